"""What a command prints: table, json, jsonl or id on stdout; errors and hints on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Any

from worker.clock import to_text
from worker.definitions.units import format_duration
from worker.telemetry.masking import masker

Row = Mapping[str, Any]

WIDEST_CELL = 80
NOTHING = "-"


class Format(StrEnum):
    """How rows are printed: for people, for programs, or only the keys that `--after` and others take."""

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
) -> None:
    """Print a list; a table has only `columns`, JSON every key. A full page says how to go on."""
    if output is Format.JSON:
        _line(json.dumps(list(rows), default=_plain, indent=2))
    elif output is Format.JSONL:
        for row in rows:
            _line(json.dumps(row, default=_plain))
    elif output is Format.ID:
        for row in rows:
            _line(str(row[key]))
    elif not rows:
        say("none")
    else:
        for line in _table(rows, columns):
            _line(line)
        if limit is not None and len(rows) == limit:
            say(f"there may be more: --after {rows[-1][key]}")


def as_json(value: Any) -> str:
    """JSON as every command prints it, masked."""
    return masker.mask(json.dumps(value, default=_plain, indent=2))


def print_row(row: Row, output: Format, *, key: str = "id") -> None:
    """Print one thing: an object in JSON; for people a line a key, what is nested indented below."""
    if output is Format.JSON:
        _line(json.dumps(row, default=_plain, indent=2))
    elif output is Format.JSONL:
        _line(json.dumps(row, default=_plain))
    elif output is Format.ID:
        _line(str(row[key]))
    else:
        width = max(len(name) for name in row)
        for name, value in row.items():
            lines = _nested(value)
            _line(f"{name:<{width}}  {'' if lines else _cell(value)}".rstrip())
            for line in lines:
                _line(f"    {line}")


def print_log(lines: Sequence[Row], output: Format) -> None:
    """Print lines of a run's log as they come: none is shortened, and none waits for the next."""
    for line in lines:
        if output is Format.JSONL:
            _line(json.dumps(line, default=_plain))
        elif output is Format.ID:
            _line(f"{line['attempt']}.{line['seq']}")
        else:
            _line(f"{to_text(line['at'])} {line['level']:<7} {printable(line['text'])}")
    sys.stdout.flush()


def say(text: str) -> None:
    """A remark for people, on stderr, so that it never gets into what a program reads."""
    print(printable(masker.mask(text)), file=sys.stderr)


def confirmed(question: str) -> bool:
    """What the person at the terminal answers; asked on stderr, as every remark. Anything but yes is no."""
    print(printable(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_error(code: str, message: str, fix: str, output: Format) -> None:
    """An error on stderr: lines for people, one object for programs."""
    if output in (Format.JSON, Format.JSONL):
        text = json.dumps({"error": {"code": code, "message": message, "fix": fix}})
        print(masker.mask(text), file=sys.stderr)
        return
    say(f"error: {message}")
    if fix:
        say(f"fix: {fix}")


def in_words(progress: Mapping[str, Any] | None) -> str | None:
    """`3/10 pages`: how much is done, of how much, and the handler's note."""
    if progress is None:
        return None
    total, note = progress.get("total"), progress.get("note")
    done = f"{progress.get('done')}" + ("" if total is None else f"/{total}")
    return done if note is None else f"{done} {note}"


def printable(text: str) -> str:
    """The text without anything that could move a terminal's cursor or colour it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _line(text: str) -> None:
    print(text)


def _table(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    shown = [list(columns)]
    shown += [[_short(_cell(row[name])) for name in shown[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in shown
    ]


def _nested(value: Any) -> list[str]:
    """Lines for what does not fit on one: lists of rows, and mappings."""
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return _table(value, dict.fromkeys(name for entry in value for name in entry))
    if isinstance(value, Mapping) and value:
        return json.dumps(value, default=_plain, indent=2).splitlines()
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
        return json.dumps(value, default=_plain)
    return printable(str(_plain(value)))


def _short(text: str) -> str:
    return text if len(text) <= WIDEST_CELL else text[: WIDEST_CELL - 1] + "…"


def _plain(value: Any) -> Any:
    """Instants in RFC 3339 UTC, durations as in worker.toml, everything else as text."""
    if isinstance(value, datetime):
        return to_text(value)
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
