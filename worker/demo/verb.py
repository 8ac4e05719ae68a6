"""`demo`: a worker with made-up orgs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worker.kit.options import option
from worker.kit.output import say


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
