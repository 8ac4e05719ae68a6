"""`limits`: limits of calls to other services; `apply` adds and changes them."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.kit.lists import add_list
from worker.kit.options import argument
from worker.kit.session import Invocation, verb
from worker.store.lists import LIMITS

app = typer.Typer(
    help="Limits of calls to other services: list, show, remove. `apply` adds and changes them."
)

OriginArgument = Annotated[str, argument("ORIGIN", "The service, such as https://api.openai.com.")]
PerArgument = Annotated[str, argument("PER", "`org`, or `all` for the limit that all orgs share.")]

add_list(app, LIMITS)


@verb(app, "show")
def show(session: Invocation, origin: OriginArgument, per: PerArgument) -> None:
    """Show one limit with what is used of it now, and the orgs whose requests pause."""
    from worker.store.lists.limits import limit

    session.show(limit, origin, per)


@verb(app, "remove")
def remove(session: Invocation, origin: OriginArgument, per: PerArgument) -> None:
    """Remove a limit; requests that wait for it go on."""
    from worker.features.egress.limits import remove_limit

    session.change(remove_limit, origin, per)
