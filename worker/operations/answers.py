"""Answers: what a person or a program says to a run that waits for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Connection

from worker.errors import AccessDenied, Conflict, NotFound, UsageError
from worker.handlers.json_text import NotStorable, to_json_text
from worker.handlers.steps import StepError, check_name
from worker.handlers.waits import BATCH, BUDGET, CHILDREN, LIMIT, SLEEP
from worker.ids import OrgId, RunId
from worker.model.runs.run import step_label
from worker.model.runs.waits import MAX_ANSWERED, MAX_EARLY, MAX_WAITS, is_allowed, is_open_question
from worker.model.search import hint_of
from worker.operations.budgets import answer_budget
from worker.operations.bulk import matching
from worker.operations.runs import require_run
from worker.store import audit, waits
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.edit_runs import Cancellable
from worker.store.lists import runs as run_lists
from worker.store.lists.rows import ChangeOutcome, WaitRow
from worker.telemetry.masking import masker

# Open questions that an error names.
MAX_NAMED = 5


def answer(
    database: Database,
    run_id: str,
    name: str,
    data: Any,
    *,
    actor: str,
    occurrence: int = 1,
    org: str | None = None,
) -> WaitRow:
    """Answer a wait of an unfinished run, and let the run go on; returns the wait as `runs show` has it.

    The first answer counts. One that comes before the run waits is kept, at most `MAX_EARLY` of a run; while
    it has an open question, only what it waits for is answered. With `org`, only that org's runs are found,
    and its budgets cannot be answered. The answer to a budget's question is `{"by": N}`, which raises the
    budget until its period ends (that of one run for this run), or false, which fails the run.

    Raises:
        NotFound: no such run.
        UsageError: an invalid name, occurrence or answer, or one that is not among the wait's options.
        AccessDenied: the question is for operators only.
        Conflict: it was answered already, its deadline has passed, the run waits for something else, or it
            has ended.
    """
    _check(name, occurrence)
    text = _checked(data)
    if org is not None and name.startswith(BUDGET):
        raise AccessDenied("only an operator may answer this question", fix="ask the operator of this worker")
    if name.startswith(BUDGET):
        return answer_budget(database, run_id, name, json.loads(text), actor=actor, occurrence=occurrence)
    with database.autocommit() as connection:
        owner = OrgId(require_run(connection, run_id, org)["org_id"])
    stored = json.loads(masker.mask(text, owner))
    with database.transaction() as connection:
        run = require_run(connection, run_id, org)
        org_id, wanted = OrgId(run["org_id"]), RunId(run["id"])
        attempt = waits.lock_attempt(connection, org_id, wanted)
        if attempt is None:
            raise Conflict(f"run {wanted} has ended", fix=f"see `runs show {wanted}`")
        now = database.now(connection)
        found = waits.find(connection, org_id, wanted, name, occurrence)
        what = step_label(name, None, occurrence)
        see = f"see `runs show {wanted}`"
        if found is None:
            # The run's row is locked: no question opens between this look and the write.
            _refuse_another(connection, org_id, wanted, name, occurrence, now)
            if waits.early(connection, org_id, wanted, most=MAX_EARLY) >= MAX_EARLY:
                raise Conflict(
                    f"run {wanted} has {MAX_EARLY} answers to waits that it has not reached, the limit",
                    fix=see,
                )
            waits.answer_early(connection, org_id, wanted, name, occurrence, stored, at=now, by=actor)
        elif found["answered_at"] is not None:
            raise Conflict(f"{what} of run {wanted} was answered already, by {found['answered_by']}", fix=see)
        elif found["kind"] != "answer":
            raise Conflict(f"{what} of run {wanted} is of kind {found['kind']}, which has no answer", fix=see)
        elif found["timed_out_at"] is not None or (found["until"] is not None and found["until"] <= now):
            raise Conflict(f"{what} of run {wanted} was not answered in time", fix=see)
        else:
            _check_option(found, stored)
            waits.answer(connection, found, stored, at=now, by=actor)
            if found["pending_attempt"] == attempt:
                waits.wake(connection, org_id, wanted, at=now)
        detail = {"wait": name, "occurrence": occurrence}
        audit.note(connection, org_id, "run.answer", wanted, detail, at=now, actor=actor)
        return run_lists.wait(connection, org_id, wanted, name, occurrence)


def answer_many(
    database: Database,
    which: Cancellable,
    name: str,
    data: Any,
    *,
    actor: str,
    limit: int,
    dry_run: bool = False,
) -> Iterator[ChangeOutcome]:
    """Give the same answer to each matching run that waits for `name`, as it is taken; yields the outcomes.

    Nothing is kept for runs that do not wait for it yet. `left` says why a run was left, else None. With
    `dry_run` nothing is answered.

    Raises:
        UsageError: an invalid name or answer.
    """
    _check(name, 1)
    _checked(data)
    for run in matching(database, which, org=None, limit=limit):
        row: Row = {key: run[key] for key in ("id", "org", "definition", "scheduled_for")}
        with database.autocommit() as connection:
            org_id = OrgId(require_run(connection, run["id"], None)["org_id"])
            found = list(filter(is_open_question, run_lists.waits_of(connection, org_id, RunId(run["id"]))))
        wait = next((each for each in found if each["name"] == name), None)
        row |= {"name": name, "occurrence": wait and wait["occurrence"], "left": None}
        if wait is None:
            waits_for = ", ".join(each["name"] for each in found) or "nothing"
            yield cast(ChangeOutcome, row | {"left": f"waits for {waits_for}, not {name}"})
            continue
        try:
            _check_option(wait, data)
            if not dry_run:
                answer(database, run["id"], name, data, actor=actor, occurrence=wait["occurrence"])
            yield cast(ChangeOutcome, row)
        except (Conflict, NotFound, UsageError) as error:
            yield cast(ChangeOutcome, row | {"left": error.message})


def _refuse_another(
    connection: Connection, org_id: OrgId, run_id: RunId, name: str, occurrence: int, now: datetime
) -> None:
    """Raise Conflict if the run waits for answers now, of which none has this name and occurrence.

    A misspelt name would be kept for a wait that never comes, and the run would go on waiting.
    """
    asked = waits.open_questions(connection, org_id, run_id, at=now)
    if not asked:
        return
    names = [step_label(wait["name"], None, wait["occurrence"]) for wait in asked]
    what = step_label(name, None, occurrence)
    raise Conflict(
        f"run {run_id} waits for {', '.join(names[:MAX_NAMED])}, not {what}",
        fix=f"{hint_of(what, names)}`runs show {run_id}` lists what it waits for; an answer to a later wait "
        "is kept only while none is open",
    )


def _check_option(wait: Mapping[str, Any], data: Any) -> None:
    """Raise UsageError for an answer that is not among the options of a wait."""
    if not is_allowed(wait, data):
        what = step_label(wait["name"], None, wait["occurrence"])
        options = " / ".join(json.dumps(option, ensure_ascii=False) for option in wait["options"])
        raise UsageError(f"the answer to {what} is one of {options}", fix="give one of them, as JSON")


def _check(name: str, occurrence: int) -> None:
    try:
        check_name("answer", name)
    except StepError as error:
        raise UsageError(str(error), fix="`runs show` lists what a run waits for") from None
    if name == SLEEP:
        raise UsageError(
            "a sleep has no answer", fix="name what the handler waits for, as `runs show` lists it"
        )
    if name.startswith((LIMIT, CHILDREN, BATCH)):
        # Kept for a wait to come, it would fail the run.
        raise UsageError(
            f"{name} is not a question: a wait of this name has no answer",
            fix="name what the handler waits for, as `runs show` lists it",
        )
    if not 1 <= occurrence <= MAX_WAITS:
        raise UsageError(
            f"occurrence {occurrence} is not between 1 and {MAX_WAITS}",
            fix="1 is the first wait of that name",
        )


def _checked(data: Any) -> str:
    """The answer as JSON text. Raises UsageError."""
    try:
        return to_json_text(data, "answer", MAX_ANSWERED)
    except NotStorable as error:
        raise UsageError(str(error), fix="give JSON of at most 64 KiB") from None
