"""Plans: what a change would do, shown before it is done; a person confirms just what was shown.

A plan is made by the change itself, which is then undone. Confirming it makes the change again, and keeps it
if it does what was shown: in one transaction with the use of the plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection

from worker.errors import Conflict, NotFound
from worker.ids import ALL_ORGS, OrgId, RunId, new_id
from worker.model.definitions.units import json_default
from worker.operations import answers, definitions, runs
from worker.store import audit, plans
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import checked_id
from worker.store.lists import read as lists
from worker.store.lists import runs as run_lists

# How long a plan can be confirmed, and open plans of one operator; another one replaces the oldest.
LASTS = timedelta(minutes=10)
MAX_OPEN = 50

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plannable:
    """A change that can be planned: `operation`, called with the arguments `names` and then the others.

    `action` is what a caller must be allowed to do. `before` reads what is there. A plan shows it, and the
    columns `after` of the row that the operation returns: none that time alone changes.
    """

    action: Literal["retry", "pause", "answer"]
    operation: Callable[..., Mapping[str, Any]]
    names: tuple[str, ...]
    before: Callable[[Connection, Arguments], Row]
    after: tuple[str, ...]


def _run(connection: Connection, arguments: Arguments) -> Row:
    """The run, with what says that it was tried, retried or has ended meanwhile."""
    row = runs.require_run(connection, arguments["run"], None)
    found = run_lists.run(connection, ALL_ORGS, RunId(row["id"]))
    names = ("id", "org", "definition", "handler", "revision", "scheduled_for", "state", "reason", "attempt")
    shown: Row = {name: found[name] for name in (*names, "finished_at", "retried_as")}  # type: ignore[literal-required]
    if found["children"] is not None:
        shown["children_that_failed"] = found["children"]["failed"]
    return shown


def _definition(connection: Connection, arguments: Arguments) -> Row:
    found = lists.definition(connection, arguments["org"], arguments["name"])
    names = ("org", "name", "handler", "schedule", "timezone", "revision", "enabled", "state", "org_state")
    return {name: found[name] for name in (*names, "paused_by", "pause_note")}  # type: ignore[literal-required]


def _wait(connection: Connection, arguments: Arguments) -> Row:
    row = runs.require_run(connection, arguments["run"], None)
    org_id, run_id = OrgId(row["org_id"]), RunId(row["id"])
    found = run_lists.row(connection, org_id, run_id)
    names = ("id", "org", "definition", "state", "attempt")
    shown: Row = {name: found[name] for name in names}  # type: ignore[literal-required]
    occurrence = arguments.get("occurrence", 1)
    waits = run_lists.waits_of(connection, org_id, run_id)
    same = (each for each in waits if (each["name"], each["occurrence"]) == (arguments["name"], occurrence))
    # Without it, the answer is kept for a wait that the run may reach.
    shown["question"] = next(same, None)
    return shown


PLANNABLE: Mapping[str, Plannable] = {
    "retry_run": Plannable(
        "retry",
        runs.retry,
        ("run",),
        _run,
        (
            "org",
            "definition",
            "handler",
            "pool",
            "revision",
            "scheduled_for",
            "origin",
            "retry_of",
            "state",
            "reason",
        ),
    ),
    "pause_definition": Plannable(
        "pause",
        definitions.pause_definition,
        ("org", "name"),
        _definition,
        ("state", "paused_by", "pause_note"),
    ),
    "answer_run": Plannable(
        "answer", answers.answer, ("run", "name"), _wait, ("name", "occurrence", "answer", "answered_by")
    ),
}


def make(
    database: Database, change: str, arguments: Arguments, *, token_sha256: str, at: datetime, actor: str
) -> Row:
    """Store what a change would do, and return its plan: `id`, `until`, `shown`. Nothing is changed.

    Raises as the change does.
    """
    until = at + LASTS
    with database.transaction() as connection:
        undone = connection.begin_nested()
        try:
            _, shown = _done(database, connection, change, arguments, actor)
        finally:
            undone.rollback()
        row: Row = {
            "id": new_id(),
            "operator": actor,
            "token_sha256": token_sha256,
            "change": change,
            "arguments": json.dumps(dict(arguments)),
            "shown": shown,
            "created_at": at,
            "until": until,
        }
        plans.add(connection, row, most=MAX_OPEN)
        now = database.now(connection)
        audit.note(connection, None, "plan.make", row["id"], _detail(row), at=now, actor=actor)
    return {"id": row["id"], "until": until, "shown": json.loads(shown)}


def find(connection: Connection, plan_id: str, *, operator: str, at: datetime) -> Row:
    """An open plan of this operator, with `arguments` and `shown` as values.

    Raises:
        NotFound: no such plan, or it was confirmed already, or it is too old.
    """
    row = plans.find(connection, checked_id(plan_id), operator=operator, at=at)
    if row is None:
        raise _gone(plan_id)
    return row | {name: json.loads(row[name]) for name in ("arguments", "shown")}


class Confirmed(NamedTuple):
    """A change that was planned: which, what it was called with, and the row that it returned."""

    change: str
    arguments: Arguments
    row: Mapping[str, Any]


def confirm(database: Database, plan_id: str, *, at: datetime, actor: str) -> Confirmed:
    """Do what a plan of this operator says, once.

    Raises:
        NotFound: as `find`.
        Conflict: what it changes has changed since, so that it would do something else.
        WorkerError: as the change does.
    """
    with database.transaction() as connection:
        row = plans.use(connection, checked_id(plan_id), operator=actor, at=at)
        if row is None:
            raise _gone(plan_id)
        arguments = json.loads(row["arguments"])
        done, shown = _done(database, connection, row["change"], arguments, actor)
        if shown != row["shown"]:
            raise Conflict(
                f"what plan {plan_id} changes has changed since it was made, so it would do something else",
                fix="ask for a new plan, and compare",
            )
        now = database.now(connection)
        audit.note(connection, None, "plan.confirm", row["id"], _detail(row), at=now, actor=actor)
        return Confirmed(row["change"], arguments, done)


def _done(
    database: Database, connection: Connection, change: str, arguments: Arguments, actor: str
) -> tuple[Mapping[str, Any], str]:
    """Make a change within this transaction; returns its row, and what a plan of it shows, as JSON."""
    planned = PLANNABLE[change]
    before = planned.before(connection, arguments)
    names = [arguments[name] for name in planned.names]
    others = {name: value for name, value in arguments.items() if name not in planned.names}
    row = planned.operation(database.within(connection), *names, **others, actor=actor)
    shown = {"before": before, "after": {name: row[name] for name in planned.after}}
    return row, json.dumps(shown, default=json_default)


def _detail(row: Row) -> Row:
    """What the audit keeps of a plan: the answer to a question is with the question."""
    arguments = json.loads(row["arguments"])
    return {"change": row["change"], **{name: arguments[name] for name in arguments if name != "data"}}


def _gone(plan_id: str) -> NotFound:
    return NotFound(
        f"there is no plan {plan_id:.80} of yours that is open",
        fix="it was confirmed already, or is over ten minutes old: ask for a new one",
    )
