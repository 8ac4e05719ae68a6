"""Rollouts: their rows, and the version that each run keeps from its first start on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from worker.errors import NotFound
from worker.ids import OrgId, RunId, new_id
from worker.model.rollouts.rollout import Rollout, RunVersion, VersionAsk, decide
from worker.store import tables
from worker.store.bulk import among, insert_many
from worker.store.dialect import Row, all_rows, database_now, first_row
from worker.store.spending import lock_running

_rollouts, _versions, _runs = tables.rollouts, tables.run_versions, tables.runs

_RULES = tuple(
    _rollouts.c[name]
    for name in (
        *("id", "name", "definitions", "from_handler", "to_handler", "orgs", "flag", "steps", "auto"),
        *("watch", "state", "step", "began_at"),
    )
)


def known(connection: Connection) -> list[Rollout]:
    """All rollouts, also those that are over: runs keep what they got by them. The newest last."""
    return [Rollout.of(row) for row in all_rows(connection, select(*_RULES).order_by(_rollouts.c.id))]


def every(connection: Connection, *, lock: bool = False) -> dict[str, Row]:
    """All rows by name, the oldest first."""
    query = select(_rollouts).order_by(_rollouts.c.id)
    return {row["name"]: row for row in all_rows(connection, query.with_for_update() if lock else query)}


def require(connection: Connection, name: str, *, lock: bool = False) -> Row:
    """The row of one rollout; raises NotFound."""
    query = select(_rollouts).where(_rollouts.c.name == name)
    row = first_row(connection, query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"there is no rollout {name}", fix="`rollouts list` lists the rollouts")
    return row


def put(
    connection: Connection,
    name: str,
    values: Mapping[str, Any],
    before: Row | None,
    *,
    at: datetime,
    actor: str,
) -> None:
    """Insert a rollout that is planned, or change one."""
    changed = {**values, "updated_at": at, "updated_by": actor}
    if before is None:
        fresh = {"id": new_id(), "name": name, "state": "planned", "created_at": at}
        connection.execute(insert(_rollouts).values(**fresh, **changed))
    else:
        connection.execute(update(_rollouts).where(_rollouts.c.id == before["id"]).values(**changed))


def change(connection: Connection, rollout_id: str, values: Mapping[str, Any]) -> None:
    """Set columns of a rollout that this transaction has locked."""
    connection.execute(update(_rollouts).where(_rollouts.c.id == rollout_id).values(**values))


def keep_versions(connection: Connection, asked: Sequence[VersionAsk]) -> dict[VersionAsk, RunVersion]:
    """The version of each run, decided here if it has none; without runs that are no longer the caller's.

    The rollouts are read in this transaction: after a halt no run gets the new version.
    """
    ours = lock_running(connection, {ask.run_id: ask.fencing_token for ask in asked})
    rows = all_rows(connection, select(*_RULES).where(_rollouts.c.id.in_({ask.rollout_id for ask in asked})))
    rollouts = {row["id"]: Rollout.of(row) for row in rows}
    stored = _stored(connection, ours)
    created = _created(
        connection, [ask.run_id for ask in asked if ask.attempt > 1 and ask.run_id not in stored]
    )
    now, new = database_now(connection), []
    found: dict[VersionAsk, RunVersion] = {}
    for ask in sorted(asked):
        if ask.run_id not in ours:
            continue
        if (kept := stored.get(ask.run_id)) is not None:
            found[ask] = kept
            continue
        rollout = rollouts[ask.rollout_id]
        version, compared = decide(rollout, ask, created.get(ask.run_id))
        found[ask] = RunVersion(rollout.handler(version.side), version.side)
        if rollout.state == "undone":
            continue
        new.append(
            {
                "run_id": ask.run_id,
                "org_id": ask.org_id,
                "rollout_id": rollout.id,
                "handler": found[ask].handler,
                "side": version.side,
                "why": version.why,
                "step": version.step,
                "started_at": now,
                "compared": compared,
            }
        )
    # The rows of the runs are locked: no other worker inserts them.
    insert_many(connection, _versions, new)
    return found


def _stored(connection: Connection, run_ids: Iterable[Any]) -> dict[Any, RunVersion]:
    ids = sorted(run_ids)
    if not ids:
        return {}
    query = select(_versions.c.run_id, _versions.c.handler, _versions.c.side)
    rows = connection.execute(query.where(among(connection, _versions.c.run_id, ids)))
    return {run_id: RunVersion(handler, side) for run_id, handler, side in rows}


def kept(connection: Connection, run_id: RunId) -> str | None:
    """The handler that a run has got by a rollout, or None."""
    found = _stored(connection, [run_id]).get(run_id)
    return None if found is None else found.handler


def _created(connection: Connection, run_ids: Sequence[RunId]) -> dict[RunId, datetime]:
    if not run_ids:
        return {}
    query = select(_runs.c.id, _runs.c.created_at).where(among(connection, _runs.c.id, sorted(run_ids)))
    return {run_id: created_at for run_id, created_at in connection.execute(query)}


def version_of(connection: Connection, org_id: OrgId, run_id: RunId) -> Row | None:
    """The version of a run, with its rollout's name and the share of the step then; None without one."""
    query = (
        select(_versions.c.handler, _versions.c.why, _versions.c.step, _rollouts.c.steps)
        .add_columns(_rollouts.c.name.label("rollout"))
        .join(_rollouts, _rollouts.c.id == _versions.c.rollout_id)
        .where(_versions.c.run_id == run_id, _versions.c.org_id == org_id)
    )
    row = first_row(connection, query)
    if row is not None:
        row["share"] = row["steps"][row["step"] - 1] if row["step"] else "0%"
    return row
