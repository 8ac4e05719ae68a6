"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.clock import Clock
from worker.errors import UsageError
from worker.kit.completion import names, states
from worker.model.definitions.units import parse_duration, parse_time, plain_json

if TYPE_CHECKING:
    from worker.model.search import Query
    from worker.store.names import Kind


def option(words: str, about: str, of: Kind | None = None, **more: Any) -> Any:
    """An option: its names and the word for its value, as in `--query -q TEXT`, and its help.

    `of` says whose names a shell offers.
    """
    flags = [word for word in words.split() if word.startswith("-")]
    metavar = next((word for word in words.split() if word not in flags), None)
    declared: Callable[..., Any] = typer.Option
    return declared(*flags, metavar=metavar, help=about, **_offered(of), **more)


def argument(word: str, about: str, of: Kind | None = None) -> Any:
    """An argument: the word for its value, and its help; `of` as for an option."""
    return typer.Argument(metavar=word, help=about, **_offered(of))


def _offered(of: Kind | None) -> dict[str, Any]:
    return {} if of is None else {"autocompletion": names(of)}


OrgArgument = Annotated[str, argument("ORG", "The org's code, as in its tokens.", of="org")]
OrgOption = Annotated[str | None, option("--org ORG", "Only this org's.", of="org")]
DefinitionOption = Annotated[
    str | None, option("--definition NAME", "Only those of definitions with this name.", of="definition")
]
StateOption = Annotated[
    str | None,
    option(
        "--state STATE",
        "Only those in this state, or in one of several: failed,refused.",
        autocompletion=states,
    ),
]
SinceOption = Annotated[
    str | None,
    option(
        "--since WHEN",
        "Only those since then: 2h, 1d (ago), yesterday, monday, 2027-01-01 or 2027-01-01T08:00 (UTC).",
    ),
]
QueryOption = Annotated[
    str | None, option("--query -q TEXT", "Only those that match a search: 'acme state:failed since:2h'.")
]
PoolOption = Annotated[str | None, option("--pool POOL", "Only those of this pool.")]
FromOption = Annotated[str, option("--from T", "First time: 2027-01-01T08:00:00Z, 2d (ago).")]
UntilOption = Annotated[str, option("--until T", "End of the range, itself excluded; not in the future.")]
LimitOption = Annotated[int, option("--limit N", "At most N rows, up to 1000.")]
AfterOption = Annotated[str | None, option("--after ID", "Continue the list after this row.")]
NoteOption = Annotated[str | None, option("--note", "The reason; shown with the state.")]
YesOption = Annotated[bool, option("--yes", "Skip confirmation (the default when stdin is not a terminal).")]
FileArgument = Annotated[str, argument("FILE|-", "A file, or - for standard input.")]

IssuerOption = Annotated[
    str | None, option("--issuer NAME", "A table [issuers.NAME] (default: the only one).")
]

# How numbers, quoted strings, lists and objects begin.
_JSON_STARTS = ('"', "[", "{", "-", *"0123456789")


def read_since(text: str | None, clock: Clock) -> datetime | None:
    """The value of `--since`, if given."""
    return None if text is None else parse_time(text, clock, name="--since")


def read_query(text: str | None, clock: Clock) -> Query | None:
    """The value of `--query`, if given; raises UsageError."""
    if text is None:
        return None
    from worker.model.search import parsed

    return parsed(text, now=clock.now())


def read_pool(query: Query | None, pool: str | None) -> Query | None:
    """The search narrowed to the value of `--pool`, if given; raises UsageError."""
    if pool is None:
        return query
    from worker.model.search import of_pool

    return of_pool(query, pool)


def read_duration(text: str, option: str) -> timedelta:
    """A duration such as 30s or 2h; raises UsageError."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}", fix="such as 30s, 15m or 2h") from None


def read_pairs(pairs: Iterable[str], *, option: str) -> dict[str, Any]:
    """A mapping from `k=v` texts; each value is parsed as JSON if possible, else kept as text.

    Raises:
        UsageError: one has no `=`, no name, or a value that is nested too deeply.
    """
    return {name: _value(value, option, name) for name, value in split_pairs(pairs, option=option).items()}


def read_json(text: str, *, option: str) -> Any:
    """A JSON value of an option; raises UsageError."""
    try:
        return plain_json(text)
    except RecursionError:
        raise UsageError(f"{option} is nested too deeply", fix="nest lists and objects less") from None
    except ValueError as error:
        raise UsageError(f"{option} is not JSON: {error}", fix="such as '{\"cursor\": 5}'") from None


def split_pairs(pairs: Iterable[str], *, option: str) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping; raises UsageError if one lacks the `=` or the name."""
    typed: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(
                f"{option} {pair!r} is not NAME=VALUE", fix='such as limit=10 or name="two words"'
            )
        typed[name] = value
    return typed


def _value(text: str, option: str, name: str) -> Any:
    if text in ("true", "false", "null") or text.startswith(_JSON_STARTS):
        try:
            return plain_json(text)
        except RecursionError:
            raise UsageError(
                f"{option} {name} is nested too deeply", fix="nest lists and objects less"
            ) from None
        except ValueError:
            return text
    return text


def read_text(path: str) -> str:
    """A file's text, or standard input's for `-`; raises UsageError."""
    try:
        if path == "-":
            return typer.get_binary_stream("stdin").read().decode("utf-8")
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", fix="name a file, or - for standard input"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not UTF-8 text", fix="check that it is the right file, or save it as UTF-8"
        ) from None
