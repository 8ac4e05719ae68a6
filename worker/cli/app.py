"""What stands first in a command, and the module that has it, imported when it is needed.

A list pays for the modules of one noun, not for those of all: they are a tenth of it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from worker.cli import completion
from worker.cli.output import Format, print_error
from worker.cli.session import Invocation
from worker.errors import DefinitionError, UsageError, WorkerError
from worker.telemetry.masking import masker

# Module and function of each verb.
VERBS = {
    "run": ("run", "run"),
    "serve": ("run", "serve"),
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


INTERRUPTED = 130
BEFORE_THE_VERB = ("--config", "--set", "--debug", "--version")


def before_the_verb(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="The settings; default WORKER_CONFIG, /etc/orgworker/worker.toml, ./worker.toml.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One setting, such as execution.poll=2s."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an unexpected error came from (also WORKER_DEBUG=1).")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Scheduled, long-running background jobs for each customer org, each run under a token scoped to it.

    Without a command it starts the worker, as `run` does.
    """
    if version:
        from importlib.metadata import version as version_of

        print(version_of("orgworker"))
        raise typer.Exit
    context.obj = Invocation(config, _settings(setting or ()))
    if context.invoked_subcommand is None:
        from worker.cli.run import run

        run(context)


def build(only: str | None = None) -> typer.Typer:
    """The command line with this verb or noun alone, or with all of them."""
    app = typer.Typer(
        rich_markup_mode=None, add_completion=False, context_settings={"max_content_width": 110}
    )
    app.callback(invoke_without_command=True)(before_the_verb)
    add(app, only)
    return app


def main() -> None:
    """Run the command that the process was started with, and exit with its code."""
    code = invoke(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough, as in `runs list | head`; the interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command; its exit code as in the documentation. Errors go to stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 must not turn an org's name into an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output = _wanted_output(arguments)
    asked = completion.prepare()
    try:
        # A shell that asks what could come next is told of everything.
        app = build(None if asked else first(arguments))
        code = typer.main.get_command(app).main(
            args=list(arguments), prog_name=_program(), standalone_mode=False
        )
    except WorkerError as error:
        return _failed(error, output)
    except typer.Abort:
        return INTERRUPTED
    except typer.TyperException as error:
        print_error(UsageError.code, error.format_message().replace("\n", " "), _way_out(error), output)
        return UsageError.exit_code
    except Exception as error:
        from worker.cli.driver_errors import in_our_words

        known = in_our_words(error)
        return _unexpected(error, arguments, output) if known is None else _failed(known, output)
    return code if isinstance(code, int) else 0


def _way_out(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if option in BEFORE_THE_VERB and context is not None and context.parent is not None:
        verb = context.command_path.removeprefix(context.find_root().command_path).strip()
        return f"{option} stands before the verb: `{_program()} {option} … {verb}`"
    return f"`{context.command_path if context else _program()} --help` says how"


def _failed(error: WorkerError, output: Format) -> int:
    print_error(error.code, _words(error), error.fix, output)
    return error.exit_code


def _words(error: WorkerError) -> str:
    """The message, led by the entry and field of a file where it does not name them itself."""
    place = [error.entry, error.field] if isinstance(error, DefinitionError) else []
    return ": ".join([*(word for word in place if word and word not in error.message), error.message])


def _unexpected(error: Exception, arguments: Sequence[str], output: Format) -> int:
    first_line = str(error).strip().partition("\n")[0]
    fix = "run it again with --debug before the verb, and report what it prints"
    if "--debug" in arguments or os.environ.get("WORKER_DEBUG", "0") not in ("", "0"):
        print(masker.mask("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        fix = "report what is printed above"
    print_error("unexpected", f"unexpected {type(error).__name__}: {first_line}", fix, output)
    return 1


def _settings(texts: Sequence[str]) -> dict[str, str]:
    said = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            # Without a name it may be the value alone, and that a URL with a password.
            said_so = "--set" if "://" in text or "@" in text else f"--set {text!r}"
            raise UsageError(f"{said_so} is not NAME=VALUE", fix="such as --set execution.poll=2s")
        said[name] = value
    return said


def _wanted_output(arguments: Sequence[str]) -> Format:
    """What `-o` asks for, also where the rest of the line is not understood."""
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


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m worker" if name == "__main__.py" else name
