"""The search language of console, API and command line: `acme state:failed since:yesterday`. Pure.

A bare word matches the beginning of a word of an org's name or code, or of a word that a run has (of its
error, its definition or its handler), or a run's id as `worker.ids.given_id` takes it. `key:value` narrows
further; a value with spaces is quoted. `worker.store.lists.search` finds the rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, tzinfo
from difflib import get_close_matches
from typing import Any, NamedTuple

from worker.errors import UsageError
from worker.ids import given_id
from worker.model.definitions.units import time_of
from worker.model.runs.causes import CAUSES

STATES = tuple(dict.fromkeys(state for state, _ in CAUSES))
"""Every state of a run."""
REASONS = tuple(dict.fromkeys(reason for _, reason in CAUSES if reason is not None))
"""Every reason of a run."""
ORIGINS = ("schedule", "manual", "backfill", "retry", "child")

KEYS: Mapping[str, str] = {
    "org": "an org's code, or the beginnings of words of its name",
    "state": "one or more of " + ", ".join(STATES) + ", separated by commas",
    "since": "runs made since then: 2h, 1d (ago), today, yesterday, monday, 2027-01-01, 2027-01-01T08:00",
    "until": "runs made before then, in the same forms",
    "handler": "the handler's name",
    "definition": "the definition's name",
    "cause": "a part of the error's cause",
    "reason": "the reason that `runs list` shows",
    "origin": "one of " + ", ".join(ORIGINS),
    "pool": "the pool of the run",
    "worker": "the machine of the worker or host that runs it or ended it, or an end of that worker's id",
    "revision": "the number of the definition's revision",
    "parent": "the whole id of a run: those that it started",
    "children": "yes: also runs that other runs started",
}
"""The keys, and what their values are."""
KEYS_OF_ORGS: Mapping[str, str] = {key: meaning for key, meaning in KEYS.items() if key != "worker"}
"""The keys for an org, which does not see workers."""

MAX_TEXT = 500
MAX_WORDS = 8
MAX_WORD = 64
"""Longer words of a name are cut, since no one types more."""
_TOKEN = re.compile(r'([A-Za-z_]+):(?=\s|$)|(?:([A-Za-z_]+):)?(?:"([^"]*)"|([^\s"]+))(?=\s|$)')


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for; every part must match."""

    words: tuple[str, ...] = ()
    org: str | None = None
    states: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None
    handler: str | None = None
    definition: str | None = None
    cause: str | None = None
    reason: str | None = None
    origin: str | None = None
    pool: str | None = None
    worker: str | None = None
    revision: int | None = None
    parent: str | None = None
    children: bool = False

    @property
    def has_children(self) -> bool:
        """Whether it finds runs that other runs started."""
        return self.children or self.parent is not None or self.origin == "child"

    @property
    def is_of_runs(self) -> bool:
        """Whether a key narrows the runs, and not only their org."""
        return any(getattr(self, name) for name in KEYS if name not in ("org", "state")) or bool(self.states)


