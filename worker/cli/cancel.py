"""`runs cancel`: one run, or all unfinished ones that have something in common."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worker.cli.options import DefinitionOption, OrgOption, OutputOption, SinceOption, StateOption, read_since
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import Session, session_of
from worker.errors import UsageError

# Runs cancelled by one command, unless `--limit` says otherwise.
LIMIT = 1000

FOUND = ("id", "org", "definition", "state", "reason", "detail", "scheduled_for", "started_at")
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


def _cancel_one(session: Session, run: str, output: Format) -> None:
    from worker.operations.cancel import cancel as cancel_run

    with session.database() as database:
        row = cancel_run(database, run, actor=session.actor)
    print_row(row, output)


def _cancel_many(
    session: Session, given: Row, org: str | None, dry_run: bool, limit: int, output: Format
) -> None:
    from worker.operations.cancel_many import cancel_many, matching
    from worker.store.cancellable import Which

    which = Which(**given)
    with session.database() as database:
        if dry_run:
            rows = list(matching(database, which, org=org, limit=limit))
            print_rows(rows, output, columns=FOUND)
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
