"""`run`, `host`, `serve` and `demo`: a worker, a host, the web side alone, and a worker with made-up orgs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worker.kit.options import option
from worker.kit.output import say
from worker.kit.session import session_of


def run(context: typer.Context) -> None:
    """Start the worker; this is the default without a command. SIGTERM or Ctrl-C drains it."""
    from worker.app.process import run as run_worker

    session = session_of(context)
    session.require_database()
    raise typer.Exit(run_worker(session.settings))


def host(
    context: typer.Context,
    pool: Annotated[
        str | None, option("--pool POOL", "Refuse to start if the token is for another pool.")
    ] = None,
) -> None:
    """Run handlers for the workers in host.control, without the database and the key ring.

    Its configuration is that of config/host.toml. SIGTERM or Ctrl-C drains it.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.hosts.wiring import run as run_host
    from worker.settings import load_for_host

    name_process(ProcessName.HOST)
    session = session_of(context)
    raise typer.Exit(run_host(load_for_host(session.config, session.overrides), pool=pool))


def serve(context: typer.Context) -> None:
    """Serve API, console and health on web.listen, and run no jobs; SIGTERM or Ctrl-C stops it.

    A worker serves them too. This is for a separate machine, next to workers whose
    web.listen is "". /readyz says whether the database answers.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.console.wiring import serve as serve_web

    name_process(ProcessName.SERVE)
    session = session_of(context)
    session.require_database()
    raise typer.Exit(serve_web(session.settings))


def demo(
    seconds: Annotated[
        float | None, option("--seconds N", "Stop the worker after N seconds (default: at Ctrl-C).", min=1)
    ] = None,
) -> None:
    """Run a worker with four made-up orgs, a day of history and a development provider.

    Needs no account, no service and no settings, and keeps nothing.
    """
    from worker.demo.run import run as run_demo
    from worker.diagnosis.shadow import warning

    if (shadowed := warning(Path.cwd())) is not None:
        say(shadowed)
    raise typer.Exit(run_demo(seconds=seconds))
