"""`runs`: list, show, explain, cancel and retry runs; read their logs."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.clock import to_text
from worker.errors import CanaryFailed, Conflict, UsageError
from worker.ids import ALL_ORGS
from worker.kit.lists import add_list
from worker.kit.options import (
    DefinitionOption,
    OrgOption,
    QueryOption,
    SinceOption,
    StateOption,
    argument,
    option,
    read_query,
    read_since,
)
from worker.kit.output import AMOUNTS, RUN_CELLS, Format, amounts, in_lines, in_words, print_log, say
from worker.kit.progress import shown
from worker.kit.session import Invocation, verb
from worker.model.claims import without_digests
from worker.model.definitions.units import parse_time
from worker.model.runs.egress import statuses_in_words, waited_for
from worker.model.runs.run import step_label
from worker.model.runs.waits import is_open_question
from worker.store.lists import RUNS
from worker.store.lists.rows import BulkRow, ChangeOutcome, LogRow, RunDetail, WaitRow

if TYPE_CHECKING:
    from worker.model.search import Query
    from worker.store.database import Database

# The most runs that one command changes, by default.
LIMIT = 1000
# Seconds between two reads of runs that have not ended.
POLL = 0.5
# Steps of a run in a table.
STEPS = 20
WIDTH = 100

FOUND = ("id", "org", "definition", "state", "reason", "detail", "scheduled_for")
CANCELLED = ("id", "org", "definition", "scheduled_for", "state", "left")
ANSWERED = ("id", "org", "definition", "scheduled_for", "name", "left")
RETRIED = ("id", "retry_of", "org", "definition", "scheduled_for", "state", "left")

OptionalRun = Annotated[str | None, argument("RUN", "One run's id, or a short one that fits no other.")]
DryRunOption = Annotated[bool, option("--dry-run", "Only list the runs that would be changed.")]


def cancel(
    session: Invocation,
    run: OptionalRun = None,
    query: QueryOption = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: SinceOption = None,
    reason: Annotated[str | None, option("--reason REASON", "Only those that wait for this reason.")] = None,
    dry_run: DryRunOption = False,
    limit: Annotated[int, option("--limit N", "Cancel at most N runs.", min=1)] = LIMIT,
) -> None:
    """Cancel waiting runs, and ask running ones to stop; does not wait for these to end.

    Without RUN, cancels all unfinished runs that match the options, oldest first; --state
    selects waiting or running ones only.
    """
    from worker.operations import bulk
    from worker.operations import runs as operation
    from worker.store.edit_runs import Cancellable

    options = {"definition": definition, "state": state, "reason": reason, "query": query, "since": since}
    given = _filters(session, run, org, options, is_bulk=dry_run)
    with session.database() as database:
        if run is not None:
            session.print_row(operation.cancel(database, run, actor=session.actor))
            return
        which = Cancellable(**given)
        found = bulk.matching(database, which, org=org, limit=limit)
        if dry_run:
            _print_found(session, found, "started_at")
            return
        changes = map(_cancelled, bulk.change_many(database, which, found, actor=session.actor))
        rows = _carry_out(session, changes, CANCELLED, limit)
    states = [row["state"] for row in rows]
    say(
        f"{states.count('cancelled')} cancelled, {states.count('running')} asked to stop, "
        f"{states.count(None)} had ended or started meanwhile"
    )


def retry(
    session: Invocation,
    run: OptionalRun = None,
    query: QueryOption = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: Annotated[
        str | None, option("--since WHEN", "Only those that ended since then: 2h (ago), yesterday, monday.")
    ] = None,
    reason: Annotated[str | None, option("--reason REASON", "Only those that ended for this reason.")] = None,
    cause: Annotated[
        str | None, option("--cause TEXT", "Only those whose last attempt has this error_cause.")
    ] = None,
    from_checkpoint: Annotated[
        bool, option("--from-checkpoint", "Start from the old run's last checkpoint and its steps.")
    ] = False,
    again: Annotated[bool, option("--again", "Retry RUN even if it was retried already.")] = False,
    children: Annotated[
        bool, option("--children", "Start those runs again that RUN has started and that did not succeed.")
    ] = False,
    dry_run: DryRunOption = False,
    canary: Annotated[int, option("--canary N", "Retry N, and the rest only if those succeed.", min=0)] = 0,
    limit: Annotated[int, option("--limit N", "Retry at most N runs.", min=1)] = LIMIT,
) -> None:
    """Make a new run of an ended one, for the same scheduled time, and print it.

    Without RUN, retries all runs that match the options and were not retried yet, oldest
    end first; failed ones unless --state selects others. Exit 1 if one of --canary did not
    succeed, or waits for an answer: the rest is not retried.

    With --children an unfinished RUN waits for them in their places; one that has ended is retried
    from its checkpoint, and takes up the others.
    """
    from worker.operations import bulk
    from worker.operations import runs as operation
    from worker.store.edit_runs import Retryable

    options = {"definition": definition, "state": state, "reason": reason, "query": query, "since": since}
    given = _filters(session, run, org, options | {"cause": cause}, is_bulk=dry_run or canary > 0)
    if (again or children) and run is None:
        name = "--children" if children else "--again"
        raise UsageError(f"{name} needs a run's id", fix="many runs at once are retried once each")
    with session.database() as database:
        if run is not None:
            row = operation.retry(
                database,
                run,
                actor=session.actor,
                from_checkpoint=from_checkpoint,
                again=again,
                only_children=children,
            )
            session.print_row(row)
            return
        which = Retryable(**given)
        found = bulk.matching(database, which, org=org, limit=limit)
        if dry_run:
            _print_found(session, found, "finished_at")
            return
        retries = bulk.change_many(
            database, which, found, actor=session.actor, from_checkpoint=from_checkpoint
        )
        changes = map(_retried, retries)
        rows = _carry_out(
            session, changes, RETRIED, limit, lambda rows: _try_first(database, changes, canary, rows)
        )
    left = [row for row in rows if row["id"] is None]
    if left:
        raise Conflict(
            f"{len(left)} of {len(rows)} runs were not retried: {left[0]['left']}",
            fix="repeat the command once nothing blocks them",
        )


def _filters(
    session: Invocation, run: str | None, org: str | None, options: Mapping[str, str | None], *, is_bulk: bool
) -> dict[str, Any]:
    """The options that select runs, read, without those that were not given.

    Raises:
        UsageError: both a run's id and such options, or neither.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name, read in (("since", read_since), ("query", read_query)):
        if name in given:
            given[name] = read(given[name], session.clock)
    if run is not None and (given or org is not None or is_bulk):
        raise UsageError(
            "a run's id cannot be combined with these options",
            fix="leave the id out to select runs by options",
        )
    if run is None and not given and org is None:
        raise UsageError("no runs are selected", fix="name a run, or select some with --org, --since, …")
    return given


