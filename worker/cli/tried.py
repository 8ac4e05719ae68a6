"""What `try` shows of a run: how it ended, where its settings came from, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from worker.cli.output import in_words

if TYPE_CHECKING:
    from worker.handlers.catalogue import HandlerEntry
    from worker.wiring.trying import Tried

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
