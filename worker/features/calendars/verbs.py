"""`calendars`: dates on which nothing runs; `apply` adds and changes them."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.lists import add_list
from worker.kit.options import argument
from worker.kit.session import Invocation, verb
from worker.store.lists import CALENDARS

app = typer.Typer(
    help="Calendars, dates on which nothing runs: list, show, remove. `apply` adds and changes them."
)

NameArgument = Annotated[str, argument("NAME", "The calendar's name.", of="calendar")]

add_list(app, CALENDARS)


@verb(app, "show")
def show(session: Invocation, name: NameArgument) -> None:
    """Show one calendar with its dates, how many definitions name it, and which templates do."""
    from worker.store.lists.read import calendar

    session.show(calendar, name)


@verb(app, "remove")
def remove(session: Invocation, name: NameArgument) -> None:
    """Remove a calendar; exit 5 while a definition or template names it."""
    from worker.features.calendars.operations import remove_calendar

    session.change(remove_calendar, name)
