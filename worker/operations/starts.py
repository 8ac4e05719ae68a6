"""Starts: workers make the runs that products have started in their own transactions.

A start becomes exactly one run. What the API would refuse is said by the run: an org that is paused keeps it
waiting, and it is refused, with the API's text, if its org or definition starts no runs, if its params are
wrong, or if an unfinished run keeps it out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, WorkerError
from worker.ids import ALL_ORGS, DefinitionId
from worker.model.definitions.definition import Definition, from_spec
from worker.model.definitions.fields import refusal
from worker.model.definitions.units import TOO_DEEP
from worker.model.runs.run import MadeRuns, NewRun, Swept
from worker.operations.handlers import Handlers
from worker.operations.runs import checked_params, new_run, overlap_problem, require_active
from worker.store import definitions, firing, starts
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.store.starts import RefusedStart, Start
from worker.store.sweeps import EndCounts

# Definitions, and runs of all of them together, in one transaction: some 50 ms of work.
DEFINITIONS = 100
RUNS = 500


def make_runs(
    database: Database,
    after: DefinitionId | None = None,
    without: Collection[DefinitionId] = (),
    *,
    looking: Database | None = None,
) -> MadeRuns:
    """Make the next runs of committed starts, in one transaction; those of definitions after `after` first.

    Definitions in `without` are passed. `looking` is the database to look for starts with, if not the same.
    Of each definition, runs are made in the order of insertion, one that has a `not_before` in the place of
    that time.
    """
    place, looking = after or starts.BEFORE_ALL, looking or database
    with looking.autocommit() as connection:
        is_any_late, found = starts.due(connection, place, DEFINITIONS)
    if is_any_late:
        with database.transaction() as connection:
            starts.wake(connection)
        with looking.autocommit() as connection:
            _, found = starts.due(connection, place, DEFINITIONS)
    passed = found[-1] if len(found) == DEFINITIONS else None
    if not (wanted := [id_ for id_ in found if id_ not in without]):
        return MadeRuns(passed=passed)
    with database.transaction() as connection:
        return replace(_make(connection, wanted), passed=passed)


def _make(connection: Connection, wanted: Sequence[DefinitionId]) -> MadeRuns:
    locked, taken = starts.lock(connection, wanted, RUNS)
    if not taken:
        return MadeRuns()
    # Runs start in the order of this time: a worker that held the lock before has an earlier one.
    at = database_now(connection)
    handlers = Handlers(connection)
    rows = {row["id"]: row for row in definitions.read(connection, ALL_ORGS, locked)}
    read: dict[DefinitionId, Definition] = {}
    unreadable: dict[DefinitionId, tuple[str, str, str]] = {}
    for id_, row in rows.items():
        try:
            read[id_] = from_spec(row["org"], row["name"], row["spec"])
        except WorkerError as error:
            # The spec of another release: another worker may know it.
            unreadable[id_] = row["org"], row["name"], error.message
    waiting: list[NewRun] = []
    refused: list[RefusedStart] = []
    made = [start for start in taken if start.definition_id in read]
    for start in made:
        row, definition = rows[start.definition_id], read[start.definition_id]
        run = _run_of(start, row, definition, handlers, at)
        try:
            _require_startable(row)
            waiting.append(replace(run, params=_params_of(start, row, definition, handlers)))
        except WorkerError as error:
            reason = _reason_of(row, error)
            refused.append(RefusedStart(run, reason, error.message))
    counts = EndCounts()
    overlapped = firing.write(connection, waiting, counts=counts).overlapped if waiting else ()
    others = starts.blocking(connection, (run.definition_id for run in overlapped)) if overlapped else {}
    # What was in the way may have ended meanwhile: then the next step makes the run.
    free = {run.id for run in overlapped if run.definition_id not in others}
    for run in overlapped:
        if run.id not in free:
            problem = overlap_problem(others[run.definition_id], run.overlap)
            refused.append(RefusedStart(run, "overlap", problem))
    names = {id_: row["name"] for id_, row in rows.items()}
    starts.insert_refused(connection, refused, names, counts)
    done = [start.id for start in made if start.id not in free]
    starts.mark_made(connection, done)
    return MadeRuns(len(done) - len(refused), _swept(refused, rows), unreadable=unreadable)


def _run_of(start: Start, row: Row, definition: Definition, handlers: Handlers, at: datetime) -> NewRun:
    """The run of a start, without its params."""
    run = new_run(row, definition, handlers, origin="manual", scheduled_for=start.at, at=at)
    asked_by = f"product:{start.login}"
    return replace(run, id=start.id, idempotency_key=start.id, created_by=asked_by, created_at=start.at)


def _require_startable(row: Row) -> None:
    """Refuse a definition that starts no runs: of a paused org they wait. Raises Conflict."""
    require_active(row | {"org_state": "active"} if row["org_state"] == "paused" else row)


def _params_of(
    start: Start, row: Row, definition: Definition, handlers: Handlers
) -> Mapping[str, Any] | None:
    """The definition's params and those given, as for a run by hand; None if none were given.

    Raises:
        DefinitionError: the handler does not accept them.
    """
    if start.params is None:
        return None
    try:
        given = json.loads(start.params)
    except (RecursionError, ValueError) as error:
        # PostgreSQL takes deeper JSON and longer integers than Python.
        problem = TOO_DEEP if isinstance(error, RecursionError) else "a number has too many digits"
        raise refusal(problem, f"definition {row['org']}/{row['name']}", "params") from error
    return checked_params(row, definition, handlers, {**row["spec"].get("params", {}), **given}, {})


def _reason_of(row: Row, error: WorkerError) -> str:
    if not isinstance(error, Conflict):
        return "params_invalid"
    return "org_inactive" if row["org_state"] != "active" else "definition_closed"


def _swept(refused: Sequence[RefusedStart], rows: Mapping[DefinitionId, Row]) -> list[Swept]:
    return [
        Swept(run.id, run.org_id, run.definition_id, row["org"], row["name"], 0, "refused", reason)
        for run, reason, _ in refused
        for row in (rows[run.definition_id],)
    ]
