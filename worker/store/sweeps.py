"""Whether anything waits for the chores of schedules; one look, so that to find nothing costs little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC

from sqlalchemy import Connection, delete, select, text, update

from worker.ids import DefinitionId, OrgId, RunId
from worker.store import tables
from worker.store.connection import chunks, database_now
from worker.store.definitions import Names, names_for_all_orgs, names_of
from worker.store.sql import statements
from worker.store.sql.ending import Rollups

# The least by its index: whether any is less would be looked for in every org.
_LOOK = """
SELECT COALESCE((SELECT min(templates_seen) FROM orgs)
                < CAST((SELECT value FROM facts WHERE name = 'templates_change') AS BIGINT), false)
       OR EXISTS (SELECT 1 FROM templates WHERE materialised_at IS NULL),
       EXISTS (SELECT 1 FROM backfills WHERE finished_at IS NULL)
"""


@dataclass(frozen=True, slots=True)
class Pending:
    """Orgs that are behind the templates; backfills that have not ended."""

    templates: bool
    backfills: bool


def pending(connection: Connection) -> Pending:
    """What there is to do now."""
    templates, backfills = connection.execute(text(_LOOK)).one()
    return Pending(bool(templates), bool(backfills))


# Rows changed by one transaction.
BATCH = 500
# Unfinished runs that one look goes through for those whose handler nobody offers.
LOOK = 5_000

_live = tables.live_runs
_runs = tables.runs
_workers = tables.workers


@dataclass(frozen=True, slots=True)
class Swept:
    """A waiting run that a sweep changed; `names` are those of its org and definition."""

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    names: Names
    attempt: int
    state: str
    reason: str


def mark_no_handler(connection: Connection, after: RunId | None = None) -> tuple[int, RunId | None]:
    """Give waiting runs that are due the reason `no_handler` while no worker offers theirs, and take it back.

    Looks at the `LOOK` runs that follow `after`, or at the first: of a long backlog a
    part at each call. Returns how many rows changed, and after which run to go on, None
    where all have been seen. Admission does not read the reason: this is for people.
    """
    now = database_now(connection)
    live = (_workers.c.ended_at.is_(None), _workers.c.lease_until > now)
    offers = [set(names) for names in connection.execute(select(_workers.c.handlers).where(*live)).scalars()]
    columns = (_live.c.id, _live.c.handler, _live.c.variant_handlers, _live.c.reason, _live.c.attempt)
    # `state NOT IN` is waiting by words that fit no partial index: the order of ids is meant.
    query = select(*columns).where(_live.c.state.not_in(("running", "held")), _live.c.available_at <= now)
    if after is not None:
        query = query.where(_live.c.id > after)
    rows = connection.execute(query.order_by(_live.c.id).limit(LOOK)).all()
    known: dict[tuple[str, ...], bool] = {}
    wrong: dict[str, list[RunId]] = {}
    for row in rows:
        needed = (row.handler, *(row.variant_handlers or ()))
        if needed not in known:
            known[needed] = any(names.issuperset(needed) for names in offers)
        if known[needed] == (row.reason == "no_handler"):
            reason = "no_handler" if not known[needed] else "due" if row.attempt == 0 else "retry"
            wrong.setdefault(reason, []).append(row.id)
    changed = 0
    for reason, ids in wrong.items():
        for part in chunks(ids):
            changed += _mark(connection, part, reason)
    return changed, rows[-1].id if len(rows) == LOOK else None


def _mark(connection: Connection, ids: Sequence[RunId], reason: str) -> int:
    """Give these runs a reason, those that still wait and that nobody is about to change."""
    waiting = (_live.c.id.in_(ids), _live.c.state == "waiting")
    rows = select(_live.c.id).where(*waiting).order_by(_live.c.id).with_for_update(skip_locked=True)
    locked = connection.execute(rows).scalars().all()
    return connection.execute(update(_live).where(_live.c.id.in_(locked)).values(reason=reason)).rowcount


def expire_overdue(connection: Connection) -> list[Swept]:
    """Skip waiting runs whose start deadline passed before their handler ever started."""
    query = (
        select(_live.c.id)
        .where(
            _live.c.state == "waiting",
            _live.c.start_by.is_not(None),
            _live.c.start_by < database_now(connection),
        )
        .limit(BATCH)
    )
    overdue = connection.execute(query).scalars().all()
    return end_waiting_for_all_orgs(connection, overdue, state="skipped", reason="expired")


def promote_held(connection: Connection) -> int:
    """Let held runs wait whose definition has nothing unfinished left; returns how many."""
    return statements(connection).promote(connection, None)


def end_waiting(
    connection: Connection, org_id: OrgId, run_ids: Sequence[RunId], *, state: str, reason: str
) -> list[Swept]:
    """End those of one org's runs that wait or are held, without another attempt; the others stay."""
    return _end_waiting(connection, run_ids, org_id, state, reason)


def end_waiting_for_all_orgs(
    connection: Connection, run_ids: Sequence[RunId], *, state: str, reason: str
) -> list[Swept]:
    """As `end_waiting`, of every org."""
    return _end_waiting(connection, run_ids, None, state, reason)


def _end_waiting(
    connection: Connection,
    run_ids: Sequence[RunId],
    org_id: OrgId | None,
    state: str,
    reason: str,
) -> list[Swept]:
    mine = () if org_id is None else (_live.c.org_id == org_id,)
    ended: list[Swept] = []
    for part in chunks(sorted(run_ids)):
        rows = connection.execute(
            select(_live)
            .where(*mine, _live.c.id.in_(part), _live.c.state.in_(("waiting", "held")))
            .order_by(_live.c.id)
            .with_for_update()
        ).all()
        if not rows:
            continue
        ids = {row.definition_id for row in rows}
        names = names_for_all_orgs(connection, ids) if org_id is None else names_of(connection, org_id, ids)
        now = database_now(connection)
        connection.execute(delete(_live).where(*mine, _live.c.id.in_([row.id for row in rows])))
        for row in rows:
            connection.execute(
                update(_runs)
                .where(_runs.c.id == row.id, _runs.c.org_id == row.org_id, _runs.c.state.is_(None))
                .values(
                    state=state,
                    reason=reason,
                    available_at=row.available_at,
                    finished_at=now,
                    attempt=row.attempt,
                    result_fencing_token=row.fencing_token,
                    progress=row.progress,
                )
            )
            called = names[row.definition_id]
            ended.append(Swept(row.id, row.org_id, row.definition_id, called, row.attempt, state, reason))
    if ended:
        hot = statements(connection)
        now = database_now(connection)
        counts: dict[OrgId, int] = {}
        for run in ended:
            counts[run.org_id] = counts.get(run.org_id, 0) + 1
        hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        hot.add_rollups(
            connection,
            Rollups(
                [(hour.date(), org_id, runs, 0, 0) for org_id, runs in sorted(counts.items())],
                [(hour, org_id, state, runs) for org_id, runs in sorted(counts.items())],
            ),
        )
        hot.promote(connection, [run.definition_id for run in ended])
    return ended
