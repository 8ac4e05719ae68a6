"""`runs`: what became of each instant, and what to do about one run."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from worker.cli import cancel, retry, why
from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_since,
)
from worker.cli.output import Format, in_words, print_log, print_row, print_rows
from worker.cli.session import session_of
from worker.errors import UsageError

# Seconds between two looks at a log that grows.
POLL = 0.5

app = typer.Typer(help="Runs: list, show, why, cancel, retry, logs.")
app.command("why")(why.why)
app.command("retry")(retry.retry)
app.command("cancel")(cancel.cancel)

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
    from worker.store import run_listing as listing

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
    from worker.store import run_listing as listing

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
    from worker.store import log_listing, run_listing

    if follow and output is Format.JSON:
        raise UsageError("--follow prints line by line", fix="use -o jsonl")
    rows: list[dict[str, Any]] = []
    with session_of(context).database() as database, database.autocommit() as connection:
        last = log_listing.START
        while True:
            found = run_listing.run_for_all_orgs(connection, run)
            page = log_listing.lines_for_all_orgs(connection, found["id"], after=last)
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
