"""`provision`, `orgs sync` and `properties`, `credentials rotate --older-than`: what is at the provider."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from worker.errors import NotFound, UsageError
from worker.kit.options import IssuerOption, OrgArgument, option
from worker.kit.output import Format, say
from worker.kit.progress import ProgressBar
from worker.kit.session import Invocation, only_issuer, session_of

if TYPE_CHECKING:
    from worker.features.provisioning.fleet import Rotated
    from worker.features.provisioning.management.contract import PropertyValue
    from worker.features.provisioning.properties import PropertyRow
    from worker.features.provisioning.provisioning import Provisioner

T = TypeVar("T")

FAILED = 1
ROTATED = ("org", "state", "replaces", "client_id", "error")
PLANNED = ("org", "state", "replaces", "created_at")
COLUMNS = ("org", "name", "changes", "client_id", "error")
ORPHAN_COLUMNS = ("id", "name", "org", "deleted", "error")


# What happens to an org that the provider does not list.
Absent = Literal["keep", "suspend"]
AbsentOption = Annotated[Absent, option("--absent", "What to do with orgs that the provider does not list.")]


def sync(
    session: Invocation,
    issuer: IssuerOption = None,
    org: Annotated[str | None, option("--org CODE", "Only this org.", of="org")] = None,
    provision: Annotated[
        bool, option("--provision", "Make an application for each org without a working credential.")
    ] = False,
    absent: AbsentOption = "keep",
    yes: Annotated[bool, option("--yes", "Suspend more orgs at once than max_suspended allows.")] = False,
    dry_run: Annotated[bool, option("--dry-run", "Only print what would be done; changes nothing.")] = False,
    orphans: Annotated[
        bool, option("--orphans", "List applications of this installation that no org uses, instead.")
    ] = False,
    delete: Annotated[bool, option("--delete", "With --orphans: delete them.")] = False,
) -> int:
    """Add and rename the provider's orgs, and set their tags; exit 1 if any org failed.

    --provision also makes a machine-to-machine application for each org without a working
    credential, with the scopes of its definitions, and verifies a token of it. After an
    interruption the same command continues. Exit 75 while another process does the same.

    Exit 78 if worker.toml and the database name different installations, except with --dry-run.

    Orgs that are gone stay, or are suspended with --absent suspend; an org that returns is
    resumed if this command suspended it. Exit 5 if more are gone than max_suspended, 69 if
    the provider's list is empty or broken: no org is suspended then.
    """
    if delete and not orphans:
        raise UsageError("--delete is for --orphans", fix="`orgs sync --orphans --delete`")
    if orphans and (provision or yes or absent != "keep"):
        raise UsageError(
            "--orphans only lists applications: --provision, --absent and --yes are for a sync",
            fix="call it twice: `orgs sync --provision`, then `orgs sync --orphans`",
        )
    name = issuer or only_issuer(session)
    if orphans:
        return with_provisioner(
            session,
            name,
            lambda made: _orphans(session, made, org, delete=delete and not dry_run),
            changes=delete and not dry_run,
            seals=False,
        )
    return with_provisioner(
        session,
        name,
        lambda made: _sync(session, made, org, provision=provision, absent=absent, yes=yes, dry_run=dry_run),
        changes=not dry_run,
        seals=provision and not dry_run,
    )


def provision(
    context: typer.Context,
    issuer: Annotated[
        str | None, option("--issuer NAME", "Only this issuer (default: each with a management API).")
    ] = None,
    absent: AbsentOption = "keep",
) -> None:
    """Keep orgs and their applications as the provider has them; SIGTERM or Ctrl-C stops it.

    Does what `orgs sync --provision` does, at the start, every provisioning.every, and for
    one org as soon as the provider's webhook names it, on provisioning.listen. Adds the
    scopes that definitions need since, takes unused ones away with provisioning.trim_scopes,
    and rotates credentials older than provisioning.rotate_after. While another process
    provisions the same issuer, it waits. It holds a secret that opens those of all orgs, so
    run it as a user of its own; workers need no access to it.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.provisioning.process import provision as run_provision

    name_process(ProcessName.PROVISION)
    session = session_of(context)
    session.require_database()
    raise typer.Exit(run_provision(session.settings, issuer=issuer, absent=absent))


