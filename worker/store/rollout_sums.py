"""What rollouts compare: their orgs, the runs of these before, and the sums of runs that have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Select, func, select, update

from worker.ids import ALL_ORGS, AllOrgs, DefinitionId, OrgId, highest_id, lowest_id
from worker.model.rollouts.effect import Sums
from worker.model.rollouts.metrics import (
    OWN_METRICS,
    EndedRun,
    add,
    as_json,
    counts,
    from_json,
    measure,
    score_of,
    slow_after,
    sum_before,
)
from worker.model.rollouts.rollout import Rollout, Side
from worker.model.rollouts.verdict import OrgRuns
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.definitions import in_force
from worker.store.dialect import Row, all_rows, chunks, database_now, upsert

_rollouts, _orgs_of, _days = tables.rollouts, tables.rollout_orgs, tables.rollout_days
_versions, _runs = tables.run_versions, tables.runs
_spends, _trees = tables.spends, tables.tree_spends
_definitions, _revisions, _orgs = tables.definitions, tables.definition_revisions, tables.orgs

# The time before a rollout, and the newest runs of an org in it that are read.
BEFORE = timedelta(days=28)
MAX_BEFORE = 500
# Orgs whose time before one transaction reads, and ended runs that one counts.
READ = 50
COUNTED = 500


@dataclass(frozen=True, slots=True)
class OrgBefore:
    """An org that may get the new version, with its runs before."""

    org_id: OrgId
    definition_id: DefinitionId
    per_day: float
    before: Mapping[str, Sums]
    slow: float | None


def eligible(connection: Connection, _: AllOrgs, rollout: Rollout) -> list[tuple[OrgId, DefinitionId]]:
    """The orgs with an open definition of the rollout's name and old handler that its selector matches."""
    query = (
        select(_orgs.c.id, _definitions.c.id, _orgs.c.tags, _orgs.c.issuer)
        .join(_definitions, _definitions.c.org_id == _orgs.c.id)
        .join(_revisions, in_force(_definitions))
        .where(
            _definitions.c.name == rollout.definitions,
            _definitions.c.closed_at.is_(None),
            _orgs.c.state != "removed",
            _revisions.c.spec["handler"].as_string() == rollout.old,
        )
    )
    return [
        (org_id, definition_id)
        for org_id, definition_id, tags, issuer in connection.execute(query)
        if rollout.selector.matches(tags=tags, issuer=issuer)
    ]


def begin(connection: Connection, rollout: Rollout) -> int:
    """Add the orgs of a rollout whose first step begins; returns how many."""
    rows = [
        {"rollout_id": rollout.id, "org_id": org_id, "definition_id": definition_id}
        for org_id, definition_id in eligible(connection, ALL_ORGS, rollout)
    ]
    insert_many(connection, _orgs_of, rows, key=("rollout_id", "org_id"))
    return len(rows)


def begin_step(connection: Connection, rollout_id: str) -> None:
    """Forget the sums of the step before."""
    mine = _orgs_of.c.rollout_id == rollout_id
    connection.execute(update(_orgs_of).where(mine).values(from_sums=None, to_sums=None))


def read_before(connection: Connection, rollout: Rollout, began_at: datetime, *, limit: int = READ) -> int:
    """Read the time before of some orgs; returns how many, 0 once all are read."""
    unread = select(_orgs_of.c.org_id, _orgs_of.c.definition_id)
    unread = unread.where(_orgs_of.c.rollout_id == rollout.id, _orgs_of.c.before.is_(None)).limit(limit)
    rows = connection.execute(unread).all()
    for org_id, definition_id in rows:
        runs = runs_before(connection, org_id, definition_id, rollout.watch, began_at)
        which = (_orgs_of.c.rollout_id == rollout.id, _orgs_of.c.org_id == org_id)
        before = as_json(sum_before(rollout.watch, runs))
        values = {"before": before, "slow": slow_after(rollout.watch, runs)}
        connection.execute(update(_orgs_of).where(*which).values(**values))
    return len(rows)


def before_of(
    connection: Connection, rollout: Rollout, org_id: OrgId, definition_id: DefinitionId, at: datetime
) -> OrgBefore:
    """An org as a plan sees it, if the rollout began now."""
    runs = runs_before(connection, org_id, definition_id, rollout.watch, at)
    counted = [run for run in runs if counts(run)]
    days = BEFORE.total_seconds() / 86_400
    slow = slow_after(rollout.watch, runs)
    return OrgBefore(org_id, definition_id, len(counted) / days, sum_before(rollout.watch, runs), slow)


def runs_before(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, watch: Collection[str], at: datetime
) -> list[EndedRun]:
    """The newest runs of a definition that were due and had ended before `at`."""
    query = _ended().where(
        _runs.c.org_id == org_id,
        _runs.c.definition_id == definition_id,
        _runs.c.id > lowest_id(at - BEFORE),
        _runs.c.id < highest_id(at),
        _runs.c.finished_at < at,
        _runs.c.origin.in_(("schedule", "manual")),
    )
    rows = all_rows(connection, query.order_by(_runs.c.id.desc()).limit(MAX_BEFORE))
    spends = _spends_of(connection, watch, [row["id"] for row in rows])
    return [_run(row, spends) for row in rows]


