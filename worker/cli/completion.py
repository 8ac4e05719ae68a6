"""`completion`: what makes a shell complete verbs, options and their values at the Tab key."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

PROGRAM = "orgworker"
# The printed script sets it when it asks what could come next.
VARIABLE = "_ORGWORKER_COMPLETE"


class Shell(StrEnum):
    """The shells that are known."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="For which shell.")],
) -> None:
    """Print what completes the command orgworker in a shell.

    In bash and zsh: source <(orgworker completion bash). In fish: orgworker completion fish | source.
    """
    from typer.completion import shell_complete

    _know_shells()
    raise typer.Exit(
        shell_complete(context.find_root().command, {}, PROGRAM, VARIABLE, f"source_{shell.value}")
    )


def prepare() -> bool:
    """Let a shell's question be understood; whether this process was started to answer one."""
    asked = VARIABLE in os.environ
    if asked:
        _know_shells()
    return asked


def _know_shells() -> None:
    # Typer makes its shells known when it makes the options of its own for this, which are not wanted here.
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()