def with_provisioner(
    session: Invocation,
    issuer: str,
    work: Callable[[Provisioner], Awaitable[T]],
    *,
    changes: bool = True,
    seals: bool = True,
) -> T:
    """The result of `work`, called with the provisioner of an issuer.

    If it `changes` something, no other process provisions the issuer meanwhile. Unless it `seals`, it
    needs no key ring.
    """
    from worker.features.provisioning.provisioning import exclusive
    from worker.features.provisioning.wiring import open_provisioner
    from worker.operations.installation import Ownership

    async def run() -> T:
        async with open_provisioner(
            session.settings, ownership, issuer, session.clock, actor=session.actor, seals=seals
        ) as provisioner:
            return await work(provisioner)

    with session.database() as database:
        ownership = Ownership(database, session.settings.installation)
        with exclusive(ownership, issuer) if changes else nullcontext():
            try:
                return asyncio.run(run())
            except KeyboardInterrupt:
                if changes:
                    say("interrupted; the same command continues")
                raise


async def _sync(
    session: Invocation,
    provisioner: Provisioner,
    org: str | None,
    *,
    provision: bool,
    absent: Absent,
    yes: bool,
    dry_run: bool,
) -> int:
    from worker.features.provisioning import sync as operation
    from worker.features.provisioning.wiring import rules_of

    database, settings = provisioner.database, session.settings
    rules = rules_of(settings, provisioner.issuer, absent=absent, any_number=yes)
    with ProgressBar("orgs") as progress:
        listed = await operation.read_orgs(
            provisioner.management, rules, org, concurrency=provisioner.concurrency, report=progress.at
        )
    made = await database.run(operation.planned, database, listed, rules, org)
    if made.is_unknown:
        raise NotFound(
            f"neither the provider nor this installation has an org {org}",
            fix="`orgs sync --dry-run` shows the provider's orgs that are new",
        )
    if dry_run:
        rows = operation.describe(made, rules)
        if provision:
            rows = operation.with_planned(rows, made, await database.run(provisioner.lacking, org))
    else:
        rows = await database.run(
            operation.apply, database, made, rules, actor=session.actor, issuers=list(settings.issuers)
        )
        if provision:
            with ProgressBar("applications") as progress:
                provisioner.report = progress.at
                rows = operation.with_results(rows, await provisioner.provision(org), made)
    shown = [{**row, "changes": ", ".join(row["changes"])} for row in rows]
    session.print_rows(rows if session.output is not Format.TABLE else shown, COLUMNS, key="org")
    for row in rows:
        for text in filter(None, (row["error"], row["warning"])):
            say(f"{row['org']}: {text}")
        if row["fix"]:
            say(f"fix: {row['fix']}")
    stored = None if org is None else made.stored.get(org)
    if provision and not rows and stored is not None and stored["state"] in ("suspended", "removed"):
        say(f"org {org} is {stored['state']}: it gets no application")
    made.check_suspended(rules)
    return FAILED if any(row["error"] for row in rows) else 0


async def _orphans(session: Invocation, provisioner: Provisioner, org: str | None, *, delete: bool) -> int:
    from worker.features.provisioning.provisioning import orphans

    rows = await orphans(provisioner, org, delete=delete)
    session.print_rows(rows, ORPHAN_COLUMNS)
    if session.output is Format.TABLE and rows and not delete:
        say("`orgs sync --orphans --delete` deletes them")
    return FAILED if any(row["error"] for row in rows) else 0


