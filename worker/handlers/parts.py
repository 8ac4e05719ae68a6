"""Parts: the kinds of values of which calls are made.

Each writes its value as JSON, and reads it again from a process or a host that is not trusted: what does not
fit raises one of `MALFORMED`. A part also says which texts of a value are masked, and which names may not
contain a secret.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from datetime import datetime, timedelta
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from worker.clock import from_text, to_text
from worker.handlers.json_text import check_json_text, clean
from worker.handlers.results import as_timedelta
from worker.handlers.steps import StepError, check_key, check_name
from worker.model.definitions.budgets import RESERVED_METERS

V = TypeVar("V")

# Checks JSON text: gets the text, its name and its limit in bytes. Raises NotStorable, now or later.
TextCheck = Callable[[str, str, int], None]
# The masked form of a text.
Masked = Callable[[str], str]


class CallPart(ABC, Generic[V]):
    """A kind of value. The base writes a value as it is, and names and masks nothing."""

    def write(self, value: V) -> Any:
        """The value as JSON."""
        return value

    @abstractmethod
    def read(self, value: Any, check: TextCheck) -> V:
        """The value of JSON that is not trusted. Raises one of `MALFORMED`, or StepError."""

    def names(self, value: V) -> Iterator[tuple[str, str]]:
        """What it names, and the name, which is refused if it contains a secret."""
        return iter(())

    def texts(self, value: V) -> Iterator[str]:
        """The texts that are stored masked."""
        return iter(())

    def masked(self, value: V, mask: Masked) -> V:
        """The value with its texts masked."""
        return value

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        """Where a message has JSON text, which takes long to check."""
        return iter(())


class Truth(CallPart[bool]):
    """True, or anything else for False."""

    def read(self, value: Any, check: TextCheck) -> bool:
        return value is True


@dataclass(frozen=True)
class Count(CallPart[int]):
    """A whole number from `least` to `most`."""

    most: int
    least: int = 0

    def read(self, value: Any, check: TextCheck) -> int:
        if type(value) is not int or not self.least <= value <= self.most:
            raise ValueError(f"not a whole number from {self.least} to {self.most}")
        return value


@dataclass(frozen=True)
class OneOf(CallPart[Any]):
    """One of these values."""

    values: Sequence[Any]

    def read(self, value: Any, check: TextCheck) -> Any:
        if value not in self.values:
            raise ValueError("not one of the known values")
        return value


@dataclass(frozen=True)
class Name(CallPart[str]):
    """The name of a step, wait or meter."""

    what: str

    def read(self, value: Any, check: TextCheck) -> str:
        return check_name(self.what, value)

    def names(self, value: str) -> Iterator[tuple[str, str]]:
        yield self.what, value


class Meter(Name):
    """The name of a meter of handlers."""

    def read(self, value: Any, check: TextCheck) -> str:
        if isinstance(value, str) and value in RESERVED_METERS:
            raise ValueError("orgworker counts this meter itself")
        return super().read(value, check)


@dataclass(frozen=True)
class KeyText(CallPart[str]):
    """The key of a step."""

    what: str

    def read(self, value: Any, check: TextCheck) -> str:
        if not isinstance(value, str):
            raise TypeError("not a text")
        return check_key(self.what, value)

    def names(self, value: str) -> Iterator[tuple[str, str]]:
        yield f"the key of a {self.what}", value


class When(CallPart[datetime]):
    """An aware time, as text."""

    def write(self, value: datetime) -> str:
        return to_text(value)

    def read(self, value: Any, check: TextCheck) -> datetime:
        return from_text(value)


class Seconds(CallPart[float]):
    """A duration in seconds of at most the longest that a handler may name."""

    def read(self, value: Any, check: TextCheck) -> float:
        return as_timedelta(float(value)).total_seconds()


class TimeSpan(CallPart[timedelta]):
    """A duration as long as a handler may name, in seconds."""

    def write(self, value: timedelta) -> float:
        return value.total_seconds()

    def read(self, value: Any, check: TextCheck) -> timedelta:
        return as_timedelta(float(value))


class Number(CallPart[float]):
    """A finite number."""

    def read(self, value: Any, check: TextCheck) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("not a finite number")
        return value


@dataclass(frozen=True)
class Text(CallPart[str]):
    """Text for people, cut to `most` characters."""

    most: int

    def read(self, value: Any, check: TextCheck) -> str:
        if not isinstance(value, str):
            raise TypeError("not a text")
        return clean(value, self.most)


@dataclass(frozen=True)
class JsonText(CallPart[str]):
    """JSON text of at most `most` bytes, which is stored masked. Long text is checked later."""

    what: str
    most: int

    def read(self, value: Any, check: TextCheck) -> str:
        if not isinstance(value, str):
            raise TypeError("not a text")
        check(value, self.what, self.most)
        return value

    def texts(self, value: str) -> Iterator[str]:
        yield value

    def masked(self, value: str, mask: Masked) -> str:
        return mask(value)

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        yield ()


@dataclass(frozen=True)
class Maybe(CallPart[V | None]):
    """The value of a part, or None."""

    part: CallPart[V]

    def write(self, value: V | None) -> Any:
        return None if value is None else self.part.write(value)

    def read(self, value: Any, check: TextCheck) -> V | None:
        return None if value is None else self.part.read(value, check)

    def names(self, value: V | None) -> Iterator[tuple[str, str]]:
        return iter(()) if value is None else self.part.names(value)

    def texts(self, value: V | None) -> Iterator[str]:
        return iter(()) if value is None else self.part.texts(value)

    def masked(self, value: V | None, mask: Masked) -> V | None:
        return None if value is None else self.part.masked(value, mask)

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return self.part.json_paths()


@dataclass(frozen=True)
class Several(CallPart[tuple[V, ...]]):
    """At most `most` values of a part."""

    part: CallPart[V]
    most: int

    def write(self, value: Iterable[V]) -> list[Any]:
        return [self.part.write(each) for each in value]

    def read(self, value: Any, check: TextCheck) -> tuple[V, ...]:
        if not isinstance(value, list) or len(value) > self.most:
            raise ValueError(f"not a list of at most {self.most}")
        return tuple(self.part.read(each, check) for each in value)

    def names(self, value: Iterable[V]) -> Iterator[tuple[str, str]]:
        for each in value:
            yield from self.part.names(each)

    def texts(self, value: Iterable[V]) -> Iterator[str]:
        for each in value:
            yield from self.part.texts(each)

    def masked(self, value: Iterable[V], mask: Masked) -> tuple[V, ...]:
        return tuple(self.part.masked(each, mask) for each in value)


class Together(CallPart[tuple[Any, ...]]):
    """A list of fixed length, each value of its own part."""

    def __init__(self, *parts: CallPart[Any]) -> None:
        self._parts = parts

    def write(self, value: Sequence[Any]) -> list[Any]:
        return [part.write(each) for part, each in zip(self._parts, value, strict=True)]

    def read(self, value: Any, check: TextCheck) -> tuple[Any, ...]:
        return tuple(part.read(each, check) for part, each in zip(self._parts, value, strict=True))

    def names(self, value: Sequence[Any]) -> Iterator[tuple[str, str]]:
        for part, each in zip(self._parts, value, strict=True):
            yield from part.names(each)


class Row(CallPart[V]):
    """An object of a dataclass, with a part for each of its fields. A missing key takes the field's default.

    `lean` are keys that are left out while they have the default: a release that does not know them can
    read the others. `then` checks what no field says alone; it raises one of `MALFORMED`.
    """

    def __init__(
        self,
        kind: type[V],
        parts: Mapping[str, CallPart[Any]],
        *,
        lean: Sequence[str] = (),
        then: Callable[[V], object] | None = None,
    ) -> None:
        known: dict[str, Any] = {
            field.name: field.default_factory if field.default is MISSING else field.default
            for field in fields(kind)  # type: ignore[arg-type]
        }
        self._kind: Callable[..., V] = kind
        self._fields = [(name, part, known[name]) for name, part in parts.items()]
        self._lean = [(name, known[name]) for name in lean]
        self._then = then
        nothing = CallPart[Any]
        # What is not written as it is.
        self._written = [each for each in self._fields if type(each[1]).write is not nothing.write]
        self._names = [name for name, _, _ in self._fields]
        self._named = [each for each in self._fields if type(each[1]).names is not nothing.names]
        self._texts = [each for each in self._fields if type(each[1]).texts is not nothing.texts]

    def write(self, value: V) -> dict[str, Any]:
        message = {name: getattr(value, name) for name in self._names}
        for name, part, _ in self._written:
            message[name] = part.write(message[name])
        for name, default in self._lean:
            if getattr(value, name) == default:
                del message[name]
        return message

    def read(self, value: Any, check: TextCheck = check_json_text, **others: Any) -> V:
        """The object of a message, of which other keys are ignored; `others` are fields without a part."""
        given = {}
        for name, part, default in self._fields:
            if name in value:
                try:
                    given[name] = part.read(value[name], check)
                except (TypeError, ValueError, StepError) as error:
                    raise ValueError(f"{name}: {error}") from error
            elif default is MISSING:
                raise KeyError(name)
        found = self._kind(**given, **others)
        if self._then is not None:
            self._then(found)
        return found

    def names(self, value: V) -> Iterator[tuple[str, str]]:
        for name, part, _ in self._named:
            yield from part.names(getattr(value, name))

    def texts(self, value: V) -> Iterator[str]:
        for name, part, _ in self._texts:
            yield from part.texts(getattr(value, name))

    def masked(self, value: V, mask: Masked) -> V:
        changed = {name: part.masked(getattr(value, name), mask) for name, part, _ in self._texts}
        return replace(value, **changed) if changed else value  # type: ignore[type-var]

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return ((name, *path) for name, part, _ in self._fields for path in part.json_paths())


def row_of(kind: type[V], **options: Any) -> Row[V]:
    """The row of a dataclass whose annotations name the parts: `name: Annotated[str, Name("step")]`."""
    parts = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            parts[name] = next(each for each in get_args(hint) if isinstance(each, CallPart))
    return Row(kind, parts, **options)


class AsItIs(CallPart[Any]):
    """A value that JSON has, of a side that is trusted."""

    def read(self, value: Any, check: TextCheck) -> Any:
        return value


@dataclass(frozen=True)
class Those(CallPart[Any]):
    """Values of a side that is trusted, by name or in a collection of this kind; sets are sorted."""

    kind: type[Any]
    part: CallPart[Any]

    def write(self, value: Any) -> Any:
        if self.kind is dict:
            return {name: self.part.write(each) for name, each in value.items()}
        return [self.part.write(each) for each in (sorted(value) if self.kind is frozenset else value)]

    def read(self, value: Any, check: TextCheck) -> Any:
        if self.kind is dict:
            return {name: self.part.read(each, check) for name, each in value.items()}
        return self.kind(self.part.read(each, check) for each in value)


def trusted(kind: type[V], without: Collection[str] = (), *, lean: Sequence[str] = ()) -> Row[V]:
    """The row of a dataclass that a trusted side writes; the parts follow from the types of its fields.

    It leaves out fields with the metadata `{"sent": False}`.
    """
    hints = get_type_hints(kind)
    unsent = {each.name for each in fields(kind) if not each.metadata.get("sent", True)}  # type: ignore[arg-type]
    sent = [name for name in hints if name not in without and name not in unsent]
    return Row(kind, {name: _trusted_part(hints[name]) for name in sent}, lean=lean)


def _trusted_part(hint: Any) -> CallPart[Any]:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if NoneType in arguments:
        part = _trusted_part(next(each for each in arguments if each is not NoneType))
        return part if isinstance(part, AsItIs) else Maybe(part)
    if kind in (tuple, frozenset):
        return Those(kind, _trusted_part(arguments[0]))
    if kind is Mapping:
        return Those(dict, _trusted_part(arguments[1]))
    if is_dataclass(kind):
        return trusted(kind)  # type: ignore[arg-type]
    return When() if kind is datetime else TimeSpan() if kind is timedelta else AsItIs()
