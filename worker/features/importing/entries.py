"""Import: schedules of cron, Celery beat and APScheduler as entries of a file for `apply`. Pure.

The sources are read, never executed. What cannot be taken over is a remark with its line and a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from worker.errors import DefinitionError, InvalidTrigger
from worker.model.definitions.definition import parse_definition
from worker.model.definitions.zones import parse_zone

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LONGEST_NAME = 200
_LIMITS = {RecursionError: "it nests too deeply", OverflowError: "one of its times is out of range"}


class NotTaken(ValueError):
    """The reason why an entry cannot become a definition."""


@dataclass(frozen=True, slots=True)
class Remark:
    """Something of the source that the file lacks.

    `line` is 0 if it concerns the whole source. `taken` is true if the entry itself is in the file.
    """

    line: int
    entry: str
    reason: str
    taken: bool = False

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else ""
        head = ", ".join(part for part in (place, self.entry) if part)
        text = self.reason if self.taken else f"not taken over: {self.reason}"
        return f"{head}: {text}" if head else text


@dataclass
class Import:
    """What becomes of one source: definitions in its order, and remarks.

    `zone` is the time zone of entries whose source names none. `handler` replaces the handlers of all.
    """

    org: str
    handler: str | None = None
    zone: str | None = None
    definitions: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    # Of each name, the highest number that was put behind it.
    _names: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        line: int,
        name: str,
        values: Mapping[str, Any],
        notes: Sequence[str] = (),
        *,
        label: str | None = None,
    ) -> None:
        """Add a definition with a unique name, or a remark if `apply` would refuse it.

        `label` is the entry's name in remarks, by default `name`.
        """
        shown = name if label is None else label
        entry = {"org": self.org, "name": self._unique(name)}
        entry |= {key: value for key, value in values.items() if value is not None and value != {}}
        if self.handler is not None:
            entry["handler"] = self.handler
        try:
            parse_definition(entry, "")
        except DefinitionError as error:
            self.leave(line, shown, error.message)
            return
        self._names[entry["name"]] = 1
        self.definitions.append(entry)
        self.lines.append(line)
        for note in notes:
            self.note(line, shown, note)

    @contextmanager
    def entry(self, line: int, name: str) -> Iterator[None]:
        """Remark why an entry is not taken if the block raises NotTaken."""
        try:
            yield
        except (NotTaken, RecursionError, OverflowError) as error:
            self.leave(line, name, _LIMITS.get(type(error), str(error)))

    def leave(self, line: int, name: str, reason: str) -> None:
        """Remark that an entry is not in the file."""
        self.remarks.append(Remark(line, name, reason))

    def note(self, line: int, name: str, reason: str) -> None:
        """Remark on an entry that is in the file, or on the whole source."""
        self.remarks.append(Remark(line, name, reason, taken=True))

    def note_zone(self, why: str, what: str) -> None:
        """Remark on a source that does not name the zone of some schedules."""
        self.note(0, "", f"{why}: {what} follow the org's zone, else UTC; --zone names one")

    def _unique(self, name: str) -> str:
        cleaned = "".join(letter if letter.isprintable() and letter != "/" else "-" for letter in name)
        cleaned = cleaned.strip()[: _LONGEST_NAME - 5].strip() or "imported"
        unique = cleaned
        while unique in self._names:
            self._names[cleaned] += 1
            unique = f"{cleaned}-{self._names[cleaned]}"
        return unique


def params_of(args: Any, kwargs: Any) -> tuple[dict[str, Any], list[str]]:
    """Params from a call's arguments, and notes on what they lack.

    Keyword arguments become params of the same names, positional ones a list in the param `args`.

    Raises:
        NotTaken: a value cannot be written into a file.
    """
    args, kwargs = sequence(args), mapping(kwargs)
    if args and "args" in kwargs:
        raise NotTaken("positional arguments would become the param args, which its kwargs have already")
    notes: list[str] = []
    return _table(kwargs | ({"args": list(args)} if args else {}), "params", notes), notes


def zone_of(name: str) -> ZoneInfo:
    """The zone of this name; raises NotTaken."""
    try:
        return parse_zone(name)
    except InvalidTrigger as error:
        raise NotTaken(error.message) from None


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise NotTaken for an argument that this release does not know."""
    for name in sorted(set(given) - set(known)):
        raise NotTaken(f"{name} is not supported here")


def sequence(value: Any) -> tuple[Any, ...]:
    """Positional arguments; raises NotTaken if they are not a list or a tuple."""
    if not isinstance(value, list | tuple):
        raise NotTaken("its args are not a list")
    return tuple(value)


def mapping(value: Any) -> dict[Any, Any]:
    """Keyword arguments; raises NotTaken if they are not a dict."""
    if not isinstance(value, Mapping):
        raise NotTaken("its kwargs are not a dict")
    return dict(value)


def _table(values: Mapping[Any, Any], path: str, notes: list[str]) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise NotTaken(f"{path} has a key that is not text")
        if value is None:
            notes.append(f"{path}.{key} is None and was left out: a file has no null")
        else:
            found[key] = _json(value, f"{path}.{key}", notes)
    return found


def _json(value: Any, path: str, notes: list[str]) -> Any:
    if isinstance(value, Mapping):
        return _table(value, path, notes)
    if isinstance(value, list | tuple):
        return [_json(item, f"{path}[{number}]", notes) for number, item in enumerate(value)]
    if value is None or isinstance(value, set | bytes | date | datetime | timedelta | tzinfo | range):
        raise NotTaken(f"{path} is a {type(value).__name__}, which a file cannot hold")
    return value


def to_toml(imported: Import, title: str) -> str:
    """The file for `apply`; a comment before each definition names its line in the source."""
    parts = [f"# {title}\n"]
    for line, entry in zip(imported.lines, imported.definitions, strict=True):
        keys = "".join(f"{key} = {_inline(value)}\n" for key, value in entry.items())
        parts.append(f"# line {line}\n[[definition]]\n{keys}")
    return "\n".join(parts)


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A basic string of TOML is one of JSON, but for this character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (
            f"{key if _BARE_KEY.fullmatch(key) else _inline(key)} = {_inline(inner)}"
            for key, inner in value.items()
        )
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return repr(value)
