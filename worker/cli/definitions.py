"""`definitions`: what each org runs and when, with a preview by the code that fires schedules."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.lists import add_list
from worker.cli.options import (
    FromOption,
    NoteOption,
    OrgArgument,
    OutputOption,
    UntilOption,
    argument,
    option,
    read_json,
    read_pairs,
    split_pairs,
)
from worker.cli.output import Format, print_row, print_rows
from worker.cli.session import change, session_of
from worker.definitions.units import parse_time
from worker.errors import UsageError
from worker.store.lists import BACKFILLS, DEFINITIONS

if TYPE_CHECKING:
    from worker.store.lists.read import DefinitionState

NameArgument = Annotated[str, argument("NAME", "The definition's name, unique in its org.", of="definition")]


def backfill(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    start: FromOption,
    until: UntilOption,
    limit: Annotated[int, option("--limit N", "At most N runs are unfinished at once.", min=1)] = 1,
    cancel: Annotated[
        bool, option("--cancel", "Cancel the backfill of this range; running runs continue.")
    ] = False,
    dry_run: Annotated[
        bool, option("--dry-run", "Only print how many runs it would make, and for which times.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> None:
    """Run every scheduled time in a range again, and print the backfill.

    The same range again adds nothing; a cancelled backfill continues where it stopped.
    """
    from worker.operations import backfill as operation

    if dry_run and cancel:
        raise UsageError("--dry-run and --cancel exclude each other", fix="leave one of them out")
    session = session_of(context)
    first = parse_time(start, session.clock, name="--from")
    end = parse_time(until, session.clock, name="--until")
    if dry_run:
        with session.database() as database:
            row = operation.planned_backfill(database, org, name, start=first, until=end, limit=limit)
        print_row(row, output)
        return
    verb = operation.cancel_backfill if cancel else partial(operation.backfill, limit=limit)
    change(context, output, partial(verb, org=org, name=name, start=first, until=end))


app = typer.Typer(
    help="Definitions: list, show, preview, run now, backfill, edit, pause, resume. `apply` makes them."
)
app.command("backfill")(backfill)
add_list(app, BACKFILLS, "backfills")

add_list(app, DEFINITIONS)


@app.command("show")
def show(
    context: typer.Context, org: OrgArgument, name: NameArgument, output: OutputOption = Format.TABLE
) -> None:
    """Show one definition with its whole spec."""
    from worker.store.lists.read import definition

    with session_of(context).database() as database, database.autocommit() as connection:
        row = definition(connection, org, name)
    print_row(row, output)


@app.command("next")
def next_(
    context: typer.Context,
    org: Annotated[str | None, argument("ORG", "The org's code.", of="org")] = None,
    name: Annotated[str | None, argument("NAME", "The definition's name.", of="definition")] = None,
    schedule: Annotated[
        str | None, option("--schedule TEXT", "Preview this instead of a stored one.")
    ] = None,
    timezone: Annotated[
        str | None, option("--timezone ZONE", "IANA zone of --schedule; default UTC.")
    ] = None,
    start: Annotated[
        str | None, option("--from T", "From this time on; default from those that are due.")
    ] = None,
    count: Annotated[int, option("-n N", "How many times.", min=1, max=1000)] = 10,
    output: OutputOption = Format.TABLE,
) -> None:
    """Preview the next scheduled times of a definition, or of --schedule."""
    session = session_of(context)
    at = None if start is None else parse_time(start, session.clock, name="--from")
    if schedule is not None and org is None:
        from worker.runs.preview import preview_schedule

        rows = preview_schedule(schedule, timezone or "UTC", at or session.clock.now(), count)
    elif schedule is None and timezone is None and org is not None and name is not None:
        from worker.runs.preview import preview_definition
        from worker.store.lists.read import definition
        from worker.store.lists.runs import unfinished

        with session.database() as database, database.autocommit() as connection:
            row = definition(connection, org, name)
            serial_runs = unfinished(connection, org, row["id"])
            now = database.now(connection)
        rows = preview_definition(row, serial_runs, at, count, now=now)
    else:
        raise UsageError(
            "no schedule is named", fix="name either ORG and NAME, or --schedule TEXT (with --timezone ZONE)"
        )
    print_rows(rows, output, columns=("scheduled_for", "local", "note"), key="scheduled_for")


@app.command("run")
def run(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    request_key: Annotated[
        str | None, option("--request-key K", "The same key again makes no second run (default: random).")
    ] = None,
    param: Annotated[
        list[str] | None,
        option(
            "--param K=V", "A param for this run only: JSON if the handler accepts it, else text; repeatable."
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
        list[str], argument("KEY=VALUE...", "Keys as in a file for `apply`; null restores the default.")
    ],
    revision: Annotated[int | None, option("--revision N", "Only if it is at this revision.")] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Change keys of a definition; the next `apply` of a file that has it overrides them."""
    from worker.operations.definitions import edit_definition
    from worker.operations.installed_handlers import store_unknown

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
            api_origins=session.settings.api_origins,
        )
    print_row(row, output)


state_app = typer.Typer(
    help="State: what a definition remembers between its runs, as its handler's `ctx.state`."
)
app.add_typer(state_app, name="state")


@state_app.command("show")
def show_state(
    context: typer.Context, org: OrgArgument, name: NameArgument, output: OutputOption = Format.TABLE
) -> None:
    """Show the state of a definition; as JSON only the state itself, {} without one."""
    from worker.store.lists.read import state

    with session_of(context).database() as database, database.autocommit() as connection:
        row = state(connection, org, name)
    _print_state(row, output)


@state_app.command("set")
def set_state(
    context: typer.Context,
    org: OrgArgument,
    name: NameArgument,
    data: Annotated[str, option("--data JSON", "The new state: a JSON object of at most 64 KiB.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Replace the state of a definition; exit 5 while a run of it is running.

    A run that waits, also for another attempt, gets the new state.
    """
    from worker.operations.states import set_state as operation

    session = session_of(context)
    value = read_json(data, option="--data")
    with session.database() as database:
        row = operation(database, org, name, value, actor=session.actor)
    _print_state(row, output)


@state_app.command("clear")
def clear_state(
    context: typer.Context, org: OrgArgument, name: NameArgument, output: OutputOption = Format.TABLE
) -> None:
    """Clear the state of a definition; exit 5 while a run of it is running."""
    from worker.operations.states import clear_state as operation

    session = session_of(context)
    with session.database() as database:
        row = operation(database, org, name, actor=session.actor)
    _print_state(row, output)


def _print_state(row: DefinitionState, output: Format) -> None:
    # As JSON, what the handler gets.
    whole = output in (Format.TABLE, Format.ID)
    print_row({**row} if whole else row["data"], output, key="definition", verbatim=True)


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
