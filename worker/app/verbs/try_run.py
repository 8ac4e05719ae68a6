"""`try`: run one handler once in front of its author, and store nothing."""

from __future__ import annotations

import asyncio
import json
import pdb
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from worker.errors import UsageError
from worker.kit.options import argument, option, read_json, read_pairs, read_text, split_pairs
from worker.kit.output import Format, amounts, in_words, say
from worker.kit.session import Invocation
from worker.model.runs.traces import trimmed

if TYPE_CHECKING:
    from worker.app.trying import Tried
    from worker.handlers.catalogue import HandlerEntry
    from worker.model.bindings import OrgSecrets

FAILED = 1
FAKE_ORG = "org_example"
# A property of a real org can be a secret, so its value is not printed.
HIDDEN = "(not shown)"

Schema = Mapping[str, Any] | None


def try_(
    session: Invocation,
    handler: Annotated[str, argument("HANDLER", "Its name, as `handlers list` prints it.", of="handler")],
    org: Annotated[str | None, option("--org ORG", f"Any code (default: {FAKE_ORG}).", of="org")] = None,
    param: Annotated[
        list[str] | None, option("--param K=V", "A param, as JSON or else as text; repeatable.")
    ] = None,
    property_: Annotated[
        list[str] | None, option("--property K=V", "A property of the token, always as text; repeatable.")
    ] = None,
    flag: Annotated[
        list[str] | None, option("--flag K=V", "A flag of the token, as JSON or else as text; repeatable.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        option("--scope SCOPE", "A scope of the token (default: all that the handler needs); repeatable."),
    ] = None,
    state: Annotated[
        str | None, option("--state JSON|@FILE", "The state of its definition (default: empty).")
    ] = None,
    answer: Annotated[
        list[str] | None,
        option("--answer NAME=JSON", "An answer that it waits for, as JSON or else as text; repeatable."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        option("--budget METER=N", "What it may spend of a meter: llm_tokens=1000; repeatable."),
    ] = None,
    secret: Annotated[
        list[str] | None,
        option(
            "--secret NAME=FILE",
            "A secret of the org, in a file; with --real instead of the stored one; repeatable.",
        ),
    ] = None,
    secret_for: Annotated[
        list[str] | None,
        option("--secret-for NAME=ORIGIN", "Bind a --secret, as `secrets add --for` does; repeatable."),
    ] = None,
    secret_header: Annotated[
        list[str] | None,
        option("--secret-header NAME=HEADER", "The header that gets a bound --secret; repeatable."),
    ] = None,
    real: Annotated[bool, option("--real", "Use the token of --org, which must be in the database.")] = False,
    batch: Annotated[
        bool, option("--batch", "Send its model requests in batches, and wait for them for up to a day.")
    ] = False,
    pdb: Annotated[
        bool, option("--pdb", "Run it in this process, and open the debugger if it fails.")
    ] = False,
) -> int:
    """Run one handler once, with made-up claims, and store nothing; exit 1 unless it succeeds.

    It runs like any run: in its own process, with its params and settings validated and its
    scopes enforced. Progress and log lines are printed on stderr. It skips sleeps, and goes
    on with the answers of --answer. Without --real, no API accepts its token; relative URLs of
    `ctx.http` begin with the api_base_url of worker.toml's issuer, if it has only one. With
    --real, that of the org's issuer counts, and the handler's effects are real.
    """
    from worker.app import trying
    from worker.operations.handlers import as_taken, schema_of
    from worker.process.installed_handlers import find_handler

    if real and (flag or property_):
        raise UsageError(
            "--flag and --property are made-up claims; with --real the token has its own",
            fix="leave them out, or leave out --real",
        )
    if real and org is None:
        raise UsageError("--real needs --org", fix="`orgs list` lists the orgs")
    if org == "":
        raise UsageError("--org is empty", fix="use any code, such as --org org_acme")
    typed = split_pairs(param or (), option="--param")
    params = read_pairs(param or (), option="--param")
    properties = split_pairs(property_ or (), option="--property")
    flags = read_pairs(flag or (), option="--flag")
    for name, value in flags.items():
        if not isinstance(value, bool | int | float | str):
            raise UsageError(
                f"--flag {name} has a value that a flag cannot have", fix="use true, false, a number or text"
            )
    before = None if state is None else _read_state(state)
    entry = asyncio.run(find_handler(handler, session.settings))
    if before is not None and not entry.state:
        raise UsageError(
            f"handler {handler} declares no state", fix="leave --state out, or write @job(..., state=True)"
        )
    with ExitStack() as stack:
        request = trying.TryRequest(
            org or FAKE_ORG,
            params=as_taken(schema_of(entry.params_schema), params, typed),
            properties=properties,
            flags=flags,
            scopes=scope or None,
            state=before,
            answers=read_pairs(answer or (), option="--answer"),
            batch=batch,
            budgets=_read_budgets(budget or ()),
            secrets=_read_secrets(secret or (), secret_for or (), secret_header or ()),
            database=stack.enter_context(session.database()) if real else None,
            on_error=_debugger_at(entry.entry_point) if pdb else None,
            on_line=lambda line: say(f"{line.level:<7} {line.text}"),
            on_progress=lambda progress: say(f"progress {in_words(progress)}"),
            on_resume=say,
        )
        tried = asyncio.run(trying.try_once(session.settings, entry, request, session.clock))
    row = _row(tried, entry, request.org, None if real else properties)
    if not pdb and not _has_invalid_params(tried.ended.error):
        for line in trimmed((tried.ended.error or {}).get("trace", "")).splitlines():
            say(line)
    for remark in _unknown_properties(entry.settings_schema, properties):
        say(remark)
    if session.output is Format.TABLE:
        error = row["error"] and f"{row['error']['type']}: {row['error']['message']}"
        shown = {"progress": in_words(row["progress"]), "spends": amounts(row["spends"]), "error": error}
        session.print_row({**row, **shown}, key="state")
    else:
        session.print_row(row, key="state")
    if row["state"] == "succeeded":
        return 0
    if fix := _fix(row, entry, real=real, debugged=pdb):
        say(f"fix: {fix}")
    return FAILED


def _read_budgets(given: Sequence[str]) -> dict[str, int]:
    """The values of `--budget`; raises UsageError."""
    from worker.model.definitions.budgets import amount, meter_name

    found = {}
    for meter, value in read_pairs(given, option="--budget").items():
        try:
            found[meter_name(meter)] = amount("the budget")(value)
        except ValueError as error:
            raise UsageError(f"--budget: {error}", fix="such as --budget llm_tokens=1000") from None
    return found


def _read_secrets(given: Sequence[str], origins: Sequence[str], headers: Sequence[str]) -> OrgSecrets:
    """The values of `--secret`, from their files, with their bindings; raises UsageError."""
    from worker.model.bindings import OrgSecret
    from worker.operations.keys import binding_of, check_secret

    files = split_pairs(given, option="--secret")
    bound = split_pairs(origins, option="--secret-for")
    placed = split_pairs(headers, option="--secret-header")
    for given_as, names in (("--secret-for", bound), ("--secret-header", placed)):
        if unknown := sorted(names.keys() - files.keys()):
            raise UsageError(
                f"{given_as}: there is no --secret {unknown[0]}", fix=f"give --secret {unknown[0]}=FILE too"
            )
    found = {}
    for name, file in files.items():
        value, binding = read_text(file).rstrip("\r\n"), binding_of(bound.get(name), placed.get(name))
        check_secret(name, value, binding)
        found[name] = OrgSecret(value, binding)
    return found


def _read_state(given: str) -> Mapping[str, Any]:
    """The value of `--state`: JSON, or `@` and a file of it; raises UsageError."""
    from worker.handlers.given import to_state_text
    from worker.handlers.json_text import NotStorable

    text = read_text(given[1:]) if given.startswith("@") else given
    state = read_json(text, option="--state")
    try:
        to_state_text(state)
    except NotStorable as error:
        raise UsageError(f"--state: {error}", fix="such as '{\"cursor\": 5}'") from None
    found: Mapping[str, Any] = state
    return found


def _row(tried: Tried, entry: HandlerEntry, org: str, properties: Mapping[str, Any] | None) -> dict[str, Any]:
    """The run as JSON prints it; `properties` are the made-up ones, None for a real org."""
    ended = tried.ended
    claims = json.loads(ended.trail.claims or "{}")
    values = dict.fromkeys(claims.get("properties", ()), HIDDEN) if properties is None else properties
    return {
        "handler": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "org": org,
        "state": ended.shown_state,
        "reason": ended.reason,
        "detail": ended.detail,
        "seconds": ended.seconds,
        "settings": _settings(entry.settings_schema, values),
        "progress": ended.trail.progress,
        "checkpoint": tried.checkpoint,
        "definition_state": tried.state if entry.state else None,
        "spends": tried.spends,
        "result": None if ended.result is None else json.loads(ended.result),
        "error": None if ended.error is None else {name: ended.error[name] for name in ("type", "message")},
    }


def _settings(schema: Schema, properties: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each setting of a handler, and whether its value is a property of the token or the default."""
    fields: dict[str, Any] = {} if schema is None else dict(schema.get("properties", {}))
    if schema is None or schema.get("additionalProperties"):
        fields |= {name: {} for name in properties if name not in fields}
    rows = []
    for name, field in fields.items():
        source = "property" if name in properties else "missing" if _is_required(schema, name) else "default"
        value = properties[name] if source == "property" else field.get("default")
        rows.append({"name": name, "from": source, "value": value})
    return rows


def _unknown_properties(schema: Schema, properties: Mapping[str, Any]) -> list[str]:
    """A remark on each property that is not a setting: it can be misspelt, or meant for `ctx.claims`."""
    known = [row["name"] for row in _settings(schema, properties)]
    remarks = []
    for name in properties:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            remarks.append(f"property {name} is not a setting of the handler{hint}")
    return remarks


def _fix(row: Mapping[str, Any], entry: HandlerEntry, *, real: bool, debugged: bool) -> str:
    """What to do about a run that did not succeed; empty if unknown."""
    detail, org = row["detail"], row["org"]
    match row["reason"]:
        case "settings_invalid":
            how = f"give the org's application a valid {detail}" if real else f"--property {detail}=VALUE"
            return f"{how}, or fix the handler's model; its settings are {_fields(entry.settings_schema)}"
        case "scope_missing" if not real:
            return f"--scope {detail} as well, or leave --scope out: then the token has all that are needed"
        case "secret_missing":
            stored = f"`secrets add {org} {detail}`, or " if real else ""
            return f"{stored}--secret {detail}=FILE"
        case "no_token" | "scope_missing" | "org_mismatch" | "client_mismatch" | "token_invalid" if real:
            return f"`orgs check {org}` reports what is wrong with its token"
        case "error" if _has_invalid_params(row["error"]):
            return f"--param NAME=VALUE; the handler takes {_fields(entry.params_schema)}"
        case "error" if not debugged:
            return "--pdb opens the debugger where it failed"
        case "timed_out":
            return "save a checkpoint and continue in another attempt, or give @job a longer timeout"
        case "result_invalid":
            return "return what JSON can hold, at most 1 MiB, or one of the result classes of `worker`"
        case "out_of_memory":
            return "keep less in memory, or give @job more memory"
        case "answer":
            return f"--answer {detail}=JSON gives the answer that it waits for"
        case "retry" | "snoozed" | "handed_back":
            return "none needed: a worker tries it again later with the checkpoint"
    return ""


def _has_invalid_params(error: Mapping[str, str] | None) -> bool:
    return error is not None and error["type"].endswith("ParamsInvalid")


def _fields(schema: Schema) -> str:
    """The fields of a model, required ones first."""
    fields = sorted(
        [] if schema is None else schema.get("properties", {}),
        key=lambda name: not _is_required(schema, name),
    )
    return ", ".join(f"{name} (needed)" if _is_required(schema, name) else name for name in fields) or "none"


def _is_required(schema: Schema, name: str) -> bool:
    return schema is not None and name in schema.get("required", ())


def _debugger_at(entry_point: str) -> Callable[[Exception], None]:
    """A callback that opens the debugger in the files of this entry point's handler."""

    def debug(error: Exception) -> None:
        say(f"{type(error).__name__}: {error}")
        top = sys.modules[entry_point.partition(":")[0].partition(".")[0]]
        paths = list(getattr(top, "__path__", ()))
        debugger = _HandlerDebugger(f"{Path(paths[0])}/" if paths else str(top.__file__))
        debugger.reset()
        debugger.interaction(None, error.__traceback__)

    return debug


class _HandlerDebugger(pdb.Pdb):
    """Starts in the innermost frame of the handler's own files; `down` goes to where the error was raised."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = home

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        stack, innermost = super().get_stack(f, t)
        own = [at for at, (frame, _) in enumerate(stack) if frame.f_code.co_filename.startswith(self._home)]
        return stack, own[-1] if own else innermost
