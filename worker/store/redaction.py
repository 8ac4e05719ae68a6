"""What an org's own token sees of a row: no other org, person, worker or file path of the server.

Each column of a row names its rule. A column without one is left out, so a new column
stays hidden until someone decides. Operators see rows as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

from worker.model.claims import without_digests
from worker.model.runs.causes import last_reason
from worker.model.runs.worker_ends import SOURCE
from worker.telemetry.masking import without_paths

T = TypeVar("T")
_WORKER_ID = re.compile(r"\bworker [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Row = Mapping[str, Any]
# The value for the org, from the value, its whole row and the org's code.
Rule = Callable[[Any, Row, str], Any]

# The keys of a definition as an operator wrote them. A column of this type has no rule: an org sees no part
# of it, in no row and on no page. Its definition's other columns say what concerns it.
Spec = dict[str, Any]

OTHER_ORG = "the token is for another org"
NOT_LOADED = "it does not load; an operator can see why"
# Actors: an org sees itself, its own people and the worker; everyone else appears as OPERATOR.
WORKER = "worker"
OPERATOR = "operator"

# Reasons whose detail is a code or the handler's own text. Other details are the worker's text.
_DETAILED = {
    *("error", "retry", "snoozed", "by_handler", "handler_exited", "result_invalid", "flag_off", "expired"),
    *("org_mismatch", "client_mismatch", "scope_missing", "property_missing", "settings_invalid"),
    *(
        "token_invalid",
        "pool_mismatch",
        "secret_missing",
        "secret_bound",
        "asleep",
        "answer",
        "resumed",
        "no_pool",
    ),
}


def redacted(kind: type, row: Row, org: str) -> dict[str, Any]:
    """A row as this org sees it; `kind` is the class that declares its columns."""
    rules = rules_of(kind)
    return {name: rules[name](value, row, org) for name, value in row.items() if name in rules}


@functools.cache
def rules_of(kind: type) -> Mapping[str, Rule]:
    """The rule of each column that an org sees."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def shown(value: Any, row: Row, org: str) -> Any:
    return value


Shown = Annotated[T, shown]


def hidden(value: Any, row: Row, org: str) -> None:
    return None


def text(value: Any, row: Row, org: str) -> Any:
    """Without file paths, also within JSON."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: text(inner, row, org) for key, inner in value.items()}
    if isinstance(value, list):
        return [text(inner, row, org) for inner in value]
    return value


def line(value: Any, row: Row, org: str) -> Any:
    """A line of a run's log; one that a worker wrote is without the ids of workers."""
    return text(_WORKER_ID.sub("a worker", value) if row.get("source") == SOURCE else value, row, org)


def actor(value: Any, row: Row, org: str) -> Any:
    if value is None or value in (f"org:{org}", WORKER):
        return value
    is_ours = isinstance(value, str) and value.startswith("person:") and value.endswith(f"@{org}")
    return value if is_ours else OPERATOR


def note_of(column: str) -> Rule:
    """The note of the actor in `column`, unless that is an operator."""

    def note(value: Any, row: Row, org: str) -> Any:
        return None if actor(row.get(column), row, org) == OPERATOR else value

    return note


def error(value: Any, row: Row, org: str) -> Any:
    """Type and message of the error of a run or an attempt; its trace is for operators."""
    if value is None:
        return None
    if row.get("reason") == "org_mismatch":
        return {"type": value.get("type"), "message": OTHER_ORG}
    return {name: without_paths(str(value[name])) for name in ("type", "message") if name in value}


def error_cause(value: Any, row: Row, org: str) -> Any:
    return OTHER_ORG if value and row.get("reason") == "org_mismatch" else text(value, row, org)


def detail(value: Any, row: Row, org: str) -> Any:
    reason = row.get("reason")
    if reason == "expired" and value is not None:
        # The reason that it had before, with that reason's detail.
        last, rest = last_reason(value)
        known = detail(rest or None, {"reason": last}, org)
        return last if known is None else f"{last}: {known}"
    if value is None or reason in _DETAILED:
        return text(value, row, org)
    # For a run without a token, the error's code; the message names files and other orgs.
    return value.partition(":")[0] if reason == "no_token" else None


def claims(value: Any, row: Row, org: str) -> Any:
    """Those of the org's own token, without digests."""
    return without_digests(value) if value is not None and value.get("org_code") == org else None


def reference(value: Any, row: Row, org: str) -> Any:
    """Only that the secret is in a file."""
    return None if value is None else "file"


def by_hand(value: Any, row: Row, org: str) -> Any:
    """Those params of a run that the org may give; the others come from the spec or from an operator."""
    if not isinstance(value, Mapping):
        return None
    given = (row.get("spec") or {}).get("params_by_hand", ())
    return {name: each for name, each in value.items() if name in given}


def audit_detail(value: Any, row: Row, org: str) -> Any:
    """Without an operator's notes, and without the values of a spec before and after a change."""
    if isinstance(value, Mapping) and actor(row.get("actor"), row, org) == OPERATOR:
        value = {name: each for name, each in value.items() if name not in ("note", "reason", "template")}
    if isinstance(value, Mapping) and str(row.get("action")).startswith("definition."):
        value = {name: each for name, each in value.items() if not _is_of_spec(each)}
    return text(value, row, org)


def _is_of_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"before", "after"}


def without_key(key: str) -> Rule:
    """An object without one of its keys."""
    return lambda value, row, org: {name: each for name, each in value.items() if name != key}


def not_loaded(value: Any, row: Row, org: str) -> Any:
    return value and NOT_LOADED


def rows(kind: type, *, without: tuple[str, str] | None = None) -> Rule:
    """A list of rows, each redacted by its own class; a refused attempt has the reason of its run.

    `without` is a column and the value that hides a row.
    """

    def redact(value: Any, row: Row, org: str) -> Any:
        reason = {"reason": row.get("reason")}
        return [
            redacted(kind, {**each, **(reason if each.get("outcome") == "refused" else {})}, org)
            for each in value
            if without is None or each[without[0]] != without[1]
        ]

    return redact
