"""Output: tables, JSON or ids on stdout, with the cells of `runs list`; errors and hints on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.clock import SystemClock, to_text
from worker.ids import ALL_ORGS, short_ids
from worker.model.definitions.budgets import MONEY
from worker.model.definitions.units import json_default
from worker.model.money import money_text
from worker.model.runs.clauses import listed
from worker.model.runs.traces import trimmed
from worker.model.runs.worker_ends import SOURCE
from worker.telemetry.masking import masker

if TYPE_CHECKING:
    from worker.store.lists.rows import Run

Row = Mapping[str, Any]
# What columns of a table, or keys of a row, show for people.
Cells = Mapping[str, Callable[[Any], Any]]

MODULE = "python -m worker"
SCRIPT = "orgworker"
# Set by config/orgworker: where the worker is a service, a slip must not start another one.
REQUIRE_COMMAND = "ORGWORKER_REQUIRE_COMMAND"
WIDEST_CELL = 80
_TRACE = "Traceback (most recent call last):"
NOTHING = "-"
# A terminal of this width has room for whole ids and times.
WIDE = 130


class Format(StrEnum):
    """The format of rows: for people, for programs, or only the ids that other commands take."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    ID = "id"


def print_rows(
    rows: Sequence[Row],
    output: Format,
    *,
    columns: Sequence[str],
    key: str = "id",
    limit: int | None = None,
    titles: bool = False,
    cells: Cells | None = None,
    short: bool = False,
) -> None:
    """Print a list. A table has only `columns`, JSON every key. For a full page, mention --after.

    A table fits the terminal, with its states in colour. With `titles` the names of its columns
    are in capitals. `cells` computes columns of the table from a row. With `short` a narrow
    terminal gets short ids.
    """
    rows = [_with_commands(row) for row in rows]
    if output is not Format.TABLE:
        _print_for_programs(rows, rows, output, key)
    elif not rows:
        say("none")
    else:
        shown = [{**row, **{name: cell(row) for name, cell in (cells or {}).items()}} for row in rows]
        if short and _is_narrow():
            ids = short_ids(row["id"] for row in rows)
            shown = [{**row, "id": ids[row["id"]]} for row in shown]
        for line in _table(shown, columns, width=terminal_width(), colour=has_colour(), titles=titles):
            print(line)
        if limit is not None and len(rows) == limit:
            say(f"there may be more: --after {rows[-1][key]}")


def as_json(value: Any) -> str:
    """JSON as every command prints it, masked."""
    return masker.mask(json.dumps(value, default=json_default, indent=2), ALL_ORGS)


def print_row(
    row: Row, output: Format, *, key: str = "id", verbatim: bool = False, cells: Cells | None = None
) -> None:
    """Print one row: an object in JSON; for people a line for each key, with nested values indented.

    `verbatim` is for data of a handler, whose keys mean nothing here. `cells` as for `print_rows`.
    """
    if not verbatim:
        row = _with_commands(row)
    if output is not Format.TABLE:
        _print_for_programs(row, [row], output, key)
        return
    row = dict(row) | {name: cell(row) for name, cell in (cells or {}).items() if name in row}
    width = max(len(name) for name in row)
    for name, value in row.items():
        lines = _nested(value)
        print(f"{name:<{width}}  {'' if lines else _cell(value)}".rstrip())
        for line in lines:
            print(f"    {line}")


class Lines(tuple[str, ...]):
    """A value of `print_row` that is printed as these lines."""


def in_lines(error: Mapping[str, Any] | None) -> Lines | None:
    """An error for people: type and message, and its trace without the frames of libraries."""
    if error is None:
        return None
    # A trace ends with type and message.
    text = trimmed(error["trace"]) if error.get("trace") else f"{error['type']}: {error['message']}"
    return Lines(map(printable, text.splitlines()))


