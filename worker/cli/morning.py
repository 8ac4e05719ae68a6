"""`status` and `failures`: the morning page of the console, on the command line."""

from __future__ import annotations

import shlex
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated
from urllib.parse import parse_qs, urlsplit

import typer

from worker.cli.options import OutputOption, SinceOption, read_since
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.web.pages.morning import Matter

DAY = timedelta(days=1)
MATTERS = ("level", "title", "about", "next")
CAUSES = ("open_runs", "open_orgs", "runs", "last_at", "message", "run")
STATES = ("failed", "refused")
# The command for each page of the console that a matter leads to.
_NEXT = {
    "/workers": "doctor",
    "/credentials": "credentials list",
    "/orgs": "orgs list --broken",
    "/handlers": "handlers list",
    "/definitions": "definitions list",
    "/failures": "failures",
}


def status(context: typer.Context, output: OutputOption = Format.TABLE) -> None:
    """What needs attention over all orgs, most harmful first, as on the console's morning page.

    `level` is bad, warn or quiet. With it, the runs that run now and those that ended in the
    last 24 hours. The exit code is 0 also if something is bad; `doctor` has one.
    """
    from worker.store.lists import morning
    from worker.web.pages.morning import EndedByHour, matters

    session = session_of(context)
    word = session.settings.installation
    with session.database() as database, database.autocommit() as connection:
        now = database.now(connection)
        found = matters(connection, now, is_admin=True, installation=word)
        running = morning.running_for_all_orgs(connection)
        hours = EndedByHour().read(connection, now).values()
    rows = [
        {"level": each.level, "title": each.title, "about": each.about, "next": _next(each)} for each in found
    ]
    ended = {state: sum(hour.get(state, 0) for hour in hours) for state in sorted(set().union(*hours))}
    if output is Format.JSON:
        print_row({"matters": rows, "running": running, "ended": ended}, output)
        return
    print_rows(rows, output, columns=MATTERS, key="title")
    counts = ", ".join(f"{count} {state}" for state, count in ended.items()) or "none"
    say(f"{running} running; ended in the last 24 hours: {counts}")


def _next(matter: Matter) -> str:
    """The command that shows what the console's page behind a matter shows."""
    parts = urlsplit(matter.href)
    if parts.path == "/search":
        # A handler chose part of it, and the reader may paste it into a shell.
        return f"runs list -q {shlex.quote(parse_qs(parts.query)['q'][0])}"
    if parts.path.startswith("/definitions/"):
        return "definitions list"
    given = parse_qs(parts.query)
    more = f" --state {given['state'][0]}" if "state" in given else ""
    return _NEXT.get(parts.path, "doctor") + more


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
