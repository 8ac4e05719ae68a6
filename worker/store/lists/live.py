"""Runs that somebody watches, as event streams show them, or has just changed, and how they go on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select, text

from worker.ids import ALL_ORGS, OrgId, OrgScope, RunId, lowest_id
from worker.store import orgs, tables
from worker.store.dialect import Instant, Row, all_rows, chunks, in_scope, is_postgresql
from worker.store.lists import runs as run_lists
from worker.store.lists.matching import shown_state
from worker.store.lists.rows import LogRow, Run, columns_of

# Rows of the audit that are looked through for changed runs, and runs that are found.
EXAMINED = 5_000
MAX_FOUND = 1_000

_logs, _audit = tables.run_logs, tables.audit
_runs, _live = tables.runs, tables.live_runs
_COLUMNS = ", ".join(("run_id", *columns_of(LogRow)))
# SQLite has no LATERAL, and at most 500 SELECTs in a UNION.
_EACH = (
    f"SELECT * FROM (SELECT {_COLUMNS} FROM run_logs WHERE run_id = :run{{0}} AND org_id = :org{{0}} "
    "AND (attempt, seq) > (:attempt{0}, :seq{0}) ORDER BY attempt, seq LIMIT :most)"
)
_AT_ONCE = 100
_ALL = text(f"""
SELECT l.* FROM unnest(CAST(:runs AS uuid[]), CAST(:orgs AS uuid[]), CAST(:attempts AS integer[]),
                       CAST(:seqs AS integer[])) AS w(run_id, org_id, attempt, seq)
CROSS JOIN LATERAL (
  SELECT {_COLUMNS} FROM run_logs
  WHERE run_logs.run_id = w.run_id AND run_logs.org_id = w.org_id
    AND (run_logs.attempt, run_logs.seq) > (w.attempt, w.seq)
  ORDER BY run_logs.attempt, run_logs.seq LIMIT :most) l
""")

# The org of a watched run, and the last line of its log that was read.
Places = Mapping[RunId, tuple[OrgId, tuple[int, int]]]


def watched(connection: Connection, org: OrgScope, run_id: str) -> tuple[Run, OrgId, tuple[int, int]]:
    """A run as lists show it, its org, and the end of its log.

    Raises:
        NotFound: there is no such org, or it has no such run.
    """
    row, org_id = run_lists.with_org(connection, orgs.scope_of(connection, org), run_id)
    last = (
        select(_logs.c.attempt, _logs.c.seq)
        .where(_logs.c.run_id == row["id"], _logs.c.org_id == org_id)
        .order_by(_logs.c.attempt.desc(), _logs.c.seq.desc())
        .limit(1)
    )
    end = connection.execute(last).first()
    return row, org_id, (0, 0) if end is None else (end.attempt, end.seq)


def read(connection: Connection, places: Places, most: int) -> tuple[list[Run], list[Row]]:
    """The watched runs as lists show them, and of each at most `most` lines after its place, in order.

    The runs are read first: the log of one that has ended is complete.
    """
    rows = [row for ids in chunks(list(places)) for row in run_lists.rows_of(connection, ALL_ORGS, ids)]
    return rows, _lines(connection, places, most)


def _lines(connection: Connection, places: Places, most: int) -> list[Row]:
    if is_postgresql(connection):
        values: dict[str, Any] = {
            "runs": list(places),
            "orgs": [org_id for org_id, _ in places.values()],
            "attempts": [attempt for _, (attempt, _) in places.values()],
            "seqs": [seq for _, (_, seq) in places.values()],
            "most": most,
        }
        found = all_rows(connection, _ALL.bindparams(**values))
        return [{**row, "run_id": str(row["run_id"])} for row in found]
    lines: list[Row] = []
    for part in chunks(list(places.items()), _AT_ONCE):
        query = text(" UNION ALL ".join(_EACH.format(number) for number in range(len(part))))
        values = {"most": most}
        for number, (run_id, (org_id, (attempt, seq))) in enumerate(part):
            values |= {f"run{number}": run_id, f"org{number}": org_id}
            values |= {f"attempt{number}": attempt, f"seq{number}": seq}
        lines += all_rows(connection, query.bindparams(**values).columns(at=Instant()))
    return lines


class ChangedRuns(NamedTuple):
    """The states of the runs, newest change first, and the reason that was given for it."""

    states: Mapping[RunId, str]
    reason: str


def changed_runs(
    connection: Connection, scope: OrgScope, *, actor: str, action: str, since: datetime
) -> ChangedRuns:
    """The newest runs that the audit says were changed since then; of a retry, the new runs.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    newest = select(_audit).where(_audit.c.id >= lowest_id(since), *in_scope(_audit.c.org_id, org_id))
    row = newest.order_by(_audit.c.id.desc()).limit(EXAMINED).subquery("newest").c
    found = connection.execute(
        select(row.subject, row.detail)
        .where(row.actor == actor, row.action == action, row.at >= since)
        .order_by(row.id.desc())
        .limit(MAX_FOUND)
    ).all()
    ids = [RunId(subject) for subject, _ in found]
    state = func.coalesce(_runs.c.state, shown_state(_live.c.state))
    each = select(_runs.c.id, state).outerjoin(_live, _live.c.id == _runs.c.id).where(_runs.c.id.in_(ids))
    each = each.where(*in_scope(_runs.c.org_id, org_id))
    states = {RunId(row[0]): str(row[1]) for row in connection.execute(each.limit(MAX_FOUND))}
    reason = (found[0][1] or {}).get("reason", "") if found else ""
    return ChangedRuns({id_: states[id_] for id_ in ids if id_ in states}, reason)