def print_log(lines: Sequence[Row], output: Format) -> None:
    """Print log lines in full, at once; for people, the frames of libraries in a trace are only counted.

    A trace is indented, so that no line of it can pass for another one of the log.
    """
    for line in lines:
        if output is Format.JSONL:
            print(json.dumps(line, default=json_default))
        elif output is Format.ID:
            print(f"{line['attempt']}.{line['seq']}")
        else:
            text = line["text"]
            shown = trimmed(text).splitlines() if _TRACE in text else [text]
            # What a worker says of the attempt, no handler can print.
            level = SOURCE if line["source"] == SOURCE else line["level"]
            print(f"{to_text(line['at'])} {level:<7} {printable(shown[0])}")
            for more in shown[1:]:
                print(f"    {printable(more)}")
    sys.stdout.flush()


def _print_for_programs(document: Any, rows: Sequence[Row], output: Format, key: str) -> None:
    """Print the document as JSON, or each row as a line of JSON or by its key."""
    if output is Format.JSON:
        print(json.dumps(document, default=json_default, indent=2))
        return
    for row in rows:
        print(json.dumps(row, default=json_default) if output is Format.JSONL else str(row[key]))


def say(text: str) -> None:
    """Print a message for people on stderr, away from what programs read."""
    print(printable(masker.mask(as_called(text), ALL_ORGS)), file=sys.stderr)


def as_called(text: str) -> str:
    """A text with the commands in it named as the person calls them: `orgworker` if this process is it."""
    if Path(sys.argv[0]).name == SCRIPT or REQUIRE_COMMAND in os.environ:
        return text.replace(f"{MODULE} ", f"{SCRIPT} ")
    return text


def _with_commands(row: Row) -> Row:
    """The row with `as_called` applied to its `fix`, and to those of its `diagnostics`."""
    changed: dict[str, Any] = {}
    if isinstance(row.get("fix"), str):
        changed["fix"] = as_called(row["fix"])
    if isinstance(row.get("diagnostics"), list):
        changed["diagnostics"] = [_with_commands(each) for each in row["diagnostics"]]
    return {**row, **changed} if changed else row