def _print_found(session: Invocation, found: Iterable[dict[str, Any]], time_column: str) -> None:
    rows = list(found)
    session.print_rows(rows, (*FOUND, time_column))
    say(f"{len(rows)} would be changed")


def _cancelled(row: BulkRow) -> ChangeOutcome:
    return ChangeOutcome(
        id=row["id"],
        org=row["org"],
        definition=row["definition"],
        scheduled_for=row["scheduled_for"],
        state=None if row["left"] else row["state"],
        left=row["left"],
    )


def _retried(row: BulkRow) -> ChangeOutcome:
    """The outcome, with the id and state of the new run."""
    return ChangeOutcome(
        id=row["retried_as"],
        state="waiting" if row["retried_as"] else None,
        left=row["left"],
        retry_of=row["id"],
        org=row["org"],
        definition=row["definition"],
        scheduled_for=row["scheduled_for"],
    )


def _carry_out(
    session: Invocation,
    changes: Iterator[ChangeOutcome],
    columns: Sequence[str],
    limit: int,
    first: Callable[[list[ChangeOutcome]], None] = lambda rows: None,
) -> list[ChangeOutcome]:
    """Change runs one by one, and print the outcomes even if one raises."""
    rows: list[ChangeOutcome] = []
    failed = True
    try:
        first(rows)
        rows.extend(shown(changes, "runs"))
        failed = False
    finally:
        if rows or not failed:
            made = [row for row in rows if row["id"] is not None or session.output is not Format.ID]
            session.print_rows(made, columns)
    if len(rows) == limit:
        say(f"there can be more than {limit}: repeat the command")
    return rows


