"""Run log: writes log lines and progress of running runs in batches, and masks all texts that a run leaves.

These are without its org's secrets and at their final size. A run's process cuts texts at 64 KiB only. They
are cut to what is stored after they are masked: a cut secret is found no longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import chain
from typing import Any, Protocol

from worker.clock import Clock
from worker.engine.runners.output import stored_lines
from worker.errors import Unavailable
from worker.handlers.calling import DETAIL_LIMIT, MESSAGE_LIMIT, TRACE_LIMIT
from worker.handlers.json_text import clean
from worker.handlers.shared_context import NOTE_LIMIT
from worker.ids import OrgId, RunId
from worker.model.runs.egress import merge
from worker.model.runs.outcome import SUCCEEDED, Cancelled, Error, Outcome, Retried, Snoozed, Trail
from worker.model.runs.run import AdmittedRun, LogLine
from worker.telemetry.events import emit
from worker.telemetry.mask_in_turn import mask_each, mask_in_turn

# Seconds between flushes.
FLUSH = 0.5
# Rows of one statement, and lines kept while the database is unavailable.
BATCH = 500
MAX_LINES = 50_000
# Characters of several lines that are masked at once.
MASKED_AT_ONCE = 64 * 1024

Progress = tuple[RunId, int, Mapping[str, Any]]
# Level, source, text and time of a line of a run, before it is masked.
_Said = tuple[AdmittedRun, str, str, str, datetime]


class RunLogStore(Protocol):
    async def write_progress(self, rows: Sequence[Progress]) -> None:
        """Set the progress of each live row whose fencing token still matches."""

    async def append_logs(self, rows: Sequence[LogLine]) -> None:
        """Append lines; skip those that are already stored."""


@dataclass(eq=False, repr=False)
class RunLogWriter:
    """Writes lines and progress twice a second; drops the oldest lines beyond `MAX_LINES`."""

    store: RunLogStore
    clock: Clock
    _said: list[_Said] = field(default_factory=list)
    # Masked lines that are not written yet.
    _lines: list[LogLine] = field(default_factory=list)
    _progress: dict[RunId, tuple[AdmittedRun, Mapping[str, Any]]] = field(default_factory=dict)
    _seq: dict[tuple[RunId, int], int] = field(default_factory=dict)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def line(self, run: AdmittedRun, level: str, source: str, text: str, at: datetime | None = None) -> None:
        """Add a line. It is masked by the next flush, and cut after that, or becomes several."""
        self._seq.setdefault((run.id, run.attempt), 0)
        self._said.append((run, level, source, text, at or self.clock.now()))

    def progress(self, run: AdmittedRun, progress: Mapping[str, Any]) -> None:
        """Set the progress of a run; its note is masked by the next flush."""
        self._progress[run.id] = (run, progress)

    def ended(self, run: AdmittedRun) -> None:
        """Drop what only a running attempt needs."""
        self._seq.pop((run.id, run.attempt), None)
        self._progress.pop(run.id, None)

    async def run(self) -> None:
        while True:
            await self.clock.sleep(FLUSH)
            await self.flush()

    async def flush_run(self, run: AdmittedRun) -> None:
        """Flush if this attempt has logged: its log must be complete before its end is visible."""
        if (run.id, run.attempt) in self._seq:
            await self.flush()

    def has_written(self, runs: Collection[RunId]) -> bool:
        """Whether no line of these runs waits."""
        waiting = chain((run.id for run, *_ in self._said), (line.run_id for line in self._lines))
        return not any(run in runs for run in waiting)

    async def flush(self) -> None:
        """Mask and write everything taken so far; keep what cannot be written for the next flush."""
        async with self._writing:
            await self._mask()
            progress, self._progress = self._progress, {}
            try:
                if progress:
                    await self.store.write_progress([await _row(*each) for each in progress.values()])
                    progress = {}
                while self._lines:
                    await self.store.append_logs(self._lines[:BATCH])
                    del self._lines[:BATCH]
            except Unavailable:
                self._progress = progress | self._progress
                if (dropped := len(self._lines) - MAX_LINES) > 0:
                    emit("logs.dropped", lines=dropped)
                    del self._lines[:dropped]
            except Exception:
                # What is not taken now is not taken later either.
                self._lines.clear()
                raise

    async def _mask(self) -> None:
        """Mask what was said so far, a little at once, in its order."""
        left = len(self._said)
        while left:
            # The rest of this turn belongs to the caller, who may have added thousands of lines.
            await asyncio.sleep(0)
            said, size = list[_Said](), 0
            for each in self._said[: min(left, BATCH)]:
                size += len(each[3])
                if said and size > MASKED_AT_ONCE:
                    break
                said.append(each)
            texts = await mask_each([(text, run.org_id) for run, _, _, text, _ in said])
            for each, text in zip(said, texts, strict=True):
                self._lines += self._stored(each, text)
            # Only now: a flush may be cancelled.
            del self._said[: len(said)]
            left -= len(said)

    def _stored(self, said: _Said, masked: str) -> Iterator[LogLine]:
        run, level, source, _, at = said
        key = (run.id, run.attempt)
        for text in stored_lines(source, masked):
            self._seq[key] = seq = self._seq.get(key, 0) + 1
            yield LogLine(run.id, run.attempt, seq, run.org_id, at, level, source, text)


async def _row(run: AdmittedRun, progress: Mapping[str, Any]) -> Progress:
    return run.id, run.fencing_token, await masked_progress(progress, run.org_id)


# What these outcomes are stored with is the handler's reason for them.
_REASONED = (Retried, Snoozed, Cancelled)
# How much more of a text is masked at first than is stored.
AHEAD = 2
CUT_BEFORE = "…\n"
# JSON text, which was refused if it is too large.
_JSON = frozenset({"result", "state"})


async def redacted(outcome: Outcome, org: OrgId) -> Outcome:
    """The same outcome with every text masked: result, detail, message, error and trace.

    All but JSON are cut to their final size.
    """
    if outcome is SUCCEEDED:
        return outcome
    changes: dict[str, str | Error] = {}
    for field_ in fields(outcome):
        value = getattr(outcome, field_.name)
        if isinstance(value, str):
            most = DETAIL_LIMIT if isinstance(outcome, _REASONED) else MESSAGE_LIMIT
            changes[field_.name] = (
                await mask_in_turn(value, org) if field_.name in _JSON else await masked_cut(value, most, org)
            )
        elif isinstance(value, Error):
            changes[field_.name] = await _redacted(value, org)
    return replace(outcome, **changes) if changes else outcome  # type: ignore[arg-type]


async def _redacted(error: Error, org: OrgId) -> Error:
    return Error(
        await masked_cut(error.type, DETAIL_LIMIT, org),
        await masked_cut(error.message, MESSAGE_LIMIT, org),
        # Its end is the most useful part.
        await masked_cut(error.trace, TRACE_LIMIT, org, _end_of),
    )


async def mask_trail(trail: Trail, org: OrgId) -> None:
    """Mask the note of the last progress, and the origins: a handler may ask for a host named by a secret."""
    if trail.progress is not None:
        trail.progress = await masked_progress(trail.progress, org)
    if trail.egress:
        texts = [(text, org) for row in trail.egress for text in (row.origin, row.reason)]
        masked = await mask_each(texts)
        trail.egress = merge(
            replace(row, origin=origin, reason=reason)
            for row, origin, reason in zip(trail.egress, masked[::2], masked[1::2], strict=True)
        )


async def masked_progress(progress: Mapping[str, Any], org: OrgId) -> Mapping[str, Any]:
    """A run's progress with its note masked and at its final size."""
    note = progress["note"]
    return progress if note is None else {**progress, "note": await masked_cut(note, NOTE_LIMIT, org)}


def _end_of(text: str, most: int) -> str:
    return text if len(text) <= most + len(CUT_BEFORE) else CUT_BEFORE + text[-most:]


async def masked_cut(text: str, most: int, org: OrgId, cut: Callable[[str, int], str] = clean) -> str:
    """A text, masked, then cut to `most` characters."""
    # Mostly this part has no secret, and is short enough to be masked at once.
    part = cut(text, most * AHEAD)
    masked = await mask_in_turn(part, org)
    if masked != part and len(part) < len(text):
        masked = await mask_in_turn(text, org)
    return cut(masked, most)
