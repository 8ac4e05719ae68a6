"""`orgs`: customer organisations: add, import, list, pause, suspend, remove, check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from worker.app.verbs.checks import FAILED, check_orgs, print_report, with_checks
from worker.app.verbs.templates import apply_templates
from worker.kit.lists import add_list
from worker.kit.options import (
    FileArgument,
    IssuerOption,
    NoteOption,
    OrgArgument,
    YesOption,
    option,
    read_text,
)
from worker.kit.output import Format, is_refused, say
from worker.kit.progress import ProgressBar, shown
from worker.kit.session import Invocation, only_issuer, verb
from worker.store.lists import ORGS

if TYPE_CHECKING:
    from worker.model.orgs import OrgState

CHANGED = ("kind", "name", "change")

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
    from worker.model.orgs import OrgEntry
    from worker.operations.orgs import add_org

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

    # Not `splitlines`, which also ends a line within a name: at U+2028, for example.
    lines, issuers = read_text(file).removesuffix("\n").split("\n"), session.settings.issuers
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


def _move(session: Invocation, code: str, state: OrgState, note: str | None) -> None:
    from worker.operations.orgs import set_org_state

    session.change(set_org_state, org=code, state=state, note=note)


@verb(app, "diff")
def diff(session: Invocation, org: OrgArgument) -> int:
    """Request a token, and say what it changes against the org's last run.

    Exit 1 without a valid token, 3 without a credential.

    Names scopes, properties and flags, never a value: runs keep a keyed digest of each.
    `unknown`: the run has no digest, or its key is no longer in the key ring.
    """
    report = with_checks(session, lambda _, checks: checks.verify(org))
    last, changes = report.last, [asdict(change) for change in report.changes]
    if not any(probe.claims is not None for probe in report.probes):
        return print_report(session, report) or FAILED
    if session.output is not Format.TABLE:
        run = None if last is None else last["run"]
        row = {"org": org, "run": run, "run_at": last and last["at"], "changes": changes}
        session.print_row(row, key="org")
    elif last is None:
        say(f"org {org} has had no run with a token yet")
    elif changes:
        session.print_rows(changes, CHANGED, key="name")
    else:
        say(f"nothing changes against run {last['run']}")
    return 0
