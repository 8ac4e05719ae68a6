"""`credentials`: what an org's tokens are asked for with, generation by generation."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    LimitOption,
    OrgOption,
    OutputOption,
    StateOption,
    read_text,
)
from worker.cli.orgs import OrgArgument
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import session_of

app = typer.Typer(help="An org's client credentials: add a generation, list them, retire one.")

COLUMNS = (
    "org",
    "generation",
    "client_id",
    "kind",
    "state",
    "created_at",
    "created_by",
    "last_used_at",
    "uses",
    "last_error",
)


@app.command("add")
def add(
    context: typer.Context,
    org: OrgArgument,
    client_id: Annotated[str, typer.Option("--client-id", metavar="ID", help="The client id at the issuer.")],
    secret_file: Annotated[
        str,
        typer.Option(
            "--secret-file", metavar="FILE|-", help="The file that holds the secret, or - for stdin."
        ),
    ],
    output: OutputOption = Format.TABLE,
) -> None:
    """Add a generation, tried first from now on; the ones before stay until they are retired.

    The secret is sealed before it is stored. It is read from a file or from standard
    input, because arguments are seen by every process of the machine.
    """
    from worker import wiring
    from worker.operations.credentials import add_credential

    session = session_of(context)
    secret = read_text(secret_file).rstrip("\r\n")
    with session.database() as database:
        row = add_credential(
            database,
            wiring.open_keyring(session.settings, create=True),
            org,
            client_id=client_id,
            secret=secret,
            actor=session.actor,
        )
    print_row(row, output)


@app.command("list")
def list_(
    context: typer.Context,
    org: Annotated[str | None, typer.Argument(metavar="[ORG]", help="Only this org's.")] = None,
    named: OrgOption = None,
    output: OutputOption = Format.TABLE,
    state: StateOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List credentials, newest first, without anything secret; `uses` counts token requests."""
    from worker.store import listing

    wanted = org or named
    with session_of(context).database() as database, database.autocommit() as connection:
        if wanted is None:
            rows = listing.credentials_for_all_orgs(connection, state=state, limit=limit, after=after)
        else:
            rows = [row for row in listing.credentials(connection, wanted) if state in (None, row["state"])]
    print_rows(rows, output, columns=COLUMNS, limit=limit if wanted is None else None)


@app.command("retire")
def retire(
    context: typer.Context,
    org: OrgArgument,
    generation: Annotated[int, typer.Argument(metavar="GENERATION", help="As `credentials list` names it.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """End one generation: no token is asked for with it any more."""
    from worker.operations.credentials import retire_credential

    session = session_of(context)
    with session.database() as database:
        row = retire_credential(database, org, generation, actor=session.actor)
    print_row(row, output)
