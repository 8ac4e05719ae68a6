"""Run log writer: writes log lines and progress of running runs in batches, masked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from worker.clock import Clock
from worker.errors import Unavailable
from worker.execution.runners.output import stored_lines
from worker.ids import RunId
from worker.runs.run import AdmittedRun, LogLine
from worker.telemetry.events import emit
from worker.telemetry.masking import masker

# Seconds between flushes.
FLUSH = 0.5
# Rows of one statement, and lines kept while the database is unavailable.
BATCH = 500
MAX_LINES = 50_000

Progress = tuple[RunId, int, Mapping[str, Any]]


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
    _lines: list[LogLine] = field(default_factory=list)
    _progress: dict[RunId, Progress] = field(default_factory=dict)
    _seq: dict[tuple[RunId, int], int] = field(default_factory=dict)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def line(self, run: AdmittedRun, level: str, source: str, text: str, at: datetime | None = None) -> None:
        """Add a line, masked; one that is too long to be stored is cut after that, or becomes several."""
        key = (run.id, run.attempt)
        for part in stored_lines(source, masker.mask(text, run.org_id)):
            self._seq[key] = seq = self._seq.get(key, 0) + 1
            self._lines.append(
                LogLine(
                    run_id=run.id,
                    attempt=run.attempt,
                    seq=seq,
                    org_id=run.org_id,
                    at=at or self.clock.now(),
                    level=level,
                    source=source,
                    text=part,
                )
            )

    def progress(self, run: AdmittedRun, progress: Mapping[str, Any]) -> None:
        self._progress[run.id] = (run.id, run.fencing_token, progress)

    def ended(self, run: AdmittedRun) -> None:
        """Drop what only a running attempt needs."""
        if self._seq:
            self._seq.pop((run.id, run.attempt), None)
        if self._progress:
            self._progress.pop(run.id, None)

    async def run(self) -> None:
        while True:
            await self.clock.sleep(FLUSH)
            await self.flush()

    def has_logged(self, run: AdmittedRun) -> bool:
        """Whether this attempt has logged since it began."""
        return bool(self._seq) and (run.id, run.attempt) in self._seq

    async def flush_run(self, run: AdmittedRun) -> None:
        """Flush if this attempt has logged: its log must be complete before its end is visible."""
        if self.has_logged(run):
            await self.flush()

    async def flush(self) -> None:
        """Write everything taken so far; keep what cannot be written for the next flush."""
        async with self._writing:
            progress, self._progress = self._progress, {}
            lines, self._lines = self._lines, []
            try:
                if progress:
                    await self.store.write_progress(list(progress.values()))
                    progress = {}
                while lines:
                    await self.store.append_logs(lines[:BATCH])
                    lines = lines[BATCH:]
            except Unavailable:
                self._progress = progress | self._progress
                kept = (lines + self._lines)[-MAX_LINES:]
                if dropped := len(lines) + len(self._lines) - len(kept):
                    emit("logs.dropped", lines=dropped)
                self._lines = kept
