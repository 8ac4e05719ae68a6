"""What stands first in a command, and the module that has it, imported when it is needed.

A list pays for the modules of one noun, not for those of all: they are a tenth of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import typer

# Module and function of each verb.
VERBS = {
    "run": ("run", "run"),
    "serve": ("serve", "serve"),
    "demo": ("demo", "demo"),
    "apply": ("apply", "apply"),
    "try": ("try_run", "try_"),
    "new-job": ("new_job", "new_job"),
    "check": ("checks", "check"),
    "doctor": ("doctor", "doctor"),
    "completion": ("completion", "completion"),
}
# Each is a module, with its verbs in its `app`.
NOUNS = (
    *("orgs", "credentials", "definitions", "templates", "runs", "skips", "audit", "handlers"),
    *("db", "keys", "config"),
)
# Options before the verb that take a value.
WITH_VALUE = ("--config", "--set")


def add(app: typer.Typer, only: str | None) -> None:
    """Give `app` this verb or noun, or all of them."""
    for verb, (module, function) in VERBS.items():
        if only in (None, verb):
            app.command(verb)(getattr(import_module(f"worker.cli.{module}"), function))
    for noun in NOUNS:
        if only in (None, noun):
            app.add_typer(import_module(f"worker.cli.{noun}").app, name=noun)


def first(arguments: Sequence[str]) -> str | None:
    """The verb or noun that a command begins with; None where it has none that is known."""
    words = iter(arguments)
    for word in words:
        if word in WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return word if word in VERBS or word in NOUNS else None
    return None