def is_refused(question: str) -> bool:
    """Whether the person at the terminal, if there is one, answers anything but yes; then nothing changes."""
    if not sys.stdin.isatty():
        return False
    print(printable(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return False
    say("nothing was changed")
    return True


def print_error(
    code: str,
    message: str,
    fix: str,
    output: Format,
    others: Sequence[Mapping[str, str]] = (),
    candidates: Sequence[Row] = (),
) -> None:
    """Print an error on stderr: lines for people, one object for programs.

    `others` of a file follow it. `candidates` are the runs that it is about.
    """
    error = {"code": code, "message": as_called(message), "fix": as_called(fix)}
    if output in (Format.JSON, Format.JSONL):
        more = {"others": [*map(_with_commands, others)], "candidates": candidates}
        text = json.dumps(
            {"error": error | {name: rows for name, rows in more.items() if rows}}, default=json_default
        )
        print(masker.mask(text, ALL_ORGS), file=sys.stderr)
        return
    ids = short_ids(row["id"] for row in candidates)
    for each in (error, *others):
        say(f"error: {each['message']}")
        for line in _table([{**row, "id": ids[row["id"]]} for row in candidates], CANDIDATE)[1:]:
            say(f"    {line}")
        if each["fix"]:
            say(f"fix: {each['fix']}")


# The columns of a run that an error may be about.
CANDIDATE = ("id", "org", "definition", "scheduled_for")


def in_words(progress: Mapping[str, Any] | None) -> str | None:
    """`3/10 pages`: progress, total and the handler's note."""
    if progress is None:
        return None
    total, note = progress.get("total"), progress.get("note")
    done = f"{progress.get('done')}" + ("" if total is None else f"/{total}")
    return done if note is None else f"{done} {note}"


def printable(text: str) -> str:
    """The text without characters that could control a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def terminal_width() -> int | None:
    """The columns of the terminal; None in a pipe, where tables have their full width."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# People copy or compare these cells: they are not cut.
_WHOLE = frozenset({"id", "run", "retry_of", "state", "took", "attempt", "revision", "scheduled_for"})
# The width that every column keeps.
_LEAST = 6
_COLOURS = {
    **dict.fromkeys(("failed", "refused", "removed"), "31"),
    **dict.fromkeys(("succeeded", "active", "done"), "32"),
    **dict.fromkeys(("waiting", "paused", "suspended", "retired"), "33"),
    "running": "36",
    **dict.fromkeys(("cancelled", "skipped", "closed", "disabled"), "2"),
}


def _table(
    rows: Sequence[Row],
    columns: Iterable[str],
    *,
    width: int | None = None,
    colour: bool = False,
    titles: bool = False,
) -> list[str]:
    names = list(columns)
    shown = [[name.upper() if titles else name for name in names]]
    shown += [[_short(_cell(row[name])) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    if width is not None:
        _shrink(widths, names, width)
    lines = []
    for number, line in enumerate(shown):
        cells = []
        for name, cell, most in zip(names, line, widths, strict=True):
            text = f"{_short(cell, most):<{most}}"
            paint = _COLOURS.get(cell) if colour and number and name == "state" else None
            cells.append(text if paint is None else f"\x1b[{paint}m{text}\x1b[0m")
        lines.append("  ".join(cells).rstrip())
    return lines


def _shrink(widths: list[int], names: Sequence[str], width: int) -> None:
    """Narrow the widest columns until the table fits, or no column can be narrower."""
    places = [place for place, name in enumerate(names) if name not in _WHOLE]
    for _ in range(sum(widths) + 2 * (len(widths) - 1) - width):
        widest = max(places, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _LEAST:
            return
        widths[widest] -= 1


def _nested(value: Any) -> list[str]:
    """Lines for values that do not fit on one: lists of rows, and mappings."""
    if isinstance(value, Lines):
        return list(value)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return _table(value, dict.fromkeys(name for entry in value for name in entry))
    if isinstance(value, Mapping) and value:
        return json.dumps(value, default=json_default, indent=2).splitlines()
    return []


def _cell(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return to_text(value)[:19] + "Z"
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return printable(", ".join(value))
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value, default=json_default)
    return printable(str(json_default(value)))


def _short(text: str, most: int = WIDEST_CELL) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _is_narrow() -> bool:
    width = terminal_width()
    return width is not None and width < WIDE


def _scheduled_for(row: Run) -> str:
    text = to_text(row["scheduled_for"])
    return f"{text[5:10]} {text[11:16]}Z" if _is_narrow() else f"{text[:19]}Z"


def _took(row: Run) -> str | None:
    """How long its last attempt took, or has been running."""
    if row["started_at"] is None:
        return None
    return took((row["finished_at"] or SystemClock().now()) - row["started_at"])


def took(time: timedelta) -> str:
    """A duration in its two largest units: `0.4s`, `12s`, `3m10s`, `2h05m` or `1d02h`."""
    seconds = max(time.total_seconds(), 0)
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if not minutes:
        return f"{rest}s"
    if not hours:
        return f"{minutes}m{rest:02}s"
    return f"{hours}h{minutes_left:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def why(row: Run) -> str | None:
    """Its cause, as `runs why` says first, its progress, and that it was retried."""
    retried = "retried" if row["retried_as"] is not None else None
    return ", ".join(filter(None, (retried, listed(row)))) or None


def _amount(name: str) -> Callable[[Mapping[str, Any]], Any]:
    def cell(row: Mapping[str, Any]) -> Any:
        value = row.get(name)
        return money_text(value) if row["meter"] == MONEY and isinstance(value, int) else value

    return cell


# Cells of rows with a meter: money is in nano-units.
AMOUNTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    name: _amount(name) for name in ("limit", "used", "left", "amount")
}


def amounts(spends: Mapping[str, int]) -> dict[str, Any]:
    """What was spent by meter, for people."""
    return {meter: money_text(spent) if meter == MONEY else spent for meter, spent in spends.items()}


RUN_CELLS: Mapping[str, Callable[[Run], Any]] = {
    "scheduled_for": _scheduled_for,
    "took": _took,
    "why": why,
}
