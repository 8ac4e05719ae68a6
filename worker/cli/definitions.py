"""The next instants of a schedule, from the very code that fires, and what is particular about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    DefinitionOption,
    LimitOption,
    NoteOption,
    OrgOption,
    OutputOption,
    SinceOption,
    StateOption,
    read_instant,
    read_pairs,
    read_since,
    split_pairs,
)
from worker.cli.orgs import OrgArgument
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import Invocation, change, session_of
from worker.definitions.units import format_duration
from worker.errors import UsageError

Row = dict[str, Any]

_NONE = timedelta(0)


def of_schedule(schedule: str, zone_name: str, start: datetime, count: int) -> list[Row]:
    """The first `count` instants of a schedule's text at or after `start`.

    Raises:
        InvalidTrigger: the text or the zone cannot be read, or it never fires.
    """
    from worker.definitions.triggers import parse_schedule
    from worker.definitions.zones import parse_zone

    zone = parse_zone(zone_name)
    return [_row(instant, zone) for instant in islice(parse_schedule(schedule, zone).instants(start), count)]


def of_definition(
    row: Mapping[str, Any],
    unfinished: Sequence[Mapping[str, Any]],
    start: datetime | None,
    count: int,
    *,
    now: datetime,
) -> list[Row]:
    """As `of_schedule`, of a row of `definitions show`; what would be skipped or is not due says so.

    Without `start` it begins with what is due and has not fired yet.
    """
    from worker.definitions.zones import parse_zone
    from worker.runs.fire import preview

    zone = parse_zone(row["timezone"])
    upcoming = preview(row, unfinished, now, start=start, count=count)
    return [_row(scheduled_for, zone, note) for scheduled_for, note in upcoming]


def _row(instant: datetime, zone: ZoneInfo, note: str = "") -> Row:
    notes = "; ".join(filter(None, (note, _change(instant, zone))))
    return {"scheduled_for": instant, "local": instant.astimezone(zone).isoformat(), "note": notes or None}


def _change(instant: datetime, zone: ZoneInfo) -> str:
    """Whether clocks change at this instant, or make its wall time come twice."""
    local = instant.astimezone(zone)
    ahead = _offset(local) - _offset((instant - timedelta(seconds=1)).astimezone(zone))
    if ahead > _NONE:
        return f"clocks go forward {format_duration(ahead)} here"
    if ahead < _NONE:
        return f"clocks go back {format_duration(-ahead)} here"
    if _offset(local.replace(fold=1 - local.fold)) != _offset(local):
        return f"{'second' if local.fold else 'first'} pass of this wall time"
    return ""


def _offset(instant: datetime) -> timedelta:
    return instant.utcoffset() or _NONE


BACKFILL_COLUMNS = (
    "id",
    "org",
    "definition",
    "range_from",
    "range_until",
    "state",
    "ended",
    "made",
    "instants",
)


def backfill(
    context: typer.Context,
    org: OrgArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The definition's name, unique in its org.")],
    start: Annotated[
        str, typer.Option("--from", metavar="T", help="First time: 2027-01-01T08:00:00Z, 2d (ago).")
    ],
    until: Annotated[
        str,
        typer.Option("--until", metavar="T", help="End of the range, itself excluded; not in the future."),
    ],
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="At most N runs are unfinished at once.")
    ] = 1,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Cancel the backfill of this range; running runs continue.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Run every scheduled time in a range again, and print the backfill.

    The same range again adds nothing; a cancelled backfill continues where it stopped.
    """
    from worker.operations import backfill as operation

    clock = session_of(context).clock
    first = read_instant(start, clock, option="--from")
    end = read_instant(until, clock, option="--until")
    verb = operation.cancel_backfill if cancel else partial(operation.backfill, limit=limit)
    change(context, output, partial(verb, org=org, name=name, start=first, until=end))


