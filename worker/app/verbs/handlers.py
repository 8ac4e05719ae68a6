"""`handlers`: the handlers of installed distributions, and why one does not load."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from worker.errors import ConfigurationError, NotFound, did_you_mean
from worker.kit.options import LimitOption, argument, option
from worker.kit.output import Format, print_rows, say
from worker.kit.session import Invocation, OutputOption, session_of, verb
from worker.store.lists import DEFAULT_LIMIT, HANDLERS, Page

app = typer.Typer(help="Handlers that installed distributions offer.")

NameArgument = Annotated[
    str, argument("NAME", "The handler's name, as `handlers list` prints it.", of="handler")
]


@app.command("list")
def list_(
    context: typer.Context,
    output: OutputOption = Format.TABLE,
    limit: LimitOption = DEFAULT_LIMIT,
    after: Annotated[str | None, option("--after NAME", "Continue the list after this name.")] = None,
) -> None:
    """List handlers by name; those that do not load have an error.

    `source` is worker, or host for what hosts of the pool declare. A handler that workers have is theirs.
    Without a database, lists those of the plug-ins that are installed here, and says so.
    """
    Page(limit=limit)
    rows = [entry for entry in _entries(session_of(context)) if after is None or entry["name"] > after]
    # Distributions can share a name: a page ends between names, so that --after skips none.
    while len(rows) > limit and rows[limit]["name"] == rows[limit - 1]["name"] != rows[0]["name"]:
        limit -= 1
    print_rows(rows[:limit], output, columns=HANDLERS.table, key="name", limit=limit)


@verb(app, "show")
def show(session: Invocation, name: NameArgument) -> None:
    """Show one handler with the schemas of its params and settings.

    If several offer the name, shows one that loads, of workers before hosts. Names on stderr the others, and
    the rules that are not checked when params are stored.
    """
    from worker.operations.handlers import schema_of

    entries = _entries(session, name)
    if not entries:
        close = did_you_mean(name, (entry["name"] for entry in _entries(session)))
        raise NotFound(
            f"no worker and no host offers a handler {name}",
            fix=f"{close} `handlers list` lists them".strip(),
        )
    entry = min(entries, key=lambda entry: (entry["error"] is not None, entry["source"] == "host"))
    session.print_row(entry, key="name")
    for other in entries:
        if other is not entry:
            say(f"also: {_place(other)}")
    schema = schema_of(entry["params_schema"])
    for left in () if schema is None else schema.unchecked():
        say(f"params: {left.place} is checked only by the run's own process: {left.reason}")


@verb(app, "forget")
def forget(session: Invocation, name: NameArgument) -> None:
    """Forget a handler that no live worker offers, even if hosts do: it is then the hosts' alone.

    Exit 3 if no worker has it, 5 if a live worker offers it. Definitions of a handler that only hosts offer
    must name the pool of their runs; `doctor` lists those that do not.
    """
    from worker.operations.handlers import forget as forget_handler

    session.change(forget_handler, name, key="name")


def _place(entry: dict[str, Any]) -> str:
    """Who offers a handler."""
    of = f"{entry['distribution']} {entry['version']}"
    where = f" on hosts of pool {entry['pool']}" if entry["source"] == "host" else ""
    return f"{of}{where}" + ("" if entry["error"] is None else ", which does not load")


def _entries(session: Invocation, name: str | None = None) -> list[dict[str, Any]]:
    """The handlers of the database, or without one those installed here; all, or those of one name."""
    from worker.ids import ALL_ORGS
    from worker.process.installed_handlers import installed_entries, store_unknown
    from worker.store import catalogue
    from worker.store.lists import handlers

    settings = session.settings
    try:
        session.require_database()
    except ConfigurationError as error:
        say(f"{error.message}; these are the handlers of the plug-ins installed here")
    else:
        with session.database() as database:
            store_unknown(settings, database)
            with database.autocommit() as connection:
                return handlers.listed(connection, ALL_ORGS, name=name)
    own = {"source": "worker", "seen_at": None}
    rows = (catalogue.as_row(entry) | own for entry in installed_entries(settings))
    return [row for row in rows if name in (None, row["name"])]
