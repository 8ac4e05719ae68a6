"""What an org's own token is shown of each noun: no other org, no person, no worker, no path of the server.

Operators see rows as they are. For an org each column has a rule here; one without a rule
is left out, so that a new column stays hidden until somebody decides about it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from worker.errors import (
    AccessDenied,
    Busy,
    Conflict,
    DefinitionError,
    IssuerUnavailable,
    NotFound,
    RolesMissing,
    StoreUnavailable,
    TokenError,
    TooManyRequests,
    UsageError,
    WorkerError,
)
from worker.store.lists.paging import Row
from worker.web.access import Caller

Noun = Literal[
    "orgs",
    "definitions",
    "templates",
    "runs",
    "attempts",
    "logs",
    "skips",
    "handlers",
    "credentials",
    "audit",
]
# The value for the org, by the value, its whole row, and the org's code.
Rule = Callable[[Any, Row, str], Any]

OTHER_ORG = "the token is for another org"
NOT_LOADED = "it does not load; an operator can see why"
# Who acted: the org itself, a worker of itself, or a person, whose name is not the org's business.
WORKER, OPERATOR = "worker", "operator"

# Errors about the request. The messages of all others are about the server.
_OF_THE_REQUEST = (
    *(UsageError, NotFound, Conflict, DefinitionError),
    *(TokenError, AccessDenied, TooManyRequests),
)
# Reasons whose detail is a code or the handler's own text. With others it is the worker's text.
_DETAILED = {
    *("error", "retry", "snoozed", "by_handler", "handler_exited", "result_invalid", "flag_off", "expired"),
    *("org_mismatch", "client_mismatch", "scope_missing", "property_missing", "settings_invalid"),
    "token_invalid",
}
# Top-level folders of a server; those of this process are added below.
_TOPS = {
    *("bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "media", "mnt", "nix", "opt", "private"),
    *("proc", "root", "run", "sbin", "snap", "srv", "sys", "tmp", "usr", "var"),
}


def redacted(noun: Noun, rows: Iterable[Row], caller: Caller) -> list[Row]:
    """The rows of one noun as this caller may see them."""
    return [redacted_row(noun, row, caller) for row in rows]


def redacted_row(noun: Noun, row: Row, caller: Caller) -> Row:
    """As `redacted`, of one row."""
    return row if caller.org is None else _row(noun, row, caller.org)


def redacted_error(error: WorkerError, caller: Caller | None) -> tuple[str, str]:
    """Message and fix of an error; without the installation's insides for all but operators."""
    if caller is not None and caller.org is None:
        return error.message, error.fix
    if isinstance(error, StoreUnavailable):
        return "the database does not answer", "try again later"
    if isinstance(error, RolesMissing):
        return "the server may not act for its callers in the database", "an operator can see why"
    if isinstance(error, IssuerUnavailable):
        return "the token's issuer does not answer, so the token cannot be verified", "try again later"
    if isinstance(error, Busy):
        return "the server is busy", "try again in a moment"
    if not isinstance(error, _OF_THE_REQUEST):
        return "the server cannot answer this", "an operator can see why"
    return without_paths(error.message), without_paths(error.fix)


def without_paths(text: str) -> str:
    """The text with `<path>` in place of each absolute path of a server's file."""
    return _PATH.sub("<path>", text) if "/" in text else text


def _row(noun: Noun, row: Row, org: str) -> Row:
    rules = RULES[noun]
    return {name: rules[name](value, row, org) for name, value in row.items() if name in rules}


def _keep(value: Any, row: Row, org: str) -> Any:
    return value


def _hide(value: Any, row: Row, org: str) -> None:
    return None


