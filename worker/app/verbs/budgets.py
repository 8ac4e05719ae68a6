"""`budgets`: what orgs may spend: list, raise, remove. `apply` adds and changes them."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from worker.errors import UsageError
from worker.kit.options import AfterOption, LimitOption, OrgArgument, OrgOption, argument, option
from worker.kit.output import AMOUNTS, Row
from worker.kit.session import Invocation, verb
from worker.model.definitions.units import parse_time
from worker.store.lists import DEFAULT_LIMIT, MAX_LIMIT, checked_id

app = typer.Typer(help="What orgs may spend: list, raise, remove. `apply` adds and changes budgets.")

COLUMNS = ("org", "orgs", "meter", "per", "limit", "limit_from", "at_limit", "zone", "id")
COLUMNS_OF_ORG = ("meter", "per", "limit", "used", "left", "resets_at", "reaches_at", "at_limit", "id")


@verb(app, "list")
def list_(
    session: Invocation, org: OrgOption = None, limit: LimitOption = DEFAULT_LIMIT, after: AfterOption = None
) -> None:
    """List budgets as they were applied, newest first; with --org those of one org, with what is used now."""
    from worker.store.lists.usage import budget_rows, budgets_of

    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit {limit} is not between 1 and {MAX_LIMIT}", fix="use --after for more")
    with session.connection() as connection:
        if org is not None:
            rows = cast(list[Row], budgets_of(connection, org))
            session.print_rows(rows, COLUMNS_OF_ORG, cells=AMOUNTS)
            return
        place = None if after is None else checked_id(after)
        rows = cast(list[Row], budget_rows(connection, limit=limit, after=place))
    session.print_rows(rows, COLUMNS, limit=limit, cells=AMOUNTS)


@verb(app, "raise")
def raise_(
    session: Invocation,
    org: OrgArgument,
    meter: Annotated[str, argument("METER", "The meter, such as llm_tokens.")],
    by: Annotated[str, option("--by N", 'What to add to the limit of each period; of money "5 USD".')],
    per: Annotated[str, option("--per PERIOD", "The budgets to raise: day, month or run.")] = "day",
    until: Annotated[
        str | None,
        option(
            "--until T", "When the raise ends: 2027-01-31, 2027-01-31T18:00:00Z (default: with the period)."
        ),
    ] = None,
    reason: Annotated[str | None, option("--reason", "Why; it is kept in the audit.")] = None,
) -> None:
    """Raise an org's budgets of a meter for a time; runs that wait for them go on at once."""
    from worker.operations.budgets import raise_budget

    end = None if until is None else parse_time(until, session.clock, name="--until")
    how: dict[str, Any] = {"org": org, "meter": meter, "by": by, "per": per, "until": end, "reason": reason}
    session.change(raise_budget, cells=AMOUNTS, **how)


@verb(app, "remove")
def remove(
    session: Invocation,
    budget: Annotated[str, argument("ID", "The budget's id, as `budgets list` prints it.")],
) -> None:
    """Remove a budget; what was spent stays, and runs that wait for it go on at once."""
    from worker.operations.budgets import remove_budget

    session.change(remove_budget, checked_id(budget))
