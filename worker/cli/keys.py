"""`keys`: the key ring that seals the client secrets in the database."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import Invocation, session_of
from worker.errors import Unavailable

app = typer.Typer(
    help="The key ring that seals secrets at rest; keep a copy of it apart from the database's."
)

COLUMNS = ("id", "in_ring", "seals", "active", "retired")


@app.command("generate")
def generate(
    context: typer.Context,
    anew: Annotated[
        bool,
        typer.Option(
            "--anew",
            help="The old ring is lost for good: give up the secrets it sealed, begin again.",
        ),
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Make the key ring, a file only its owner can read; exit 5 where there is one already.

    It lies in secrets_dir; on SQLite, without one there, beside the database. The
    worker must run as the same user, or be given the file. Where the database has
    secrets that a lost ring sealed, exit 78 unless --anew.
    """
    from worker.tokens.sealing import KeyRing

    session = session_of(context)
    path = session.settings.keyring_file
    if not anew and not path.exists():
        _refuse_if_lost(session, str(path))
    ring = KeyRing.generate(path)
    print_row({"keyring": str(ring.path), "key_id": ring.sealing_key_id}, output, key="key_id")


@app.command("list")
def list_(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """List the keys, oldest first, with how many active and retired secrets each seals.

    One that is not in the ring is lost: what it seals does not open.
    """
    from worker import wiring
    from worker.operations.keys import list_keys

    session = session_of(context)
    with session.database() as database:
        rows = list_keys(database, wiring.find_keyring(session.settings))
    print_rows(rows, output, columns=COLUMNS)


@app.command("rekey")
def rekey(
    context: typer.Context,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, max=10_000, help="Secrets in one transaction.")
    ] = 500,
    output: OutputOption = Format.TABLE,
) -> int:
    """Add a key and seal every secret with it; the same again goes on where this was interrupted.

    Workers go on meanwhile: they read the ring's file again when they meet the new key.
    Then remove the old one: `keys list`, `keys remove`. Exit 1 if a secret did not open.
    """
    from worker import wiring
    from worker.operations import keys

    session = session_of(context)
    with session.database() as database:
        ring = wiring.open_keyring(session.settings)
        done = keys.rekey(
            database,
            ring,
            actor=session.actor,
            batch=batch,
            report=lambda resealed: say(f"{resealed} resealed"),
        )
    row = {"key_id": done.key_id, "new": done.is_new, "resealed": done.resealed, "unopened": done.unopened}
    print_row(row, output, key="key_id")
    if done.unopened:
        say(f"{done.unopened} secrets open with no key of the ring; `keys list` names the lost ones")
    return 1 if done.unopened else 0


@app.command("add")
def add(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """Only add a key, so that the ring's file can be brought to every machine before `keys rekey` uses it."""
    from worker import wiring
    from worker.operations.keys import add_key

    session = session_of(context)
    with session.database() as database:
        ring = add_key(database, wiring.open_keyring(session.settings), actor=session.actor)
        row = {"keyring": str(session.settings.keyring_file), "key_id": ring.sealing_key_id}
    print_row(row, output, key="key_id")


@app.command("remove")
def remove(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` names it.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Take a key that seals nothing any more out of the ring; exit 5 while it does.

    A backup of the database from before the last `keys rekey` needs it still.
    """
    from worker import wiring
    from worker.operations.keys import remove_key

    session = session_of(context)
    with session.database() as database:
        remove_key(database, wiring.open_keyring(session.settings), key_id, actor=session.actor)
    print_row({"key_id": key_id, "removed": True}, output, key="key_id")


def _refuse_if_lost(session: Invocation, path: str) -> None:
    """Refuse to put a new ring in the place of one that still seals secrets."""
    from worker.operations.keys import check_ring
    from worker.store import schema

    file = session.settings.database.sqlite_file
    if file is not None and not file.exists():
        return
    # A database that is not there yet has nothing sealed; the worker's start checks once more.
    with suppress(Unavailable), session.database(any_schema=True) as database:
        with database.autocommit() as connection:
            has_schema = schema.current(connection) is not None
        if has_schema:
            check_ring(database, None, path)
