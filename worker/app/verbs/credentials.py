"""`credentials`: the client credentials of orgs, by generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from worker.app.verbs.checks import FAILED, print_report, say_problems, with_checks
from worker.errors import UsageError
from worker.kit.feature import Point
from worker.kit.lists import add_list
from worker.kit.options import IssuerOption, OrgArgument, argument, option, read_duration, read_text
from worker.kit.output import Format, say
from worker.kit.session import Invocation, OutputOption, session_of, verb
from worker.store.lists import CREDENTIALS
from worker.store.lists.rows import CredentialRow

if TYPE_CHECKING:
    from worker.diagnosis.check_orgs import Checks
    from worker.store.database import Database

ROTATE_FLEET: Point[Callable[..., int]] = Point("provisioning.fleet", "`credentials rotate --older-than`")

app = typer.Typer(help="An org's client credentials: add a generation, list, verify, rotate, retire.")


# What the secret is.
Kind = Literal["client_secret", "private_key"]
ClientOption = Annotated[str, option("--client-id ID", "The client id at the issuer.")]
OptionalOrgArgument = Annotated[str | None, argument("ORG", "The code of one org.", of="org")]
KindOption = Annotated[Kind, option("--kind", "A client secret, or a private key in PEM.")]


@verb(app, "add")
def add(
    session: Invocation,
    org: OrgArgument,
    client_id: ClientOption,
    secret_file: Annotated[
        str | None, option("--secret-file FILE|-", "The file that holds the secret, or -.")
    ] = None,
    reference: Annotated[
        str | None,
        option("--reference file:NAME", "Instead of a secret: a file in secrets_dir, read at each use."),
    ] = None,
    kind: KindOption = "client_secret",
    no_verify: Annotated[bool, option("--no-verify", "Only store it: request no token with it.")] = False,
) -> int:
    """Add a generation, which is tried first from now on; older ones stay until they are retired.

    Then requests a token with it, as `credentials verify` does: exit 1 if it is unusable; it
    stays stored. A provider that does not respond is a warning.

    The secret is sealed before it is stored. It is read from a file or standard input,
    since every process of the machine can read arguments.
    """
    from worker import wiring
    from worker.operations.credentials import add_credential

    if (secret_file is None) == (reference is None):
        raise UsageError(
            "name either the file of a secret, or a reference to a file in secrets_dir",
            fix="--secret-file FILE, --secret-file - for standard input, or --reference file:NAME",
        )
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
            kind=kind,
            actor=session.actor,
        )
    session.print_row(row)
    return 0 if no_verify else _verify_stored(session, org, row["generation"])


def _verify_stored(session: Invocation, org: str, generation: int) -> int:
    """Report on stderr whether a new generation gets a token; returns the exit code."""
    report = with_checks(session, lambda _, checks: checks.verify(org, generation))
    if report.ok:
        say(f"verified: issuer {report.issuer} gives a usable token for generation {generation}")
        return 0
    if report.transient:
        say(f"warning: stored, but not verified: issuer {report.issuer} does not respond")
        say(f"fix: `credentials verify {org} {generation}` once it does")
        return 0
    say_problems(report)
    say(f"generation {generation} is stored; `credentials retire {org} {generation}` undoes it")
    return FAILED


add_list(app, CREDENTIALS, org_argument=True)


@verb(app, "verify")
def verify(
    session: Invocation,
    org: OrgArgument,
    generation: Annotated[int | None, argument("[GENERATION]", "Default: the newest active one.")] = None,
) -> int:
    """Request a token with one generation and report the result; exit 1 if it is unusable.

    Exit 69 if the provider does not respond.
    """
    report = with_checks(session, lambda _, checks: checks.verify(org, generation))
    return print_report(session, report)


@app.command("rotate")
def rotate(
    context: typer.Context,
    org: OptionalOrgArgument = None,
    client_id: Annotated[str | None, option("--client-id ID", "The client id at the issuer.")] = None,
    secret_file: Annotated[
        str | None, option("--secret-file FILE|-", "The file that holds the secret, or - for stdin.")
    ] = None,
    kind: KindOption = "client_secret",
    quiet: Annotated[str, option("--quiet DURATION", "How long older generations must be unused.")] = "15s",
    timeout: Annotated[
        str, option("--timeout DURATION", "When to give up: exit 75, with older ones still active.")
    ] = "10m",
    older_than: Annotated[
        str | None,
        option(
            "--older-than DURATION", "Instead of one org: all whose credential orgworker made longer ago."
        ),
    ] = None,
    issuer: IssuerOption = None,
    limit: Annotated[
        int | None, option("--limit N", "With --older-than: at most N orgs, oldest first.", min=1)
    ] = None,
    overlap: Annotated[
        str | None,
        option(
            "--overlap DURATION",
            "With --older-than: how long the old one stays usable (default: provisioning.overlap).",
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", "With --older-than: only list the orgs; changes nothing.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> int:
    """Move one org to a new secret, or with --older-than all orgs to new applications.

    One org: verify the secret, add it, wait until the old one is unused, retire that. Does not
    ask for confirmation. Keep the old secret valid at the provider until this ends. A secret
    that the provider rejects changes nothing.

    --older-than: for each org whose credential orgworker made longer ago, make a second
    application with the same scopes and properties, verify a token of it, and let runs use it.
    After the overlap, and when no run uses the old token, retire the old one and delete it at
    the provider. Waits until all of that is over; exit 1 if any org failed, 75 while another
    process does the same.

    After an interruption, repeat the command: it continues.
    """
    given = _given(context, "issuer", "limit", "overlap", "dry_run")
    of_one = _given(context, "org", "client_id", "secret_file", "kind", "quiet", "timeout")
    session = session_of(context, output)
    if older_than is not None:
        if of_one:
            raise UsageError(
                f"{of_one[0]} is for one org, --older-than for all of an issuer",
                fix="`credentials rotate --older-than 90d`, "
                "or `credentials rotate ORG --client-id ID --secret-file FILE`",
            )
        age = read_duration(older_than, "--older-than")
        span = None if overlap is None else read_duration(overlap, "--overlap")
        rotate_fleet = ROTATE_FLEET.require()
        return rotate_fleet(session, issuer, age, limit=limit, overlap=span, dry_run=dry_run)
    if given:
        raise UsageError(
            f"{given[0]} is for the rotation of all orgs",
            fix="add --older-than, such as --older-than 90d",
        )
    if org is None or client_id is None or secret_file is None:
        missing = "an org" if org is None else "--client-id" if client_id is None else "--secret-file"
        raise UsageError(
            f"{missing} is missing",
            fix="`credentials rotate ORG --client-id ID --secret-file FILE`, "
            "or `credentials rotate --older-than 90d` for all orgs",
        )
    _rotate_one(session, org, client_id, secret_file, kind, quiet, timeout)
    return 0


def _given(context: typer.Context, *names: str) -> list[str]:
    """Those of the parameters that were typed, as they are typed."""
    sources = {name: context.get_parameter_source(name) for name in names}
    typed = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    return ["ORG" if name == "org" else f"--{name.replace('_', '-')}" for name in typed]


def _rotate_one(
    session: Invocation,
    org: str,
    client_id: str,
    secret_file: str,
    kind: Kind,
    quiet: str,
    timeout: str,
) -> None:
    from worker import wiring
    from worker.operations.credentials import Rotation
    from worker.operations.installation import Ownership

    secret = read_text(secret_file).rstrip("\r\n")
    spans = {"quiet": read_duration(quiet, "--quiet"), "timeout": read_duration(timeout, "--timeout")}

    async def change_secret(database: Database, checks: Checks) -> list[CredentialRow]:
        ring = wiring.open_keyring(session.settings, database=database)
        ownership = Ownership(database, session.settings.installation)
        rotation = Rotation(ownership, ring, checks, org, session.actor, session.clock, report=say)
        return await rotation.run(client_id, secret, kind, **spans)

    rows = with_checks(session, change_secret)
    session.print_rows(rows, CREDENTIALS.table)


@verb(app, "retire")
def retire(
    session: Invocation,
    org: OrgArgument,
    generation: Annotated[int, argument("GENERATION", "As `credentials list` prints it.")],
    now: Annotated[bool, option("--now", "The secret has leaked: also destroy it here, and wait.")] = False,
) -> None:
    """Retire one generation: it gets no more tokens, and workers drop cached ones within 2 s.

    With --now, returns after they have. A running run keeps its token until that expires or
    the run requests another; `runs cancel` ends the run. Revoke the secret at the provider
    too: until then, stolen tokens stay valid.
    """
    from worker.operations.credentials import retire_credential
    from worker.tokens.credentials import READ_AGAIN

    with session.database() as database:
        row = retire_credential(database, org, generation, actor=session.actor, now=now)
    if now:
        asyncio.run(session.clock.sleep(READ_AGAIN))
    session.print_row(row)
