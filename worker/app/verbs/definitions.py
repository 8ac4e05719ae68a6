"""`definitions`: what each org runs and when, with a preview by the code that fires schedules."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from worker.errors import UsageError
from worker.kit.lists import add_list
from worker.kit.options import (
    FromOption,
    NoteOption,
    OrgArgument,
    UntilOption,
    argument,
    option,
    read_json,
    read_pairs,
    split_pairs,
)
from worker.kit.output import Format
from worker.kit.session import Invocation, verb
from worker.model.definitions.units import parse_time
from worker.store.lists import BACKFILLS, DEFINITIONS

if TYPE_CHECKING:
    from worker.store.lists.read import DefinitionState

NameArgument = Annotated[str, argument("NAME", "The definition's name, unique in its org.", of="definition")]


def backfill(
    session: Invocation,
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
) -> None:
    """Run every scheduled time in a range again, and print the backfill.

    The same range again adds nothing; a cancelled backfill continues where it stopped.
    """
    from worker.operations import backfill as operation

    if dry_run and cancel:
        raise UsageError("--dry-run and --cancel exclude each other", fix="leave one of them out")
    first = parse_time(start, session.clock, name="--from")
    end = parse_time(until, session.clock, name="--until")
    if dry_run:
        with session.database() as database:
            row = operation.planned_backfill(database, org, name, start=first, until=end, limit=limit)
        session.print_row(row)
        return
    run_again = operation.cancel_backfill if cancel else partial(operation.backfill, limit=limit)
    session.change(run_again, org=org, name=name, start=first, until=end)


app = typer.Typer(
    help="Definitions: list, show, preview, run now, backfill, edit, pause, resume. `apply` makes them."
)
verb(app, "backfill")(backfill)
add_list(app, BACKFILLS, "backfills")

add_list(app, DEFINITIONS)


@verb(app, "show")
def show(session: Invocation, org: OrgArgument, name: NameArgument) -> None:
    """Show one definition with its whole spec."""
    from worker.store.lists.read import definition

    session.show(definition, org, name)


@verb(app, "next")
def next_(
    session: Invocation,
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
) -> None:
    """Preview the next scheduled times of a definition, or of --schedule.

    `deadline` is when the run of each must have succeeded, if the definition has `done_by` or `done_within`.
    """
    at = None if start is None else parse_time(start, session.clock, name="--from")
    if schedule is not None and org is None:
        from worker.model.runs.preview import preview_schedule

        rows = preview_schedule(schedule, timezone or "UTC", at or session.clock.now(), count)
    elif schedule is None and timezone is None and org is not None and name is not None:
        from worker.model.runs.preview import preview_definition
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
    until = ("deadline",) if any(row["deadline"] for row in rows) else ()
    session.print_rows(rows, ("scheduled_for", "local", *until, "note"), key="scheduled_for")


@verb(app, "run")
def run(
    session: Invocation,
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
) -> None:
    """Run a definition now, and print the new run."""
    from worker.operations.runs import run_now

    params = read_pairs(param or (), option="--param") or None
    typed = split_pairs(param or (), option="--param")
    session.change(run_now, org=org, name=name, request_key=request_key, params=params, typed=typed)


@verb(app, "edit")
def edit(
    session: Invocation,
    org: OrgArgument,
    name: NameArgument,
    changes: Annotated[
        list[str], argument("KEY=VALUE...", "Keys as in a file for `apply`; null restores the default.")
    ],
    revision: Annotated[int | None, option("--revision N", "Only if it is at this revision.")] = None,
) -> None:
    """Change keys of a definition; the next `apply` of a file that has it overrides them."""
    from worker.operations.definitions import edit_definition
    from worker.process.installed_handlers import store_unknown

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
    session.print_row(row)


state_app = typer.Typer(
    help="State: what a definition remembers between its runs, as its handler's `ctx.state`."
)
app.add_typer(state_app, name="state")


@verb(state_app, "show")
def show_state(session: Invocation, org: OrgArgument, name: NameArgument) -> None:
    """Show the state of a definition; as JSON only the state itself, {} without one."""
    from worker.store.lists.read import state

    with session.connection() as connection:
        row = state(connection, org, name)
    _print_state(session, row)


@verb(state_app, "set")
def set_state(
    session: Invocation,
    org: OrgArgument,
    name: NameArgument,
    data: Annotated[str, option("--data JSON", "The new state: a JSON object of at most 64 KiB.")],
) -> None:
    """Replace the state of a definition; exit 5 while a run of it is running.

    A run that waits, also for another attempt, gets the new state.
    """
    from worker.operations.definitions import set_state as operation

    value = read_json(data, option="--data")
    with session.database() as database:
        row = operation(database, org, name, value, actor=session.actor)
    _print_state(session, row)


@verb(state_app, "clear")
def clear_state(session: Invocation, org: OrgArgument, name: NameArgument) -> None:
    """Clear the state of a definition; exit 5 while a run of it is running."""
    from worker.operations.definitions import clear_state as operation

    with session.database() as database:
        row = operation(database, org, name, actor=session.actor)
    _print_state(session, row)


def _print_state(session: Invocation, row: DefinitionState) -> None:
    # As JSON, what the handler gets.
    whole = session.output in (Format.TABLE, Format.ID)
    session.print_row({**row} if whole else row["data"], key="definition", verbatim=True)


@verb(app, "pause")
def pause(session: Invocation, org: OrgArgument, name: NameArgument, note: NoteOption = None) -> None:
    """Pause a definition: it is not due until it is resumed; a running run continues."""
    from worker.operations.definitions import pause_definition

    session.change(pause_definition, org=org, name=name, note=note)


@verb(app, "resume")
def resume(session: Invocation, org: OrgArgument, name: NameArgument) -> None:
    """Resume a paused definition from now on; the times meanwhile are not replayed."""
    from worker.operations.definitions import resume_definition

    session.change(resume_definition, org=org, name=name)
