"""`orgs`: customer organisations: add, import, list, pause, suspend, remove, check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.checks import check_orgs
from worker.cli.lists import add_list
from worker.cli.options import FileArgument, NoteOption, OrgArgument, YesOption, option, read_text
from worker.cli.org_claims import diff, properties
from worker.cli.output import is_refused
from worker.cli.progress import ProgressBar, shown
from worker.cli.session import Invocation, verb
from worker.cli.sync import IssuerOption, only_issuer, sync
from worker.cli.templates import apply_templates
from worker.store.lists import ORGS

if TYPE_CHECKING:
    from worker.orgs import OrgState

app = typer.Typer(help="Customer organisations: add, list, pause, suspend, remove, check.")


@verb(app, "add")
def add(
    session: Invocation,
    code: OrgArgument,
    name: Annotated[str | None, option("--name", "A name for people (default: the code).")] = None,
    issuer: IssuerOption = None,
    tag: Annotated[list[str] | None, option("--tag", "A tag that templates select by; repeatable.")] = None,
    max_concurrent_runs: Annotated[
        int, option("--max-concurrent-runs N", "Its concurrent runs over all workers.")
    ] = 10,
    weight: Annotated[int, option("--weight N", "Its share of the slots, relative to other orgs.")] = 1,
    timezone: Annotated[
        str | None, option("--timezone ZONE", "IANA zone of its schedules (default: UTC).")
    ] = None,
    pool: Annotated[
        str | None, option("--pool POOL", "Pool of its runs that name none elsewhere (default: default).")
    ] = None,
) -> None:
    """Add one org, or bring a removed one back. `credentials add` gives it a secret."""
    from worker.operations.orgs import add_org
    from worker.orgs import OrgEntry

    entry = OrgEntry(
        code=code,
        name=name or code,
        issuer=issuer or only_issuer(session),
        max_concurrent_runs=max_concurrent_runs,
        weight=weight,
        tags=frozenset(tag or ()),
        timezone=timezone,
        pool=pool,
    )
    session.change(add_org, entry=entry, issuers=session.settings.issuers)


@verb(app, "import")
def import_(session: Invocation, file: FileArgument) -> None:
    """Add or change orgs with their credentials from JSON lines, all or none.

    A line is {"code", "name", "issuer", "client_id", "client_secret"} and can have "tags",
    "max_concurrent_runs", "weight", "timezone" and "pool". The same file again changes nothing. Then
    gives the orgs the definitions of their templates; interrupted, the workers do the rest.
    """
    from worker import wiring
    from worker.operations.orgs import import_orgs

    lines, issuers = read_text(file).splitlines(), session.settings.issuers
    with session.database() as database:
        ring = wiring.open_keyring(session.settings, database=database)
        checked = shown(lines, "lines", len(lines))
        with ProgressBar("orgs", len(lines)) as progress:
            row = import_orgs(
                database, ring, checked, actor=session.actor, issuers=issuers, report=progress.at
            )
        session.print_row(row, key="orgs_added")
        apply_templates(session, database)


add_list(app, ORGS, words_argument=True)


@verb(app, "show")
def show(session: Invocation, code: OrgArgument) -> None:
    """Show one org with its credentials (never their secrets)."""
    from worker.store.lists.read import org

    session.show(org, code)


@verb(app, "pause")
def pause(session: Invocation, code: OrgArgument, note: NoteOption = None) -> None:
    """Pause an org: no runs fire or start; running ones continue. Times in the pause are not replayed."""
    _move(session, code, "paused", note)


@verb(app, "resume")
def resume(session: Invocation, code: OrgArgument, note: NoteOption = None) -> None:
    """Resume a paused or suspended org from now on; the times meanwhile are not replayed."""
    _move(session, code, "active", note)


@verb(app, "suspend")
def suspend(session: Invocation, code: OrgArgument, note: NoteOption = None) -> None:
    """Pause an org, cancel waiting runs now and running ones within a renewal, and drop its tokens."""
    _move(session, code, "suspended", note)


@verb(app, "remove")
def remove(
    session: Invocation,
    code: OrgArgument,
    note: NoteOption = None,
    yes: YesOption = False,
) -> None:
    """Suspend an org and destroy its secrets; its history is retained as long as configured.

    On a terminal, asks for confirmation; exit 1 if the answer is no.
    """
    if not yes and is_refused(f"Cancel all runs of {code} and destroy its secrets?"):
        raise typer.Exit(1)
    _move(session, code, "removed", note)


verb(app, "check")(check_orgs)
verb(app, "sync")(sync)
verb(app, "properties")(properties)
verb(app, "diff")(diff)


def _move(session: Invocation, code: str, state: OrgState, note: str | None) -> None:
    from worker.operations.orgs import set_org_state

    session.change(set_org_state, org=code, state=state, note=note)
