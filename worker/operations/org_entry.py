"""An org's columns as a file or a command names them; shared by the verbs that write them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.zones import parse_zone
from worker.errors import InvalidTrigger, UsageError
from worker.operations import settle
from worker.orgs import OrgEntry
from worker.store import orgs

Row = dict[str, Any]


def columns(entry: OrgEntry) -> Row:
    """The columns of `orgs` that an entry sets."""
    return {
        "name": entry.name,
        "issuer": entry.issuer,
        "max_concurrent_runs": entry.max_concurrent_runs,
        "weight": entry.weight,
        "tags": sorted(entry.tags),
        "timezone": entry.timezone,
    }


def changed(before: Mapping[str, Any], entry: OrgEntry) -> Row:
    """Those columns that the entry changes, with their new values."""
    return {name: value for name, value in columns(entry).items() if before[name] != value}


def write(connection: Connection, before: Mapping[str, Any], new: Row, *, at: datetime) -> None:
    """Change columns of an org; a new zone first settles its definitions under the old one."""
    if "timezone" not in new:
        orgs.change(connection, before["id"], new, at=at)
        return
    with settle.settled_org(connection, before["id"], at=at):
        orgs.change(connection, before["id"], new, at=at)


def check(entry: OrgEntry, issuers: Collection[str] | None) -> None:
    """Refuse what cannot work; `issuers` None means that those of `worker.toml` are not known here.

    Raises:
        UsageError: an issuer that `worker.toml` does not have, an unknown zone, a number out of range.
    """
    named = f"org {entry.code}"
    if issuers is not None and entry.issuer not in issuers:
        raise UsageError(
            f"{named}: there is no issuer {entry.issuer!r}; worker.toml has "
            f"{', '.join(sorted(issuers)) or 'none'}",
            fix=f"add a table [issuers.{entry.issuer}] to worker.toml, or correct the name",
        )
    if not entry.code or not entry.code.isprintable():
        raise UsageError(f"{entry.code!r} is no code of an org", fix="use the org_code of its tokens")
    if entry.max_concurrent_runs < 1 or entry.weight < 1:
        raise UsageError(
            f"{named}: max_concurrent_runs and weight are 1 or more",
            fix=f"to let nothing of it run, `orgs pause {entry.code}`",
        )
    if entry.timezone is not None:
        try:
            parse_zone(entry.timezone)
        except InvalidTrigger as error:
            raise UsageError(f"{named}: {error.message}", fix=error.fix) from None
