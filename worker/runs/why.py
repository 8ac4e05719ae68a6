"""Why: what happened to a run in words, what is retained, whether a retry is safe, what to do next. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.clock import to_text
from worker.runs.run import step_label
from worker.runs.waits import is_open_question

Row = Mapping[str, Any]

# Maximum length of a checkpoint in a sentence.
SHORT = 80


@dataclass(frozen=True, slots=True)
class Why:
    """Clauses without a full stop. `next` is a command, `facts` are values of the row.

    `others` is about other orgs with the same error, None if unknown.
    """

    what: str
    cause: str
    kept: str
    retry: str
    next: str
    facts: Mapping[str, Any]
    others: str | None = None

    @property
    def sentence(self) -> str:
        """All clauses as text."""
        clauses = [f"{self.what}: {self.cause}", self.others, self.kept, self.retry]
        return " ".join(f"{_up(clause)}." for clause in clauses if clause) + f" Next: `{self.next}`."

    def as_row(self) -> dict[str, Any]:
        names = ("what", "cause", "others", "kept", "retry", "next", "sentence")
        return {**self.facts, **{name: getattr(self, name) for name in names}}


# What each reason means; the names in braces are columns of the run.
CAUSES: Mapping[tuple[str, str | None], str] = {
    ("succeeded", None): "its handler returned a result",
    ("failed", "error"): "its handler raised {error}",
    ("failed", "timed_out"): "its handler did not return within its timeout",
    ("failed", "handler_exited"): "its process exited without a result ({detail})",
    ("failed", "result_invalid"): "the result of its handler is not JSON or is too large: {error}",
    ("failed", "result_unstorable"): "the database rejects the result of its handler: {error}",
    ("failed", "out_of_memory"): "it exceeded its memory limit",
    ("failed", "budget"): "{error}",
    ("failed", "lost"): "its worker died too often without a new checkpoint",
    ("cancelled", "requested"): "it was cancelled on request",
    ("cancelled", "suspended"): "its org was suspended or removed",
    ("cancelled", "replaced"): "a newer run replaced it (overlap = replace)",
    ("cancelled", "closed"): "its definition was closed",
    ("cancelled", "by_handler"): "its handler cancelled it: {detail}",
    ("refused", "org_mismatch"): "the issuer returned a token of another org",
    ("refused", "client_mismatch"): "the token was issued to another client",
    ("refused", "scope_missing"): "its token lacks the scope {detail}",
    ("refused", "property_missing"): "its token lacks the property {detail}",
    ("refused", "settings_invalid"): "the property {detail} of its token is invalid for the handler",
    (
        "refused",
        "pool_mismatch",
    ): "its token does not allow its pool: the property {detail} has another value",
    ("refused", "secret_missing"): "its org has no secret {detail}, which its handler needs",
    ("refused", "token_invalid"): "its token failed verification ({detail})",
    ("skipped", "flag_off"): "the flag {detail} is off for its org",
    ("skipped", "expired"): "no worker could start it within its start_deadline",
    ("waiting", "due"): "no worker had a free slot for it yet",
    ("waiting", "held"): "an earlier run of its definition is unfinished (overlap = queue_one or replace)",
    ("waiting", "retry"): "its last attempt failed; it is retried at {available_at}",
    ("waiting", "snoozed"): "its handler asked to be called again at {available_at}",
    ("waiting", "handed_back"): "its worker was stopped while it ran",
    ("waiting", "recovered"): "its worker died while it ran",
    ("waiting", "no_token"): "its org has no token ({detail}); it is requested again at {available_at}",
    ("waiting", "budget"): "its org has used up its budget of {detail}; it goes on at {available_at}, or "
    "when the budget is raised",
    ("waiting", "no_handler"): "no running worker offers its handler {handler}",
    ("waiting", "no_pool"): "no worker or host serves pool {detail}",
    ("waiting", "not_approved"): "hosts of pool {pool} declare more for its handler {handler} than an "
    "administrator approved",
    ("waiting", "unplaced"): "it could not be placed on a host of its pool: {detail}",
    ("waiting", "asleep"): "its handler sleeps until {available_at}, without a process",
    ("waiting", "answer"): "its handler waits for an answer to {waits}, without a process",
    ("waiting", "resumed"): "what it waited for has come, and no worker had a free slot for it yet",
    ("running", None): "it has been running on worker {worker} since {started_at}",
}

# The next command.
NEXT: Mapping[tuple[str, str | None], str] = {
    ("succeeded", None): "runs show {id}",
    ("cancelled", "suspended"): "orgs show {org}",
    ("cancelled", "replaced"): "runs list --org {org} --definition {definition}",
    ("cancelled", "closed"): "definitions show {org} {definition}",
    ("failed", "result_invalid"): "runs logs {id}",
    ("failed", "result_unstorable"): "runs logs {id}",
    ("failed", "lost"): "runs logs {id}",
    ("refused", "settings_invalid"): "handlers show {handler}",
    ("refused", "secret_missing"): "secrets add {org} {detail}",
    # A retry gives the same outcome until the token of the org has another flag.
    ("skipped", "flag_off"): "orgs check {org}",
    ("waiting", "due"): "orgs show {org}",
    ("waiting", "held"): "runs list --org {org} --definition {definition} --state running",
    ("waiting", "no_token"): "orgs check {org}",
    ("waiting", "no_handler"): "handlers list",
    ("waiting", "no_pool"): "definitions show {org} {definition}",
    ("waiting", "not_approved"): "pools approvals {pool}",
    ("waiting", "answer"): "runs answer {id} {wait} --data JSON",
    ("waiting", "budget"): "budgets list --org {org}",
    ("running", None): "runs logs {id} --follow",
}
# Of a budget that asks.
ANSWER_BUDGET = "runs answer {id} {wait} --data '{{\"by\": N}}'"
_NEXT_OF_STATE = {
    "failed": "runs retry {id}",
    "cancelled": "runs retry {id}",
    "refused": "orgs check {org}",
    "skipped": "runs retry {id}",
    "waiting": "runs show {id}",
}


def why_run(run: Row, *, others: int | None = None, more: bool = False, retried: Row | None = None) -> Why:
    """Explain one run, from its row of `runs show`.

    `others` is the number of other orgs with the same error in the hour around it (None if unknown),
    a minimum with `more`. `retried` is the last run of its retries, if it was retried.
    """
    state, reason = str(run["state"]), run["reason"]
    values = _values(run)
    cause = CAUSES.get((state, reason), "its reason is {reason}").format_map(values)
    if state == "running" and run.get("cancel_requested_at"):
        cause += ", and was asked to stop"
    command = NEXT.get((state, reason), _NEXT_OF_STATE.get(state, "runs show {id}"))
    if command == "runs retry {id}" and _can_continue(run):
        command += " --from-checkpoint"
    if (state, reason) == ("waiting", "budget") and values["wait"] != "NAME":
        command = ANSWER_BUDGET
    retry = _retry(run, state)
    if retried is not None:
        retry, command = _retried(retried)
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    return Why(
        what=f"Run {run['id']} of {run['org']}/{run['definition']} for {to_text(run['scheduled_for'])} "
        f"{_is(state)}{tried}",
        cause=cause,
        kept=_kept(run, state),
        retry=retry,
        next=command.format_map(values),
        facts={
            "run": run["id"],
            "org": run["org"],
            "definition": run["definition"],
            "scheduled_for": run["scheduled_for"],
            "state": state,
            "reason": reason,
            "retried_as": run.get("retried_as"),
            "other_orgs": others,
        },
        others=None if others is None else _others(reason, others, more),
    )


def last_error(run: Row) -> Row | None:
    """The last attempt if its error explains the state of the run, else None."""
    if run["state"] not in ("failed", "refused") and run["reason"] not in ("retry", "recovered"):
        return None
    ended = [attempt for attempt in run.get("attempts") or () if attempt["ended_at"] is not None]
    return ended[-1] if ended and ended[-1]["error_cause"] is not None else None


def _others(reason: str | None, count: int, more: bool) -> str:
    met = "had the same error in the hour around it"
    if reason == "no_token":
        met = "is waiting for a token" if count < 2 else "are waiting for a token"
    if not count:
        return f"no other org {met}"
    return f"{'at least ' if more else ''}{count} other org{'s' if count > 1 else ''} {met}"


def _is(state: str) -> str:
    words = {"succeeded": "succeeded", "failed": "failed", "waiting": "is waiting", "running": "is running"}
    return words.get(state, f"was {state}")


def _kept(run: Row, state: str) -> str:
    kept = []
    if state == "succeeded":
        kept.append("its result")
    checkpoint = run.get("checkpoint")
    if checkpoint is not None:
        text = json.dumps(checkpoint)
        kept.append("its last checkpoint" + (f" ({text})" if len(text) <= SHORT else ""))
    if count := run.get("step_count"):
        last = run["steps"][-1]
        label = step_label(last["name"], last["key"], last["occurrence"])
        kept.append("its step " + label if count == 1 else f"its {count:,} steps, the last one {label}")
    if run.get("attempts"):
        kept.append("its attempts and their log")
    if not kept:
        return "it had not started, so only this row is retained"
    if not _can_continue(run) and state != "succeeded" and _had_started(run):
        kept[-1] += ", but no checkpoint: it would start from the beginning"
    return f"retained: {', '.join(kept)}"


def _can_continue(run: Row) -> bool:
    return run.get("checkpoint") is not None or bool(run.get("step_count"))


def _retry(run: Row, state: str) -> str:
    if state == "running":
        return "a retry is possible after it has ended"
    if state == "waiting":
        return "no retry is needed: it continues automatically"
    if not _had_started(run):
        return "a retry is safe: its handler has not started"
    if state == "succeeded":
        return "a retry repeats its work, with the same idempotency key"
    return "its handler had started: a retry is safe if it sends the idempotency key, which stays the same"


def _retried(run: Row) -> tuple[str, str]:
    """How the last of its retries went, and the command that shows more."""
    state = str(run["state"])
    how = f"it was retried as run {run['id']}, which {_is(state)}"
    if state == "succeeded":
        return f"{how}: no other retry is needed", f"runs show {run['id']}"
    return how, f"runs why {run['id']}"


def _had_started(run: Row) -> bool:
    return any(attempt["handler_started_at"] for attempt in run.get("attempts") or ())


def _values(run: Row) -> dict[str, str]:
    values = {name: _word(value) for name, value in run.items()}
    error = run.get("error") or {}
    message = (str(error.get("message") or "").splitlines() or [""])[0]
    open_waits = list(filter(is_open_question, run.get("waits") or ()))
    values["wait"] = _as_argument(open_waits[0]) if open_waits else "NAME"
    values["waits"] = ", ".join(map(_in_words, open_waits)) or values.get("detail", "none")
    values["error"] = ": ".join(filter(None, (error.get("type", "an error"), message)))
    return values


def _as_argument(wait: Row) -> str:
    """A wait as arguments of `runs answer`."""
    other = "" if wait["occurrence"] == 1 else f" --occurrence {wait['occurrence']}"
    return f"{wait['name']}{other}"


def _in_words(wait: Row) -> str:
    """A wait with its times."""
    number = "" if wait["occurrence"] == 1 else f"#{wait['occurrence']}"
    until = "" if wait["until"] is None else f", until {to_text(wait['until'])}"
    return f"{wait['name']}{number} (since {to_text(wait['opened_at'])}{until})"


def _word(value: Any) -> str:
    if isinstance(value, datetime):
        return to_text(value)
    return "none" if value is None else str(value)


def _up(clause: str) -> str:
    return clause[:1].upper() + clause[1:]
