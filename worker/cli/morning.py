"""`status` and `failures`: the morning page of the console, on the command line."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from worker.cli.options import OutputOption, SinceOption, read_since
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of
from worker.errors import UsageError

DAY = timedelta(days=1)
MATTERS = ("level", "title", "about", "next")
CAUSES = ("open_runs", "open_orgs", "runs", "last_at", "message", "run")
STATES = ("failed", "refused")


def status(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """What needs attention over all orgs, most harmful first, as on the console's morning page.

    `level` is bad, warn or quiet. With it, the runs that run now and those that ended in the
    last 24 hours. The exit code is 0 also if something is bad; `doctor` has one.
    """
    from worker.operations.matters import matters
    from worker.store.lists import morning
    from worker.web.pages.morning import EndedByHour

    session = session_of(context)
    word = session.settings.installation
    with session.database() as database, database.autocommit() as connection:
        now = database.now(connection)
        found = matters(connection, now, is_admin=True, installation=word)
        running = morning.running_for_all_orgs(connection)
        hours = EndedByHour().read(connection, now).values()
    rows = [
        {"level": each.level, "title": each.title, "about": each.about, "next": each.step.command}
        for each in found
    ]
    ended = {state: sum(hour.get(state, 0) for hour in hours) for state in sorted(set().union(*hours))}
    if output is Format.JSON:
        print_row({"matters": rows, "running": running, "ended": ended}, output)
        return
    print_rows(rows, output, columns=MATTERS, key="title")
    counts = ", ".join(f"{count} {state}" for state, count in ended.items()) or "none"
    say(f"{running} running; ended in the last 24 hours: {counts}")


def failures(
    context: typer.Context,
    state: Annotated[str, typer.Option("--state", metavar="STATE", help="failed, or refused.")] = "failed",
    since: SinceOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Failed or refused runs by cause, most runs without a retry first; by default of the last day.

    `open_runs` are those without a retry, in `open_orgs` orgs; `run` is the newest one, which
    `runs why` explains. `runs retry --cause` takes the `cause` of -o json.
    """
    from worker.store.lists.failures import by_cause_for_all_orgs

    if state not in STATES:
        raise UsageError(f"--state {state} is not one of {', '.join(STATES)}", fix="--state refused")
    session = session_of(context)
    start = read_since(since, session.clock)
    with session.database() as database, database.autocommit() as connection:
        rows, more = by_cause_for_all_orgs(connection, state, start or database.now(connection) - DAY)
    print_rows(rows, output, columns=CAUSES, key="run")
    if more:
        say("older runs were not read: give --since a later time")
