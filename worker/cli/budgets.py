"""`budgets`: what orgs may spend: list, raise, remove. `apply` adds and changes them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from worker.cli.options import (
    AfterOption,
    LimitOption,
    OrgArgument,
    OrgOption,
    OutputOption,
    argument,
    option,
)
from worker.cli.output import Format, Row, print_row, print_rows
from worker.cli.session import change, session_of
from worker.errors import UsageError
from worker.store.lists import DEFAULT_LIMIT, MAX_LIMIT, checked_id

if TYPE_CHECKING:
    from datetime import datetime

    from worker.clock import Clock

app = typer.Typer(help="What orgs may spend: list, raise, remove. `apply` adds and changes budgets.")

COLUMNS = ("org", "orgs", "meter", "per", "limit", "limit_from", "at_limit", "zone", "id")
COLUMNS_OF_ORG = ("meter", "per", "limit", "used", "left", "resets_at", "at_limit", "id")


@app.command("list")
def list_(
    context: typer.Context,
    org: OrgOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """List budgets as they were applied, newest first; with --org those of one org, with what is used now."""
    from worker.store.lists.usage import budget_rows, budgets_of

    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit {limit} is not between 1 and {MAX_LIMIT}", fix="use --after for more")
    with session_of(context).database() as database, database.autocommit() as connection:
        if org is not None:
            rows = cast(list[Row], budgets_of(connection, org))
            print_rows(rows, output, columns=COLUMNS_OF_ORG)
            return
        place = None if after is None else checked_id(after)
        rows = cast(list[Row], budget_rows(connection, limit=limit, after=place))
    print_rows(rows, output, columns=COLUMNS, limit=limit)


@app.command("raise")
def raise_(
    context: typer.Context,
    org: OrgArgument,
    meter: Annotated[str, argument("METER", "The meter, such as llm_tokens.")],
    by: Annotated[int, option("--by N", "What to add to the limit of each period.")],
    per: Annotated[str, option("--per PERIOD", "The budgets to raise: day, month or run.")] = "day",
    until: Annotated[
        str | None,
        option(
            "--until T", "When the raise ends: 2027-01-31, 2027-01-31T18:00:00Z (default: with the period)."
        ),
    ] = None,
    reason: Annotated[str | None, option("--reason", "Why; it is kept in the audit.")] = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Raise an org's budgets of a meter for a time; runs that wait for them go on at once."""
    from worker.operations.budgets import raise_budget

    end = None if until is None else _future(until, session_of(context).clock)
    change(
        context,
        output,
        partial(raise_budget, org=org, meter=meter, by=by, per=per, until=end, reason=reason),
    )


@app.command("remove")
def remove(
    context: typer.Context,
    budget: Annotated[str, argument("ID", "The budget's id, as `budgets list` prints it.")],
    output: OutputOption = Format.TABLE,
) -> None:
    """Remove a budget; what was spent stays, and runs that wait for it go on at once."""
    from worker.operations.budgets import remove_budget

    budget_id, session = checked_id(budget), session_of(context)
    with session.database() as database:
        row: dict[str, Any] = dict(remove_budget(database, budget_id, actor=session.actor))
    print_row(row, output)


def _future(text: str, clock: Clock) -> datetime:
    """A time in RFC 3339, or a date in UTC; raises UsageError."""
    from worker.definitions.units import parse_time

    return parse_time(text, clock, name="--until")
