"""`orgs properties` and `orgs diff`: what an org's tokens say, and what the next one changes."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from worker.cli.checks import FAILED, print_report, with_checks
from worker.cli.options import OrgArgument, option
from worker.cli.output import Format, say
from worker.cli.session import Invocation
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.operations.properties import PropertyRow
    from worker.providers.management.contract import PropertyValue

CHANGE_COLUMNS = ("kind", "name", "change")


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
    from worker.operations.installation import Ownership
    from worker.operations.new_claims import EVERY
    from worker.operations.properties import change_properties, show_properties
    from worker.store import orgs
    from worker.wiring.management import open_management

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
        session.print_rows(changes, CHANGE_COLUMNS, key="name")
    else:
        say(f"nothing changes against run {last['run']}")
    return 0


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
