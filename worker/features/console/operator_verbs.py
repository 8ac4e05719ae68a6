"""`operators`: people and programs that work for all orgs, each with a token."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from worker.kit.options import argument, option
from worker.kit.output import Format, say
from worker.kit.session import Invocation, verb

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


@verb(app, "add")
def add(session: Invocation, name: NameArgument, role: RoleOption = OperatorRole.VIEWER) -> None:
    """Add an operator and print its token, once; exit 5 if the name is taken.

    Only the token's hash is stored. Every process accepts the token within 2 s.
    """
    from worker.features.console.operators import add_operator

    taken = [operator.name for operator in session.settings.web.operators]
    session.change(add_operator, name, role.value, taken=taken, key="token")
    if session.output is Format.TABLE:
        say("the token is not stored and cannot be shown again")


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the operators of the database and those of [[web.operators]] in worker.toml."""
    from worker.features.console.operators import list_operators

    with session.database() as database:
        rows = [{**row, "source": "database"} for row in list_operators(database)]
    unknown = {"id": None, "created_at": None, "created_by": None, "source": "worker.toml"}
    rows += [{**unknown, "name": one.name, "role": one.role} for one in session.settings.web.operators]
    session.print_rows(sorted(rows, key=lambda row: str(row["name"])), COLUMNS, key="name")


@verb(app, "remove")
def remove(session: Invocation, name: NameArgument) -> None:
    """Remove an operator and end its sessions; the token is refused within 2 s. Exit 3 if it is unknown."""
    from worker.features.console.operators import remove_operator

    configured = [operator.name for operator in session.settings.web.operators]
    session.change(remove_operator, name, configured=configured, key="name")
