"""`run`: the worker itself."""

from __future__ import annotations

import typer

from worker.cli.session import session_of


def run(context: typer.Context) -> None:
    """Start the worker; SIGTERM or Ctrl-C drains it. This is what happens without a command, too."""
    from worker import wiring

    session = session_of(context)
    session.require_database()
    raise typer.Exit(wiring.run_worker(session.settings))
