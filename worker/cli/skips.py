"""`skips`: the instants that never became a run, and why."""

from __future__ import annotations

from typing import Any

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    DefinitionOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    read_since,
)
from worker.cli.output import Format, print_rows
from worker.cli.session import session_of

app = typer.Typer(help="Instants that never became a run: missed while nobody could fire, or overlapped.")

COLUMNS = ("org", "definition", "revision", "skipped_from", "skipped_until", "count", "reason")


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    definition: DefinitionOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List skips, newest first; a row stands for consecutive instants, both ends included."""
    from worker.store.lists import orgs as org_lists

    session = session_of(context)
    narrowed: dict[str, Any] = {
        "definition": definition,
        "since": read_since(since, session.clock),
        "limit": limit,
        "after": after,
    }
    with session.database() as database, database.autocommit() as connection:
        if org is None:
            rows = org_lists.skips_for_all_orgs(connection, **narrowed)
        else:
            rows = org_lists.skips(connection, org, **narrowed)
    print_rows(rows, output, columns=COLUMNS, limit=limit)
