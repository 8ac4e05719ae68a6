"""The command line: every verb with its arguments and options, and the exit code of each error."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import typer

import worker
from docs.generate.tables import code, codes, sentence, table
from worker.cli.app import build
from worker.errors import WorkerError
from worker.web.responses import STATUS

PROGRAM = "python -m worker"
# Options of many verbs, described once above the first verb. A verb only names those whose help text is the
# common one; its own table describes the others.
COMMON = ("-o", "--org", "--definition", "--state", "--since", "--limit", "--after", "--note")
HELP = ("--help", "Print the help of a verb, or of all, and exit.")

# An argument or option as the help shows it, with its help text.
Record = tuple[str, str]


def commands() -> str:
    """Return the general and the common options, then each verb with its help and its own options."""
    root = typer.main.get_command(build())
    context = root.context_class(root, info_name=PROGRAM)
    records = {verb: list(_records(command, inside)) for verb, command, inside in verbs(root, context)}
    common = _common(records.values())
    text = f"## Options before the verb\n\n{_options(_records(root, context))}\n"
    text += f"## Common options\n\n{_options([*common, HELP])}\n"
    for verb, command, inside in verbs(root, context):
        usage = command.get_usage(inside).removeprefix("Usage: ")
        text += f"## {verb}\n\n```text output\n{' '.join(usage.split())}\n```\n\n{_help(command.help)}\n"
        own = [record for record in records[verb] if record not in common]
        text += f"\n{_options(own)}" if own else ""
        named = [_name(record) for record in records[verb] if record in common]
        text += f"\n[Common](#common-options): {codes(named)}.\n" if named else ""
        text += "\n"
    return text.rstrip("\n") + "\n"


def verbs(group: Any, context: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every command with its full name and context, in the order of the help."""
    for name, command in group.commands.items():
        words = f"{above} {name}".strip()
        inside = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from verbs(command, inside, words)
        elif not command.hidden:
            yield words, command, inside


def exit_codes() -> str:
    """Return a table of all error codes with their exit codes and HTTP statuses."""
    _import_all()
    rows = [
        (code(error.code), str(error.exit_code), _status(error), sentence(error.__doc__))
        for error in sorted(_tree(WorkerError), key=lambda error: (error.exit_code, error.code))
    ]
    return table(("code", "exit code", "HTTP status", "meaning"), rows)


def _import_all() -> None:
    """Import every module of the package, so that every error class is defined."""
    for module in pkgutil.walk_packages(worker.__path__, "worker."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _tree(error: type[WorkerError]) -> Iterator[type[WorkerError]]:
    """Yield the subclasses, at any depth, that define their own code."""
    for below in error.__subclasses__():
        if "code" in vars(below):
            yield below
        yield from _tree(below)


def _status(error: type[WorkerError]) -> str:
    return str(next(status for kind, status in STATUS if issubclass(error, kind)))


def _records(command: Any, context: Any) -> Iterator[Record]:
    """Yield the arguments and options of a command with their help texts."""
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        names, words = record
        # The help text already says what kind of value an argument takes.
        names = re.sub(r" <[a-z\[\] ]+>$", "", names)
        yield names, re.sub(r"\[(.*)]$", lambda found: f"({_bounds(found[1])})", words)


def _common(verbs: Iterable[list[Record]]) -> list[Record]:
    """Return the most frequent record of each common option, in the order of COMMON."""
    counts = Counter(record for records in verbs for record in records)
    return [max((each for each in counts if _name(each) == name), key=counts.__getitem__) for name in COMMON]


def _name(record: Record) -> str:
    """Return the first name of an option, without its value."""
    return re.split(r"[ ,]", record[0])[0]


def _options(records: Iterable[Record]) -> str:
    return table(("option", "meaning"), [(code(names), words) for names, words in records])


def _bounds(text: str) -> str:
    """Rewrite the bounds that typer appends to a help text, such as `x>=0` or `1<=x<=64`, in words."""
    text = re.sub(r"(\d+)<=x<=(\d+)", r"\1 to \2", text)
    return re.sub(r"x>=(\d+)", r"at least \1", text)


def _help(text: str | None) -> str:
    """Put each paragraph of a help text on one line."""
    return "\n\n".join(" ".join(each.split()) for each in (text or "").split("\n\n"))
