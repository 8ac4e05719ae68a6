"""`hosts`: machines that run handlers without the database, each with a token."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import OutputOption, argument, option
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of

app = typer.Typer(help="Machines that run handlers without the database, each with a token.")

COLUMNS = ("name", "pool", "state", "machine", "version", "seen_at", "pending", "created_by")
NameArgument = Annotated[str, argument("NAME", "1 to 63 letters, digits and . _ -")]
PoolOption = Annotated[str, option("--pool POOL", "The only pool that it takes runs of.")]


@app.command("add")
def add(
    context: typer.Context, name: NameArgument, pool: PoolOption, output: OutputOption = Format.TABLE
) -> None:
    """Add a host and print its token, once; exit 5 if the name is taken.

    Only the token's hash is stored. Put the token into the file that `token_file` in [host] of the host's
    configuration names.
    """
    from worker.operations.hosts import add_host

    session = session_of(context)
    with session.database() as database:
        row = add_host(database, name, pool, actor=session.actor)
    print_row(row, output, key="token")
    if output is Format.TABLE:
        say("the token is not stored and cannot be shown again")


@app.command("list")
def list_(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """List the hosts: ready, late (its lease has expired), stopped, crashed, silent or absent.

    Crashed: its lease expired while it ran something. Silent: while it ran nothing; it crashed, was cut off,
    or stopped while no worker answered. Absent: it has never started.
    `pending` are the handlers of which a host declares more than is approved; see `pools approvals`.
    """
    from worker.operations.hosts import list_hosts

    session = session_of(context)
    with session.database() as database:
        rows = list_hosts(database)
    print_rows(
        rows, output, columns=COLUMNS, key="name", cells={"state": lambda row: row["end"] or row["state"]}
    )


@app.command("remove")
def remove(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Remove a host: its token is refused within 5 s, and its runs go to others. Exit 3 if it is unknown."""
    from worker.operations.hosts import remove_host

    session = session_of(context)
    with session.database() as database:
        row = remove_host(database, name, actor=session.actor)
    print_row(row, output, key="name")