def parsed(text: str, *, now: datetime, zone: tzinfo = UTC, keys: Mapping[str, str] = KEYS) -> Query:
    """The query of a text; days and times without an offset are in `zone`. It has no keys but `keys`.

    Raises:
        UsageError: an unknown key, state, reason or origin, each with the nearest known one; a key
            that is given twice or without a value; an open quote; or a text that is too long.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"the search has more than {MAX_TEXT} characters", fix="search for less")
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        raise UsageError("the search has a character that is not printable", fix="remove it")
    words: list[str] = []
    given: dict[str, str] = {}
    for key, value, _ in _tokens(text):
        if key is None:
            words += value.split()
        elif key not in keys:
            raise UsageError(
                f"the search has no key {key}:",
                fix=f"{hint_of(key, keys)}the keys are {', '.join(keys)}; quote a word that has a colon",
            )
        elif key in given:
            raise UsageError(f"the search has {key}: twice", fix="give each key once")
        elif not value.strip():
            raise UsageError(f"{key}: has no value", fix=f"it is {KEYS[key]}")
        else:
            given[key] = value.strip()
    if len(words) > MAX_WORDS:
        raise UsageError(f"the search has more than {MAX_WORDS} words", fix="search for fewer")
    for key, known, what in (("reason", REASONS, "a reason"), ("origin", ORIGINS, "an origin")):
        if key in given:
            _check(given[key], known, f"{what} of a run")
    read: dict[str, Any] = dict(given)
    states = frozenset(states_of(read.pop("state"))) if "state" in read else frozenset[str]()
    for key in ("since", "until"):
        if key in read:
            read[key] = time_of(read[key], now=now, zone=zone, name=f"{key}:")
    if "revision" in read:
        read["revision"] = _revision_of(read["revision"])
    if "parent" in read:
        read["parent"] = _whole_id(read["parent"])
    if "children" in read:
        _check(read["children"], ("yes",), "a value of children:")
        read["children"] = True
    return Query(words=tuple(words), states=states, **read)


def of_pool(query: Query | None, pool: str | None) -> Query | None:
    """The query narrowed to a pool that is given beside it.

    Raises:
        UsageError: the query names another pool.
    """
    if pool is None:
        return query
    if query is not None and query.pool not in (None, pool):
        raise UsageError(f"the search has pool:{query.pool}, not {pool}", fix="name the pool once")
    return replace(query or Query(), pool=pool)


class Term(NamedTuple):
    """A word or `key:value` of a search, and how it is written; the key of a bare word is None."""

    key: str | None
    value: str
    written: str


def terms(text: str) -> list[Term]:
    """The terms of a text that `parsed` takes, in their order."""
    return list(_tokens(text))


def with_term(text: str, key: str, value: str) -> str:
    """The text with this value of a key, in the place of the one that it has; an empty one removes it."""
    word = quoted(value)
    new = [f"{key}:{word}"] if word.strip('"') else []
    written: list[str] = []
    for term in _tokens(text):
        if term.key == key:
            written += new
            new = []
        else:
            written.append(term.written)
    return " ".join([*written, *new])


def without(text: str, term: Term) -> str:
    """The text without one of its terms."""
    rest = terms(text)
    rest.remove(term)
    return " ".join(one.written for one in rest)


def quoted(value: str) -> str:
    """A value of a key as a search writes it, in quotes if it has spaces."""
    # The grammar has no escape: a quote within becomes a blank.
    plain = value.replace('"', " ").strip()
    return f'"{plain}"' if re.search(r"\s", plain) or plain != value else value


def _revision_of(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UsageError(f"revision: {text!r} is not a number", fix=f"it is {KEYS['revision']}")
    return int(text)


def _whole_id(text: str) -> str:
    given = given_id(text)
    if given is None or not given.is_whole:
        raise UsageError(f"parent: {text!r} is not the whole id of a run", fix=f"it is {KEYS['parent']}")
    return given.first


def _tokens(text: str) -> Iterable[Term]:
    """The terms of a text.

    Raises:
        UsageError: a quote is in the wrong place.
    """
    place = 0
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        found = _TOKEN.match(text, place)
        if found is None:
            raise UsageError(
                f"the search has a quote in the wrong place: {text[place:]}",
                fix='write a value with spaces as cause:"CRM answers"',
            )
        empty, key, in_quotes, plain = found.groups()
        value = in_quotes if in_quotes is not None else plain or ""
        yield Term((empty or key or "").lower() or None, value, found[0])
        place = found.end()


def states_of(text: str, known: Collection[str] = STATES, *, what: str = "a run") -> tuple[str, ...]:
    """The states of a text such as `failed,refused`.

    Raises:
        UsageError: one is unknown; names the nearest known one.
    """
    states = tuple(dict.fromkeys(state.strip() for state in text.split(",")))
    for state in states:
        _check(state, known, f"a state of {what}", "; several are separated by commas")
    return states


def _check(value: str, known: Collection[str], what: str, more: str = "") -> None:
    if value not in known:
        fix = f"{hint_of(value, known)}one of {', '.join(known)}{more}"
        raise UsageError(f"{value!r} is not {what}", fix=fix)


def near(word: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The known words that are most like this one, best first."""
    return get_close_matches(word, list(known), n=most, cutoff=0.7)


def hint_of(word: str, known: Iterable[str]) -> str:
    """`did you mean failed? `, or nothing if no known word is near."""
    found = near(word.lower(), known, most=1)
    return f"did you mean {found[0]}? " if found else ""


def folded(text: str) -> str:
    """The text without case and accents, as words are compared."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def words_of(*texts: str) -> set[str]:
    """The folded words of an org's name and code: `org_acme` gives `org_acme`, `org` and `acme`."""
    parts = {part[:MAX_WORD] for text in texts for part in folded(text).split()}
    return parts.union(*map(pieces_of, texts))


def pieces_of(text: str) -> list[str]:
    """The folded runs of letters and digits of a text, in order: `HTTP_503 (crm)` gives http, 503 and crm."""
    return [piece[:MAX_WORD] for piece in re.findall(r"[^\W_]+", folded(text))]
