"""One limit of calls to a service: what workers use of it now, and which orgs pause."""

from __future__ import annotations

from typing import cast

from sqlalchemy import Connection, select

from worker.errors import NotFound
from worker.ids import OrgId
from worker.model.definitions.limits import limit_of
from worker.model.limits import Bucket, level
from worker.store import tables
from worker.store.dialect import all_rows, database_now, first_row
from worker.store.limits import seconds
from worker.store.lists.rows import LimitDetail, LimitRow, LimitUse, OriginPause, columns_of

# Orgs that are shown with what they use, and with a pause.
SHOWN = 50
# Buckets that are looked at for those.
READ = 5_000

_limits, _shares, _pauses, _orgs = tables.limits, tables.limit_shares, tables.origin_pauses, tables.orgs


def limit(connection: Connection, origin: str, per: str) -> LimitDetail:
    """One limit; raises NotFound."""
    columns = [_limits.c[name] for name in columns_of(LimitRow)]
    found = select(*columns).where(_limits.c.origin == origin.rstrip("/").lower(), _limits.c.per == per)
    row = first_row(connection, found)
    if row is None:
        raise NotFound(
            f"there is no limit of {origin} per {per}",
            fix="`limits list` lists the limits, `apply` of a file with a [[limit]] makes one",
        )
    limited = limit_of(row)
    now = database_now(connection)
    query = select(_shares.c.bucket, _orgs.c.code).join(_orgs, _orgs.c.id == _shares.c.org_id, isouter=True)
    # Not by what waits: that is within the buckets.
    query = query.where(_shares.c.limit_id == row["id"]).order_by(_shares.c.idle_at.desc()).limit(READ)
    used = []
    for bucket, code in connection.execute(query):
        use = level(limited, Bucket.from_json(bucket), seconds(now))
        used.append(LimitUse(org=code, tokens=round(use.tokens, 1), waiting=use.waiting, slots=use.slots))
    used.sort(key=lambda use: (-use["waiting"], -use["slots"], use["org"] or ""))
    return cast(
        LimitDetail,
        {**row, "orgs": len(used), "used": used[:SHOWN], "pauses": _paused(connection, row["origin"])},
    )


def _paused(connection: Connection, origin: str) -> list[OriginPause]:
    query = (
        select(_orgs.c.code.label("org"), _pauses.c.until)
        .join(_orgs, _orgs.c.id == _pauses.c.org_id)
        .where(_pauses.c.origin == origin, _pauses.c.until > database_now(connection))
        .order_by(_pauses.c.until.desc())
        .limit(SHOWN)
    )
    return cast(list[OriginPause], all_rows(connection, query))


def waiting_for(connection: Connection, org_id: OrgId) -> list[str]:
    """What an org's requests wait for now, in words: limits by org that are used up, and pauses."""
    now = database_now(connection)
    at = seconds(now)
    query = select(_shares.c.bucket, _limits).join(_limits, _limits.c.id == _shares.c.limit_id)
    found = []
    for row in all_rows(connection, query.where(_shares.c.org_id == org_id).limit(READ)):
        if level(limit_of(row), Bucket.from_json(row["bucket"]), at).waiting:
            what = row["rate"] or f"{row['concurrent']} at once"
            found.append(f"the limit of {row['origin']} per org ({what})")
    pauses = select(_pauses.c.origin).where(_pauses.c.org_id == org_id, _pauses.c.until > now).limit(SHOWN)
    found += [f"{origin}, which asked for a pause" for origin in connection.execute(pauses).scalars()]
    return found
