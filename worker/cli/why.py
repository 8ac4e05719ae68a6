"""`runs why`: in words, what became of a run or of an instant that has none."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from worker.cli.options import DefinitionOption, OrgOption, OutputOption, read_instant
from worker.cli.output import Format, print_row
from worker.cli.session import session_of
from worker.errors import UsageError

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
