"""`handlers`: the handlers of installed distributions, and why one does not load."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worker.cli.completion import names
from worker.cli.options import LimitOption, OutputOption
from worker.cli.output import Format, print_row, print_rows, say
from worker.cli.session import session_of
from worker.errors import ConfigurationError, NotFound, did_you_mean
from worker.store.lists import DEFAULT_LIMIT, HANDLERS, Page

app = typer.Typer(help="Handlers that installed distributions offer.")


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    limit: LimitOption = DEFAULT_LIMIT,
    after: Annotated[
        str | None, typer.Option("--after", metavar="NAME", help="Continue the list after this name.")
    ] = None,
) -> None:
    """List handlers by name; those that do not load have an error.

    Without a database, lists those of the plug-ins that are installed here, and says so.
    """
    Page(limit=limit)
    rows = [entry for entry in _entries(context) if after is None or entry["name"] > after]
    # Distributions can share a name: a page ends between names, so that --after skips none.
    while len(rows) > limit and rows[limit]["name"] == rows[limit - 1]["name"] != rows[0]["name"]:
        limit -= 1
    print_rows(rows[:limit], output, columns=HANDLERS.table, key="name", limit=limit)


@app.command("show")
def show(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The handler's name, as `handlers list` prints it.",
            autocompletion=names("handler"),
        ),
    ],
    output: OutputOption = Format.TABLE,
) -> None:
    """Show one handler with the schemas of its params and settings.

    If several distributions offer the name, shows the one that loads. Names on stderr the
    rules that are not checked when params are stored.
    """
    from worker.operations.handlers import schema_of

    entries = _entries(context, name)
    if not entries:
        close = did_you_mean(name, (entry["name"] for entry in _entries(context)))
        raise NotFound(
            f"no installed distribution offers a handler {name}",
            fix=f"{close} `handlers list` lists them".strip(),
        )
    entry = min(entries, key=lambda entry: entry["error"] is not None)
    print_row(entry, output, key="name")
    schema = schema_of(entry["params_schema"])
    for left in () if schema is None else schema.unchecked():
        say(f"params: {left.place} is checked only by the run's own process: {left.reason}")


def _entries(context: typer.Context, name: str | None = None) -> list[dict[str, Any]]:
    """The handlers of the database, or without one those installed here; all, or those of one name."""
    from worker.store import catalogue
    from worker.wiring.catalogue import installed_entries, store_unknown

    session = session_of(context)
    settings = session.settings
    try:
        session.require_database()
    except ConfigurationError as error:
        say(f"{error.message}; these are the handlers of the plug-ins installed here")
    else:
        with session.database() as database:
            store_unknown(settings, database)
            with database.autocommit() as connection:
                return catalogue.entries(connection, name)
    rows = (catalogue.as_row(entry) | {"seen_at": None} for entry in installed_entries(settings))
    return [row for row in rows if name in (None, row["name"])]
