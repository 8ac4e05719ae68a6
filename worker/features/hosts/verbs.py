"""`host`, and `hosts`: machines that run handlers without the database, each with a token."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.options import argument, option
from worker.kit.output import Format, say
from worker.kit.session import Invocation, session_of, verb

app = typer.Typer(help="Machines that run handlers without the database, each with a token.")

COLUMNS = ("name", "pool", "state", "machine", "version", "seen_at", "pending", "created_by")
NameArgument = Annotated[str, argument("NAME", "1 to 63 letters, digits and . _ -")]
PoolOption = Annotated[str, option("--pool POOL", "The only pool that it takes runs of.")]


@verb(app, "add")
def add(session: Invocation, name: NameArgument, pool: PoolOption) -> None:
    """Add a host and print its token, once; exit 5 if the name is taken.

    Only the token's hash is stored. Put the token into the file that `token_file` in [host] of the host's
    configuration names.
    """
    from worker.features.hosts.operations import add_host

    session.change(add_host, name, pool, key="token")
    if session.output is Format.TABLE:
        say("the token is not stored and cannot be shown again")


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the hosts: ready, late (its lease has expired), stopped, crashed, silent or absent.

    Crashed: its lease expired while it ran something. Silent: while it ran nothing; it crashed, was cut off,
    or stopped while no worker answered. Absent: it has never started.
    `pending` are the handlers of which a host declares more than is approved; see `pools approvals`.
    """
    from worker.features.hosts.operations import list_hosts

    with session.database() as database:
        rows = list_hosts(database)
    session.print_rows(rows, COLUMNS, key="name", cells={"state": lambda row: row["end"] or row["state"]})


@verb(app, "remove")
def remove(session: Invocation, name: NameArgument) -> None:
    """Remove a host: its token is refused within 5 s, and its runs go to others. Exit 3 if it is unknown."""
    from worker.features.hosts.operations import remove_host

    session.change(remove_host, name, key="name")


def host(
    context: typer.Context,
    pool: Annotated[
        str | None, option("--pool POOL", "Refuse to start if the token is for another pool.")
    ] = None,
) -> None:
    """Run handlers for the workers in host.control, without the database and the key ring.

    Its configuration is that of config/host.toml. SIGTERM or Ctrl-C drains it.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.hosts.wiring import run as run_host
    from worker.settings import load

    name_process(ProcessName.HOST)
    session = session_of(context)
    raise typer.Exit(run_host(load(session.config, session.overrides, of_host=True), pool=pool))
