"""Masked texts: what a run leaves, without its org's secrets and at its final size.

A run's process cuts texts at 64 KiB only. They are cut to what is stored after they are masked: a cut
secret is found no longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from worker.handlers.calling import DETAIL_LIMIT, MESSAGE_LIMIT, TRACE_LIMIT
from worker.handlers.context import NOTE_LIMIT
from worker.handlers.json_text import clean
from worker.ids import OrgId
from worker.runs.outcome import SUCCEEDED, Cancelled, Error, Outcome, Retried, Snoozed, Trail
from worker.telemetry.mask_in_turn import mask_in_turn

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
                await mask_in_turn(value, org)
                if field_.name in _JSON
                else await masked_start(value, most, org)
            )
        elif isinstance(value, Error):
            changes[field_.name] = await _redacted(value, org)
    return replace(outcome, **changes) if changes else outcome  # type: ignore[arg-type]


async def _redacted(error: Error, org: OrgId) -> Error:
    return Error(
        await masked_start(error.type, DETAIL_LIMIT, org),
        await masked_start(error.message, MESSAGE_LIMIT, org),
        await _masked_end(error.trace, TRACE_LIMIT, org),
    )


async def mask_trail(trail: Trail, org: OrgId) -> None:
    """Mask the note of the last progress."""
    if trail.progress is not None:
        trail.progress = await masked_progress(trail.progress, org)


async def masked_progress(progress: Mapping[str, Any], org: OrgId) -> Mapping[str, Any]:
    """A run's progress with its note masked and at its final size."""
    note = progress["note"]
    return progress if note is None else {**progress, "note": await masked_start(note, NOTE_LIMIT, org)}


async def masked_start(text: str, most: int, org: OrgId) -> str:
    """A text, masked, then cut to `most` characters."""
    # Mostly this part has no secret, and is short enough to be masked at once.
    part = clean(text, most * AHEAD)
    masked = await mask_in_turn(part, org)
    if masked != part and len(part) < len(text):
        masked = await mask_in_turn(text, org)
    return clean(masked, most)


async def _masked_end(text: str, most: int, org: OrgId) -> str:
    """The end of a text, which is the most useful part of a trace, masked and cut as `masked_start`."""
    part = _end_of(text, most * AHEAD)
    masked = await mask_in_turn(part, org)
    if masked != part and len(part) < len(text):
        masked = await mask_in_turn(text, org)
    return _end_of(masked, most)


def _end_of(text: str, most: int) -> str:
    return text if len(text) <= most + len(CUT_BEFORE) else CUT_BEFORE + text[-most:]
