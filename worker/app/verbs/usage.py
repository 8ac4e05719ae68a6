"""`usage`: what orgs spent."""

from __future__ import annotations

import csv
import sys
from typing import Annotated, Any, Literal, cast

import typer

from worker.ids import ALL_ORGS
from worker.kit.options import LimitOption, OrgOption, SinceOption, option, read_since
from worker.kit.output import Format, Row, print_rows, say
from worker.kit.session import session_of
from worker.model.definitions.units import json_default, parse_time
from worker.store.lists import DEFAULT_LIMIT

app = typer.Typer(help="What orgs spent, by meter, definition or day.")


@app.command("list")
def list_(
    context: typer.Context,
    org: OrgOption = None,
    since: SinceOption = None,
    until: Annotated[
        str | None, option("--until WHEN", "Only those until then, its day included (default: now).")
    ] = None,
    by: Annotated[
        Literal["meter", "definition", "day"],
        option("--by", "A row for each meter, or for each definition or UTC day of it."),
    ] = "meter",
    limit: LimitOption = DEFAULT_LIMIT,
    after: Annotated[str | None, option("--after ORG", "Continue the list after this org.")] = None,
    output: Annotated[
        Literal["table", "json", "jsonl", "csv"],
        option("--output -o", "For people, for programs, or for spreadsheets."),
    ] = "table",
) -> None:
    """List what orgs spent in the last 30 days, or since another time; --limit counts orgs."""
    from worker.store.lists.usage import columns_by, usage

    session = session_of(context)
    first = read_since(since, session.clock)
    last = None if until is None else parse_time(until, session.clock, name="--until")
    with session.database() as database, database.autocommit() as connection:
        scope = ALL_ORGS if org is None else org
        found = usage(connection, scope, by, since=first, until=last, limit=limit, after=after)
    rows, columns = cast(list[Row], found), columns_by(by)
    if output == "csv":
        _print_csv(rows, columns)
    else:
        print_rows(rows, Format(output), columns=columns, key="org")
    if org is None and len({row["org"] for row in rows}) == limit:
        say(f"there may be more: --after {rows[-1]['org']}")


def _print_csv(rows: list[Row], columns: tuple[str, ...]) -> None:
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(columns)
    for row in rows:
        lines.writerow([_cell(row[name]) for name in columns])


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet takes as text or a number, not as a formula."""
    text = "" if value is None else value if isinstance(value, int) else str(json_default(value))
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t")) else text
