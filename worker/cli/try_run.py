"""The debugger of `try --pdb`, opened in the handler's own code rather than in what that called."""

from __future__ import annotations

import asyncio
import json
import pdb
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import OutputOption, read_pairs, split_pairs
from worker.cli.output import Format, in_words, print_row, say
from worker.cli.session import session_of
from worker.errors import UsageError

if TYPE_CHECKING:
    from worker.handlers.catalogue import HandlerEntry
    from worker.runs.outcome import EndedAttempt
    from worker.runs.run import LogLine
    from worker.wiring.trying import Tried


def opened_at(entry_point: str) -> Callable[[Exception], None]:
    """What opens the debugger for an error out of the handler that the entry point names."""

    def debug(error: Exception) -> None:
        say(f"{type(error).__name__}: {error}")
        debugger = _AtHandler(_home(entry_point.partition(":")[0]))
        debugger.reset()
        debugger.interaction(None, error.__traceback__)

    return debug


class _AtHandler(pdb.Pdb):
    """Stands in the innermost frame of the handler's own files; `down` leads to where the error arose."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = home

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        stack, innermost = super().get_stack(f, t)
        own = [at for at, (frame, _) in enumerate(stack) if frame.f_code.co_filename.startswith(self._home)]
        return stack, own[-1] if own else innermost


def _home(module: str) -> str:
    """The folder of the handler's package, or its one file."""
    top = sys.modules[module.partition(".")[0]]
    paths = list(getattr(top, "__path__", ()))
    return f"{Path(paths[0])}/" if paths else str(top.__file__)


# A property of a real org may be a secret, so no value is printed.
HIDDEN = "(not shown)"


def row_of(
    tried: Tried, entry: HandlerEntry, org: str, properties: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The run as JSON has it; `properties` are those that were made up, None for a real org's."""
    ended, claims = tried.ended, tried.ended.trail.claims or {}
    values = dict.fromkeys(claims.get("properties", ()), HIDDEN) if properties is None else properties
    return {
        "handler": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "org": org,
        "state": ended.state,
        "reason": ended.reason,
        "detail": ended.detail,
        "seconds": round((ended.ended_at - ended.started_at).total_seconds(), 3),
        "settings": settings_of(entry.settings_schema, values),
        "progress": ended.trail.progress,
        "checkpoint": tried.checkpoint,
        "result": None if ended.result is None else json.loads(ended.result),
        "error": None if ended.error is None else {name: ended.error[name] for name in ("type", "message")},
    }


def for_people(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same row with its progress and error in words."""
    error = row["error"] and f"{row['error']['type']}: {row['error']['message']}"
    return {**row, "progress": in_words(row["progress"]), "error": error}


def settings_of(schema: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each setting of a handler, and whether a property of the token or the model's default says it."""
    fields: dict[str, Any] = {} if schema is None else dict(schema.get("properties", {}))
    if schema is None or schema.get("additionalProperties"):
        fields |= {name: {} for name in properties if name not in fields}
    rows = []
    for name, field in fields.items():
        source = "property" if name in properties else "default" if _is_optional(schema, name) else "missing"
        value = properties[name] if source == "property" else field.get("default")
        rows.append({"name": name, "from": source, "value": value})
    return rows


def unknown_properties(schema: Mapping[str, Any] | None, properties: Mapping[str, Any]) -> list[str]:
    """A remark on each property that is no setting: it may be misspelt, or meant for `ctx.claims`."""
    known = [row["name"] for row in settings_of(schema, properties)]
    remarks = []
    for name in properties:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            remarks.append(
                f"property {name} is no setting of the handler" + (f"; is {near[0]} meant?" if near else "")
            )
    return remarks


def fix_for(row: Mapping[str, Any], entry: HandlerEntry, *, real: bool, debugged: bool) -> str:
    """What to do next about a run that did not succeed; empty where nobody can say."""
    detail, org = row["detail"], row["org"]
    match row["reason"]:
        case "settings_invalid":
            how = f"give the org's application a {detail} that fits" if real else f"--property {detail}=VALUE"
            return f"{how}, or mend the handler's model; its settings are {_named(entry.settings_schema)}"
        case "scope_missing" if not real:
            return f"--scope {detail} as well, or leave --scope out: then the token has all that is needed"
        case "no_token" | "scope_missing" | "org_mismatch" | "client_mismatch" | "token_invalid" if real:
            return f"`orgs check {org}` says what is wrong with its token"
        case "error" if is_params_invalid(row["error"]):
            return f"--param NAME=VALUE; the handler takes {_named(entry.params_schema)}"
        case "error" if not debugged:
            return "--pdb opens the debugger where it failed"
        case "timed_out":
            return "let it save and go on in another attempt, or give @job a longer timeout"
        case "result_invalid":
            return "return what JSON can hold, at most 1 MiB, or one of the answers of `worker`"
        case "out_of_memory":
            return "let it hold less at once, or give @job more memory"
        case "retry" | "snoozed" | "handed_back":
            return "nothing: a worker tries it again later, and gives it the checkpoint"
    return ""


def is_params_invalid(error: Mapping[str, str] | None) -> bool:
    """Whether the params do not fit the handler's model."""
    return error is not None and error["type"].endswith("ParamsInvalid")


def _named(schema: Mapping[str, Any] | None) -> str:
    """The fields of a model, those first that have no default."""
    fields = [] if schema is None else list(schema.get("properties", {}))
    fields.sort(key=lambda name: _is_optional(schema, name))
    words = [name if _is_optional(schema, name) else f"{name} (needed)" for name in fields]
    return ", ".join(words) or "none"


def _is_optional(schema: Mapping[str, Any] | None, name: str) -> bool:
    return schema is None or name not in schema.get("required", ())


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
    pass
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
        request = trying.TryRequest(
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
        tried = asyncio.run(trying.try_once(session.settings, entry, request, session.clock))
    row = row_of(tried, entry, request.org, None if real else properties)
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
