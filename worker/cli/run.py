"""`run` and `serve`: the worker itself, and API and dashboard without a worker's loops."""

from __future__ import annotations

import typer

from worker.cli.session import session_of


def run(context: typer.Context) -> None:
    """Start the worker; SIGTERM or Ctrl-C drains it. This is what happens without a command, too."""
    from worker.wiring.process import run as run_worker

    session = session_of(context)
    session.require_database()
    raise typer.Exit(run_worker(session.settings))


def serve(context: typer.Context) -> None:
    """Serve API, dashboard and health on web.listen, and run nothing; SIGTERM or Ctrl-C ends it.

    A worker serves the same by itself. This is for a machine of its own, beside workers
    whose web.listen is "". /readyz says whether the database answers.
    """
    from worker.wiring.web import serve as serve_web

    session = session_of(context)
    session.require_database()
    raise typer.Exit(serve_web(session.settings))
