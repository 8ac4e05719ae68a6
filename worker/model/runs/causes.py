"""Causes: what each state and reason of a run means, whose it is, and what to do next. Pure.

Everything that is said of a reason is declared here once; `worker.model.runs.why` puts it together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.model.egress import PLACES, Owner, deniers
from worker.model.runs.outcome import names_http_status

# Whose a cause is: the installation and its operators, the handler and its author, the org, its identity
# provider, an API that the handler calls, or a limit that somebody set.
Whose = Literal["operator", "handler", "org", "provider", "remote_api", "limit"]

# What each cause lies with, in words.
WHOSE: Mapping[Whose, str] = {
    "operator": "the installation",
    "handler": "the handler",
    "org": "the org",
    "provider": "the identity provider",
    "remote_api": "a remote API",
    "limit": "a limit",
}
# What a customer reads of each, after "because".
FOR_CUSTOMER: Mapping[Whose, str] = {
    "operator": "of an interruption on our side",
    "handler": "of an error on our side",
    "org": "something in your account needs a change",
    "provider": "the sign-in service gave us no valid access for your account",
    "remote_api": "a service that it uses did not respond as expected",
    "limit": "it reached a limit",
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a reason means: `text` for the operator, `customer` for the org, without internals.

    Names in braces are values of the run, in `CAUSES` those of its own columns, which lists have. `verb` is
    the next step; empty for that of the state. `probably` says that `whose` is an assumption. `expired` is
    said of a run that had this reason until its start_deadline passed.
    """

    text: str
    whose: Whose | None
    verb: str = ""
    customer: str = ""
    probably: bool = False
    expired: str = ""


