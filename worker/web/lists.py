"""The lists of the API: what each gives, which parameters it takes, and who may see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

from sqlalchemy import Connection

from worker.clock import Clock, from_text
from worker.definitions.units import parse_duration
from worker.errors import UsageError
from worker.store import catalogue
from worker.store.lists import definitions as definition_lists
from worker.store.lists import orgs as org_lists
from worker.store.lists import runs as run_lists
from worker.store.lists.paging import DEFAULT_LIMIT, MAX_LIMIT, Row
from worker.web.access import Caller, Role
from worker.web.redaction import Noun, redacted

PAGE = {"limit", "after"}

Read = Callable[..., list[Row]]


@dataclass(frozen=True, slots=True)
class Listing:
    """One list: how it is read for one org and for all, and its parameters besides `org`."""

    of_org: Read
    of_all: Read
    filters: frozenset[str]
    role: Role = "viewer"


def _own_org(connection: Connection, org: str) -> list[Row]:
    found = org_lists.org(connection, org)
    return [{name: found[name] for name in org_lists.ORG_COLUMNS}]


def _own_definitions(connection: Connection, org: str) -> list[Row]:
    rows: list[Row] = []
    while page := definition_lists.definitions(
        connection, org, limit=MAX_LIMIT, after=rows[-1]["id"] if rows else None
    ):
        rows += page
    return rows


def _own_handlers(connection: Connection, org: str) -> list[Row]:
    """Those that the org's definitions name."""
    names = {row["handler"] for row in _own_definitions(connection, org)}
    return [row for row in catalogue.entries(connection) if row["name"] in names]


def _listing(of_org: Read, of_all: Read, filters: str = "", role: Role = "viewer") -> Listing:
    return Listing(of_org, of_all, frozenset(filters.split()), role)


LISTS: Mapping[Noun, Listing] = {
    "orgs": _listing(_own_org, org_lists.orgs_for_all_orgs, "state since limit after"),
    "definitions": _listing(
        definition_lists.definitions,
        definition_lists.definitions_for_all_orgs,
        "definition state since limit after",
    ),
    "templates": _listing(
        definition_lists.templates, definition_lists.templates_for_all_orgs, "state since limit after"
    ),
    "runs": _listing(run_lists.runs, run_lists.runs_for_all_orgs, "definition state since limit after"),
    "skips": _listing(org_lists.skips, org_lists.skips_for_all_orgs, "definition since limit after"),
    "handlers": _listing(_own_handlers, catalogue.entries),
    "credentials": _listing(
        org_lists.credentials, org_lists.credentials_for_all_orgs, "state limit after", "admin"
    ),
    "audit": _listing(org_lists.audit, org_lists.audit_for_all_orgs, "since limit after", "admin"),
}
# These have no pages where they are one org's: there are few.
SHORT = {_own_org, definition_lists.templates, _own_handlers, org_lists.credentials}


def read_list(
    connection: Connection, name: Noun, caller: Caller, given: Mapping[str, str], clock: Clock
) -> list[Row]:
    """The rows of one list that this caller may see, as it may see them, newest first.

    Raises:
        AccessDenied: the caller's role does not reach so far.
        NotFound: an org that does not exist, for this caller at least, or no such row to go on after.
        UsageError: a parameter that the list does not have, or a value that it cannot be.
    """
    return redacted(name, _rows(connection, name, caller, given, clock), caller)


def _rows(
    connection: Connection, name: Noun, caller: Caller, given: Mapping[str, str], clock: Clock
) -> list[Row]:
    wanted = LISTS[name]
    # An org's own credentials and audit are its own business.
    if caller.org is None:
        caller.require(wanted.role)
    unknown = set(given) - wanted.filters - {"org"}
    if unknown:
        names = ", ".join(sorted({"org", *wanted.filters}))
        raise UsageError(f"{name} has no parameter {', '.join(sorted(unknown))}", fix=f"it has {names}")
    org = caller.org_asked_for(given.get("org"))
    values = {key: _value(key, text, clock) for key, text in given.items() if key != "org"}
    if org is None:
        return wanted.of_all(connection, **values)
    if wanted.of_org in SHORT:
        return _page(wanted.of_org(connection, org), values)
    return wanted.of_org(connection, org, **values)


def limit_of(given: Mapping[str, str]) -> int:
    """How many rows a full page has."""
    return int(given.get("limit", DEFAULT_LIMIT))


def _page(rows: list[Row], values: Mapping[str, Any]) -> list[Row]:
    """A short list by the same parameters as a long one."""
    limit, after, state, since = (values.get(name) for name in ("limit", "after", "state", "since"))
    rows = [row for row in rows if state in (None, row.get("state"))]
    rows = [row for row in rows if since is None or row["created_at"] >= since]
    if after is not None:
        rows = [row for row in rows if row["id"] < after]
    return rows if limit is None else rows[:limit]


def _value(key: str, text: str, clock: Clock) -> Any:
    if key == "limit":
        if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_LIMIT:
            raise UsageError(
                f"limit {text!r} is not between 1 and {MAX_LIMIT}",
                fix="limit=50, and `after` for the next page",
            )
        return int(text)
    return _instant(text, clock) if key == "since" else text


def _instant(text: str, clock: Clock) -> datetime:
    for read in (
        from_text,
        lambda given: datetime.combine(date.fromisoformat(given), time(), UTC),
        lambda given: clock.now() - parse_duration(given),
    ):
        try:
            return read(text)
        except ValueError:
            continue
    raise UsageError(
        f"since {text!r} is no instant",
        fix="write 2027-01-01T08:00:00Z, 2027-01-01, or a duration ago such as 2h",
    )
