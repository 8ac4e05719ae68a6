"""`try`: one run of one handler in front of its author, nothing stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import OutputOption, read_pairs, split_pairs
from worker.cli.output import Format, in_words, print_row, say
from worker.cli.session import session_of
from worker.cli.tried import fix_for, for_people, is_params_invalid, row_of, unknown_properties
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.runs.firing import LogLine
    from worker.runs.outcome import EndedAttempt

FAILED = 1
MADE_UP_ORG = "org_example"
NOT_REAL = "--flag and --property are made-up claims; with --real the token says them"


def try_(
    context: typer.Context,
    handler: Annotated[str, typer.Argument(metavar="HANDLER", help="As `handlers list` names it.")],
    org: Annotated[
        str | None, typer.Option("--org", metavar="ORG", help=f"Any code; default {MADE_UP_ORG}.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="K=V", help="A param, as JSON or else as text.")
    ] = None,
    property_: Annotated[
        list[str] | None,
        typer.Option("--property", metavar="K=V", help="A property of the token, always as text."),
    ] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option("--flag", metavar="K=V", help="A feature flag of the token, as JSON or else as text."),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="SCOPE", help="A scope of the token; default all the handler needs."),
    ] = None,
    real: Annotated[
        bool,
        typer.Option("--real", help="As --org of the database, with a token that its issuer gives it."),
    ] = False,
    pdb: Annotated[
        bool, typer.Option("--pdb", help="Run it in this process, and open the debugger where it fails.")
    ] = False,
    output: OutputOption = Format.TABLE,
) -> int:
    """Run one handler once, with made-up claims, and store nothing; exit 1 unless it succeeds.

    It runs as any run does: in a process of its own, its params and settings checked,
    its scopes enforced. Progress and log lines go to stderr as they come. Without
    --real no API takes its token; with it, the effects of the handler are real.
    """
    from worker.cli.debugger import opened_at
    from worker.operations.handlers import as_taken, schema_of
    from worker.wiring import trying

    if real and (flag or property_):
        raise UsageError(NOT_REAL, fix="leave them out, or leave out --real")
    if real and org is None:
        raise UsageError("--real needs --org", fix="`orgs list` names the orgs")
    if org == "":
        raise UsageError("--org is empty", fix="any code will do, such as --org org_acme")
    session = session_of(context)
    params = read_pairs(param or (), option="--param")
    properties = split_pairs(property_ or (), option="--property")
    flags = _read_flags(flag or ())
    entry = asyncio.run(trying.find_handler(handler, session.settings))
    with ExitStack() as open_:
        wish = trying.Wish(
            org or MADE_UP_ORG,
            params=as_taken(
                schema_of(entry.params_schema), params, split_pairs(param or (), option="--param")
            ),
            properties=properties,
            flags=flags,
            scopes=scope or None,
            database=open_.enter_context(session.database()) if real else None,
            on_error=opened_at(entry.entry_point) if pdb else None,
            on_line=_say_line,
            on_progress=_say_progress,
        )
        tried = asyncio.run(trying.try_once(session.settings, entry, wish, session.clock))
    row = row_of(tried, entry, wish.org, None if real else properties)
    if not pdb:
        _say_trace(tried.ended)
    for remark in unknown_properties(entry.settings_schema, properties):
        say(remark)
    print_row(for_people(row) if output is Format.TABLE else row, output, key="state")
    if row["state"] == "succeeded":
        return 0
    if fix := fix_for(row, entry, real=real, debugged=pdb):
        say(f"fix: {fix}")
    return FAILED


def _read_flags(pairs: Iterable[str]) -> dict[str, Any]:
    flags = read_pairs(pairs, option="--flag")
    for name, value in flags.items():
        if not isinstance(value, bool | int | float | str):
            raise UsageError(
                f"--flag {name} has a value that no flag of a token can have",
                fix="true, false, a number or a text",
            )
    return flags


def _say_trace(ended: EndedAttempt) -> None:
    """The handler's trace as Python prints it, on stderr: no cell could hold it."""
    if not is_params_invalid(ended.error):
        for line in (ended.error or {}).get("trace", "").splitlines():
            say(line)


def _say_line(line: LogLine) -> None:
    say(f"{line.level:<7} {line.text}")


def _say_progress(progress: Mapping[str, Any]) -> None:
    say(f"progress {in_words(progress)}")
