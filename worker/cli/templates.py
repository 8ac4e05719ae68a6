"""`templates`: one definition for every org that a selector means; `apply` makes and changes them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    LimitOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_since,
)
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import change, session_of

app = typer.Typer(help="Templates: list, show, close. `apply` makes them.")

COLUMNS = ("name", "orgs", "handler", "schedule", "state", "revision", "reached")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The template's name.")]


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    state: StateOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List templates, newest first, with how many orgs the last change has reached."""
    from worker.store.lists import definitions as listing

    session = session_of(context)
    narrowed: dict[str, Any] = {
        "state": state,
        "since": read_since(since, session.clock),
        "limit": limit,
        "after": after,
    }
    with session.database() as database, database.autocommit() as connection:
        rows = listing.templates_for_all_orgs(connection, **narrowed)
    if output is Format.TABLE:
        rows = [row | {"reached": f"{row['orgs_done']}/{row['orgs_total']} orgs"} for row in rows]
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("show")
def show(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Show one template with its whole spec."""
    from worker.store.lists import definitions as listing

    with session_of(context).database() as database, database.autocommit() as connection:
        row = listing.template_for_all_orgs(connection, name)
    print_row(row, output)


@app.command("close")
def close(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Close a template and, org by org, the definitions it made; their history stays."""
    from worker.operations.templates import close_template

    change(context, output, partial(close_template, name=name))
