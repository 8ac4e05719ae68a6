"""Admit: waiting runs become running, in order of fair share and within every limit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from worker.ids import OrgId
from worker.model.runs.hosts import SLOTS
from worker.model.runs.run import AdmittedRun
from worker.store.dialect import compact_json, driver
from worker.store.sql.contract import PER_ORG, WINDOW, OrgQueue, RingStep, Taker, Walk, distinct, reach
from worker.store.sql.postgresql.arrays import plain, texts

# The key of the advisory lock that makes its holder the only admitter of this database.
ADMISSION_LOCK = 6_070_312
LOCK = "SELECT pg_advisory_xact_lock(%s)"
COMMIT = "COMMIT"


def _read(name: str) -> str:
    """A statement of `admission/`, read at import: an upgrade must not change it under a running worker."""
    return Path(__file__).with_name("admission").joinpath(f"{name}.sql").read_text(encoding="ascii")


# Of a worker that only places runs: no more than the free slots of the pool's hosts, which every run counts
# against that is placed there or runs there.
AT_HOSTS = """GREATEST(0, LEAST({most}, (
     SELECT COALESCE(sum((w.capacity->>'{slots}')::integer), 0) FROM workers w
     WHERE w.host_id IS NOT NULL AND w.ended_at IS NULL AND w.lease_until > (SELECT clock_timestamp())
       AND w.pools @> %(pool)s::jsonb) - (
     SELECT count(*) FROM owner o JOIN live_runs l ON l.worker_id = o.id
     WHERE l.isolation = '{isolation}' AND l.pool = ANY(%(pools)s::text[]))))"""


def _within_hosts(statement: str) -> str:
    for isolation, slots in SLOTS.items():
        most = f"%({isolation})s"
        statement = statement.replace(most, AT_HOSTS.format(most=most, slots=slots, isolation=isolation))
    return statement


def _planned_once(statement: str) -> str:
    """Each parameter in a subquery, so that its value cannot change the plan.

    PostgreSQL would plan each call, for a fifth of what it costs to admit a few hundred runs.
    """
    return re.sub(
        r"%\(\w+\)s(::\w+(\[\])?)?", lambda found: f"(SELECT {found[0]}){found[1] or ''}", statement
    )


RING = f"WITH RECURSIVE {_read('walk')} SELECT * FROM ring"
NEWEST = _read("newest")
CHOOSE = _read("choose").format(admitted=_read("admitted"))
PLACE = _within_hosts(CHOOSE)
CROWD = _planned_once(
    _read("crowd").format(walk=_read("walk"), newest=NEWEST, admitted=_read("admitted")),
)


def admit_ring(connection: Connection, taker: Taker, walk: Walk) -> RingStep:
    raw = driver(connection)
    runnable = _runnable(taker)
    values = runnable | {"cursor": walk.cursor, "want": walk.want, "hops": walk.hops}
    found: list[OrgId] = []
    if walk.newest:
        with raw.pipeline():
            walked = raw.execute(RING, values)
            last = raw.execute(NEWEST, runnable | {"window": WINDOW, "runs": walk.newest * PER_ORG})
            rows = walked.fetchall()
            found = distinct((org_id for (org_id,) in last), walk.newest)
    else:
        rows = raw.execute(RING, values).fetchall()
    if not rows:
        return RingStep({}, partial=False, cursor=walk.cursor, hops=0, complete=True)
    ready = [row for row in rows if row[2]]
    queues = [OrgQueue(*row[3:]) for row in ready]
    reaches = reach(queues, sum(taker.free.values()))
    place, passed = rows[-1][:2]
    return RingStep(
        dict(zip((row[0] for row in ready), reaches, strict=True)),
        partial=any(n < queue.room for n, queue in zip(reaches, queues, strict=True)),
        cursor=place,
        hops=passed,
        complete=len(rows) < walk.want and passed < walk.hops,
        newest=found,
    )


def admit_choose(
    connection: Connection,
    taker: Taker,
    orgs: Mapping[OrgId, int],
    *,
    first: Collection[OrgId] = (),
    placing: bool = False,
) -> list[AdmittedRun]:
    values = _to_admit(taker)
    values |= {"orgs": plain(orgs), "reach": plain(orgs.values()), "first": plain(first)}
    if placing:
        values["pool"] = compact_json(list(taker.pools))
    rows = _locked(connection, PLACE if placing else CHOOSE, values)
    return [AdmittedRun(*row) for row in rows if row[0] is not None]


def admit_crowd(
    connection: Connection,
    taker: Taker,
    walk: Walk,
    *,
    passed: Collection[OrgId] = (),
    whole: bool = False,
) -> tuple[RingStep, list[AdmittedRun]]:
    values = _to_admit(taker) | {"slots": sum(taker.free.values()), "whole": whole, "passed": plain(passed)}
    values |= {"cursor": walk.cursor, "want": walk.want, "hops": walk.hops}
    values |= {"newest": walk.newest, "runs": walk.newest * PER_ORG, "window": WINDOW}
    rows = _locked(connection, CROWD, values)
    found, walked, partial, place, in_turn = rows[0][:5]
    step = RingStep(
        dict.fromkeys(in_turn, 1),
        partial=bool(partial),
        cursor=place or walk.cursor,
        hops=walked or 0,
        complete=found < walk.want and (walked or 0) < walk.hops,
    )
    return step, [AdmittedRun(*row[5:]) for row in rows if row[5] is not None]


def _runnable(taker: Taker) -> dict[str, Any]:
    """The runs that may be admitted, by their own columns."""
    return {
        "handlers": texts(taker.offered),
        "isolations": plain(isolation for isolation, slots in taker.free.items() if slots > 0),
        "pools": texts(taker.pools),
    }


def _to_admit(taker: Taker) -> dict[str, Any]:
    return _runnable(taker) | {
        "worker": taker.worker_id,
        "limits": plain(taker.offered.values()),
        "offered": compact_json(list(taker.offered)),
        "child": max(0, taker.free.get("child", 0)),
        "inline": max(0, taker.free.get("inline", 0)),
    }


def _locked(connection: Connection, statement: str, values: Mapping[str, Any]) -> list[Any]:
    """The rows of a statement under the lock of admission; the transaction ends here.

    A later statement than the lock has a snapshot in which everything admitted before it can be counted.
    """
    raw = driver(connection)
    # With COMMIT in the same pipeline: a worker that hangs must not keep the lock.
    with raw.pipeline():
        raw.execute(LOCK, (ADMISSION_LOCK,))
        answer = raw.execute(statement, values)
        raw.execute(COMMIT, prepare=False)
    rows: list[Any] = answer.fetchall()
    return rows
