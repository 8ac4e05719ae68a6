"""`installation`: which one the database belongs to, and how a copy or a restore is adopted."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.errors import UsageError
from worker.kit.options import YesOption, option
from worker.kit.output import Format, is_refused, say
from worker.kit.session import Invocation, verb

app = typer.Typer(help="The installation that the database belongs to: show it; adopt a copy or a restore.")


@verb(app, "show")
def show(session: Invocation) -> None:
    """Show the installation of worker.toml and of the database, and the key of its applications.

    State `matches`, `unset` if one of them has no word, or `differs`: then nothing is
    provisioned, rotated or deleted at a provider, and `installation adopt` is the way on.
    """
    from worker.operations.installation import show

    with session.database() as database:
        row = show(database, session.settings.installation)
    session.print_row(row, key="state")


@verb(app, "adopt")
def adopt(
    session: Invocation,
    same: Annotated[
        bool, option("--same", "After a restore: what the database made at a provider is its own.")
    ] = False,
    new: Annotated[bool, option("--new", "For a copy: nothing at a provider is its own any more.")] = False,
    yes: YesOption = False,
) -> None:
    """Give the database the installation of worker.toml, once they differ.

    On a terminal, asks for confirmation; exit 1 if the answer is no. --same keeps the key: the
    next `orgs sync`, rotation or deletion treats the applications of the key as its own.

    --new makes a new key, and forgets the applications. Credentials stay in use. Processes that
    run must be started again: `provision`, and workers that place runs with Temporal.

    Exit 75 while another process provisions an issuer.
    """
    from worker.operations.installation import adopt

    if same == new:
        raise UsageError(
            "name one of --same and --new",
            fix="`installation adopt --same` after a restore, `installation adopt --new` for a copy",
        )
    settings = session.settings
    word = settings.installation
    question = (
        f"Forget all applications that this database made at providers, and be the new installation {word!r}?"
        if new
        else f"Let {word!r} rotate and delete all applications that this database made at providers? "
        "Only if the original is not in use any more."
    )
    if word and not yes and is_refused(question):
        raise typer.Exit(1)
    with session.database() as database:
        row = adopt(
            database,
            word,
            "new" if new else "same",
            actor=session.actor,
            issuers=[name for name, each in settings.issuers.items() if each.management.client_id],
        )
    session.print_row(row, key="state")
    if new and session.output is Format.TABLE:
        say("start `provision` again, and workers that place runs with Temporal")