def backfills(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List backfills, newest first, with how many of their instants have run."""
    from worker.store import backfills as listing

    with session_of(context).database() as database, database.autocommit() as connection:
        if org is None:
            rows = listing.backfills_for_all_orgs(connection, definition=definition, limit=limit, after=after)
        else:
            rows = listing.backfills(connection, org, definition=definition, limit=limit, after=after)
    print_rows(rows, output, columns=BACKFILL_COLUMNS, limit=limit)


app = typer.Typer(
    help="Definitions: list, show, preview, run now, backfill, edit, pause, resume. `apply` makes them."
)
app.command("backfill")(backfill)
app.command("backfills")(backfills)

COLUMNS = ("org", "name", "handler", "schedule", "timezone", "state", "next_scheduled_for", "revision")
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The definition's name, unique in its org.")
]


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    state: StateOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List definitions, newest first; closed ones only with --state closed."""
    from worker.store.lists import definitions as listing

    session = session_of(context)
    narrowed: dict[str, Any] = {
        "definition": definition,
        "state": state,
        "since": read_since(since, session.clock),
        "limit": limit,
        "after": after,
    }
    with session.database() as database, database.autocommit() as connection:
        if org is None:
            rows = listing.definitions_for_all_orgs(connection, **narrowed)
        else:
            rows = listing.definitions(connection, org, **narrowed)
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("show")
def show(
    context: typer.Context, org: OrgArgument, name: NameArgument, output: OutputOption = Format.TABLE
) -> None:
    """Show one definition with its whole spec."""
    print_row(_definition(session_of(context), org, name), output)


@app.command("next")
def next_(
    context: typer.Context,
    org: Annotated[str | None, typer.Argument(metavar="ORG", help="The org's code.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The definition's name.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="TEXT", help="Preview this instead of a stored one.")
    ] = None,
    timezone: Annotated[
        str | None, typer.Option("--timezone", metavar="ZONE", help="IANA zone of --schedule; default UTC.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="T", help="From this instant on; default from what is due."),
    ] = None,
    count: Annotated[int, typer.Option("-n", metavar="N", min=1, max=1000, help="How many instants.")] = 10,
    output: OutputOption = Format.TABLE,
) -> None:
    """Preview the next instants of a definition, or of --schedule, from the very code that fires."""
    session = session_of(context)
    at = None if start is None else read_instant(start, session.clock, option="--from")
    if schedule is not None and org is None:
        rows = of_schedule(schedule, timezone or "UTC", at or session.clock.now(), count)
    elif schedule is None and timezone is None and org is not None and name is not None:
        rows = _upcoming(session, org, name, at, count)
    else:
        raise UsageError(
            "it is not said which schedule",
            fix="name either ORG and NAME, or --schedule TEXT (with --timezone ZONE)",
        )
    print_rows(rows, output, columns=("scheduled_for", "local", "note"), key="scheduled_for")


@app.command("run")
def run(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    request_key: Annotated[
        str | None,
        typer.Option(
            "--request-key", metavar="K", help="The same key again makes no second run (default: random)."
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="K=V",
            help="A param for this run only: JSON if the handler accepts it, else text; repeatable.",
        ),
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Run a definition now, and print the new run."""
    from worker.operations.runs import run_now

    params = read_pairs(param or (), option="--param") or None
    typed = split_pairs(param or (), option="--param")
    run_it = partial(run_now, org=org, name=name, request_key=request_key, params=params, typed=typed)
    change(context, output, run_it)


@app.command("edit")
def edit(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...", help="Keys as in a file for `apply`; null restores the default."
        ),
    ],
    revision: Annotated[
        int | None, typer.Option("--revision", metavar="N", help="Only if it is at this revision.")
    ] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Change keys of a definition; the next `apply` of a file that has it overrides them."""
    from worker.operations.definitions import edit_definition
    from worker.wiring.catalogue import store_unknown

    session = session_of(context)
    with session.database() as database:
        store_unknown(session.settings, database)
        row = edit_definition(
            database,
            org,
            name,
            read_pairs(changes, option="KEY=VALUE"),
            actor=session.actor,
            revision=revision,
            inline=session.settings.execution.inline,
            insecure_origins=session.settings.execution.insecure_origins,
        )
    print_row(row, output)


@app.command("pause")
def pause(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    note: NoteOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Pause a definition: it is not due until it is resumed; a running run continues."""
    from worker.operations.definitions import pause_definition

    change(context, output, partial(pause_definition, org=org, name=name, note=note))


@app.command("resume")
def resume(
    context: typer.Context, org: OrgArgument, name: NameArgument, output: OutputOption = Format.TABLE
) -> None:
    """Resume a paused definition from now on; the times meanwhile are not replayed."""
    from worker.operations.definitions import resume_definition

    change(context, output, partial(resume_definition, org=org, name=name))


def _upcoming(
    session: Invocation, org: str, name: str, start: datetime | None, count: int
) -> list[dict[str, Any]]:
    from worker.store.lists import definitions as definition_lists
    from worker.store.lists import runs as run_lists

    with session.database() as database, database.autocommit() as connection:
        row = definition_lists.definition(connection, org, name)
        unfinished = run_lists.unfinished(connection, org, row["id"])
        now = database.now(connection)
    return of_definition(row, unfinished, start, count, now=now)


def _definition(session: Invocation, org: str, name: str) -> dict[str, Any]:
    from worker.store.lists import definitions as definition_lists

    with session.database() as database, database.autocommit() as connection:
        return definition_lists.definition(connection, org, name)
