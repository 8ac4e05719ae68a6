"""`orgs`: the customer organisations, added one at a time or in bulk, and what may go on for each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.checks import check_orgs
from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    FileArgument,
    LimitOption,
    NoteOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_since,
    read_text,
)
from worker.cli.output import Format, confirmed, print_row, print_rows, say
from worker.cli.session import Invocation, session_of
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.orgs import OrgState

app = typer.Typer(help="Customer organisations: add, list, pause, suspend, remove, check.")

COLUMNS = (
    "code",
    "name",
    "issuer",
    "state",
    "max_concurrent_runs",
    "weight",
    "tags",
    "timezone",
    "created_at",
)
OrgArgument = Annotated[str, typer.Argument(metavar="ORG", help="The org's code, as in its tokens.")]


@app.command("add")
def add(
    context: typer.Context,
    code: OrgArgument,
    name: Annotated[str | None, typer.Option("--name", help="For people; default the code.")] = None,
    issuer: Annotated[
        str | None,
        typer.Option("--issuer", help="A table [issuers.NAME] of worker.toml; default the only one."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="A tag that templates select by; may be repeated.")
    ] = None,
    max_concurrent_runs: Annotated[
        int, typer.Option("--max-concurrent-runs", metavar="N", help="Its runs at once, over all workers.")
    ] = 10,
    weight: Annotated[
        int, typer.Option("--weight", metavar="N", help="Its share of the slots beside others'.")
    ] = 1,
    timezone: Annotated[
        str | None,
        typer.Option("--timezone", metavar="ZONE", help="IANA zone of its schedules; default UTC."),
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Add one org; `credentials add` gives it a secret. One that was removed comes back."""
    from worker.operations.orgs import add_org
    from worker.orgs import OrgEntry

    session = session_of(context)
    entry = OrgEntry(
        code=code,
        name=name or code,
        issuer=issuer or _only_issuer(session),
        max_concurrent_runs=max_concurrent_runs,
        weight=weight,
        tags=frozenset(tag or ()),
        timezone=timezone,
    )
    with session.database() as database:
        row = add_org(database, entry, actor=session.actor, issuers=session.settings.issuers)
    print_row(row, output)


@app.command("import")
def import_(context: typer.Context, file: FileArgument, output: OutputOption = Format.TABLE) -> None:
    """Add or change orgs with their credentials, all or none, from JSON lines.

    A line is {"code", "name", "issuer", "client_id", "client_secret"} and may have "tags",
    "max_concurrent_runs", "weight" and "timezone". The same file again changes nothing.
    """
    from dataclasses import asdict

    from worker import wiring
    from worker.operations.orgs import import_orgs

    session = session_of(context)
    lines = read_text(file).splitlines()
    with session.database() as database:
        done = import_orgs(
            database,
            wiring.open_keyring(session.settings, database=database),
            lines,
            actor=session.actor,
            issuers=session.settings.issuers,
        )
    print_row(asdict(done), output, key="orgs_added")


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    state: StateOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List orgs, newest first."""
    from worker.store.lists import orgs as org_lists

    session = session_of(context)
    with session.database() as database, database.autocommit() as connection:
        rows = org_lists.orgs_for_all_orgs(
            connection,
            org=org,
            state=state,
            since=read_since(since, session.clock),
            limit=limit,
            after=after,
        )
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("show")
def show(context: typer.Context, code: OrgArgument, output: OutputOption = Format.TABLE) -> None:
    """Show one org with its credentials (never their secrets)."""
    from worker.store.lists import orgs as org_lists

    with session_of(context).database() as database, database.autocommit() as connection:
        row = org_lists.org(connection, code)
    print_row(row, output)


@app.command("pause")
def pause(
    context: typer.Context, code: OrgArgument, note: NoteOption = None, output: OutputOption = Format.TABLE
) -> None:
    """Nothing new fires or starts; running runs go on. While it is paused nothing is due."""
    _move(context, code, "paused", note, output)


@app.command("resume")
def resume(
    context: typer.Context, code: OrgArgument, note: NoteOption = None, output: OutputOption = Format.TABLE
) -> None:
    """Let a paused or suspended org go on, from now: what was not due meanwhile is not replayed."""
    _move(context, code, "active", note, output)


@app.command("suspend")
def suspend(
    context: typer.Context, code: OrgArgument, note: NoteOption = None, output: OutputOption = Format.TABLE
) -> None:
    """As pause, and cancel its waiting runs at once, its running ones within a renewal; drop its tokens."""
    _move(context, code, "suspended", note, output)


@app.command("remove")
def remove(
    context: typer.Context,
    code: OrgArgument,
    note: NoteOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing, as where standard input is no terminal.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """As suspend, and destroy its secrets for good; its history stays until retention.

    On a terminal it asks before it does so; exit 1 if the answer is no.
    """
    question = f"Cancel what runs for {code} and destroy its secrets for good?"
    if not yes and sys.stdin.isatty() and not confirmed(question):
        say("nothing was changed")
        raise typer.Exit(1)
    _move(context, code, "removed", note, output)


app.command("check")(check_orgs)


def _move(context: typer.Context, code: str, state: OrgState, note: str | None, output: Format) -> None:
    from worker.operations.orgs import set_org_state

    session = session_of(context)
    with session.database() as database:
        row = set_org_state(database, code, state, actor=session.actor, note=note)
    print_row(row, output)


def _only_issuer(session: Invocation) -> str:
    names = sorted(session.settings.issuers)
    if len(names) != 1:
        raise UsageError(
            f"--issuer is missing; worker.toml has {', '.join(names) or 'none'}",
            fix="name one of them" if names else "add a table [issuers.main] to worker.toml",
        )
    return names[0]
