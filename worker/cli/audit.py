"""`audit`: who changed what, and when."""

from __future__ import annotations

from typing import Any

import typer

from worker.cli.options import (
    DEFAULT_LIMIT,
    AfterOption,
    LimitOption,
    OrgOption,
    OutputOption,
    SinceOption,
    read_since,
)
from worker.cli.output import Format, print_rows
from worker.cli.session import session_of

app = typer.Typer(help="Who changed what: each change made by a person or by a program that stands for one.")

COLUMNS = ("at", "actor", "action", "org", "subject", "detail")


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    org: OrgOption = None,
    since: SinceOption = None,
    limit: LimitOption = DEFAULT_LIMIT,
    after: AfterOption = None,
) -> None:
    """List changes, newest first."""
    from worker.store.lists import orgs as org_lists

    session = session_of(context)
    narrowed: dict[str, Any] = {"since": read_since(since, session.clock), "limit": limit, "after": after}
    with session.database() as database, database.autocommit() as connection:
        if org is None:
            rows = org_lists.audit_for_all_orgs(connection, **narrowed)
        else:
            rows = org_lists.audit(connection, org, **narrowed)
    print_rows(rows, output, columns=COLUMNS, limit=limit)