def _try_first(
    database: Database, changes: Iterator[ChangeOutcome], count: int, rows: list[ChangeOutcome]
) -> None:
    """Retry `count` runs and wait for their ends.

    Raises:
        CanaryFailed: one did not succeed, or waits for an answer.
    """
    canaries: list[ChangeOutcome] = []
    while len(canaries) < count and (row := next(changes, None)) is not None:
        rows.append(row)
        if row["id"] is not None:
            canaries.append(row)
    if not canaries:
        return
    ends = _ends(database, canaries)
    for row, end in zip(canaries, ends, strict=True):
        row["state"] = end["state"]
    bad = [row for row in canaries if row["state"] not in ("succeeded", "waiting")]
    if bad:
        raise CanaryFailed(
            f"{len(bad)} of the {len(canaries)} retried first did not succeed; nothing else was retried",
            fix=f"`runs why {bad[0]['id']}` explains it",
        )
    for end in ends:
        if (wait := _question_of(end)) is not None:
            number = "" if wait["occurrence"] == 1 else f" --occurrence {wait['occurrence']}"
            raise CanaryFailed(
                f"run {end['id']} of {end['org']}/{end['definition']} waits for an answer to {wait['name']}; "
                "nothing else was retried",
                fix=f"`runs answer {end['id']} {wait['name']}{number} --data JSON`, "
                "and repeat the command for the rest once the run has succeeded",
            )


def _question_of(run: RunDetail) -> WaitRow | None:
    """The first thing that somebody must answer before this run goes on; None if it runs or has ended."""
    return next(filter(is_open_question, run["waits"]), None) if run["state"] == "waiting" else None


def _ends(database: Database, runs: Iterable[ChangeOutcome]) -> list[RunDetail]:
    """The rows of these runs once each has ended or waits for an answer; prints their progress on stderr."""
    from worker.store.lists import runs as run_lists

    ids = [row["id"] for row in runs if row["id"] is not None]
    said: dict[str, str] = {}
    while True:
        with database.autocommit() as connection:
            found = [run_lists.run(connection, ALL_ORGS, run_id) for run_id in ids]
        ended = sum(row["finished_at"] is not None for row in found)
        for row in found:
            now = " ".join(filter(None, (row["state"], row["reason"], in_words(row["progress"]))))
            if said.get(row["id"]) != now:
                said[row["id"]] = now
                name = f"{row['org']}/{row['definition']}"
                say(f"{ended} of {len(ids)} ended; run {row['id']} of {name}: {now}")
        if all(row["finished_at"] is not None or _question_of(row) is not None for row in found):
            return found
        time.sleep(POLL)


def why(
    session: Invocation,
    run: OptionalRun = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    at: Annotated[
        str | None, option("--at T", "A scheduled time of --org's --definition instead of a run.")
    ] = None,
) -> None:
    """Explain the state of a run, or why a scheduled time has no run; what is retained, and what to do."""
    from worker.diagnosis import why as operation
    from worker.model.runs.clauses import row_of, sentence

    with session.database() as database, database.autocommit() as connection:
        if run is not None and definition is None and at is None:
            found = operation.why(connection, run, org=org)
        elif run is None and org is not None and definition is not None and at is not None:
            when = parse_time(at, session.clock, name="--at")
            found = operation.why_time(connection, org, definition, when, now=database.now(connection))
        else:
            raise UsageError(
                "nothing to explain is selected",
                fix="name either a RUN, or a scheduled time by --org ORG --definition NAME --at T",
            )
    if session.output is Format.TABLE:
        print(textwrap.fill(sentence(found), WIDTH, break_long_words=False, break_on_hyphens=False))
    else:
        session.print_row(row_of(found), key="run")


