"""The command line: finds the module of a command, runs it, prints errors and returns the exit code.

Only the module of the given verb or noun is imported: all of them would take a tenth of a list's time.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from worker.app.features import FEATURES
from worker.errors import (
    AccessDenied,
    AmbiguousRun,
    Busy,
    ConfigurationError,
    DefinitionError,
    UsageError,
    WorkerError,
    did_you_mean,
)
from worker.ids import ALL_ORGS
from worker.kit.completion import COMPLETION_VARIABLE, register_shells
from worker.kit.feature import not_installed, use
from worker.kit.options import option
from worker.kit.output import MODULE, REQUIRE_COMMAND, Format, print_error
from worker.kit.session import Invocation, as_command, session_of
from worker.telemetry.masking import masker

# Module and function of each verb, below `worker.app.verbs` unless it is in another room.
VERBS = {
    "run": "worker.app.shell:run",
    "demo": "worker.demo.verb:demo",
    "apply": "apply:apply",
    "try": "try_run:try_",
    "new-job": "new_job:new_job",
    "status": "morning:status",
    "failures": "morning:failures",
    "check": "checks:check",
    "doctor": "checks:doctor",
    "completion": "worker.kit.completion:completion",
}
NOUNS = {
    "orgs": "orgs:app",
    "credentials": "credentials:app",
    "definitions": "definitions:app",
    "templates": "templates:app",
    "runs": "runs:app",
    "skips": "morning:skips",
    "audit": "morning:audit",
    "handlers": "handlers:app",
    "budgets": "budgets:app",
    "usage": "usage:app",
    "prices": "prices:app",
    "pools": "pools:app",
    "product": "product:app",
    "db": "db:app",
    "keys": "keys:app",
    "tokens": "keys:tokens",
    "config": "config:app",
    "installation": "installation:app",
}
# Options before the verb that take a value.
WITH_VALUE = ("--config", "--set")


def add(app: typer.Typer, only: str | None) -> None:
    """Add one verb or noun to `app`, or all of them: those of the core, and of the features installed.

    Raises UsageError if only a feature that is not installed has the one.
    """
    for name, place in (VERBS | NOUNS).items():
        if only in (None, name):
            _add(app, name, _load(place))
    for feature in FEATURES:
        if only is None and not feature.is_installed():
            continue
        for name, place in feature.verbs.items():
            noun, _, verb = name.rpartition(" ")
            if only not in (None, noun or verb):
                continue
            if feature.is_installed():
                _add(_group(app, noun) if noun else app, verb, feature.load(place))
            elif not noun:
                raise not_installed(f"`{name}`", feature.name)


def _add(app: typer.Typer, name: str, found: Any) -> None:
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(as_command(found))


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module if "." in module else f"worker.app.verbs.{module}"), name)


def _group(app: typer.Typer, noun: str) -> typer.Typer:
    """The verbs of a noun of the core, for this command line: its module keeps its own."""
    [found] = (group for group in app.registered_groups if group.name == noun)
    core = cast(typer.Typer, found.typer_instance)
    group = typer.Typer(help=core.info.help)
    group.registered_commands = list(core.registered_commands)
    found.typer_instance = group
    return group


def first(arguments: Sequence[str]) -> str | None:
    """The verb or noun that a command begins with; None if it is unknown."""
    known = VERBS.keys() | NOUNS.keys() | {name for feature in FEATURES for name in feature.verbs}
    words = iter(arguments)
    for word in words:
        if word in WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return word if word in known else None
    return None


INTERRUPTED = 130
BEFORE_THE_VERB = ("--config", "--set", "--debug", "--version")


def before_the_verb(
    context: typer.Context,
    config: Annotated[
        str | None,
        option(
            "--config FILE",
            "Settings file (default: WORKER_CONFIG, /etc/orgworker/worker.toml, ./worker.toml).",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None, option("--set NAME=VALUE", "One setting, such as execution.poll=2s.")
    ] = None,
    debug: Annotated[
        bool, option("--debug", "Print tracebacks of unexpected errors (also WORKER_DEBUG=1).")
    ] = False,
    version: Annotated[bool, option("--version", "Print the version and its commit, and exit.")] = False,
) -> None:
    """Scheduled, long-running background jobs for each customer org, each run under a token scoped to it.

    Without a command, `python -m worker` starts the worker, as `run` does; `orgworker` prints this.
    """
    if version:
        from worker import release

        print(f"{release.version()} (commit {release.commit()})")
        raise typer.Exit
    context.obj = Invocation(config, _settings(setting or ()))
    if context.invoked_subcommand is None:
        if REQUIRE_COMMAND in os.environ:
            raise UsageError(
                "no command is named", fix="`orgworker --help` lists them; `run` starts a worker"
            )
        if not _is_module():
            print(context.get_help())
            raise typer.Exit
        run(context)


def run(context: typer.Context) -> None:
    """Start the worker; this is the default without a command. SIGTERM or Ctrl-C drains it."""
    from worker.app.process import run as run_worker

    session = session_of(context)
    session.require_database()
    raise typer.Exit(run_worker(session.settings))


def build(only: str | None = None) -> typer.Typer:
    """The command line with one verb or noun, or with all of them."""
    app = typer.Typer(
        rich_markup_mode=None,
        add_completion=False,
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(before_the_verb)
    add(app, only)
    return app


@cache
def command(only: str | None) -> Any:
    """The command of `build`, kept for a process that runs several; building it takes some 20 ms."""
    return typer.main.get_command(build(only))


def main() -> None:
    """Run this process's command, and exit with its code."""
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as in `runs list | head`; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Errors go to stderr, without a traceback."""
    use(FEATURES)
    for stream in (sys.stdout, sys.stderr):
        # An org's name must not fail on a terminal without UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output = _wanted_output(arguments)
    completes = COMPLETION_VARIABLE in os.environ
    if completes:
        register_shells()
    try:
        # A shell that asks for completions needs every command.
        code = command(None if completes else first(arguments)).main(
            args=list(arguments),
            prog_name=_program(),
            # By default it follows the program's name: under another one, a Tab would start a worker.
            complete_var=COMPLETION_VARIABLE,
            standalone_mode=False,
        )
    except WorkerError as error:
        return _failed(error, output)
    except typer.Abort:
        return INTERRUPTED
    except typer.TyperException as error:
        print_error(UsageError.code, _usage_message(error), _usage_fix(error), output)
        return UsageError.exit_code
    except Exception as error:
        known = from_driver(error)
        return _unexpected(error, arguments, output) if known is None else _failed(known, output)
    return code if isinstance(code, int) else 0


def _usage_message(error: typer.TyperException) -> str:
    """What is wrong with a command line; for an unknown option, with the closest one first."""
    option, possible = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if option and possible:
        close = did_you_mean(option, possible) or f"did you mean {' or '.join(sorted(possible))}?"
        return f"{error.message}. {close.capitalize()}"
    # A library's word for any invalid value.
    return error.format_message().replace("\n", " ").replace("Value error, ", "")


def _usage_fix(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if option in BEFORE_THE_VERB and context is not None and context.parent is not None:
        verb = context.command_path.removeprefix(context.find_root().command_path).strip()
        return f"{option} goes before the verb: `{_program()} {option} … {verb}`"
    return f"`{context.command_path if context else _program()} --help` shows the usage"


def _failed(error: WorkerError, output: Format) -> int:
    others = error.others if isinstance(error, DefinitionError) else ()
    print_error(
        error.code,
        _placed(error),
        error.fix,
        output,
        others=[{"code": each.code, "message": _placed(each), "fix": each.fix} for each in others],
        candidates=error.candidates if isinstance(error, AmbiguousRun) else (),
    )
    return error.exit_code


def _placed(error: WorkerError) -> str:
    """The message, after entry and field of a file unless it names them."""
    place = [error.entry, error.field] if isinstance(error, DefinitionError) else []
    return ": ".join([*(word for word in place if word and word not in error.message), error.message])


def _unexpected(error: Exception, arguments: Sequence[str], output: Format) -> int:
    first_line = str(error).strip().partition("\n")[0]
    fix = "run it again with --debug before the verb, and report what it prints"
    if "--debug" in arguments or os.environ.get("WORKER_DEBUG", "0") not in ("", "0"):
        print(masker.mask("".join(traceback.format_exception(error)), ALL_ORGS), file=sys.stderr, end="")
        fix = "report what is printed above"
    print_error("unexpected", f"unexpected {type(error).__name__}: {first_line}", fix, output)
    return 1


def _settings(texts: Sequence[str]) -> dict[str, str]:
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            # It can be a value alone, such as a URL with a password.
            shown = "--set" if "://" in text or "@" in text else f"--set {text!r}"
            raise UsageError(f"{shown} is not NAME=VALUE", fix="such as --set execution.poll=2s")
        settings[name] = value
    return settings


def _wanted_output(arguments: Sequence[str]) -> Format:
    """The value of `-o`, even if the rest of the line is invalid."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("-o", "--output"):
            value = value if equals else "".join(arguments[place + 1 : place + 2])
        elif argument.startswith("-o") and not argument.startswith("--"):
            value = argument[2:]
        else:
            continue
        return Format(value) if value in Format.__members__.values() else Format.TABLE
    return Format.TABLE


