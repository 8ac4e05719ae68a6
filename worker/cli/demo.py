"""`demo`: four orgs, a development provider and a worker, on a throw-away database."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="N", min=1, help="Stop after so long; else Ctrl-C.")
    ] = None,
) -> None:
    """Show the whole path with four made-up orgs; needs no account, no service, no settings."""
    from worker.demo.run import run

    raise typer.Exit(run(seconds=seconds))