def properties(
    session: Invocation,
    org: OrgArgument,
    set_: Annotated[
        list[str] | None, option("--set K=V", "Set a property; true and false are booleans. Repeatable.")
    ] = None,
    unset: Annotated[list[str] | None, option("--unset K", "Unset a property; repeatable.")] = None,
) -> None:
    """Show the properties of the org's application at the provider, and change them.

    A change outdates the org's tokens: it returns once workers have dropped theirs, so that the
    next run has the value. A running run keeps its token until it requests another. Needs
    [issuers.NAME.management]. Values are neither stored here nor in the audit; give no secret
    on a command line.
    """
    from worker.features.provisioning.management_wiring import open_management
    from worker.features.provisioning.properties import change_properties, show_properties
    from worker.operations.installation import Ownership
    from worker.operations.new_claims import EVERY
    from worker.store import orgs

    changes = _changes(set_ or [], unset or [])

    async def run() -> list[PropertyRow]:
        ownership = Ownership(database, session.settings.installation)
        if changes:
            await ownership.permit()
        async with open_management(
            session.settings, issuer, session.clock, permit=ownership.permit
        ) as management:
            if changes:
                changed = await change_properties(database, management, org, changes, actor=session.actor)
                # Workers look every two seconds, and a moment is left for what they do then.
                await session.clock.sleep(EVERY + 0.5)
                return changed
            return await show_properties(database, management, org)

    with session.database() as database:
        with database.autocommit() as connection:
            issuer = orgs.require(connection, org)["issuer"]
        rows = asyncio.run(run())
    session.print_rows(rows, ("name", "value"), key="name")
    if changes and session.output is Format.TABLE:
        say(f"runs that start from now on have them; `orgs diff {org}` requests one and compares")


def _changes(given: list[str], unset: list[str]) -> dict[str, PropertyValue | None]:
    """The values by key, None for those to unset; raises UsageError."""
    values: dict[str, PropertyValue | None] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {text!r} is not K=V", fix="--set plan=pro; --unset plan")
        if key in values:
            raise UsageError(f"--set {key} is given twice", fix="give one value")
        if not value:
            raise UsageError(f"--set {key}= has no value", fix=f"--unset {key}")
        values[key] = value == "true" if value in ("true", "false") else value
    for key in dict.fromkeys(unset):
        if key in values:
            raise UsageError(f"{key} is both set and unset", fix="give one of the two")
        values[key] = None
    return values


def rotate_fleet(
    session: Invocation,
    issuer: str | None,
    older_than: timedelta,
    *,
    limit: int | None,
    overlap: timedelta | None,
    dry_run: bool,
) -> int:
    """Rotate what orgworker made longer ago, print a row for each org, and return the exit code."""
    name = issuer or only_issuer(session)
    with ProgressBar("rotations") as progress:

        def tell(text: str) -> None:
            progress.close()
            say(text)

        async def work(provisioner: Provisioner) -> list[dict[str, Any]]:
            from worker.features.provisioning.wiring import fleet_of

            fleet = fleet_of(session.settings, provisioner, overlap=overlap)
            fleet.report, fleet.say = progress.at, tell
            chosen, by_hand = await provisioner.database.run(fleet.candidates, older_than, limit)
            if by_hand:
                tell(
                    f"{by_hand} org{'s' * (by_hand != 1)} with an older credential that a person added:"
                    " `credentials rotate ORG` rotates these"
                )
            if dry_run:
                return [
                    {
                        "org": each["org"],
                        "state": "planned",
                        "replaces": each["client_id"],
                        "created_at": each["created_at"],
                    }
                    for each in chosen
                ]
            return [_row_of(each) for each in await fleet.rotate(chosen)]

        rows = with_provisioner(session, name, work, changes=not dry_run, seals=not dry_run)
    session.print_rows(rows, PLANNED if dry_run else ROTATED, key="org")
    for row in rows:
        if row.get("error"):
            say(f"{row['org']}: {row['error']}")
        if row.get("fix"):
            say(f"fix: {row['fix']}")
    return FAILED if any(row.get("error") for row in rows) else 0


def _row_of(result: Rotated) -> dict[str, Any]:
    state = "failed" if result.error else "rotated" if result.client_id else "unchanged"
    return {
        "org": result.org,
        "state": state,
        "replaces": result.replaces,
        "client_id": result.client_id,
        "error": result.error.message if result.error else None,
        "fix": (result.error.fix if result.error else None) or None,
    }