def _ended() -> Select[Any]:
    columns = [_runs.c[name] for name in ("id", "org_id", "state", "reason", "started_at", "finished_at")]
    return select(*columns, _runs.c.result["score"].as_string().label("score"))


def _run(row: Row, spends: Mapping[str, Mapping[str, int]]) -> EndedRun:
    began_at, seconds = row["started_at"], None
    if began_at is not None:
        seconds = (row["finished_at"] - began_at).total_seconds()
    score = score_of(row["score"])
    return EndedRun(row["state"], row["reason"], seconds, score, spends.get(row["id"], {}))


def _spends_of(
    connection: Connection, watch: Collection[str], run_ids: Sequence[Any]
) -> dict[str, dict[str, int]]:
    """What runs have spent of the meters that are watched, with those below them."""
    meters = [metric for metric in watch if metric not in OWN_METRICS]
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for part in chunks(run_ids) if meters else ():
        for table, amount in ((_spends, _spends.c.amount), (_trees, _trees.c.used)):
            query = select(table.c.run_id, table.c.meter, func.sum(amount))
            query = query.where(among(connection, table.c.run_id, part), table.c.meter.in_(meters))
            for run_id, meter, spent in connection.execute(query.group_by(table.c.run_id, table.c.meter)):
                found[run_id][meter] += int(spent)
    return found


@dataclass(slots=True)
class _Added:
    """What one pass adds to an org."""

    sums: dict[Side, dict[str, Sums]] = field(default_factory=lambda: {"from": {}, "to": {}})
    moved_at: datetime | None = None
    moved_step: int = 0


def count_ended(
    connection: Connection, rollout: Rollout, step_began_at: datetime, *, limit: int = COUNTED
) -> int:
    """Add the compared runs that have ended to the sums of their orgs and days, once each; returns how many.

    Runs that started in an earlier step count for the days only. The caller has locked the rollout.
    """
    names = ("side", "step", "started_at")
    query = _ended().add_columns(
        _runs.c.definition_id, *(_versions.c[name].label(f"version_{name}") for name in names)
    )
    query = query.join(_versions, _versions.c.run_id == _runs.c.id).where(
        _versions.c.rollout_id == rollout.id,
        _versions.c.compared,
        ~_versions.c.counted,
        _runs.c.state.is_not(None),
    )
    rows = all_rows(connection, query.limit(limit))
    if not rows:
        return 0
    spends = _spends_of(connection, rollout.watch, [row["id"] for row in rows])
    stored = _org_rows(connection, rollout.id, {row["org_id"] for row in rows})
    added: dict[OrgId, _Added] = defaultdict(_Added)
    days: dict[tuple[Any, Side], dict[str, Sums]] = defaultdict(dict)
    definition_of: dict[OrgId, Any] = {}
    for row in rows:
        org_id, side, began_at = row["org_id"], row["version_side"], row["version_started_at"]
        definition_of[org_id] = row["definition_id"]
        if side == "to" and (added[org_id].moved_at is None or began_at < added[org_id].moved_at):
            added[org_id].moved_at, added[org_id].moved_step = began_at, row["version_step"]
        run = _run(row, spends)
        if not counts(run):
            continue
        had = stored.get(org_id)
        values = measure(rollout.watch, run, None if had is None else had["slow"])
        add(days[row["finished_at"].astimezone(UTC).date(), side], values)
        if row["version_step"] == rollout.step and began_at >= step_began_at:
            add(added[org_id].sums[side], values)
    for org_id, new in sorted(added.items()):
        if org_id not in stored:
            fresh = {"rollout_id": rollout.id, "org_id": org_id, "definition_id": definition_of[org_id]}
            insert_many(connection, _orgs_of, [fresh | {"before": {}}], key=("rollout_id", "org_id"))
        _add_to_org(connection, rollout.id, org_id, stored.get(org_id), new)
    _add_to_days(connection, rollout.id, days)
    ids = sorted(row["id"] for row in rows)
    connection.execute(
        update(_versions).where(among(connection, _versions.c.run_id, ids)).values(counted=True)
    )
    return len(rows)


def _org_rows(connection: Connection, rollout_id: str, org_ids: Collection[OrgId]) -> dict[OrgId, Row]:
    query = select(_orgs_of).where(
        _orgs_of.c.rollout_id == rollout_id, among(connection, _orgs_of.c.org_id, sorted(org_ids))
    )
    return {row["org_id"]: row for row in all_rows(connection, query)}