CAUSES: Mapping[tuple[str, str | None], Meaning] = {
    ("succeeded", None): Meaning("its handler returned a result", None, "show_run", "ran to its end"),
    ("running", None): Meaning(
        "it has been running since {started_at}", None, "follow_log", "is running"
    ),
    ("failed", "error"): Meaning("{error}", "handler", probably=True),
    ("failed", "timed_out"): Meaning(
        "its handler did not return within its timeout", "handler", probably=True, customer="took too long"
    ),
    ("failed", "handler_exited"): Meaning("its process exited without a result{with_detail}", "handler"),
    ("failed", "result_invalid"): Meaning(
        "the result of its handler is not JSON or is too large: {error}", "handler", "read_log"
    ),
    ("failed", "result_unstorable"): Meaning(
        "the database rejects the result of its handler: {error}", "handler", "read_log"
    ),
    ("failed", "out_of_memory"): Meaning("it exceeded its memory limit", "limit"),
    ("failed", "budget"): Meaning(
        "{error}", "limit", "show_budgets", "stopped, because its budget is used up"
    ),
    ("failed", "lost"): Meaning(
        "its worker died too often without a new checkpoint", "operator", "read_log", probably=True
    ),
    ("cancelled", "requested"): Meaning(
        "it was cancelled on request", "operator", customer="was cancelled", probably=True
    ),
    ("cancelled", "suspended"): Meaning(
        "its org was suspended or removed", "operator", "show_org", "was cancelled: your account is suspended"
    ),
    ("cancelled", "replaced"): Meaning(
        "a newer run replaced it (overlap = replace)", "limit", "list_runs", "was replaced by a newer run"
    ),
    ("cancelled", "closed"): Meaning(
        "its definition was closed", "operator", "show_definition", "was cancelled: the job was closed"
    ),
    ("cancelled", "parent"): Meaning(
        "the run that started it was cancelled or has failed", "operator", "show_run", probably=True
    ),
    ("cancelled", "by_handler"): Meaning(
        "its handler cancelled it: {detail}", "handler", customer="ended early, as it was made to"
    ),
    ("refused", "org_mismatch"): Meaning("the issuer returned a token of another org", "provider"),
    ("refused", "client_mismatch"): Meaning("the token was issued to another client", "provider"),
    ("refused", "scope_missing"): Meaning("its token lacks the scope {detail}", "org", probably=True),
    ("refused", "property_missing"): Meaning("its token lacks the property {detail}", "org"),
    ("refused", "settings_invalid"): Meaning(
        "the property {detail} of its token is invalid for the handler", "org", "show_handler"
    ),
    ("refused", "pool_mismatch"): Meaning(
        "its token does not allow its pool: the property {detail} has another value", "org", probably=True
    ),
    ("refused", "secret_missing"): Meaning(
        "its org has no secret {detail}, which its handler needs", "org", "add_secret"
    ),
    ("refused", "secret_bound"): Meaning(
        "the secret {detail} of its org is bound, and its worker has no broker that sends it",
        "operator",
        "list_secrets",
    ),
    ("refused", "params_invalid"): Meaning(
        "a product started it with params that its handler does not accept: {detail}",
        "operator",
        "show_handler",
    ),
    ("refused", "org_inactive"): Meaning(
        "a product started it while its org was not active: {detail}",
        "operator",
        "show_org",
        "was not started: your account was suspended",
    ),
    ("refused", "definition_closed"): Meaning(
        "a product started it after its definition was closed: {detail}", "operator", "show_definition"
    ),
    ("refused", "overlap"): Meaning(
        "a product started it, and an unfinished run kept it out: {detail}",
        "limit",
        "list_runs",
        "was not started: an earlier run had not ended",
    ),
    ("refused", "child_exceeds"): Meaning(
        "its handler declares {detail}, which the handler that started it does not have",
        "handler",
        "show_handler",
    ),
    ("refused", "token_invalid"): Meaning("its token failed verification{with_detail}", "provider"),
    # A retry gives the same outcome until the token of the org has another flag.
    ("skipped", "flag_off"): Meaning(
        "the flag {detail} is off for its org",
        "org",
        "check_org",
        "was skipped: the feature is turned off for your account",
    ),
    ("skipped", "expired"): Meaning(
        "no worker had a free slot for it within its start_deadline",
        "limit",
        "retry",
        "could not start in time",
        probably=True,
    ),
    ("waiting", "due"): Meaning(
        "it is due and waits for its turn", "limit", "show_org", "waits for its turn"
    ),
    ("waiting", "held"): Meaning(
        "an earlier run of its definition is unfinished (overlap = queue_one or replace)",
        "limit",
        "list_running",
        "waits for an earlier run to end",
    ),
    ("waiting", "retry"): Meaning(
        "its last attempt failed{with_detail}; it is retried at {available_at}",
        "handler",
        customer="failed at its last attempt, and is tried again",
        probably=True,
    ),
    ("waiting", "snoozed"): Meaning(
        "its handler asked to be called again at {available_at}{with_detail}",
        "handler",
        customer="goes on later",
    ),
    ("waiting", "handed_back"): Meaning(
        "its worker gave it back while it ran{with_detail}",
        "operator",
        expired="its worker gave it back before its handler had started",
    ),
    ("waiting", "recovered"): Meaning(
        "its worker died while it ran",
        "operator",
        probably=True,
        expired="its worker died before its handler had started",
    ),
    ("waiting", "no_token"): Meaning(
        "its org has no token{with_detail}; it is requested again at {available_at}",
        "provider",
        "check_org",
        probably=True,
        expired="its org had no token: {last}",
    ),
    ("waiting", "budget"): Meaning(
        "its org has used up its budget of {detail}; it goes on at {available_at}, or when the budget is "
        "raised",
        "limit",
        "show_budgets",
        "waits, because its budget is used up",
    ),
    ("waiting", "no_handler"): Meaning(
        "no running worker offers its handler {handler}",
        "operator",
        "show_handler",
        expired="no running worker offered its handler {handler}",
    ),
    ("waiting", "no_pool"): Meaning(
        "no worker or host serves pool {pool}",
        "operator",
        "show_definition",
        expired="no worker or host served pool {pool}",
    ),
    ("waiting", "not_approved"): Meaning(
        "hosts of pool {pool} declare more for its handler {handler} than an administrator approved",
        "operator",
        "list_approvals",
        expired="hosts of pool {pool} declared more for its handler {handler} than an administrator approved",
    ),
    ("waiting", "unplaced"): Meaning(
        "it could not be placed on a host of its pool: {detail}",
        "operator",
        expired="it could not be placed on a host of its pool: {last}",
    ),
    ("waiting", "asleep"): Meaning(
        "its handler sleeps until {available_at}{with_detail}, without a process",
        "handler",
        customer="goes on later",
    ),
    ("waiting", "answer"): Meaning(
        "its handler waits for an answer{with_detail}, without a process",
        "org",
        "answer",
        "waits for an answer",
        probably=True,
    ),
    ("waiting", "children"): Meaning(
        "its handler waits for the runs that it started{with_detail}, without a process",
        "handler",
        customer="waits for its parts to end",
    ),
    ("waiting", "batch"): Meaning(
        "its model requests are in a batch of {detail}, for which it waits without a process",
        "provider",
        customer="waits for the answer of a model",
    ),
    ("waiting", "window"): Meaning(
        "as many of its siblings are unfinished as ctx.map_runs allows",
        "limit",
        customer="waits for its turn",
    ),
    ("waiting", "resumed"): Meaning(
        "what it waited for has come, and it waits for its turn",
        "limit",
        "show_org",
        "waits for its turn",
    ),
}  # fmt: skip

