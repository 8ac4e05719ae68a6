"""Shell completion: the scripts of the shells, and the values that are offered from the database.

A shell calls the command at each Tab. It gets names in a fraction of a second or nothing: no error is
printed and no database is made.
"""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from worker.store.names import Kind

COMMAND = "orgworker"
# Set by the printed completion script when it asks for completions.
COMPLETION_VARIABLE = "_ORGWORKER_COMPLETE"
# A database that does not answer within this many seconds offers nothing.
PATIENCE = 5.0

# The scripts evaluate what they get, so a name with any other character is not offered.
_SAFE = re.compile(r"[A-Za-z0-9_.@+-]+")


def completion(
    context: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="The shell.")],
) -> None:
    """Print the completion script of the command orgworker for a shell.

    In bash: source <(orgworker completion bash). In zsh, after compinit: source <(orgworker
    completion zsh). In fish: orgworker completion fish | source.
    """
    from typer.completion import shell_complete

    register_shells()
    raise typer.Exit(
        shell_complete(context.find_root().command, {}, COMMAND, COMPLETION_VARIABLE, f"source_{shell}")
    )


def register_shells() -> None:
    """Make the shells known. Typer does so only for completion options of its own, which are off here."""
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()


@contextmanager
def limited() -> Iterator[None]:
    """End this process, which completes, in silence if the block takes too long."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        # An exit can take a while on a busy machine, and then has no handler any more.
        signal.setitimer(signal.ITIMER_REAL, 0)


def names(kind: Kind) -> Callable[[typer.Context, str], list[str]]:
    """The completion of an argument or option that takes a name; of definitions, those of the given org."""

    def offer(context: typer.Context, incomplete: str) -> list[str]:
        # A warning of a library would land in the middle of the person's line.
        with suppress(Exception), redirect_stderr(io.StringIO()), limited():
            return _read(context, kind, incomplete)
        return []

    return offer


def _read(context: typer.Context, kind: Kind, incomplete: str) -> list[str]:
    from worker.kit.session import Invocation
    from worker.store.names import beginning_with

    session = Invocation(context.find_root().params.get("config"))
    org = context.params.get("org")
    with session.database() as database, database.autocommit() as connection:
        found = beginning_with(connection, kind, incomplete, org if isinstance(org, str) else None)
    return [name for name in found if _SAFE.fullmatch(name)]


def states(context: typer.Context, incomplete: str) -> list[str]:
    """The completion of `--state`: the states of what the command is about; also after a comma."""
    from worker.store import lists

    noun = context.parent.info_name if context.parent is not None else None
    listings: dict[str | None, lists.Listing[Any]] = {
        "orgs": lists.ORGS,
        "definitions": lists.DEFINITIONS,
        "templates": lists.TEMPLATES,
        "runs": lists.RUNS,
        "credentials": lists.CREDENTIALS,
    }
    before, comma, last = incomplete.rpartition(",")
    known = listings[noun].states if noun in listings else ()
    return [f"{before}{comma}{state}" for state in known if state.startswith(last)]