def _is_module() -> bool:
    """Whether this process is `python -m worker`, and not a console script."""
    return Path(sys.argv[0]).name == "__main__.py"


def _program() -> str:
    return MODULE if _is_module() else Path(sys.argv[0]).name


def from_driver(error: Exception) -> WorkerError | None:
    """A database driver's error as a worker error; None if it is unexpected."""
    import sqlite3

    cause = getattr(error, "orig", None) or error
    if isinstance(cause, UnicodeEncodeError) and cause.reason == "surrogates not allowed":
        return UsageError("an argument is not UTF-8 text", fix="type it in a terminal that uses UTF-8")
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            return ConfigurationError(
                "the file of database.url is not an SQLite database",
                fix="name another file; if it was one, restore it from a backup",
            )
        if code == sqlite3.SQLITE_CORRUPT:
            return ConfigurationError(
                f"the database is damaged: {text}", fix="stop the worker, and restore it from a backup"
            )
    # By name, so that SQLite alone needs no psycopg.
    name = type(cause).__name__ if type(cause).__module__.startswith("psycopg") else ""
    if name == "NumericValueOutOfRange" or (isinstance(cause, OverflowError) and "SQLite" in text):
        return UsageError("a number is larger than the database stores", fix="give a smaller one")
    if name == "UniqueViolation":
        return Busy("another command has just added the same", fix="repeat the command")
    if name == "InsufficientPrivilege":
        return AccessDenied(
            f"the database's login lacks the right: {text}",
            fix="grant it the rights of a worker, listed in the documentation's page Many workers on one "
            "PostgreSQL; `db upgrade` needs database.owner_url",
        )
    return None
