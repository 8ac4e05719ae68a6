"""`templates`: one definition for every org that a selector matches; `apply` adds and changes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from worker.errors import Conflict, UsageError
from worker.ids import ALL_ORGS, new_id
from worker.kit.lists import add_list
from worker.kit.options import FromOption, UntilOption, argument, option, read_pairs, split_pairs
from worker.kit.output import Format, say
from worker.kit.progress import ProgressBar, shown
from worker.kit.session import Invocation, verb
from worker.model.definitions.units import parse_time
from worker.store.lists import TEMPLATES
from worker.store.lists.rows import ChangeOutcome, Template

if TYPE_CHECKING:
    from worker.store.database import Database

app = typer.Typer(help="Templates: list, show, run, backfill, close. `apply` adds and changes them.")

NameArgument = Annotated[str, argument("NAME", "The template's name.", of="template")]

RAN = ("id", "org", "definition", "state", "left")
BACKFILLED = ("org", "definition", "instants", "made", "left")
# Orgs that are counted for the progress, and those of one transaction.
MAX_DEFINITIONS = 100_000
AT_ONCE = 500


def _reaches(row: Template) -> str:
    """`4 orgs`, and how far its last change is if that is not everywhere yet."""
    from worker.store.templates import COUNTED

    count = row["definitions"]
    text = f"{count}{'+' if count == COUNTED else ''} {'org' if count == 1 else 'orgs'}"
    if row["orgs_done"] < row["orgs_total"]:
        text += f", change at {row['orgs_done']}/{row['orgs_total']}"
    return text


add_list(app, TEMPLATES, cells={"reaches": _reaches})


def apply_templates(session: Invocation, database: Database) -> None:
    """Bring all orgs up to date with the templates, a batch at a time, and show the progress.

    Workers do the same, and what is left if this is interrupted.
    """
    from worker.operations.templates import materialise
    from worker.store.templates import count_behind

    with database.autocommit() as connection:
        total = count_behind(connection, ALL_ORGS)
    done = 0
    with ProgressBar("orgs of templates", total) as progress:
        while orgs := materialise(database, limit=AT_ONCE, actor=session.actor).orgs:
            done += orgs
            progress.at(done)


@verb(app, "show")
def show(session: Invocation, name: NameArgument) -> None:
    """Show one template with its whole spec."""
    from worker.store.lists.read import template

    session.show(template, ALL_ORGS, name)


@verb(app, "close")
def close(session: Invocation, name: NameArgument) -> None:
    """Close a template and, org by org, the definitions it made; their history stays."""
    from worker.operations.templates import close_template

    with session.database() as database:
        session.print_row(close_template(database, name, actor=session.actor))
        apply_templates(session, database)


@verb(app, "run")
def run(
    session: Invocation,
    name: NameArgument,
    request_key: Annotated[
        str | None, option("--request-key K", "The same key again makes no second runs (default: random).")
    ] = None,
    param: Annotated[
        list[str] | None,
        option(
            "--param K=V",
            "A param for these runs only: JSON if the handler accepts it, else text; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[bool, option("--dry-run", "Only list the orgs.")] = False,
) -> None:
    """Run a template's definition now, for each org that has it; paused ones are left out.

    Prints a row for each org; `left` says why one was left out. After an interruption, repeat
    it with the same --request-key: only what is left runs.
    """
    from worker.operations.templates import run_template

    key = request_key or new_id()
    with session.database() as database:
        total = _orgs_of(database, name)
        changes = run_template(
            database,
            name,
            actor=session.actor,
            request_key=key,
            params=read_pairs(param or (), option="--param") or None,
            typed=split_pairs(param or (), option="--param"),
            dry_run=dry_run,
        )
        try:
            rows = _print_each(session, shown(changes, "runs", total), RAN)
        except BaseException:
            say(f"the same runs again, without those that were made: --request-key {key}")
            raise
    say(f"{_done(rows)} runs {'would be made' if dry_run else 'made'}")
    _check_left(rows, f"repeat the command with --request-key {key} once nothing blocks them")


@verb(app, "backfill")
def backfill(
    session: Invocation,
    name: NameArgument,
    start: FromOption,
    until: UntilOption,
    limit: Annotated[
        int, option("--limit N", "At most N runs of each org are unfinished at once.", min=1)
    ] = 1,
    dry_run: Annotated[
        bool, option("--dry-run", "Only list the orgs, with the number of their scheduled times.")
    ] = False,
    cancel: Annotated[
        bool, option("--cancel", "Cancel the backfills of this range; running runs continue.")
    ] = False,
) -> None:
    """Run every scheduled time in a range again, for each org that has the template's definition.

    Prints a row for each org; `left` says why one was left out. The same range again adds
    nothing, so after an interruption the command continues with what is left.
    """
    from worker.operations.backfill import backfill_template

    if dry_run and cancel:
        raise UsageError("--dry-run and --cancel exclude each other", fix="leave one of them out")
    first = parse_time(start, session.clock, name="--from")
    end = parse_time(until, session.clock, name="--until")
    with session.database() as database:
        total = _orgs_of(database, name)
        changes = backfill_template(
            database,
            name,
            start=first,
            until=end,
            limit=limit,
            actor=session.actor,
            dry_run=dry_run,
            cancel=cancel,
        )
        rows = _print_each(session, shown(changes, "backfill", total), BACKFILLED, key="org")
    times = sum(row["instants"] for row in rows)
    done = "cancelled" if cancel else "would run again" if dry_run else "run again"
    say(f"{times} scheduled times of {_done(rows)} orgs {done}")
    _check_left(
        rows, "repeat the command once nothing blocks them; orgs that have the backfill already keep it"
    )


def _orgs_of(database: Database, name: str) -> int:
    """How many orgs have a definition of the template."""
    from worker.store.lists.read import template
    from worker.store.templates import count_definitions

    with database.autocommit() as connection:
        found = template(connection, ALL_ORGS, name)
        return count_definitions(connection, found["id"], most=MAX_DEFINITIONS)


def _print_each(
    session: Invocation,
    changes: Iterable[ChangeOutcome],
    columns: Sequence[str],
    key: Literal["id", "org"] = "id",
) -> list[ChangeOutcome]:
    """Print what is done for each org of a template; also what was done before an error or Ctrl-C."""
    rows: list[ChangeOutcome] = []
    try:
        rows.extend(changes)
    finally:
        if rows or session.output is not Format.TABLE:
            made = [row for row in rows if row[key] is not None or session.output is not Format.ID]
            session.print_rows(made, columns, key=key)
    return rows


def _done(rows: Sequence[ChangeOutcome]) -> int:
    return sum(row["left"] is None for row in rows)


def _check_left(rows: Sequence[ChangeOutcome], fix: str) -> None:
    """Raise Conflict if an org was left out."""
    for row in rows:
        if row["left"] is not None:
            raise Conflict(
                f"{len(rows) - _done(rows)} of {len(rows)} orgs were left out: {row['org']}: {row['left']}",
                fix=fix,
            )
