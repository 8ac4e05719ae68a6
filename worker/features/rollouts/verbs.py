"""`rollouts`: new versions step by step; `apply` adds and changes them."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.lists import add_list
from worker.kit.options import argument, option
from worker.kit.session import Invocation, verb
from worker.store.lists import ROLLOUTS

app = typer.Typer(
    help="New versions of handlers, step by step: list, show, plan, advance, halt, resume, finish, undo. "
    "`apply` adds and changes them."
)

NameArgument = Annotated[str, argument("NAME", "The rollout's name.")]
ReasonOption = Annotated[str, option("--reason TEXT", "Why, for the audit.")]

add_list(app, ROLLOUTS)


@verb(app, "show")
def show(session: Invocation, name: NameArgument) -> None:
    """Show one rollout with the numbers of both sides, its curves, and the orgs that moved last."""
    from worker.store.lists.rollouts import rollout

    session.show(rollout, name)


@verb(app, "plan")
def plan(session: Invocation, name: NameArgument) -> None:
    """Print the orgs, runs and days that each step needs at today's volume; changes nothing."""
    from worker.features.rollouts.operations import plan_steps

    with session.connection() as connection:
        rows = plan_steps(connection, name)
    session.print_rows(rows, ("step", "orgs", "runs_per_day", "runs", "days", "note"))


@verb(app, "advance")
def advance(
    session: Invocation,
    name: NameArgument,
    reason: Annotated[str | None, option("--reason TEXT", "Why, for the audit.")] = None,
    anyway: Annotated[bool, option("--anyway", "Also if the step has not shown yet what it must.")] = False,
) -> None:
    """Begin the first or the next step; exit 5 unless the step before is ready."""
    from worker.features.rollouts import operations

    session.change(operations.advance, name, reason=reason, anyway=anyway)


@verb(app, "halt")
def halt(session: Invocation, name: NameArgument, reason: ReasonOption) -> None:
    """Give new runs of all orgs the old version; running ones go on."""
    from worker.features.rollouts.operations import move

    session.change(move, name, "halt", reason=reason)


@verb(app, "resume")
def resume(session: Invocation, name: NameArgument, reason: ReasonOption) -> None:
    """Begin the step of a halted rollout again, with the orgs that it had."""
    from worker.features.rollouts.operations import move

    session.change(move, name, "resume", reason=reason)


@verb(app, "finish")
def finish(session: Invocation, name: NameArgument, reason: ReasonOption) -> None:
    """End a rollout: new runs of all its orgs take the new version."""
    from worker.features.rollouts.operations import move

    session.change(move, name, "finish", reason=reason)


@verb(app, "undo")
def undo(session: Invocation, name: NameArgument, reason: ReasonOption) -> None:
    """End a rollout for good: new runs of all orgs take the old version."""
    from worker.features.rollouts.operations import move

    session.change(move, name, "undo", reason=reason)
