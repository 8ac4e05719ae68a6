"""`secrets`: an org's own secrets for its handlers, such as its model key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from worker.errors import UsageError
from worker.kit.lists import add_list
from worker.kit.options import OrgArgument, argument, option, read_text
from worker.kit.output import Row
from worker.kit.session import Invocation, verb
from worker.store.lists import SECRETS

app = typer.Typer(help="An org's own secrets for its handlers: add, list, bind, rotate, remove.")

NameArgument = Annotated[str, argument("NAME", "As handlers ask for it: `ctx.secret(NAME)`.")]
FileOption = Annotated[
    str | None,
    option(
        "--file FILE|-",
        "The file that holds the value (default: standard input; on a terminal it is asked for).",
    ),
]
ForOption = Annotated[
    str | None,
    option("--for ORIGIN", "Bind it: handlers never get it, and it goes to this origin only."),
]
HeaderOption = Annotated[
    str | None,
    option("--header HEADER", "The header that gets the value (default: where handlers put it)."),
]


@verb(app, "add")
def add(
    session: Invocation,
    org: OrgArgument,
    name: NameArgument,
    file: FileOption = None,
    for_: ForOption = None,
    header: HeaderOption = None,
) -> None:
    """Add a secret, sealed before it is stored; exit 5 if the org has one of that name.

    Handlers that declare `@job(secrets={NAME})` get it. The value is never an argument, since
    every process of the machine can read arguments; a line end after it is dropped.

    With --for they get a placeholder. In headers of requests to that origin the broker puts the
    value in its place. With --header it sets that header itself.
    """
    from worker.features.org_secrets.operations import add_secret

    _write(session, partial(add_secret, origin=for_, header=header), org, name, file)


add_list(app, SECRETS, org_argument=True)


@verb(app, "bind")
def bind(
    session: Invocation,
    org: OrgArgument,
    name: NameArgument,
    for_: ForOption = None,
    header: HeaderOption = None,
    clear: Annotated[bool, option("--clear", "Remove the binding: handlers get the value in clear.")] = False,
) -> None:
    """Bind a secret to an origin, or remove its binding. The value stays the same.

    It takes the key ring: the value is sealed together with its binding, which a change in the
    database cannot redirect. Each later attempt has the new binding.
    """
    from worker import wiring
    from worker.features.org_secrets.operations import bind_secret

    if clear == (for_ is not None):
        raise UsageError("give either --for or --clear", fix="such as --for https://api.openai.com")
    session.require_database()
    with session.database() as database:
        ring = wiring.open_keyring(session.settings)
        row = bind_secret(database, ring, org, name, origin=for_, header=header, actor=session.actor)
    session.print_row(row)


@verb(app, "rotate")
def rotate(session: Invocation, org: OrgArgument, name: NameArgument, file: FileOption = None) -> None:
    """Replace the value of a secret, and keep its binding; the old value is gone.

    A running attempt keeps the old value, and each later attempt gets the new one. The old value
    must open: that proves that the binding was not changed in the database.
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
