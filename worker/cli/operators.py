"""`operators`: people and programs that work for all orgs, each with a token."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from worker.cli.options import OutputOption, argument, option
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of

app = typer.Typer(help="People and programs that work for all orgs, each with a token.")

COLUMNS = ("name", "role", "source", "created_at", "created_by")
NameArgument = Annotated[str, argument("NAME", "The name in the audit: 1 to 100 characters without a colon.")]


class OperatorRole(StrEnum):
    """What an operator may do."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


RoleOption = Annotated[
    OperatorRole, option("--role", "viewer reads; operator also changes runs; admin sees all.")
]


@app.command("add")
def add(
    context: typer.Context,
    name: NameArgument,
    role: RoleOption = OperatorRole.VIEWER,
    output: OutputOption = Format.TABLE,
) -> None:
    """Add an operator and print its token, once; exit 5 if the name is taken.

    Only the token's hash is stored. Every process accepts the token within 2 s.
    """
    from worker.operations.operators import add_operator

    session = session_of(context)
    taken = [operator.name for operator in session.settings.web.operators]
    with session.database() as database:
        row = add_operator(database, name, role.value, taken=taken, actor=session.actor)
    print_row(row, output, key="token")
    if output is Format.TABLE:
        say("the token is not stored and cannot be shown again")


@app.command("list")
def list_(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """List the operators of the database and those of [[web.operators]] in worker.toml."""
    from worker.operations.operators import list_operators

    session = session_of(context)
    with session.database() as database:
        rows = [{**row, "source": "database"} for row in list_operators(database)]
    unknown = {"id": None, "created_at": None, "created_by": None, "source": "worker.toml"}
    rows += [{**unknown, "name": one.name, "role": one.role} for one in session.settings.web.operators]
    print_rows(sorted(rows, key=lambda row: str(row["name"])), output, columns=COLUMNS, key="name")


@app.command("remove")
def remove(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Remove an operator and end its sessions; the token is refused within 2 s. Exit 3 if it is unknown."""
    from worker.operations.operators import remove_operator

    session = session_of(context)
    configured = [operator.name for operator in session.settings.web.operators]
    with session.database() as database:
        row = remove_operator(database, name, configured=configured, actor=session.actor)
    print_row(row, output, key="name")
