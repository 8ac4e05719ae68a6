"""Rollouts: what people do to them, and what `rollouts plan` says before they start."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.features.rollouts.evaluation import Events, advance_to
from worker.ids import ALL_ORGS
from worker.model.rollouts.rollout import Rollout
from worker.model.rollouts.verdict import OrgVolume, plan
from worker.operations.changes import because
from worker.store import audit, catalogue, places, rollout_sums, rollouts
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.store.lists.rollouts import rollout as shown
from worker.store.lists.rows import PlannedStepRow, RolloutDetail

# The verbs by the states in which they are possible, and the state after.
_MOVES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "halt": (("running",), "halted"),
    "resume": (("halted",), "running"),
    "finish": (("running",), "finished"),
    "undo": (("planned", "running", "halted", "finished"), "undone"),
}


def advance(
    database: Database, name: str, *, reason: str | None = None, anyway: bool = False, actor: str
) -> RolloutDetail:
    """Begin the next step, or the first one.

    Raises:
        NotFound: there is no such rollout.
        Conflict: it does not run, is at its last step, no worker offers the new handler, no org has such a
            definition, or its step has not shown yet what it must and `anyway` is not given.
    """
    with database.transaction() as connection:
        row = rollouts.require(connection, name, lock=True)
        rollout, now = Rollout.of(row), database_now(connection)
        if row["state"] not in ("planned", "running"):
            raise Conflict(f"rollout {name} is {row['state']}", fix=_fix(row))
        if rollout.step >= len(rollout.steps):
            raise Conflict(f"rollout {name} is at its last step", fix=f"`rollouts finish {name}` ends it")
        if rollout.step and not row["ready"] and not anyway:
            raise Conflict(
                f"step {rollout.steps[rollout.step - 1]} of rollout {name} has not shown yet what it must",
                fix=f"wait; `rollouts show {name}` has the numbers, and --anyway goes on without them",
            )
        _check_offered(connection, row["to_handler"])
        values = advance_to(connection, rollout, rollout.step + 1, now, actor, reason, Events())
        if row["state"] == "planned":
            if not rollout_sums.begin(connection, rollout):
                raise Conflict(
                    f"rollout {name} has no orgs: none that its `orgs` matches has an open definition "
                    f"{rollout.definitions} with the handler {rollout.old}",
                    fix="correct definitions, from or orgs in its file, and apply that",
                )
            values["began_at"] = now
        rollouts.change(connection, row["id"], values)
        return shown(connection, name)


def move(database: Database, name: str, verb: str, *, reason: str, actor: str) -> RolloutDetail:
    """Halt, resume, finish or undo a rollout.

    After `halt` and `undo` new runs of all orgs take the old version, after `finish` the new one. `resume`
    begins the step again, with the orgs that it had.

    Raises:
        NotFound: there is no such rollout.
        Conflict: its state does not allow it.
    """
    states, after = _MOVES[verb]
    with database.transaction() as connection:
        row = rollouts.require(connection, name, lock=True)
        if row["state"] not in states:
            raise Conflict(f"rollout {name} is {row['state']}", fix=_fix(row))
        now = database_now(connection)
        values: dict[str, Any] = {
            "state": after,
            "reason": reason,
            "updated_at": now,
            "updated_by": actor,
            "ready": False,
            "stalled": False,
        }
        if verb == "halt":
            values |= {"halted_at": now, "halted_by": actor}
        if verb == "resume":
            values |= {"step_began_at": now, "verdict": None}
            rollout_sums.begin_step(connection, row["id"])
        rollouts.change(connection, row["id"], values)
        audit.note(connection, None, f"rollout.{verb}", name, because(reason), at=now, actor=actor)
        return shown(connection, name)


def _check_offered(connection: Connection, handler: str) -> None:
    """Raise Conflict if the runs of a step would wait for a handler that no worker or host has."""
    found = catalogue.entries(connection, handler)
    if all(entry["error"] for entry in found) and not places.pools_with(connection, handler):
        raise Conflict(
            f"no worker or host offers the handler {handler}",
            fix=f"install it, and restart the workers; `handlers show {handler}` shows who has it",
        )


def _fix(row: Row) -> str:
    name = row["name"]
    match row["state"]:
        case "planned":
            return f"`rollouts advance {name}` begins it"
        case "halted":
            return f"`rollouts resume {name} --reason TEXT`, or `rollouts undo {name} --reason TEXT`"
        case "running":
            return f"`rollouts show {name}` shows it"
    return "it is over; apply a [[rollout]] with another name"


def plan_steps(connection: Connection, name: str) -> list[PlannedStepRow]:
    """The orgs, runs and days of each step at the volume of the last 28 days; raises NotFound."""
    row = rollouts.require(connection, name)
    rollout, at = Rollout.of(row), _at(connection, row)
    volumes = []
    for org_id, definition_id in rollout_sums.eligible(connection, ALL_ORGS, rollout):
        org = rollout_sums.before_of(connection, rollout, org_id, definition_id, at)
        volumes.append(OrgVolume(org_id, org.per_day, org.before))
    return [
        PlannedStepRow(
            step=step.step,
            orgs=step.orgs,
            runs_per_day=round(step.runs_per_day, 1),
            runs=step.runs,
            days=step.days,
            note=step.why,
        )
        for step in plan(rollout, volumes)
    ]


def _at(connection: Connection, row: Row) -> datetime:
    began_at: datetime | None = row["began_at"]
    return database_now(connection) if began_at is None else began_at
