"""The log of a run in pages by key, newest first, each small enough to send at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from worker.clock import to_text
from worker.errors import NotFound
from worker.ids import RunId
from worker.store.lists import runs
from worker.store.lists.rows import LogRow
from worker.store.lists.runs import newest_lines
from worker.web.callers import Caller

Row = Mapping[str, Any]
Place = tuple[int, int]

# Lines of a page, and the characters that it shows at most: of one line, and of all.
LINES = 200
LINE = 2_000
TEXT = 120_000
# The largest number of a column.
_MAX_NUMBER = 2**31 - 1


class LogPage(NamedTuple):
    """Lines of a log, oldest first, and the places around which other pages begin, None at an end."""

    lines: Sequence[Row]
    older: str | None = None
    newer: str | None = None
    newest: str = "0.0"
    """The place of the last line, from which a stream continues."""


def page_before(connection: Connection, caller: Caller, run_id: str, before: Place | None = None) -> LogPage:
    """The newest lines, or those just before a place, as this caller sees them."""
    lines = newest_lines(connection, caller.scope(), RunId(run_id), before=before, limit=LINES + 1)
    kept = _fitting(reversed(lines), caller)[::-1]
    newest = _text(kept[-1]) if kept else "0.0"
    return LogPage(
        kept,
        older=_text(kept[0]) if len(kept) < len(lines) else None,
        newer=None if before is None else newest if kept else f"{before[0]}.{max(before[1] - 1, 0)}",
        newest=newest,
    )


def page_after(connection: Connection, caller: Caller, run_id: str, after: Place) -> LogPage:
    """The lines just after a place, as this caller sees them."""
    lines = runs.lines(connection, caller.scope(), RunId(run_id), after=after, limit=LINES + 1)
    kept = _fitting(lines, caller)
    newest = _text(kept[-1]) if kept else f"{after[0]}.{after[1]}"
    # Pages before this one end with the line `after` itself.
    older = _text(kept[0]) if kept else f"{after[0]}.{min(after[1] + 1, _MAX_NUMBER)}"
    return LogPage(kept, older, newest if len(kept) < len(lines) else None, newest)


def place_of(text: str) -> Place:
    """The place of a line, from its text `attempt.seq`; raises NotFound for another form."""
    attempt, dot, seq = text.partition(".")
    if not (dot and text.isascii() and attempt.isdecimal() and seq.isdecimal() and len(text) < 24):
        raise NotFound(
            "that is not a place in a log", fix="open the page of the run, and page back from there"
        )
    return min(int(attempt), _MAX_NUMBER), min(int(seq), _MAX_NUMBER)


def _fitting(lines: Iterable[Row], caller: Caller) -> list[Row]:
    """The first of the lines that fit on a page, each shortened, at least one."""
    kept: list[Row] = []
    room = TEXT
    for line in lines:
        text = line["text"]
        if len(text) > LINE:
            text = f"{text[:LINE]} … {len(line['text']) - LINE:,} more characters"
        room -= len(text)
        if len(kept) == LINES or (kept and room < 0):
            break
        at = line["at"]
        when = {"instant": to_text(at), "day": f"{at:%Y-%m-%d}", "clock": f"{at:%H:%M:%S}"}
        kept.append({**caller.sees(LogRow, {**line, "text": text}), **when})
    return kept


def _text(line: Row) -> str:
    return f"{line['attempt']}.{line['seq']}"
