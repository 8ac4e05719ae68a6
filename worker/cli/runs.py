"""`runs`: what became of each scheduled time, why, and how to cancel or retry."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_instant,
    read_since,
)
from worker.cli.output import Format, in_words, print_log, print_row, print_rows, say
from worker.cli.session import Invocation, session_of
from worker.errors import CanaryFailed, Conflict, UsageError

if TYPE_CHECKING:
    from worker.store.database import Database

# Runs cancelled by one command, unless `--limit` says otherwise.
LIMIT = 1000

CANCEL_FOUND = ("id", "org", "definition", "state", "reason", "detail", "scheduled_for", "started_at")
DONE = ("id", "org", "definition", "scheduled_for", "state", "left")

Row = dict[str, Any]


def cancel(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="One run's id, as `runs list` prints it.")
    ] = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: SinceOption = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Only those that wait for this reason.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be cancelled.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Cancel at most so many.")
    ] = LIMIT,
    output: OutputOption = Format.TABLE,
) -> None:
    """Cancel a run: one that waits ends at once, one that is on is asked to stop. Returns at once.

    Without RUN all unfinished ones that the options mean, waiting and running ones unless
    --state says which, the oldest first.
    """
    session = session_of(context)
    chosen: Row = {"definition": definition, "state": state, "reason": reason}
    chosen["since"] = read_since(since, session.clock)
    given = {name: value for name, value in chosen.items() if value is not None}
    if run is not None:
        if given or org is not None or dry_run:
            raise UsageError("a run's id stands alone", fix="leave the id out to choose runs by options")
        _cancel_one(session, run, output)
    elif not given and org is None:
        raise UsageError("nothing says which runs", fix="name a run, or choose with --org, --since, …")
    else:
        _cancel_many(session, given, org, dry_run, limit, output)


def _cancel_one(session: Invocation, run: str, output: Format) -> None:
    from worker.operations.runs import cancel as cancel_run

    with session.database() as database:
        row = cancel_run(database, run, actor=session.actor)
    print_row(row, output)


def _cancel_many(
    session: Invocation, given: Row, org: str | None, dry_run: bool, limit: int, output: Format
) -> None:
    from worker.operations.runs import cancel_many, matching
    from worker.store.edit_runs import Cancellable

    which = Cancellable(**given)
    with session.database() as database:
        if dry_run:
            rows = list(matching(database, which, org=org, limit=limit))
            print_rows(rows, output, columns=CANCEL_FOUND)
            say(f"{len(rows)} would be cancelled")
            return
        rows = []
        try:
            # One after the other, so that what was done is printed whatever stops it.
            rows.extend(cancel_many(database, which, actor=session.actor, org=org, limit=limit))
        except BaseException:
            if rows:
                print_rows(rows, output, columns=DONE)
            raise
        print_rows(rows, output, columns=DONE)
    states = [row["state"] for row in rows]
    say(
        f"{states.count('cancelled')} cancelled, {states.count('running')} asked to stop, "
        f"{states.count(None)} had ended or started meanwhile"
    )
    if len(rows) == limit:
        say(f"there may be more than {limit}: give the command again")


# Runs retried by one command, unless `--limit` says otherwise; seconds between two looks at canaries.
POLL = 0.5

RETRY_FOUND = ("id", "org", "definition", "state", "reason", "detail", "scheduled_for", "finished_at")
MADE = ("id", "retry_of", "org", "definition", "scheduled_for", "state", "left")


def retry(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="One run's id, as `runs list` prints it.")
    ] = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="WHEN", help="Only those that ended since then: 2h (ago)."),
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Only those that ended for this reason.")
    ] = None,
    cause: Annotated[
        str | None,
        typer.Option("--cause", metavar="TEXT", help="Only those whose last attempt has this error_cause."),
    ] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Start where the old run's last checkpoint was.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be retried.")] = False,
    canary: Annotated[
        int,
        typer.Option("--canary", metavar="N", min=0, help="Retry N, and the rest only if those succeed."),
    ] = 0,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Retry at most so many.")] = LIMIT,
    output: OutputOption = Format.TABLE,
) -> None:
    """Make a new run of one that has ended, for the same instant, and print it; the old one stays.

    Without RUN all that the options mean, failed ones unless --state says otherwise, the oldest
    end first, each that was not retried yet.
    """
    session = session_of(context)
    chosen: Row = {"definition": definition, "state": state, "reason": reason, "cause": cause}
    chosen["since"] = read_since(since, session.clock)
    given = {name: value for name, value in chosen.items() if value is not None}
    if run is not None:
        if given or org is not None or dry_run or canary:
            raise UsageError("a run's id stands alone", fix="leave the id out to choose runs by options")
        _retry_one(session, run, from_checkpoint, output)
    elif not given and org is None:
        raise UsageError("nothing says which runs", fix="name a run, or choose with --org, --since, …")
    else:
        _retry_many(session, given, org, from_checkpoint, dry_run, canary, limit, output)


def _retry_one(session: Invocation, run: str, from_checkpoint: bool, output: Format) -> None:
    from worker.operations.runs import retry as retry_run

    with session.database() as database:
        row = retry_run(database, run, actor=session.actor, from_checkpoint=from_checkpoint)
    print_row(row, output)


def _retry_many(
    session: Invocation,
    given: Row,
    org: str | None,
    from_checkpoint: bool,
    dry_run: bool,
    canary: int,
    limit: int,
    output: Format,
) -> None:
    from worker.operations.runs import matching, retry_many
    from worker.store.edit_runs import Retryable

    which = Retryable(**given)
    with session.database() as database:
        if dry_run:
            print_rows(list(matching(database, which, org=org, limit=limit)), output, columns=RETRY_FOUND)
            return
        making = retry_many(
            database, which, actor=session.actor, org=org, from_checkpoint=from_checkpoint, limit=limit
        )
        rows: list[Row] = []
        try:
            if canary:
                _try_first(database, making, canary, rows)
            rows.extend(making)
        except BaseException:
            if rows:
                _print_made(rows, output)
            raise
        _print_made(rows, output)
    if len(rows) == limit:
        say(f"there may be more than {limit}: give the command again")
    left = [row for row in rows if row["id"] is None]
    if left:
        raise Conflict(
            f"{len(left)} of {len(rows)} runs were left: {left[0]['left']}",
            fix="give the command again once nothing stands in their way",
        )


def _try_first(database: Database, making: Iterator[Row], count: int, rows: list[Row]) -> None:
    """Retry so many, wait for their ends, and raise where one did not succeed."""
    made: list[Row] = []
    for row in making:
        rows.append(row)
        if row["id"] is not None:
            made.append(row)
            if len(made) == count:
                break
    for row, end in zip(made, _ends(database, made), strict=True):
        row["state"] = end["state"]
    bad = [row for row in made if row["state"] != "succeeded"]
    if bad:
        raise CanaryFailed(
            f"{len(bad)} of the {len(made)} retried first did not succeed; nothing else was retried",
            fix=f"`runs why {bad[0]['id']}` says why",
        )


def _ends(database: Database, made: Iterable[Row]) -> list[Row]:
    """The rows of these runs once each has ended; tells on stderr how far they are."""
    from worker.store.lists import runs as run_lists

    ids = [row["id"] for row in made]
    told: dict[str, str] = {}
    while True:
        with database.autocommit() as connection:
            found = [run_lists.run_for_all_orgs(connection, run_id) for run_id in ids]
        ended = sum(row["finished_at"] is not None for row in found)
        for row in found:
            how = " ".join(filter(None, (row["state"], row["reason"], in_words(row["progress"]))))
            if told.get(row["id"]) != how:
                told[row["id"]] = how
                say(
                    f"{ended} of {len(ids)} ended; run {row['id']} of {row['org']}/{row['definition']}: {how}"
                )
        if ended == len(ids):
            return found
        time.sleep(POLL)


def _print_made(rows: list[Row], output: Format) -> None:
    if output is Format.ID:
        rows = [row for row in rows if row["id"] is not None]
    print_rows(rows, output, columns=MADE)


WIDTH = 100


def why(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="The run's id, as `runs list` prints it.")
    ] = None,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="T", help="An instant of --org's --definition instead.")
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Say in words what became of a run, or why an instant has none; what is kept, and what to do."""
    from worker.operations import why as operation

    session = session_of(context)
    with session.database() as database, database.autocommit() as connection:
        if run is not None and definition is None and at is None:
            found = operation.why(connection, run, org=org)
        elif run is None and org is not None and definition is not None and at is not None:
            instant = read_instant(at, session.clock, option="--at")
            found = operation.why_instant(connection, org, definition, instant, now=database.now(connection))
        else:
            raise UsageError(
                "it is not said what to explain",
                fix="name either a RUN, or an instant by --org ORG --definition NAME --at T",
            )
    if output is Format.TABLE:
        print(textwrap.fill(found.sentence, WIDTH, break_long_words=False, break_on_hyphens=False))
    else:
        print_row(found.as_row(), output, key="run")


