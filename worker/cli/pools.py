"""`pools`: where runs execute, with rules, slots and backlog."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import session_of

app = typer.Typer(help="Pools: where runs execute, with their rules, slots and backlog.")

COLUMNS = ("name", "requires", "waiting", "running", "workers", "hosts", "slots")
NameArgument = Annotated[str, typer.Argument(metavar="POOL", help="The name of the pool.")]


@app.command("list")
def list_(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """List the pools that are served, waited for or have stored rules.

    `waiting` are the runs that could start if there were slots, `slots` those of all workers and hosts
    that serve the pool.
    """
    from worker.operations.pools import list_pools

    with session_of(context).database() as database:
        rows = list_pools(database)
    print_rows(rows, output, columns=COLUMNS, key="name")


@app.command("forget")
def forget(context: typer.Context, name: NameArgument, output: OutputOption = Format.TABLE) -> None:
    """Forget the stored rules of a pool, once no configuration has them; exit 3 if there are none.

    Workers enforce what the one that started last with `[pools.POOL] requires` has stored, also without that
    table in their own configuration.
    """
    from worker.operations.pools import forget_rules

    session = session_of(context)
    with session.database() as database:
        row = forget_rules(database, name, actor=session.actor)
    print_row(row, output, key="name")
