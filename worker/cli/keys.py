"""`keys`: the key ring that seals the client secrets in the database."""

from __future__ import annotations

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row
from worker.cli.session import session_of

app = typer.Typer(
    help="The key ring that seals secrets at rest; keep a copy of it apart from the database's."
)


@app.command("generate")
def generate(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """Make the key ring, a file only its owner can read; exit 5 where there is one already.

    It lies in secrets_dir; on SQLite, without one there, beside the database. The
    worker must run as the same user, or be given the file.
    """
    from worker.tokens.sealing import KeyRing

    ring = KeyRing.generate(session_of(context).settings.keyring_file)
    print_row({"keyring": str(ring.path), "key_id": ring.sealing_key_id}, output, key="key_id")