# What keeps a waiting run from starting, where more is known than its reason says. It follows the cause.
BLOCKS: Mapping[str, Meaning] = {
    "org_paused": Meaning(
        "its org was paused by {state_by} at {state_at}: none of its runs start",
        "operator",
        "resume_org",
        "waits, because your account is paused",
    ),
    "org_limit": Meaning(
        "its org already runs as many as its max_concurrent_runs allows: {limit}",
        "limit",
        "list_running_of_org",
        "waits for other runs of your account to end",
    ),
    "definition_limit": Meaning(
        "its definition already runs as many as its max_concurrent allows: {limit}",
        "limit",
        "list_running",
        "waits for other runs of this job to end",
    ),
    "handler_limit": Meaning(
        "its handler {handler} already runs as many as its max_concurrent allows, over all orgs: {limit}",
        "limit",
        "show_handler",
        "waits for its turn",
    ),
    "not_yet": Meaning("it can start at {available_at}", None, customer="goes on later"),
    "no_slot": Meaning("no worker had a free slot for it yet", None),
    "no_worker": Meaning("no worker is up to run it", "operator", "check_workers"),
    "silent_worker": Meaning(
        "{worker_may_be_down}: silent since {silent_since}, for longer than two renewals of its lease",
        "operator",
        "check_workers",
        probably=True,
    ),
    "pool_not_served": Meaning("no worker or host serves pool {pool}", "operator", "check_workers"),
    "not_restarted": Meaning(
        "restart the workers: none has {handler}, which {offered} offers",
        "operator",
        "restart_workers",
    ),
    "handler_broken": Meaning(
        "its handler {handler} does not load on the workers: {load_error}", "handler", "show_handler"
    ),
    "other_pools": Meaning(
        "only hosts offer its handler {handler}, those of pool {pools}, and its pool is {pool}: the "
        "definition must name the pool",
        "operator",
        "show_definition",
    ),
    "not_approved": Meaning(
        "they declare {declared} for {pending}, which no administrator has approved{unless}",
        "operator",
        "approve",
    ),
    "approved_meanwhile": Meaning(
        "an approval is not needed any more: it starts at {starts_at}", None, "show_run"
    ),
}

# The next step of each state, for a reason without one.
VERB_OF_STATE: Mapping[str, str] = {
    "failed": "retry",
    "cancelled": "retry",
    "refused": "check_org",
    "skipped": "retry",
    "waiting": "show_run",
}
# Reasons of waiting runs that no time ends: somebody has to do something.
STUCK = frozenset({"no_handler", "no_pool", "not_approved", "unplaced"})
# A run with one of these reasons starts as soon as a slot is free.
READY = frozenset({"due", "handed_back", "recovered", "resumed"})

