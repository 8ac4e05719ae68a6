"""`usage`: what orgs spent."""

from __future__ import annotations

import csv
import sys
from typing import Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from worker.ids import ALL_ORGS
from worker.kit.options import LimitOption, OrgOption, SinceOption, option, read_since
from worker.kit.output import AMOUNTS, Format, Row, print_rows, say
from worker.kit.session import session_of
from worker.model.definitions.units import json_default, parse_time
from worker.store.lists import DEFAULT_LIMIT


class ListGroup(TyperGroup):
    """`usage --by …` is `usage list --by …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_option = bool(args) and args[0].startswith("-") and args[0] != "--help"
        return super().parse_args(ctx, ["list", *args] if is_option else args)


app = typer.Typer(cls=ListGroup, help="What orgs spent, by meter, definition or day; and what models cost.")


@app.command("list")
def list_(
    context: typer.Context,
    org: OrgOption = None,
    since: SinceOption = None,
    until: Annotated[
        str | None, option("--until WHEN", "Only those until then, its day included (default: now).")
    ] = None,
    by: Annotated[
        str,
        option(
            "--by PARTS",
            "A row for each meter, or for each definition or day of it. What models cost, by some of "
            "org,definition,provider,model,kind,tariff,day,month: a row for each org, or for each of these.",
        ),
    ] = "meter",
    limit: LimitOption = DEFAULT_LIMIT,
    after: Annotated[str | None, option("--after ORG", "Continue the list after this org.")] = None,
    output: Annotated[
        Literal["table", "json", "jsonl", "csv"],
        option("--output -o", "For people, for programs, or for spreadsheets."),
    ] = "table",
) -> None:
    """List what orgs spent in the last 30 days, or since another time; --limit counts orgs."""
    from worker.store.lists.costs import columns_of_costs, costs, parts_of
    from worker.store.lists.usage import BYS, columns_by, usage

    session = session_of(context)
    first = read_since(since, session.clock)
    last = None if until is None else parse_time(until, session.clock, name="--until")
    scope = ALL_ORGS if org is None else org
    how: dict[str, Any] = {"since": first, "until": last, "limit": limit, "after": after}
    with session.database() as database, database.autocommit() as connection:
        if by in BYS:
            rows, columns = cast(list[Row], usage(connection, scope, by, **how)), columns_by(by)
        else:
            rows = cast(list[Row], costs(connection, scope, by, **how))
            columns = columns_of_costs(parts_of(by))
        ahead = [] if org is None else _forecasts(connection, org)
    if output == "csv":
        _print_csv(rows, columns)
    else:
        shown = tuple(name for name in columns if name != "money" or output != "table")
        print_rows(rows, Format(output), columns=shown, key="org", cells=AMOUNTS if by in BYS else None)
    for line in ahead:
        say(line)
    if org is None and len({row["org"] for row in rows}) == limit:
        say(f"there may be more: --after {rows[-1]['org']}")


def _forecasts(connection: Any, org: str) -> list[str]:
    """The budgets of an org whose pace reaches their limit before the period ends, for people."""
    from worker.store.lists.usage import budgets_of, forecast_text
    from worker.store.prices import currency_of

    currency = currency_of(connection) or ""
    found = ((level, forecast_text(level, currency)) for level in budgets_of(connection, org))
    return [text for _, text in found if text is not None]


def _print_csv(rows: list[Row], columns: tuple[str, ...]) -> None:
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(columns)
    for row in rows:
        lines.writerow([_cell(row[name]) for name in columns])


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet takes as text or a number, not as a formula."""
    text = "" if value is None else value if isinstance(value, int) else str(json_default(value))
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t")) else text
