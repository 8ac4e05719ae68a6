"""`orgs check`, `check` and `doctor`: whether tokens are valid, the load is possible, and all is healthy."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from worker.errors import Conflict, Diagnostic, IssuerUnavailable, UsageError
from worker.kit.feature import Point
from worker.kit.options import argument, option
from worker.kit.output import Format, as_json, say
from worker.kit.session import Invocation

if TYPE_CHECKING:
    from worker.diagnosis.check_orgs import Checks, Report
    from worker.store.database import Database

T = TypeVar("T")

FAILED = 1
COLUMNS = ("org", "issuer", "ok", "generation", "missing", "unused", "lifetime", "problems")
FINDING_COLUMNS = ("check", "ok", "detail")
FORECAST_COLUMNS = (
    *("issuer", "orgs", "definitions", "runs_a_day", "token_requests_a_day", "token_lifetime"),
    *("max_requests_per_second", "cold_start", "tokens_at_once", "tokens_ahead"),
)
CAPACITY_COLUMNS = ("what", "needs", "mean", "has", "unit", "at", "wait", "ok")
HOST_CHECKS: Point[Callable[..., list[Diagnostic]]] = Point("hosts.checks", "`doctor` of a host")
# Orgs between two progress messages.
EVERY = 100
# Missing secrets that `check` names.
MAX_LACKING = 20


def check_orgs(
    session: Invocation,
    org: Annotated[str | None, argument("[ORG]", "One org, or --all.", of="org")] = None,
    all_: Annotated[bool, option("--all", "Every org that can run something.")] = False,
    concurrency: Annotated[
        int, option("--concurrency N", "Orgs at a time, within the rate.", min=1, max=64)
    ] = 8,
) -> int:
    """Request a token of an org, or of all, and report problems; exit 1 if any org fails.

    Checks discovery, key, org, client, the scopes that the definitions need, properties and
    flags by name and type, lifetime, clock and rate headers.
    """
    if (org is None) != all_:
        raise UsageError("name one org, or --all", fix="`orgs check ORG`, or `orgs check --all`")
    codes = None if org is None else [org]
    reports = with_checks(
        session, lambda _, checks: checks.check_all(codes, concurrency=concurrency, report=_report)
    )
    if org is not None and session.output is Format.TABLE:
        print_report(session, reports[0])
    else:
        session.print_rows([report.as_row() for report in reports], COLUMNS, key="org")
        for report in reports:
            say_problems(report)
    return FAILED if any(not report.ok for report in reports) else 0


def with_checks(session: Invocation, ask: Callable[[Database, Checks], Coroutine[Any, Any, T]]) -> T:
    """The result of `ask`, called with the open database and the checks of its orgs."""
    from worker.diagnosis.check_orgs import open_checks

    async def run(database: Database) -> T:
        async with open_checks(session.settings, database, session.clock) as checks:
            return await ask(database, checks)

    with session.database() as database:
        return asyncio.run(run(database))


def print_report(session: Invocation, report: Report) -> int:
    """Print one org's report and return the exit code."""
    if session.output is Format.TABLE:
        rows = [{"check": each.check, "ok": each.ok, "detail": each.detail} for each in report.diagnostics]
        session.print_rows(rows, FINDING_COLUMNS, key="check")
    else:
        session.print_row(report.as_row(), key="org")
    say_problems(report)
    if report.ok:
        return 0
    return IssuerUnavailable.exit_code if report.transient else FAILED


def say_problems(report: Report) -> None:
    """Print on stderr what is wrong with an org's token, each with its fix."""
    for finding in report.diagnostics:
        if not finding.ok:
            say(f"{report.org}: {finding.check}: {finding.detail}")
        if finding.fix:
            say(f"{'better' if finding.ok else 'fix'}: {finding.fix}")


def _report(done: int, total: int) -> None:
    if done % EVERY == 0:
        say(f"{done} of {total}")


