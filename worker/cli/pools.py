"""`pools`: where runs execute, with rules, slots and backlog."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import OutputOption, argument
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of

app = typer.Typer(help="Pools: where runs execute, their rules and backlog, what hosts of them may do.")

COLUMNS = ("name", "requires", "waiting", "running", "workers", "hosts", "slots")
APPROVALS = (
    *("pool", "handler", "distribution", "digest", "secrets", "scopes", "timeout", "max_attempts"),
    *("max_concurrent", "approved", "approved_at", "approved_by", "hosts"),
)
NameArgument = Annotated[str, argument("POOL", "The name of the pool.")]

HandlerArgument = Annotated[str, argument("HANDLER", "The name of the handler.")]


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


@app.command("approvals")
def approvals(
    context: typer.Context,
    pool: Annotated[str | None, argument("[POOL]", "One pool; by default those of all hosts.")] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """List what hosts declare of their handlers beyond what needs no approval; those not approved first.

    Without an approval a handler gets no secrets, and the scopes, timeout and attempts of the definition or
    the defaults. `digest` is of all that is declared for the handler in the pool.
    """
    from worker.operations.approvals import command_of, list_approvals

    with session_of(context).database() as database:
        rows = list_approvals(database, pool)
    print_rows(rows, output, columns=APPROVALS, key="digest")
    if output is Format.TABLE:
        for row in rows:
            if not row["approved"]:
                say(f"approve: {command_of(row)}")


@app.command("approve")
def approve(
    context: typer.Context,
    pool: NameArgument,
    handler: HandlerArgument,
    digest: Annotated[str, argument("DIGEST", "As `pools approvals` prints it, once you have read it.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Approve what hosts of a pool declare of a handler, in place of an earlier approval.

    Runs that wait for it start at once. Exit 3 if no host of the pool declares the handler, 5 if they
    declare something else than what has this digest.
    """
    from worker.operations.approvals import approve as approve_digest

    session = session_of(context)
    with session.database() as database:
        row = approve_digest(database, pool, handler, digest, actor=session.actor)
    print_row(row, output, key="digest")


@app.command("revoke")
def revoke(
    context: typer.Context,
    pool: NameArgument,
    handler: HandlerArgument,
    output: OutputOption = Format.TABLE,
) -> None:
    """Withdraw the approval of a handler in a pool; exit with 3 if it has no approval. Running runs go on."""
    from worker.operations.approvals import revoke as revoke_approval

    session = session_of(context)
    with session.database() as database:
        row = revoke_approval(database, pool, handler, actor=session.actor)
    print_row(row, output, key="digest")
