"""`definitions backfill` and `definitions backfills`: let instants of the past run, a few at a time."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    OutputOption,
    read_instant,
)
from worker.cli.orgs import OrgArgument
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import session_of

COLUMNS = ("id", "org", "definition", "range_from", "range_until", "state", "ended", "made", "instants")


def backfill(
    context: typer.Context,
    org: OrgArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The definition's name, unique in its org.")],
    start: Annotated[
        str, typer.Option("--from", metavar="T", help="From this instant on: 2027-01-01T08:00:00Z, 2d (ago).")
    ],
    until: Annotated[
        str, typer.Option("--until", metavar="T", help="Until before this instant, which has passed.")
    ],
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="At most so many unfinished at once.")
    ] = 1,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop the backfill of this range; what runs of it goes on.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Let every instant of a range run once more, and print the backfill.

    The same range again adds nothing; one that was cancelled goes on where it was.
    """
    from worker.operations import backfill as operation

    session = session_of(context)
    first = read_instant(start, session.clock, option="--from")
    end = read_instant(until, session.clock, option="--until")
    with session.database() as database:
        if cancel:
            row = operation.cancel_backfill(database, org, name, start=first, until=end, actor=session.actor)
        else:
            row = operation.backfill(
                database, org, name, start=first, until=end, limit=limit, actor=session.actor
            )
    print_row(row, output)


def backfills(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List backfills, newest first, with how many of their instants have run."""
    from worker.store import backfills as listing

    with session_of(context).database() as database, database.autocommit() as connection:
        if org is None:
            rows = listing.backfills_for_all_orgs(connection, definition=definition, limit=limit, after=after)
        else:
            rows = listing.backfills(connection, org, definition=definition, limit=limit, after=after)
    print_rows(rows, output, columns=COLUMNS, limit=limit)
