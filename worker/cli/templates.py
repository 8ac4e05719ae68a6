"""`templates`: one definition for every org that a selector matches; `apply` adds and changes them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from worker.cli.completion import names
from worker.cli.lists import add_list
from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row
from worker.cli.session import change, session_of
from worker.ids import ALL_ORGS
from worker.store.lists import TEMPLATES

app = typer.Typer(help="Templates: list, show, close. `apply` adds and changes them.")

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The template's name.", autocompletion=names("template")),
]

add_list(app, TEMPLATES, cells={"reached": lambda row: f"{row['orgs_done']}/{row['orgs_total']} orgs"})


@app.command("show")
def show(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Show one template with its whole spec."""
    from worker.store.lists.read import template

    with session_of(context).database() as database, database.autocommit() as connection:
        row = template(connection, ALL_ORGS, name)
    print_row(row, output)


@app.command("close")
def close(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Close a template and, org by org, the definitions it made; their history stays."""
    from worker.operations.templates import close_template

    change(context, output, partial(close_template, name=name))
