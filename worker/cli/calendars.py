"""`calendars`: dates on which nothing runs; `apply` adds and changes them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from worker.cli.lists import add_list
from worker.cli.options import OutputOption, argument
from worker.cli.output import Format, print_row
from worker.cli.session import change, session_of
from worker.store.lists import CALENDARS

app = typer.Typer(
    help="Calendars, dates on which nothing runs: list, show, remove. `apply` adds and changes them."
)

NameArgument = Annotated[str, argument("NAME", "The calendar's name.", of="calendar")]

add_list(app, CALENDARS)


@app.command("show")
def show(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Show one calendar with its dates, how many definitions name it, and which templates do."""
    from worker.store.lists.read import calendar

    with session_of(context).database() as database, database.autocommit() as connection:
        row = calendar(connection, name)
    print_row(row, output)


@app.command("remove")
def remove(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Remove a calendar; exit 5 while a definition or template names it."""
    from worker.operations.calendars import remove_calendar

    change(context, output, partial(remove_calendar, name=name))
