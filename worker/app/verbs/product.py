"""`product`: the database logins of your product, and the orgs whose runs they may start."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.options import argument
from worker.kit.session import Invocation, verb

app = typer.Typer(
    help="Database logins of your product, which start runs in its own transactions: allow, list, revoke."
)

COLUMNS = ("login", "org", "member", "created_at", "created_by")
LoginArgument = Annotated[str, argument("LOGIN", "The login of the product's connections.")]


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the logins that may start runs, with the orgs of each; `*` stands for all.

    `member` says whether the login exists and is a member of the role `orgworker_product`, without which it
    cannot call `orgworker_start`.
    """
    from worker.operations.product import list_logins

    with session.database() as database:
        rows = list_logins(database)
    session.print_rows(rows, COLUMNS, key="login")


@verb(app, "allow")
def allow(
    session: Invocation,
    login: LoginArgument,
    orgs: Annotated[list[str], argument("ORG...", "The codes of the orgs; '*' for all.")],
) -> None:
    """Let a login start definitions of these orgs by `orgworker_start`; prints what it may start.

    Only on PostgreSQL. The login also needs `GRANT orgworker_product TO LOGIN`.
    """
    from worker.operations.product import allow as allow_orgs

    with session.database() as database:
        rows = allow_orgs(database, login, orgs, actor=session.actor)
    session.print_rows(rows, COLUMNS, key="login")


@verb(app, "revoke")
def revoke(
    session: Invocation,
    login: LoginArgument,
    orgs: Annotated[
        list[str] | None,
        argument("[ORG...]", "Codes of orgs; '*' for the row of all. Default: every row."),
    ] = None,
) -> None:
    """Revoke orgs from a login, and print what it may still start. Runs that it has started continue.

    Exit 3 if the login may not start one of them as it is.
    """
    from worker.operations.product import revoke as revoke_orgs

    with session.database() as database:
        rows = revoke_orgs(database, login, orgs or [], actor=session.actor)
    session.print_rows(rows, COLUMNS, key="login")