# Errors of the usual HTTP clients and SDKs, by the names of their classes.
# fmt: off
_REMOTE = frozenset({
    "APIConnectionError", "APIError", "APIStatusError", "APITimeoutError", "BadGateway",
    "ChunkedEncodingError", "ClientConnectorError", "ClientError", "ClientResponseError", "ConnectError",
    "ConnectTimeout", "ConnectionAbortedError", "ConnectionError", "ConnectionRefusedError",
    "ConnectionResetError", "EndpointConnectionError", "GatewayTimeout", "HTTPError", "HTTPStatusError",
    "InternalServerError", "MaxRetryError", "NewConnectionError", "OverloadedError", "PoolTimeout",
    "ProxyError", "RateLimitError", "ReadError", "ReadTimeout", "RemoteDisconnected", "RemoteProtocolError",
    "RequestError", "SSLError", "ServerDisconnectedError", "ServerTimeoutError", "ServiceUnavailable",
    "ServiceUnavailableError", "TooManyRequests", "URLError", "WriteError", "WriteTimeout", "gaierror",
})
# fmt: on
# Codes of token errors by whom they concern; the rest are the provider's, probably.
_TOKEN_ERRORS: Mapping[str, Whose] = {
    "credentials_rejected": "org",
    "request_rejected": "operator",
    "configuration": "operator",
    "issuer_paused": "provider",
    "issuer_unavailable": "provider",
    "throttled": "provider",
    "answer_too_large": "provider",
}


@dataclass(frozen=True, slots=True)
class Denial:
    """A request that was not sent, of which an attempt failed: who can allow it, and how."""

    whose: Whose
    verb: str
    retry: str


_BY_OWNER: Mapping[Owner, tuple[Whose, str]] = {
    "handler": ("handler", "list_in_handler"),
    "definition": ("operator", "list_in_definition"),
    "operator": ("operator", "list_in_settings"),
}
_UNTIL_LISTED = "a retry is denied until {where}"


def denial_of(error: Mapping[str, Any]) -> Denial | None:
    """What an error says of a request that was not sent; None for any other error."""
    kind, message = str(error.get("type") or ""), str(error.get("message") or "")
    if kind == "AddressRefused":
        where = "[execution] private_origins or api_origins has its origin"
        return Denial("operator", "list_in_settings", _UNTIL_LISTED.format(where=where))
    if kind != "EgressDenied":
        return None
    owners = deniers(message) or ("handler",)
    where = " and ".join(f"{PLACES[owner]} has its origin" for owner in owners)
    return Denial(*_BY_OWNER[owners[0]], _UNTIL_LISTED.format(where=where))


def whose_error(error: Mapping[str, Any]) -> Whose:
    """Whose an exception of a handler probably is, by its type and message."""
    kind, message = str(error.get("type") or ""), str(error.get("message") or "")
    if kind == "MemoryError":
        return "limit"
    return "remote_api" if kind in _REMOTE or names_http_status(message) else "handler"


def whose_token(detail: str | None) -> tuple[Whose, bool]:
    """Whose it is that there is no token, by the code before the colon, and whether that is an assumption."""
    known = _TOKEN_ERRORS.get((detail or "").partition(":")[0])
    return (known or "provider", known is None)


def last_reason(detail: str | None) -> tuple[str, str]:
    """The reason that an expired run had until then, and its detail; two empty texts if it was only due."""
    reason, _, rest = (detail or "").partition(": ")
    return (reason, rest) if ("waiting", reason) in CAUSES else ("", "")


def kept_reason(reason: str | None, detail: str | None) -> str | None:
    """What an expired run keeps in `detail` of the reason that it had; None if it was only due."""
    if reason is None or reason == "due":
        return None
    return reason if detail is None else f"{reason}: {detail}"
