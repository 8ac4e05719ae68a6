"""`secrets`: an org's own secrets for its handlers, such as its model key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from worker.kit.lists import add_list
from worker.kit.options import OrgArgument, argument, option, read_text
from worker.kit.output import Row
from worker.kit.session import Invocation, verb
from worker.store.lists import SECRETS

app = typer.Typer(help="An org's own secrets for its handlers: add, list, rotate, remove.")

NameArgument = Annotated[str, argument("NAME", "As handlers ask for it: `ctx.secret(NAME)`.")]
FileOption = Annotated[
    str | None,
    option(
        "--file FILE|-",
        "The file that holds the value (default: standard input; on a terminal it is asked for).",
    ),
]


@verb(app, "add")
def add(session: Invocation, org: OrgArgument, name: NameArgument, file: FileOption = None) -> None:
    """Add a secret, sealed before it is stored; exit 5 if the org has one of that name.

    Handlers that declare `@job(secrets={NAME})` get it. The value is never an argument, since
    every process of the machine can read arguments; a line end after it is dropped.
    """
    from worker.features.org_secrets.operations import add_secret

    _write(session, add_secret, org, name, file)


add_list(app, SECRETS, org_argument=True)


@verb(app, "rotate")
def rotate(session: Invocation, org: OrgArgument, name: NameArgument, file: FileOption = None) -> None:
    """Replace the value of a secret; the old one is gone.

    A running attempt keeps the old value, and each later attempt gets the new one.
    """
    from worker.features.org_secrets.operations import rotate_secret

    _write(session, rotate_secret, org, name, file)


@verb(app, "remove")
def remove(session: Invocation, org: OrgArgument, name: NameArgument) -> None:
    """Delete a secret. New runs of handlers that declare it are refused (`secret_missing`)."""
    from worker.features.org_secrets.operations import remove_secret

    session.change(remove_secret, org, name)


def _write(session: Invocation, write: Callable[..., Row], org: str, name: str, file: str | None) -> None:
    """Add or rotate a secret with the value in a file."""
    from worker import wiring

    session.require_database()
    value = _value(file, name)
    with session.database() as database:
        ring = wiring.open_keyring(session.settings, database=database)
        row = write(database, ring, org, name, value, actor=session.actor)
    session.print_row(row)


def _value(file: str | None, name: str) -> str:
    """The value, without the line end after it: of the file, standard input, or asked for."""
    if file is None and sys.stdin.isatty():
        asked: str = typer.prompt(f"{name} (not shown)", hide_input=True, err=True)
        return asked
    return read_text(file or "-").rstrip("\r\n")
