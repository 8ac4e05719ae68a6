"""`serve`: health, API and dashboard without a worker's loops."""

from __future__ import annotations

import typer

from worker.cli.session import session_of


def serve(context: typer.Context) -> None:
    """Serve API, dashboard and health on web.listen, and run nothing; SIGTERM or Ctrl-C ends it.

    A worker serves the same by itself. This is for a machine of its own, beside workers
    whose web.listen is "". /readyz says whether the database answers.
    """
    from worker.wiring.serving import serve as serve_web

    session = session_of(context)
    session.require_database()
    raise typer.Exit(serve_web(session.settings))
