"""`keys`: the key ring that seals the secrets in the database; `tokens`: those that workers share there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from worker.errors import Unavailable, UsageError
from worker.kit.options import argument, option
from worker.kit.output import say
from worker.kit.session import Invocation, verb

app = typer.Typer(help="The key ring that seals secrets at rest; back it up apart from the database.")
tokens = typer.Typer(help="The access tokens that workers share through the database, sealed.")

COLUMNS = ("id", "in_ring", "seals", "active", "retired")


@verb(app, "generate")
def generate(
    session: Invocation,
    anew: Annotated[
        bool, option("--anew", "Replace a lost key ring. The secrets that it sealed cannot be recovered.")
    ] = False,
) -> None:
    """Create the key ring, a file that only its owner can read; exit 5 if there is one already.

    It is in secrets_dir; on SQLite it is beside the database, unless secrets_dir has it
    already. The worker must run as the same user, or get the file. If a lost ring sealed
    secrets of the database, exits 78 unless --anew is given.
    """
    from worker.tokens.sealing import KeyRing

    path = session.settings.keyring_file
    if not anew and not path.exists():
        _check_not_lost(session, path)
    ring = KeyRing.generate(path)
    session.print_row({"keyring": str(ring.path), "key_id": ring.sealing_key_id}, key="key_id")


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the keys, oldest first, with the number of active and retired secrets that each seals.

    A key that is not in the ring is lost: its secrets cannot be opened.
    """
    from worker import wiring
    from worker.wiring import list_keys

    with session.database() as database:
        rows = list_keys(database, wiring.find_keyring(session.settings))
    session.print_rows(rows, COLUMNS)


@verb(app, "rekey")
def rekey(
    session: Invocation,
    batch: Annotated[int, option("--batch N", "Secrets in one transaction.", min=1, max=10_000)] = 500,
) -> int:
    """Add a key and reseal every secret with it; after an interruption, repeat the command.

    Workers keep running: they read the ring again when they meet the new key. Then remove
    the old key: `keys list`, `keys remove`. Exit 1 if a secret cannot be opened.
    """
    from worker import wiring
    from worker.operations import keys

    with session.database() as database:
        ring = wiring.open_keyring(session.settings)
        row = keys.rekey(
            database, ring, actor=session.actor, batch=batch, report=lambda count: say(f"{count} resealed")
        )
    session.print_row(row, key="key_id")
    if row["unopened"]:
        say(f"{row['unopened']} secrets cannot be opened with the ring; `keys list` lists the lost keys")
    return 1 if row["unopened"] else 0


@verb(app, "add")
def add(session: Invocation) -> None:
    """Only add a key, to copy the ring's file to every machine before `keys rekey` uses it."""
    from worker import wiring
    from worker.operations.keys import add_key

    with session.database() as database:
        ring = add_key(database, wiring.open_keyring(session.settings), actor=session.actor)
    row = {"keyring": str(session.settings.keyring_file), "key_id": ring.sealing_key_id}
    session.print_row(row, key="key_id")


@verb(app, "remove")
def remove(
    session: Invocation, key_id: Annotated[str, argument("ID", "The key's id, as `keys list` prints it.")]
) -> None:
    """Remove an unused key from the ring; exit 5 while it seals secrets.

    Database backups from before the last `keys rekey` still need it.
    """
    from worker import wiring
    from worker.operations.keys import remove_key

    with session.database() as database:
        remove_key(database, wiring.open_keyring(session.settings), key_id, actor=session.actor)
    session.print_row({"key_id": key_id, "removed": True}, key="key_id")


def _check_not_lost(session: Invocation, path: Path) -> None:
    """Refuse to replace a ring that still seals secrets of the database."""
    from worker.store import schema
    from worker.wiring import check_ring

    file = session.settings.database.sqlite_file
    if file is not None and not file.exists():
        return
    # A database that does not exist yet has no secrets; the worker checks again when it starts.
    with suppress(Unavailable), session.database(any_schema=True) as database:
        with database.autocommit() as connection:
            has_schema = schema.current(connection) is not None
        if has_schema:
            check_ring(database, None, path)


@verb(tokens, "drop")
def drop(
    session: Invocation,
    org: Annotated[str | None, option("--org CODE", "Only those of this org.")] = None,
    all_: Annotated[bool, option("--all", "Those of all orgs.")] = False,
) -> None:
    """Delete stored tokens, so that workers request new ones; give --org or --all.

    After the database was restored from a backup, run it before any worker starts: the
    backup has tokens of credentials that may be retired since. A worker that runs keeps the
    tokens that it holds; `credentials retire` ends those within two seconds.
    """
    from worker.operations.keys import drop_tokens

    if (org is None) != all_:
        raise UsageError("tokens drop needs --org CODE or --all", fix="give one of the two")
    session.change(drop_tokens, org, key="dropped")
