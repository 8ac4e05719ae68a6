"""`pools`: where runs execute, with rules, slots and backlog."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.options import argument
from worker.kit.output import Format, say
from worker.kit.session import Invocation, verb

app = typer.Typer(help="Pools: where runs execute, their rules and backlog, what hosts of them may do.")

COLUMNS = ("name", "requires", "waiting", "running", "workers", "hosts", "slots")
APPROVALS = (
    *(
        "pool",
        "handler",
        "distribution",
        "digest",
        "secrets",
        "scopes",
        "egress",
        "audiences",
        "children",
        "timeout",
    ),
    *("max_attempts", "max_concurrent", "approved", "approved_at", "approved_by", "hosts"),
)
NameArgument = Annotated[str, argument("POOL", "The name of the pool.")]

HandlerArgument = Annotated[str, argument("HANDLER", "The name of the handler.")]


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the pools that are served, waited for or have stored rules.

    `waiting` are the runs that could start if there were slots, `slots` those of all workers and hosts
    that serve the pool.
    """
    from worker.store.pools import overview

    with session.connection() as connection:
        rows = overview(connection)
    session.print_rows(rows, COLUMNS, key="name")


@verb(app, "forget")
def forget(session: Invocation, name: NameArgument) -> None:
    """Forget the stored rules of a pool, once no configuration has them; exit 3 if there are none.

    Workers enforce what the one that started last with `[pools.POOL] requires` has stored, also without that
    table in their own configuration.
    """
    from worker.operations.approvals import forget_rules

    session.change(forget_rules, name, key="name")


@verb(app, "approvals")
def approvals(
    session: Invocation,
    pool: Annotated[str | None, argument("[POOL]", "One pool; by default those of all hosts.")] = None,
) -> None:
    """List what hosts declare of their handlers beyond what needs no approval; those not approved first.

    Without an approval a handler gets no secrets, audiences and children, reaches no more than `api`, and
    has the scopes, timeout and attempts of the definition or the defaults. Where a host declares no
    egress, what workers declare or what is approved counts. `digest` is of all that is declared for
    the handler in the pool.
    """
    from worker.operations.approvals import command_of, list_approvals

    with session.database() as database:
        rows = list_approvals(database, pool)
    session.print_rows(rows, APPROVALS, key="digest")
    if session.output is Format.TABLE:
        for row in rows:
            if not row["approved"]:
                say(f"approve: {command_of(row)}")


@verb(app, "approve")
def approve(
    session: Invocation,
    pool: NameArgument,
    handler: HandlerArgument,
    digest: Annotated[str, argument("DIGEST", "As `pools approvals` prints it, once you have read it.")],
) -> None:
    """Approve what hosts of a pool declare of a handler, in place of an earlier approval.

    Runs that wait for it start at once. Exit 3 if no host of the pool declares the handler, 5 if they
    declare something else than what has this digest.
    """
    from worker.operations.approvals import approve as approve_digest

    session.change(approve_digest, pool, handler, digest, key="digest")


@verb(app, "revoke")
def revoke(session: Invocation, pool: NameArgument, handler: HandlerArgument) -> None:
    """Withdraw the approval of a handler in a pool; exit with 3 if it has no approval. Running runs go on."""
    from worker.operations.approvals import revoke as revoke_approval

    session.change(revoke_approval, pool, handler, key="digest")
