"""`orgs check` and `check`: whether every org's tokens are as they should be, and what they cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.options import OutputOption
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of
from worker.errors import IssuerUnavailable, UsageError

if TYPE_CHECKING:
    from worker.operations.check_orgs import Report
    from worker.store.database import Database

FAILED = 1
COLUMNS = ("org", "issuer", "ok", "generation", "missing", "unused", "lifetime", "problems")
DEMAND_COLUMNS = (
    "issuer",
    "orgs",
    "definitions",
    "runs_a_day",
    "token_requests_a_day",
    "token_lifetime",
    "max_requests_per_second",
    "cold_start",
)
CAPACITY_COLUMNS = ("what", "needs", "mean", "has", "unit", "at", "ok")
# Orgs between two remarks on how far it is.
EVERY = 100


def check_orgs(
    context: typer.Context,
    org: Annotated[str | None, typer.Argument(metavar="[ORG]", help="One org, or --all.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every org that may run something.")] = False,
    concurrency: Annotated[
        int,
        typer.Option("--concurrency", metavar="N", min=1, max=64, help="Orgs at a time, within the rate."),
    ] = 8,
    output: OutputOption = Format.TABLE,
) -> int:
    """Fetch a token of an org, or of all, and say what is wrong with it; exit 1 if any org fails.

    Looks at discovery, key, org, client, scopes against those that the definitions
    need, properties and flags by name and type, lifetime, clock and rate headers.
    """
    from worker.wiring.secrets import open_checks

    if (org is None) != all_:
        raise UsageError("name one org, or --all", fix="`orgs check ORG`, or `orgs check --all`")
    session = session_of(context)

    async def ask(database: Database) -> list[Report]:
        async with open_checks(session.settings, database, session.clock) as checks:
            return await checks.check_all(
                None if org is None else [org], concurrency=concurrency, report=_report
            )

    with session.database() as database:
        reports = asyncio.run(ask(database))
    rows = [report.as_row() for report in reports]
    if org is not None and output is Format.TABLE:
        _print_findings(reports[0])
    else:
        print_rows(rows, output, columns=COLUMNS, key="org")
    for report in reports:
        _say_problems(report)
    return FAILED if any(not report.ok for report in reports) else 0


def print_report(report: Report, output: Format) -> int:
    """Print one org's report; its exit code."""
    if output is Format.TABLE:
        _print_findings(report)
    else:
        print_row(report.as_row(), output, key="org")
    _say_problems(report)
    if report.ok:
        return 0
    return IssuerUnavailable.exit_code if report.transient else FAILED


def _print_findings(report: Report) -> None:
    rows = [{"check": each.check, "ok": each.ok, "detail": each.detail} for each in report.findings]
    print_rows(rows, Format.TABLE, columns=("check", "ok", "detail"), key="check")


def _say_problems(report: Report) -> None:
    for finding in report.findings:
        if not finding.ok:
            say(f"{report.org}: {finding.check}: {finding.detail}")
        if finding.fix:
            say(f"{'fix' if not finding.ok else 'better'}: {finding.fix}")


def _report(done: int, total: int) -> None:
    if done % EVERY == 0:
        say(f"{done} of {total}")


def check(
    context: typer.Context,
    only_capacity: Annotated[
        bool,
        typer.Option("--capacity", help="Only starts, slots, memory and limits; `-o json` prints these."),
    ] = False,
    output: OutputOption = Format.TABLE,
) -> int:
    """Say what the definitions imply for a day, and whether it can be had; exit 1 if it cannot.

    Token requests, per issuer: from schedules, the life of the tokens that came last (an
    hour where none did), max_claims_age, and the workers that are up. `cold_start` is how
    long it takes to get every org's token at the configured rate. Asks no provider;
    `orgs check` does.

    Capacity: starts a second, runs at once and their memory at the worst time of the day
    (`needs`) and in the mean, beside what workers and machine can (`has`); orgs and
    handlers whose limit is too low, and definitions that are due again before they have
    ended. From the newest runs of each handler; what is assumed of one that has not run
    fails nothing.
    """
    from worker.operations.capacity import Machine, capacity
    from worker.operations.requirements import forecast_tokens
    from worker.wiring.secrets import issuers_of

    session = session_of(context)
    issuers = issuers_of(session.settings)
    with session.database() as database:
        found = [] if only_capacity else forecast_tokens(database, issuers)
        room = capacity(database, session.settings.execution, Machine.here())
    rows = [one.as_row(issuers.get(one.issuer)) for one in found]
    measured = [measure.as_row() for measure in room.measures]
    if not only_capacity:
        print_rows(rows, output, columns=DEMAND_COLUMNS, key="issuer")
    if only_capacity or output is Format.TABLE:
        print_rows(measured, output, columns=CAPACITY_COLUMNS, key="what")
    for row in rows:
        if row["lifetime_is_assumed"]:
            say(f"{row['issuer']}: has given no token yet; a life of an hour is assumed")
        if row["problem"]:
            say(f"{row['issuer']}: {row['problem']}")
    for assumption in room.assumed:
        say(assumption)
    for measure in room.measures:
        if measure.change:
            say(f"{'better' if measure.ok else 'fix'}: {measure.what}: {measure.change}")
    failed = any(row["problem"] for row in rows) or any(not row["ok"] for row in measured)
    return FAILED if failed else 0