def _text(value: Any, row: Row, org: str) -> Any:
    """Without paths, in whatever JSON it stands."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {key: _text(inner, row, org) for key, inner in value.items()}
    if isinstance(value, list):
        return [_text(inner, row, org) for inner in value]
    return value


def _actor(value: Any, row: Row, org: str) -> Any:
    if value is None or value in (f"org:{org}", WORKER):
        return value
    return OPERATOR


def _note_of(actor: str) -> Rule:
    """The words of whoever is in the column `actor`: not those of an operator."""

    def note(value: Any, row: Row, org: str) -> Any:
        return None if _actor(row.get(actor), row, org) == OPERATOR else value

    return note


def _error(value: Any, row: Row, org: str) -> Any:
    """Type and message of a run's or an attempt's error; its trace is for operators."""
    if value is None:
        return None
    if row.get("reason") == "org_mismatch":
        return {"type": value.get("type"), "message": OTHER_ORG}
    return {name: without_paths(str(value[name])) for name in ("type", "message") if name in value}


def _error_cause(value: Any, row: Row, org: str) -> Any:
    return OTHER_ORG if value and row.get("reason") == "org_mismatch" else _text(value, row, org)


def _detail(value: Any, row: Row, org: str) -> Any:
    if value is None or row.get("reason") in _DETAILED:
        return _text(value, row, org)
    # Of a run without a token the code of the error; its message tells of files and other orgs.
    return value.partition(":")[0] if row.get("reason") == "no_token" else None


def _attempts(value: Any, row: Row, org: str) -> Any:
    """A refused attempt is the last of its run, and so refused for the run's reason."""
    shown = []
    for attempt in value:
        refused = {"reason": row.get("reason")} if attempt.get("outcome") == "refused" else {}
        shown.append(_row("attempts", {**attempt, **refused}, org))
    return shown


def _claims(value: Any, row: Row, org: str) -> Any:
    return value if value is None or value.get("org_code") == org else None


def _credentials(value: Any, row: Row, org: str) -> Any:
    return [_row("credentials", each, org) for each in value]


def _reference(value: Any, row: Row, org: str) -> Any:
    """Only that the secret is a file."""
    return None if value is None else "file"


def _audit_detail(value: Any, row: Row, org: str) -> Any:
    """Without an operator's words."""
    if isinstance(value, Mapping) and _actor(row.get("actor"), row, org) == OPERATOR:
        value = {name: each for name, each in value.items() if name not in ("note", "template")}
    return _text(value, row, org)


def _not_loaded(value: Any, row: Row, org: str) -> Any:
    return value and NOT_LOADED


def _all(names: str, rule: Rule = _keep) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[Noun, Mapping[str, Rule]] = {
    "orgs": {
        **_all("id code name issuer state state_at max_concurrent_runs weight tags timezone"),
        **_all("created_at updated_at"),
        "state_by": _actor,
        "state_note": _note_of("state_by"),
        "credentials": _credentials,
    },
    "definitions": {
        **_all("id org name handler schedule timezone state org_state next_scheduled_for next_fire_at"),
        **_all("revision enabled paused_at consecutive_failures template created_at updated_at closed_at"),
        "paused_by": _actor,
        "pause_note": _note_of("paused_by"),
    },
    # Which orgs a template is for, and how far it has got with them, is left out.
    "templates": _all(
        "id name handler schedule state revision materialised_at created_at updated_at closed_at"
    ),
    "runs": {
        **_all("id org definition handler revision scheduled_for origin retry_of state reason available_at"),
        **_all("attempt fencing_token result_fencing_token started_at finished_at progress result"),
        **_all("created_at request_key idempotency_key params cancel_requested_at checkpoint spec"),
        "detail": _detail,
        "worker": _hide,
        "error": _error,
        "claims": _claims,
        "attempts": _attempts,
    },
    "attempts": {
        **_all("attempt fencing_token handler started_at token_ready_at handler_started_at ended_at outcome"),
        "worker": _hide,
        "error": _error,
        "error_cause": _error_cause,
    },
    "logs": {**_all("attempt seq at level source"), "text": _text},
    "skips": _all("id org definition revision skipped_from skipped_until count reason"),
    "handlers": {
        **_all("name distribution version entry_point isolation scopes params_schema settings_schema"),
        **_all("timeout max_attempts memory max_concurrent seen_at"),
        "error": _not_loaded,
    },
    "credentials": {
        **_all("id org generation client_id kind state created_at retired_at last_used_at uses"),
        "reference": _reference,
        "key_id": _hide,
        "created_by": _actor,
        "last_error": _text,
    },
    "audit": {
        **_all("id at action org subject"),
        "actor": _actor,
        "detail": _audit_detail,
    },
}


def _path_pattern(tops: Iterable[str]) -> re.Pattern[str]:
    names = "|".join(sorted(map(re.escape, tops)))
    # Not behind a word, which is the host of a URL or a part of another path.
    return re.compile(rf"(?<![\w.~/-])/+(?:{names})(?:/[^\s'\"<>|:;,)\]}}]*)+")


def _own_tops(paths: Sequence[str]) -> set[str]:
    return {parts[1] for path in paths if len(parts := Path(path).parts) > 1}


_PATH = _path_pattern(
    _TOPS | _own_tops([sys.prefix, sys.base_prefix, os.getcwd(), tempfile.gettempdir(), *sys.path])
)