def check(
    session: Invocation,
    only_capacity: Annotated[
        bool, option("--capacity", "Only starts, slots, memory and limits; `-o json` prints these.")
    ] = False,
) -> int:
    """Forecast the load of the definitions for a day; exit 1 if it is not possible.

    Token requests, per issuer: computed from schedules, the lifetime of the last tokens (an
    hour if there are none), max_claims_age and, unless `[tokens] shared`, the live workers.
    `cold_start` is the time to get every org's token at the configured rate. `tokens_at_once`
    are needed at the worst time, `tokens_at`; `tokens_ahead` can be requested before it at this
    rate and lifetime, and if they are fewer, `advice` says what to do. Sends no requests;
    `orgs check` does.

    Capacity: starts a second, concurrent runs and their memory at the worst time of the day
    (`needs`) and on average (`mean`), against workers and machine (`has`), and how long runs
    then wait; orgs and handlers whose limit is too low; definitions that are due again before
    they end. Not ok: never enough, or a wait of more than 15 minutes; `tight`: a shorter one.
    It uses the newest run of each definition. Assumptions about handlers without runs fail
    nothing.

    Secrets: orgs that lack one which a handler of their definitions declares. Approvals: what hosts declare
    of their handlers that no administrator has approved; fails if definitions need it.

    Warns if this user may read the secret of a management API, as workers must not. Of egress it warns if
    this machine cannot seal runs, and names handlers that declare none and definitions that reveal the token.
    It also names definitions whose deadline passes before they fire, or after the next scheduled time.
    """
    from worker.diagnosis.capacity import Machine, capacity
    from worker.diagnosis.deadlines import odd_deadlines
    from worker.diagnosis.doctor import revealed_tokens, unapproved, undeclared_egress
    from worker.diagnosis.machine import network
    from worker.diagnosis.requirements import forecast_tokens, lacking_of_all_orgs
    from worker.process.confinement import readable_management_secrets
    from worker.wiring.issuers import issuers_of

    issuers = issuers_of(session.settings)
    with session.database() as database:
        tokens = session.settings.tokens
        forecasts, now = ([], None) if only_capacity else forecast_tokens(database, issuers, tokens)
        found = capacity(database, session.settings.execution, Machine.here())
        lacking = [] if only_capacity else lacking_of_all_orgs(database)
        pending = None if only_capacity else next(unapproved(database), None)
        warned: list[Diagnostic] = []
        if not only_capacity:
            warned = [network(session.settings), *undeclared_egress(database, session.settings)]
            warned += [*revealed_tokens(database), *odd_deadlines(database)]
    rows = [forecast.as_row(issuers.get(forecast.issuer), now, tokens) for forecast in forecasts if now]
    if not only_capacity:
        session.print_rows(rows, FORECAST_COLUMNS, key="issuer")
    if only_capacity or session.output is Format.TABLE:
        measures = [measure.as_row() for measure in found.measures]
        if session.output is Format.TABLE:
            # Enough on average and at once too little is neither yes nor no.
            measures = [
                row | {"ok": "tight" if row["ok"] and row["change"] else row["ok"]} for row in measures
            ]
        session.print_rows(measures, CAPACITY_COLUMNS, key="what")
    for row in rows:
        if row["lifetime_is_assumed"]:
            say(f"{row['issuer']}: has issued no token yet; a lifetime of an hour is assumed")
        if row["problem"]:
            say(f"{row['issuer']}: {row['problem']}")
        if row["advice"]:
            say(f"better: {row['issuer']}: {row['advice']}")
    for assumption in found.assumed:
        say(assumption)
    for name in readable_management_secrets(session.settings):
        say(
            f"warning: this user may read the secret {name}, which opens every org's secret at the provider; "
            "if workers run as this user, move the file to a secrets_dir that only provisioning uses"
        )
    for measure in found.measures:
        if measure.change:
            say(f"{'better' if measure.ok else 'fix'}: {measure.what}: {measure.change}")
    for org, missing in lacking[:MAX_LACKING]:
        say(f"{org}: {missing.detail}")
        say(f"fix: {missing.fix}")
    if len(lacking) > MAX_LACKING:
        say(f"{len(lacking) - MAX_LACKING} more secrets are missing; `orgs check ORG` names those of an org")
    if pending is not None and pending.fix:
        say(f"{'warning' if pending.ok else 'approvals'}: {pending.detail}")
        say(f"fix: {pending.fix}")
    for one in warned:
        if one.fix:
            say(f"{'warning' if one.ok else one.check}: {one.detail}")
            say(f"fix: {one.fix}")
    failed = (
        not all(one.ok for one in warned)
        or (pending is not None and not pending.ok)
        or any(row["problem"] for row in rows)
        or not all(measure.ok for measure in found.measures)
    )
    return FAILED if failed or lacking else 0


def doctor(
    session: Invocation,
    bundle: Annotated[
        str | None, option("--bundle FILE", "Also write a redacted support bundle to FILE.")
    ] = None,
) -> int:
    """Find slow or silent faults; exit 1 if any check fails. Changes nothing.

    With the configuration of a host: whether its token, its workers and its sandbox can be used.

    The bundle is one readable JSON file: versions, settings without secrets, sizes, workers
    and the last failures. Numbers replace the names of orgs, definitions and machines; it has
    no secrets, tokens, params, results, logs or error messages.
    """
    from worker.diagnosis.doctor import run_checks
    from worker.diagnosis.shadow import shadow
    from worker.wiring import find_keyring

    if session.settings.host.control:
        findings = _of_host(session)
        if bundle is not None:
            raise UsageError("--bundle needs the database", fix="run `doctor --bundle` on a worker's machine")
    else:
        with session.database() as database:
            findings = run_checks(database, session.settings, find_keyring(session.settings))
            if bundle is not None:
                _write(bundle, session, database)
    if (shadowed := shadow(Path.cwd())) is not None:
        findings = [*findings, shadowed]
    rows = [asdict(finding) for finding in findings]
    session.print_rows(rows, FINDING_COLUMNS, key="check")
    for finding in findings:
        if not finding.ok:
            say(f"fix: {finding.check}: {finding.fix}")
        elif finding.fix:
            say(f"warning: {finding.check}: {finding.detail}; {finding.fix}")
    if bundle is not None:
        say(f"wrote {bundle}; read it before you send it")
    return 0 if all(finding.ok for finding in findings) else FAILED


def _of_host(session: Invocation) -> list[Diagnostic]:
    from worker.diagnosis.machine import OF_HOST
    from worker.settings import load

    settings = load(session.config, session.overrides, of_host=True)
    return [*HOST_CHECKS.require()(settings.host), *(check(settings) for check in OF_HOST)]


def _write(path: str, session: Invocation, database: Database) -> None:
    """Write the bundle to a new file that only its owner can read."""
    from worker.diagnosis.bundle import gather
    from worker.wiring import find_keyring
    from worker.wiring.issuers import issuers_of

    ring = find_keyring(session.settings)
    text = as_json(gather(database, session.settings, issuers_of(session.settings), ring))
    try:
        file = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Conflict(f"there is a file {path} already", fix="name another file") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", fix="name a file in a folder that you can write to"
        ) from None
    with os.fdopen(file, "w", encoding="utf-8") as bundle:
        bundle.write(text + "\n")
