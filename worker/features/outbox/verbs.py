"""`relay`, and `outbox`: starts that products insert into their own database, in their own transaction."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from worker.errors import UsageError
from worker.kit.options import LimitOption, argument, option
from worker.kit.output import Format
from worker.kit.session import Invocation, session_of, verb

app = typer.Typer(help="The outbox of a product's database: its table, its rows, and what was refused.")

COLUMNS = ("id", "org", "definition", "key", "state", "tries", "run_id", "error", "created_at")
State = Literal["waiting", "sent", "refused"]
MAX_ROWS = 1000


def relay(
    context: typer.Context,
    once: Annotated[
        bool, option("--once", "Relay what is due, and exit; 75 if the API does not take it.")
    ] = False,
) -> None:
    """Start what the outbox in relay.outbox_url has, over the API at relay.api; SIGTERM stops it.

    Needs neither the database of orgworker nor a key ring, only a token of `operators add NAME --role
    starter`. Several may relay one outbox.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.outbox.relaying import run

    name_process(ProcessName.RELAY)
    raise typer.Exit(run(session_of(context).settings, once=once))


@verb(app, "ddl")
def ddl(
    session: Invocation,
    dialect: Annotated[
        Literal["postgresql", "mysql", "sqlite"],
        argument("DIALECT", "postgresql, mysql (MariaDB too) or sqlite."),
    ],
    table: Annotated[str, option("--table NAME", "The table's name, also SCHEMA.NAME.")] = "orgworker_outbox",
) -> None:
    """Print the statements that make the outbox's table, for a migration of the product."""
    from worker.features.outbox.relaying import ddl_of

    statements = ddl_of(dialect, table)
    if session.output is Format.TABLE:
        print("\n".join(statements))
    else:
        session.print_rows([{"sql": each} for each in statements], ("sql",), key="sql")


@verb(app, "list")
def list_(
    session: Invocation,
    state: Annotated[State, option("--state", "Rows of this state, the newest first.")] = "refused",
    limit: LimitOption = 50,
) -> None:
    """List rows of the outbox in relay.outbox_url, by default those that the API has refused, with why."""
    from worker.features.outbox.relaying import rows

    if not 0 < limit <= MAX_ROWS:
        raise UsageError(f"--limit {limit} is not between 1 and {MAX_ROWS}", fix="such as --limit 50")
    session.print_rows(rows(session.settings, state, limit), COLUMNS, key="id")


@verb(app, "retry")
def retry(session: Invocation, row: Annotated[int, argument("ROW", "The number of the row.")]) -> None:
    """Let a refused row wait again, after what refused it was corrected. Exit 3 if there is no such row."""
    from worker.features.outbox.relaying import retry as let_wait

    session.print_row(let_wait(session.settings, row))
