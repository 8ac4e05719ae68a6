"""`credentials`: what an org's tokens are asked for with, generation by generation."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.checks import print_report
from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_duration,
    read_since,
    read_text,
)
from worker.cli.orgs import OrgArgument
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.operations.check_orgs import Report
    from worker.store.database import Database

app = typer.Typer(help="An org's client credentials: add a generation, list, verify, rotate, retire.")


class Kind(StrEnum):
    """What the secret is."""

    CLIENT_SECRET = "client_secret"  # noqa: S105 - the name of a kind, not a secret
    PRIVATE_KEY = "private_key"


ClientOption = Annotated[str, typer.Option("--client-id", metavar="ID", help="The client id at the issuer.")]
SecretOption = Annotated[
    str,
    typer.Option("--secret-file", metavar="FILE|-", help="The file that holds the secret, or - for stdin."),
]
KindOption = Annotated[Kind, typer.Option("--kind", help="A client secret, or a private key in PEM.")]

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
    client_id: ClientOption,
    secret_file: Annotated[
        str | None,
        typer.Option("--secret-file", metavar="FILE|-", help="The file that holds the secret, or -."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="file:NAME",
            help="Instead: a file of secrets_dir, which is read at each use and so may be replaced.",
        ),
    ] = None,
    kind: KindOption = Kind.CLIENT_SECRET,
    output: OutputOption = Format.TABLE,
) -> None:
    """Add a generation, tried first from now on; the ones before stay until they are retired.

    The secret is sealed before it is stored. It is read from a file or from standard
    input, because arguments are seen by every process of the machine.
    """
    from worker import wiring
    from worker.operations.credentials import add_credential

    if (secret_file is None) == (reference is None):
        raise UsageError(
            "name either a file that holds the secret, or a reference to one in secrets_dir",
            fix="--secret-file FILE, --secret-file - for standard input, or --reference file:NAME",
        )
    session = session_of(context)
    secret = None if secret_file is None else read_text(secret_file).rstrip("\r\n")
    with session.database() as database:
        row = add_credential(
            database,
            None if secret is None else wiring.open_keyring(session.settings, database=database),
            org,
            client_id=client_id,
            secret=secret,
            reference=reference,
            secrets_dir=Path(folder) if (folder := session.settings.secrets_dir) else None,
            kind=kind.value,
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
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List credentials, newest first, without anything secret; `uses` counts token requests."""
    from worker.store.lists import orgs as org_lists

    session = session_of(context)
    wanted = org or named
    narrowed: dict[str, Any] = {
        "state": state,
        "since": read_since(since, session.clock),
        "limit": limit,
        "after": after,
    }
    with session.database() as database, database.autocommit() as connection:
        if wanted is None:
            rows = org_lists.credentials_for_all_orgs(connection, **narrowed)
        else:
            rows = org_lists.credentials(connection, wanted, **narrowed)
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("verify")
def verify(
    context: typer.Context,
    org: OrgArgument,
    generation: Annotated[
        int | None, typer.Argument(metavar="[GENERATION]", help="Default the newest active one.")
    ] = None,
    output: OutputOption = Format.TABLE,
) -> int:
    """Ask the provider for a token with one generation, and say what came; exit 1 if it is no good.

    Exit 69 if the provider cannot be reached.
    """
    from worker.wiring.secrets import open_checks

    session = session_of(context)

    async def ask(database: Database) -> Report:
        async with open_checks(session.settings, database, session.clock) as checks:
            return await checks.verify(org, generation)

    with session.database() as database:
        report = asyncio.run(ask(database))
    return print_report(report, output)


@app.command("rotate")
def rotate(
    context: typer.Context,
    org: OrgArgument,
    client_id: ClientOption,
    secret_file: SecretOption,
    kind: KindOption = Kind.CLIENT_SECRET,
    quiet: Annotated[
        str,
        typer.Option(
            "--quiet", metavar="DURATION", help="How long nobody may have used an older generation."
        ),
    ] = "15s",
    timeout: Annotated[
        str,
        typer.Option("--timeout", metavar="DURATION", help="Then exit 75, with the older ones still active."),
    ] = "10m",
    output: OutputOption = Format.TABLE,
) -> None:
    """Change to a new secret: verify it, add it, watch the old one's use end, retire that. Asks nothing.

    Leave the old secret valid at the provider until this has ended. A secret that the
    provider does not accept changes nothing. The same command again goes on where
    this was interrupted.
    """
    from worker import wiring
    from worker.operations.credentials import Rotation
    from worker.wiring.secrets import open_checks

    session = session_of(context)
    secret = read_text(secret_file).rstrip("\r\n")
    spans = {"quiet": read_duration(quiet, "--quiet"), "timeout": read_duration(timeout, "--timeout")}

    async def change(database: Database) -> list[dict[str, Any]]:
        ring = wiring.open_keyring(session.settings, database=database)
        async with open_checks(session.settings, database, session.clock) as checks:
            rotation = Rotation(
                database, ring, checks, org, actor=session.actor, clock=session.clock, report=say
            )
            return await rotation.run(client_id, secret, kind.value, **spans)

    with session.database() as database:
        rows = asyncio.run(change(database))
    print_rows(rows, output, columns=COLUMNS)


@app.command("retire")
def retire(
    context: typer.Context,
    org: OrgArgument,
    generation: Annotated[int, typer.Argument(metavar="GENERATION", help="As `credentials list` names it.")],
    now: Annotated[
        bool, typer.Option("--now", help="It has leaked: destroy its secret here as well, and wait.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """End one generation: no token is asked for with it, and workers drop those they hold within 2 s.

    With --now this returns when they have. A run that is on keeps the token that it
    was given until that runs out or the run asks for another; `runs cancel` ends it.
    Revoke the secret at the provider as well: tokens that were stolen live on until then.
    """
    from worker.operations.credentials import retire_credential
    from worker.tokens.credentials import READ_AGAIN

    session = session_of(context)
    with session.database() as database:
        row = retire_credential(database, org, generation, actor=session.actor, now=now)
    if now:
        asyncio.run(session.clock.sleep(READ_AGAIN))
    print_row(row, output)
