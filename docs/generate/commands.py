"""The command line: a page for each noun with its verbs, an index, and the exit code of each error."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import typer

import worker
from docs.generate.tables import code, codes, sentence, table
from worker.app.shell import build
from worker.errors import WorkerError
from worker.kit.web.responses import STATUS

PROGRAM = "python -m worker"
# The page of the verbs that belong to no noun, such as `run`.
NO_NOUN = "without-a-noun"
# Options of many verbs, described once, on the index. A verb only names those whose help text is the common
# one; its own table describes the others.
COMMON = ("-o", "--org", "--definition", "--state", "--since", "--limit", "--after", "--note")
HELP = ("--help", "Print the help of a verb, or of all, and exit.")

# An argument or option as the help shows it, with its help text.
Record = tuple[str, str]


def index() -> str:
    """Return the general and the common options, then a table of the pages with links to each verb."""
    root, context = _root()
    text = f"## Options before the verb\n\n{_options(_records(root, context))}\n"
    text += f"## Common options\n\n{_options([*_common(), HELP])}\n"
    rows = []
    for noun in nouns():
        address = f"commands/{noun}.md"
        named = [words for words, _, _ in _verbs_of(noun)]
        links = ", ".join(
            f"[{words.removeprefix(noun).strip()}]({address}#{words.replace(' ', '-')})" for words in named
        )
        rows.append((f"[{_title(noun)}]({address})", sentence(_about(noun)), links))
    return f"{text}## Pages\n\n{table(('commands', 'about', 'verbs'), rows)}"


def page(noun: str) -> str:
    """Return what a noun is about, then each of its verbs with its help and its own options."""
    common = _common()
    text = f"{_help(_about(noun))}\n\n"
    for words, command, inside in _verbs_of(noun):
        usage = command.get_usage(inside).removeprefix("Usage: ")
        text += f"## {words}\n\n```text output\n{' '.join(usage.split())}\n```\n\n{_help(command.help)}\n"
        records = list(_records(command, inside))
        own = [record for record in records if record not in common]
        text += f"\n{_options(own)}" if own else ""
        named = [_name(record) for record in records if record in common]
        text += f"\n[Common](../command-line.md#common-options): {codes(named)}.\n" if named else ""
        text += "\n"
    return text.rstrip("\n") + "\n"


def nouns() -> list[str]:
    """Return the names of the pages: the verbs without a noun, then each noun in the order of the help."""
    root, _ = _root()
    return [NO_NOUN, *(name for name, command in root.commands.items() if hasattr(command, "commands"))]


def heading(noun: str) -> str:
    """Return the heading of a new page."""
    return "Commands without a noun" if noun == NO_NOUN else f"Commands: {noun}"


def verbs(group: Any, context: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every command with its full name and context, in the order of the help."""
    for name, command in group.commands.items():
        words = f"{above} {name}".strip()
        inside = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "commands"):
            yield from verbs(command, inside, words)
        elif not command.hidden:
            yield words, command, inside


@functools.cache
def _root() -> tuple[Any, Any]:
    """Return the command line and its context."""
    root = typer.main.get_command(build())
    return root, root.context_class(root, info_name=PROGRAM)


def _verbs_of(noun: str) -> list[tuple[str, Any, Any]]:
    every = verbs(*_root())
    return [each for each in every if (each[0].partition(" ")[0] if " " in each[0] else NO_NOUN) == noun]


def _title(noun: str) -> str:
    return "without a noun" if noun == NO_NOUN else code(noun)


def _about(noun: str) -> str:
    root, _ = _root()
    return "Start and try things, and look after them." if noun == NO_NOUN else root.commands[noun].help


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


@functools.cache
def _common() -> list[Record]:
    """Return the most frequent record of each common option, in the order of COMMON."""
    counts = Counter(each for _, command, inside in verbs(*_root()) for each in _records(command, inside))
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