def answer(
    session: Invocation,
    run: Annotated[str | None, argument("[RUN]", "The run's id, or a short one that fits no other.")] = None,
    name: Annotated[
        str | None, argument("NAME", "What it waits for, as `runs show` lists it in `waits`.")
    ] = None,
    data: Annotated[
        str | None, option("--data JSON", 'The answer, such as true or {"approved": true}.')
    ] = None,
    query: QueryOption = None,
    occurrence: Annotated[int, option("--occurrence N", "Which wait of that name in the run.", min=1)] = 1,
    dry_run: Annotated[
        bool, option("--dry-run", "With -q: only list the runs that would be answered.")
    ] = False,
    limit: Annotated[int, option("--limit N", "With -q: answer at most N runs.", min=1)] = LIMIT,
) -> None:
    """Answer what a run waits for, so that it goes on; the first answer counts.

    An answer that comes before the run waits is kept. Exit 2 if it is not one of the wait's
    options; exit 5 if it was answered already, its deadline has passed, the run waits for
    something else, or it has ended.

    With -q instead of RUN, gives the same answer to all matching runs that wait for NAME now,
    oldest first; `left` says why one was left out, and the exit code is then 5.
    """
    from worker.operations.answers import answer as operation

    if query is not None and name is None:
        # The only one of the two that was given.
        run, name = None, run
    if name is None or data is None or (run is None) == (query is None):
        raise UsageError(
            "an answer needs a run or a search, what is waited for, and --data",
            fix="`runs answer RUN NAME --data true`, or `runs answer -q 'org:acme' NAME --data true`",
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError(
            f"--data: {data!r:.80} is not JSON", fix="""quote text, as in --data '"yes"'"""
        ) from None
    if run is None:
        _answer_many(session, read_query(query, session.clock), name, value, limit, dry_run=dry_run)
        return
    with session.database() as database:
        row = operation(database, run, name, value, actor=session.actor, occurrence=occurrence)
    session.print_row(row, key="name")


def _answer_many(
    session: Invocation,
    query: Query | None,
    name: str,
    value: Any,
    limit: int,
    *,
    dry_run: bool,
) -> None:
    """Answer all runs that match a search and wait for a name; raises Conflict if any was left."""
    from worker.handlers.waits import BUDGET
    from worker.operations.answers import answer_many
    from worker.store.edit_runs import Cancellable

    which = Cancellable(
        query=query, state="waiting", reason="budget" if name.startswith(BUDGET) else "answer"
    )
    with session.database() as database:
        changes = answer_many(database, which, name, value, actor=session.actor, limit=limit, dry_run=dry_run)
        rows = _carry_out(session, changes, ANSWERED, limit)
    left = [row for row in rows if row["left"] is not None]
    say(f"{len(rows) - len(left)} {'would be answered' if dry_run else 'answered'}")
    if left:
        raise Conflict(
            f"{len(left)} of {len(rows)} runs were left: {left[0]['id']}: {left[0]['left']}",
            fix=f"`runs show {left[0]['id']}` lists what it waits for",
        )


app = typer.Typer(help="Runs: list, show, why, answer, cancel, retry, logs.")
verb(app, "why")(why)
verb(app, "answer")(answer)
verb(app, "retry")(retry)
verb(app, "cancel")(cancel)

RunArgument = Annotated[str, argument("RUN", "The run's id, or a short one that fits no other.")]


add_list(app, RUNS, cells=RUN_CELLS, titles=True, short=True)


@verb(app, "show")
def show(session: Invocation, run: RunArgument) -> None:
    """Show one run with its attempts, checkpoint, steps, requests, claims (redacted) and spec.

    The table has the newest 20 steps without results; `-o json` has the newest 1,000, with results
    of at most 1 MiB together.
    """
    from worker.store.lists import runs as run_lists

    with session.connection() as connection:
        row = run_lists.run(connection, ALL_ORGS, run)
    session.print_row(_for_people(row) if session.output is Format.TABLE else row)


def _for_people(run: RunDetail) -> dict[str, Any]:
    """A run with readable errors and without digests; attempts without traces, few steps without results."""
    attempts = [
        {name: value for name, value in attempt.items() if name != "error_cause"}
        | {"error": attempt["error"] and f"{attempt['error']['type']}: {attempt['error']['message']}"}
        for attempt in run["attempts"]
    ]
    steps = [
        {
            "step": step_label(step["name"], step["key"], step["occurrence"]),
            **{name: step[name] for name in ("attempt", "started_at", "ended_at", "size")},
            "spends": amounts(step["spends"]),
        }
        for step in run["steps"][-STEPS:]
    ]
    egress = [{**row, "statuses": statuses_in_words(row["statuses"])} for row in run["egress"]]
    waited = waited_for(run["egress"])
    spends = [{**spent, "amount": AMOUNTS["amount"](spent)} for spent in run["spends"]]
    shown: dict[str, Any] = {"attempts": attempts, "steps": steps, "spends": spends, "egress": egress}
    shown |= {"claims": without_digests(run["claims"]), "error": in_lines(run["error"])}
    return {**run, **shown} | ({"limits": waited} if waited else {})


@verb(app, "logs")
def logs(
    session: Invocation,
    run: RunArgument,
    follow: Annotated[bool, option("--follow -f", "Go on printing until the run has ended.")] = False,
) -> None:
    """Print what a run logged and printed, all attempts one after the other, and the error of each.

    The frames of libraries in a traceback are only counted; `runs show -o json` has all of them.
    """
    from worker.store.lists import runs as run_lists

    if follow and session.output is Format.JSON:
        raise UsageError("--follow prints line by line", fix="use -o jsonl")
    rows: list[LogRow] = []
    with session.connection() as connection:
        last, errors = run_lists.START, _Errors(session.output)
        while True:
            found = run_lists.run(connection, ALL_ORGS, run)
            run = found["id"]
            page = run_lists.lines(connection, ALL_ORGS, found["id"], after=last)
            for attempt, lines in groupby(page, key=lambda line: line["attempt"]):
                errors.print(found, before=attempt)
                if session.output is Format.JSON:
                    rows += lines
                else:
                    print_log(list(lines), session.output)
            if page:
                last = (page[-1]["attempt"], page[-1]["seq"])
                continue
            errors.print(found)
            if not follow or found["finished_at"] is not None:
                break
            time.sleep(POLL)
    if session.output is Format.JSON:
        session.print_rows(rows, ())
    elif last == run_lists.START and not errors.printed:
        state = " ".join(filter(None, (found["state"], found["reason"])))
        say(f"run {found['id']} has logged nothing ({state})")


class _Errors:
    """Prints the error of each attempt once, for people, behind the attempt's lines."""

    def __init__(self, output: Format) -> None:
        self._output = output
        self._last = 0
        self.printed = False

    def print(self, run: RunDetail, before: int | None = None) -> None:
        """Print those of the attempts that have ended, or of those before this one."""
        for attempt in run["attempts"]:
            number = attempt["attempt"]
            if attempt["ended_at"] is None or not self._last < number < (before or number + 1):
                continue
            self._last = number
            if attempt["error"] is not None and self._output is Format.TABLE:
                self.printed = True
                print(f"{to_text(attempt['ended_at'])} attempt {number} {attempt['outcome']}:")
                for line in in_lines(attempt["error"]) or ():
                    print(f"    {line}")
        sys.stdout.flush()
