"""Orgs: their states and limits, and selectors by tag and issuer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from worker.errors import DefinitionError
from worker.ids import OrgId

OrgState = Literal["active", "paused", "suspended", "removed"]

MAX_CONCURRENT_RUNS = 10
WEIGHT = 1


class OrgRef(NamedTuple):
    """An org: its key in the database and its code in tokens."""

    id: OrgId
    code: str


class TokenWant(NamedTuple):
    """A request for a token of an org.

    The token must have the `scopes`; `also_ask`, the scopes of variants, are requested too but may be
    missing. It is usable `covers` seconds from now, and received within `max_age`, which counts as at least
    60 s. `fresh` requests a new one, unless one was minted so in the last two seconds. An `audience` of None
    is the issuer's; one that is a `resource` is asked for as RFC 8707 says.
    """

    org: OrgRef
    issuer: str
    audience: str | None = None
    scopes: frozenset[str] = frozenset()
    also_ask: frozenset[str] = frozenset()
    covers: float = 0.0
    max_age: timedelta | None = None
    fresh: bool = False
    resource: bool = False


@dataclass(frozen=True, slots=True)
class OrgEntry:
    """An org as in a file for `apply` or a line for `orgs import`."""

    code: str
    """The code in its tokens (`org_code`); at most 200 characters, no slash."""
    name: str
    """The display name."""
    issuer: str
    """A table `[issuers.NAME]` of worker.toml."""
    max_concurrent_runs: int = MAX_CONCURRENT_RUNS
    """Maximum concurrent runs, over all workers."""
    weight: int = WEIGHT
    """Its share of the slots relative to other orgs: with 2 it gets twice as many."""
    tags: frozenset[str] = frozenset()
    """Templates select orgs by these."""
    timezone: str | None = None
    """The default IANA time zone of its definitions; UTC if not set."""
    pool: str | None = None
    """The pool of its runs whose definition and handler do not name one; `default` if not set."""


def may_move(state: OrgState, to: OrgState) -> bool:
    """Whether an org in `state` may be set to `to`: `removed` is final."""
    return state in (to, "active", "paused", "suspended")


_FIX = 'write orgs = "all", orgs = { tags = ["pro"] } or orgs = { issuer = "main" }'


@dataclass(frozen=True, slots=True)
class Selector:
    """Matches orgs with every tag in `tags` and, if set, with this `issuer`; by default all orgs."""

    tags: frozenset[str] = frozenset()
    issuer: str | None = None

    def matches(self, *, tags: Iterable[str], issuer: str) -> bool:
        """Whether an org with these tags and this issuer matches."""
        return (self.issuer is None or self.issuer == issuer) and self.tags <= set(tags)

    def as_json(self) -> Any:
        """The canonical form for the database, as `parse_selector` reads it."""
        chosen: dict[str, Any] = {}
        if self.tags:
            chosen["tags"] = sorted(self.tags)
        if self.issuer is not None:
            chosen["issuer"] = self.issuer
        return chosen or "all"


def parse_selector(value: Any, *, entry: str = "") -> Selector:
    """Parse `orgs` of a template.

    Raises:
        DefinitionError: it is neither `"all"` nor a table of `tags` and `issuer`.
    """
    if value == "all":
        return Selector()
    if not isinstance(value, Mapping) or not value:
        raise _refusal(f"{value!r} selects no orgs", entry)
    for key in value:
        if key not in ("tags", "issuer"):
            raise _refusal(f"unknown key {key!r}", entry, f".{key}")
    tags = value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise _refusal("tags must be a list of strings", entry, ".tags")
    if "tags" in value and not tags:
        raise _refusal("tags must not be empty", entry, ".tags")
    issuer = value.get("issuer")
    if "issuer" in value and not (isinstance(issuer, str) and issuer):
        raise _refusal("issuer must be a string", entry, ".issuer")
    return Selector(tags=frozenset(tags), issuer=issuer)


def selector_in_words(value: Any) -> str:
    """`orgs` of a template or budget for people; of an unknown form as JSON."""
    try:
        chosen = parse_selector(value)
    except DefinitionError:
        return json.dumps(value, default=str)
    if not (chosen.tags or chosen.issuer):
        return "all orgs"
    *most, last = sorted(chosen.tags) or [""]
    tags = f"{', '.join(most)} and {last}" if most else last
    with_tags = f" with the tag{'s' if most else ''} {tags}" if chosen.tags else ""
    return f"orgs{with_tags}{f' of the issuer {chosen.issuer}' if chosen.issuer else ''}"


def _refusal(problem: str, entry: str, below: str = "") -> DefinitionError:
    field = f"orgs{below}"
    place = f"{entry}, {field}" if entry else field
    return DefinitionError(f"{place}: {problem}", entry=entry, field=field, fix=_FIX)
