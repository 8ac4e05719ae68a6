"""`status`, `failures`, `skips` and `audit`: what happened, and what needs attention."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from worker.errors import UsageError
from worker.ids import ALL_ORGS
from worker.kit.lists import add_list
from worker.kit.options import SinceOption, option, read_since
from worker.kit.output import Format, say
from worker.kit.session import Invocation
from worker.store.lists import AUDIT, SKIPS

DAY = timedelta(days=1)
MATTERS = ("level", "title", "about", "next")
CAUSES = ("open_runs", "open_orgs", "runs", "last_at", "message", "run")
STATES = ("failed", "refused")


def status(session: Invocation) -> None:
    """What needs attention over all orgs, most harmful first, as on the console's morning page.

    `level` is bad, warn or quiet, and `next` the command to go on with. -o json also has `kind`, a stable
    word; `whose` the cause is (operator, handler, org, provider, remote_api or limit); `since`; and `subject`
    and `verb`, which `next` is made of. Then come the runs that run now and those that ended in the last 24
    hours. The exit code is 0 also if something is bad; `doctor` has one.
    """
    from worker.diagnosis.matters import overview

    with session.database() as database, database.autocommit() as connection:
        found = overview(connection, database.now(connection), installation=session.settings.installation)
    if session.output is Format.JSON:
        session.print_row(found)
        return
    session.print_rows(found["matters"], MATTERS, key="title")
    counts = ", ".join(f"{count} {state}" for state, count in found["ended"].items()) or "none"
    say(f"{found['running']} running; ended in the last 24 hours: {counts}")


def failures(
    session: Invocation,
    state: Annotated[str, option("--state STATE", "failed, or refused.")] = "failed",
    since: SinceOption = None,
) -> None:
    """Failed or refused runs by cause, most runs without a retry first; by default of the last day.

    `open_runs` are those without a retry, in `open_orgs` orgs, of which up to three are `named`; `run` is
    the newest one, which `runs why` explains. `runs retry --cause` takes the `cause` of -o json.
    """
    from worker.diagnosis.matters import listed
    from worker.store.lists.failures import by_cause
    from worker.store.lists.morning import Named

    if state not in STATES:
        raise UsageError(f"--state {state} is not one of {', '.join(STATES)}", fix="--state refused")
    start = read_since(since, session.clock)
    with session.database() as database, database.autocommit() as connection:
        rows, more = by_cause(connection, ALL_ORGS, state, start or database.now(connection) - DAY)
    named = {"open_orgs": lambda row: listed(Named(row["open_orgs"], row["named"]))}
    session.print_rows(rows, CAUSES, key="run", cells=named)
    if more:
        say("older runs were not read: give --since a later time")


skips = typer.Typer(
    help="Scheduled times that never became a run, because they were missed, overlapped or on a calendar."
)
add_list(skips, SKIPS)

audit = typer.Typer(help="Who changed what: every change made by a person, or by a program for one.")
add_list(audit, AUDIT)
