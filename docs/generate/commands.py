"""The command line: every verb with its arguments and options, and what each error ends it with."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import typer

import worker
from docs.generate.tables import code, sentence, table
from worker.cli.app import build
from worker.errors import WorkerError
from worker.web.answers import STATUS

PROGRAM = "python -m worker"


def commands() -> str:
    """A heading for each verb, with its help and a table of what it takes."""
    root = typer.main.get_command(build())
    context = root.context_class(root, info_name=PROGRAM)
    text = f"## Before the verb\n\n{_options(root, context)}\n"
    for verb, command, inside in verbs(root, context):
        usage = command.get_usage(inside).removeprefix("Usage: ")
        text += f"## {verb}\n\n```console\n$ {' '.join(usage.split())}\n```\n\n{_help(command.help)}\n"
        text += f"\n{_options(command, inside)}\n" if command.params else "\n"
    return text.rstrip("\n") + "\n"


def verbs(group: Any, context: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every command with its words and its context, in the order of the help."""
    for name, command in group.commands.items():
        words = f"{above} {name}".strip()
        inside = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from verbs(command, inside, words)
        elif not command.hidden:
            yield words, command, inside


def exit_codes() -> str:
    """Each error by its code, with what the command line and the API end with."""
    _import_all()
    rows = [
        (code(error.code), str(error.exit_code), _status(error), sentence(error.__doc__))
        for error in sorted(_tree(WorkerError), key=lambda error: (error.exit_code, error.code))
    ]
    return table(("code", "exit code", "HTTP status", "meaning"), rows)


def _import_all() -> None:
    """Every module of the package: an error exists from the import of its module on."""
    for module in pkgutil.walk_packages(worker.__path__, "worker."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _tree(error: type[WorkerError]) -> Iterator[type[WorkerError]]:
    """The classes below one that have a code of their own."""
    for below in error.__subclasses__():
        if "code" in vars(below):
            yield below
        yield from _tree(below)


def _status(error: type[WorkerError]) -> str:
    return str(next(status for kind, status in STATUS if issubclass(error, kind)))


def _options(command: Any, context: Any) -> str:
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        names, words = record
        # Which type reads an argument is in its words.
        names = re.sub(r" <[a-z\[\] ]+>$", "", names)
        words = re.sub(r"\[(.*)]$", lambda found: f"({_bounds(found[1])})", words)
        rows.append((code(names), words))
    return table(("", ""), rows)


def _bounds(text: str) -> str:
    """What typer adds to a help text, in words: `default: 0; x>=0`, `1<=x<=64`."""
    text = re.sub(r"(\d+)<=x<=(\d+)", r"\1 to \2", text)
    return re.sub(r"x>=(\d+)", r"at least \1", text)


def _help(text: str | None) -> str:
    """The help's paragraphs, each on one line."""
    return "\n\n".join(" ".join(each.split()) for each in (text or "").split("\n\n"))
