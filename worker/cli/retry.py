"""`runs retry`: one run that has ended, or all that have something in common, a few of them first."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import DefinitionOption, OrgOption, OutputOption, StateOption, read_since
from worker.cli.output import Format, in_words, print_row, print_rows, say
from worker.cli.session import Session, session_of
from worker.errors import CanaryFailed, Conflict, UsageError

if TYPE_CHECKING:
    from worker.store.database import Database

# Runs retried by one command, unless `--limit` says otherwise; seconds between two looks at canaries.
LIMIT = 1000
POLL = 0.5

FOUND = ("id", "org", "definition", "state", "reason", "detail", "scheduled_for", "finished_at")
MADE = ("id", "retry_of", "org", "definition", "scheduled_for", "state", "left")

Row = dict[str, Any]


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


def _retry_one(session: Session, run: str, from_checkpoint: bool, output: Format) -> None:
    from worker.operations.retry import retry as retry_run

    with session.database() as database:
        row = retry_run(database, run, actor=session.actor, from_checkpoint=from_checkpoint)
    print_row(row, output)


def _retry_many(
    session: Session,
    given: Row,
    org: str | None,
    from_checkpoint: bool,
    dry_run: bool,
    canary: int,
    limit: int,
    output: Format,
) -> None:
    from worker.operations.retry_many import matching, retry_many
    from worker.store.retryable import Which

    which = Which(**given)
    with session.database() as database:
        if dry_run:
            print_rows(list(matching(database, which, org=org, limit=limit)), output, columns=FOUND)
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
    from worker.store import run_listing

    ids = [row["id"] for row in made]
    told: dict[str, str] = {}
    while True:
        with database.autocommit() as connection:
            found = [run_listing.run_for_all_orgs(connection, run_id) for run_id in ids]
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