# Seconds between two looks at a log that grows.

app = typer.Typer(help="Runs: list, show, why, cancel, retry, logs.")
app.command("why")(why)
app.command("retry")(retry)
app.command("cancel")(cancel)

COLUMNS = (
    "id",
    "org",
    "definition",
    "state",
    "reason",
    "detail",
    "scheduled_for",
    "attempt",
    "started_at",
    "finished_at",
    "progress",
)
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `runs list` prints it.")]


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List runs, newest first."""
    from worker.store.lists import runs as listing

    session = session_of(context)
    narrowed: dict[str, Any] = {
        "definition": definition,
        "state": state,
        "since": read_since(since, session.clock),
        "limit": limit,
        "after": after,
    }
    with session.database() as database, database.autocommit() as connection:
        if org is None:
            rows = listing.runs_for_all_orgs(connection, **narrowed)
        else:
            rows = listing.runs(connection, org, **narrowed)
    if output is Format.TABLE:
        rows = [row | {"progress": in_words(row["progress"])} for row in rows]
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("show")
def show(context: typer.Context, run: RunArgument, output: OutputOption = Format.TABLE) -> None:
    """Show one run with its attempts, checkpoint, claims (redacted) and spec."""
    from worker.store.lists import runs as listing

    with session_of(context).database() as database, database.autocommit() as connection:
        row = listing.run_for_all_orgs(connection, run)
    print_row(row, output)


@app.command("logs")
def logs(
    context: typer.Context,
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the run has ended.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Print what a run logged and printed, all attempts one after the other."""
    from worker.store.lists import runs as run_lists

    if follow and output is Format.JSON:
        raise UsageError("--follow prints line by line", fix="use -o jsonl")
    rows: list[dict[str, Any]] = []
    with session_of(context).database() as database, database.autocommit() as connection:
        last = run_lists.START
        while True:
            found = run_lists.run_for_all_orgs(connection, run)
            page = run_lists.lines_for_all_orgs(connection, found["id"], after=last)
            if output is Format.JSON:
                rows += page
            else:
                print_log(page, output)
            if page:
                last = (page[-1]["attempt"], page[-1]["seq"])
            elif not follow or found["finished_at"] is not None:
                break
            else:
                time.sleep(POLL)
    if output is Format.JSON:
        print_rows(rows, output, columns=())