def _add_to_org(connection: Connection, rollout_id: str, org_id: OrgId, had: Row | None, new: _Added) -> None:
    values: dict[str, Any] = {}
    for side, sums in new.sums.items():
        if sums:
            column = f"{side}_sums"
            values[column] = as_json(joined(from_json(had and had[column]), sums))
    if new.moved_at is not None and (had is None or had["moved_at"] is None):
        values |= {"moved_at": new.moved_at, "moved_step": new.moved_step}
    if values:
        which = (_orgs_of.c.rollout_id == rollout_id, _orgs_of.c.org_id == org_id)
        connection.execute(update(_orgs_of).where(*which).values(**values))


def _add_to_days(
    connection: Connection, rollout_id: str, days: Mapping[tuple[Any, Side], Mapping[str, Sums]]
) -> None:
    query = select(_days.c.day, _days.c.side, _days.c.sums).where(
        _days.c.rollout_id == rollout_id, _days.c.day.in_({day for day, _ in days})
    )
    had = {(day, side): sums for day, side, sums in connection.execute(query)}
    rows = [
        {
            "rollout_id": rollout_id,
            "day": day,
            "side": side,
            "sums": as_json(joined(from_json(had.get((day, side))), sums)),
        }
        for (day, side), sums in sorted(days.items())
    ]
    if rows:
        connection.execute(upsert(connection, _days, ("rollout_id", "day", "side"), ("sums",)), rows)


def joined(one: Mapping[str, Sums], other: Mapping[str, Sums]) -> dict[str, Sums]:
    """The sums of both."""
    found = dict(one)
    for metric, sums in other.items():
        had = found.get(metric, Sums())
        found[metric] = Sums(had.runs + sums.runs, had.total + sums.total, had.squares + sums.squares)
    return found


def is_unread(connection: Connection, rollout_id: str) -> bool:
    """Whether the time before of an org is still to be read."""
    query = select(_orgs_of.c.org_id).where(_orgs_of.c.rollout_id == rollout_id, _orgs_of.c.before.is_(None))
    return connection.execute(query.limit(1)).first() is not None


def compared(connection: Connection, _: AllOrgs, rollout_id: str) -> list[OrgRuns]:
    """The runs of all orgs of a rollout in its step, by side."""
    query = select(_orgs_of.c.before, _orgs_of.c.from_sums, _orgs_of.c.to_sums)
    found = []
    for before, old, new in connection.execute(query.where(_orgs_of.c.rollout_id == rollout_id)):
        sums = from_json(before)
        if old:
            found.append(OrgRuns("from", sums, from_json(old)))
        if new:
            found.append(OrgRuns("to", sums, from_json(new)))
    return found


def totals(runs: Sequence[OrgRuns]) -> dict[str, dict[str, Any]]:
    """By side the orgs, and by metric the runs and the sum: what a recount of the runs gives."""
    found: dict[str, dict[str, Any]] = {side: {"orgs": 0, "metrics": {}} for side in tables.ROLLOUT_SIDES}
    for side, _, after in runs:
        of_side = found[side]
        of_side["orgs"] += 1
        for metric, sums in after.items():
            had = of_side["metrics"].setdefault(metric, {"runs": 0, "total": 0.0})
            had["runs"] += sums.runs
            had["total"] += sums.total
    return found


def recent_sides(connection: Connection, rollout_id: str) -> set[str]:
    """The sides with runs that ended today or yesterday (UTC)."""
    since = database_now(connection).astimezone(UTC).date() - timedelta(days=1)
    query = select(_days.c.side).where(_days.c.rollout_id == rollout_id, _days.c.day >= since)
    return set(connection.execute(query.distinct()).scalars())


def curves(connection: Connection, rollout_id: str, *, most: int = 400) -> list[Row]:
    """The sums by day and side, the newest days, the oldest first."""
    query = select(_days.c.day, _days.c.side, _days.c.sums).where(_days.c.rollout_id == rollout_id)
    rows = all_rows(connection, query.order_by(_days.c.day.desc(), _days.c.side).limit(most))
    return rows[::-1]


def moved(connection: Connection, _: AllOrgs, rollout_id: str, *, most: int = 50) -> tuple[int, list[Row]]:
    """How many orgs have moved, and the codes of those that moved last."""
    mine = (_orgs_of.c.rollout_id == rollout_id, _orgs_of.c.moved_at.is_not(None))
    count = connection.execute(select(func.count()).select_from(_orgs_of).where(*mine)).scalar_one()
    query = (
        select(_orgs.c.code.label("org"), _orgs_of.c.moved_step, _orgs_of.c.moved_at)
        .join(_orgs, _orgs.c.id == _orgs_of.c.org_id)
        .where(*mine)
        .order_by(_orgs_of.c.moved_at.desc(), _orgs.c.code)
    )
    return count, all_rows(connection, query.limit(most))


def org_count(connection: Connection, _: AllOrgs, rollout_id: str) -> int:
    query = select(func.count()).select_from(_orgs_of).where(_orgs_of.c.rollout_id == rollout_id)
    return connection.execute(query).scalar_one()
