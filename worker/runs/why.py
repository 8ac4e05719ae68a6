"""Why: what became of a run in words, what is kept, whether a retry is safe, what to do next. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.clock import to_text

Row = Mapping[str, Any]

# Characters of a checkpoint that are shown in a sentence.
SHORT = 80


@dataclass(frozen=True, slots=True)
class Why:
    """Clauses without a full stop; `next` is one command. `facts` are the row's own words for it.

    `others` says how many other orgs met the same, where that can be told.
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
        """All of it, to be read by a person."""
        clauses = [f"{self.what}: {self.cause}", self.others, self.kept, self.retry]
        return " ".join(f"{_up(clause)}." for clause in clauses if clause) + f" Next: `{self.next}`."

    def as_row(self) -> dict[str, Any]:
        return {
            **self.facts,
            "what": self.what,
            "cause": self.cause,
            "others": self.others,
            "kept": self.kept,
            "retry": self.retry,
            "next": self.next,
            "sentence": self.sentence,
        }


# What a reason means; `{detail}`, `{error}` and `{available_at}` are the run's own.
CAUSES: Mapping[tuple[str, str | None], str] = {
    ("succeeded", None): "its handler returned a result",
    ("failed", "error"): "its handler raised {error}",
    ("failed", "timed_out"): "its handler had not returned when its timeout passed",
    ("failed", "handler_exited"): "its process ended without an answer ({detail})",
    ("failed", "result_invalid"): "what its handler returned is no JSON, or is too large: {error}",
    ("failed", "result_unstorable"): "the database does not take what its handler returned: {error}",
    ("failed", "out_of_memory"): "it needed more memory than it may have",
    ("failed", "lost"): "its worker died under it too often without a new checkpoint",
    ("cancelled", "requested"): "somebody cancelled it",
    ("cancelled", "suspended"): "its org was suspended or removed",
    ("cancelled", "replaced"): "a newer run took its place, as overlap = replace says",
    ("cancelled", "closed"): "its definition was closed",
    ("cancelled", "by_handler"): "its handler ended it: {detail}",
    ("refused", "org_mismatch"): "the issuer gave a token of another org",
    ("refused", "client_mismatch"): "the token was given to another client",
    ("refused", "scope_missing"): "its token lacks the scope {detail}",
    ("refused", "property_missing"): "its token lacks the property {detail}",
    ("refused", "settings_invalid"): "the property {detail} of its token is not what the handler takes",
    ("refused", "token_invalid"): "its token failed verification ({detail})",
    ("skipped", "flag_off"): "the flag {detail} is off for its org",
    ("skipped", "expired"): "nothing could start it within its start_deadline",
    ("waiting", "due"): "no worker had a free slot for it yet",
    ("waiting", "held"): "an earlier run of its definition is on, and overlap = queue_one or replace",
    ("waiting", "retry"): "its last attempt failed; it is tried again at {available_at}",
    ("waiting", "snoozed"): "its handler asked to be called again at {available_at}",
    ("waiting", "handed_back"): "its worker was stopped while it ran",
    ("waiting", "recovered"): "its worker died under it",
    ("waiting", "no_token"): "its org has no token now ({detail}); it is asked for again at {available_at}",
    ("waiting", "no_handler"): "no worker that is up offers its handler {handler}",
    ("running", None): "it runs on worker {worker} since {started_at}",
}

# What to look at, or to give, next.
NEXT: Mapping[tuple[str, str | None], str] = {
    ("succeeded", None): "runs show {id}",
    ("cancelled", "suspended"): "orgs show {org}",
    ("cancelled", "replaced"): "runs list --org {org} --definition {definition}",
    ("cancelled", "closed"): "definitions show {org} {definition}",
    ("failed", "result_invalid"): "runs logs {id}",
    ("failed", "result_unstorable"): "runs logs {id}",
    ("failed", "lost"): "runs logs {id}",
    ("refused", "settings_invalid"): "handlers show {handler}",
    # A retry would end the same: what counts is what the org's newest token says.
    ("skipped", "flag_off"): "orgs check {org}",
    ("waiting", "due"): "orgs show {org}",
    ("waiting", "held"): "runs list --org {org} --definition {definition} --state running",
    ("waiting", "no_token"): "orgs check {org}",
    ("waiting", "no_handler"): "handlers list",
    ("running", None): "runs logs {id} --follow",
}
_NEXT_OF_STATE = {
    "failed": "runs retry {id}",
    "cancelled": "runs retry {id}",
    "refused": "orgs check {org}",
    "skipped": "runs retry {id}",
    "waiting": "runs show {id}",
}


def why_run(run: Row, *, others: int | None = None, more: bool = False) -> Why:
    """Of one run, from its row of `runs show`.

    So many `others`, orgs that met the same in the hour around it, and perhaps `more`; None if nobody looked.
    """
    state, reason = str(run["state"]), run["reason"]
    values = _values(run)
    cause = CAUSES.get((state, reason), "its reason is {reason}").format_map(values)
    if state == "running" and run.get("cancel_requested_at"):
        cause += ", and was asked to stop"
    command = NEXT.get((state, reason), _NEXT_OF_STATE.get(state, "runs show {id}"))
    if command == "runs retry {id}" and run.get("checkpoint") is not None:
        command += " --from-checkpoint"
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    return Why(
        what=f"Run {run['id']} of {run['org']}/{run['definition']} for {to_text(run['scheduled_for'])} "
        f"{_is(state)}{tried}",
        cause=cause,
        kept=_kept(run, state),
        retry=_retry(run, state),
        next=command.format_map(values),
        facts={
            "run": run["id"],
            "org": run["org"],
            "definition": run["definition"],
            "scheduled_for": run["scheduled_for"],
            "state": state,
            "reason": reason,
            "other_orgs": others,
        },
        others=None if others is None else _others(reason, others, more),
    )


def last_error(run: Row) -> Row | None:
    """The attempt that says why a run is as it is, by an error that others may have met as well; if any."""
    if run["state"] not in ("failed", "refused") and run["reason"] not in ("retry", "recovered"):
        return None
    ended = [attempt for attempt in run.get("attempts") or () if attempt["ended_at"] is not None]
    return ended[-1] if ended and ended[-1]["error_cause"] is not None else None


def _others(reason: str | None, count: int, more: bool) -> str:
    met = "met the same error in the hour around it"
    if reason == "no_token":
        met = "waits for a token now" if count < 2 else "wait for a token now"
    if not count:
        return f"no other org {met}"
    return f"{'at least ' if more else ''}{count} other org{'s' if count > 1 else ''} {met}"


def _is(state: str) -> str:
    return {
        "succeeded": "succeeded",
        "failed": "failed",
        "waiting": "waits",
        "running": "runs",
    }.get(state, f"was {state}")


def _kept(run: Row, state: str) -> str:
    kept = []
    if state == "succeeded":
        kept.append("its result")
    checkpoint = run.get("checkpoint")
    if checkpoint is not None:
        text = json.dumps(checkpoint)
        kept.append("the checkpoint that it saved last" + (f" ({text})" if len(text) <= SHORT else ""))
    if run.get("attempts"):
        kept.append("its attempts and their log")
    if not kept:
        return "nothing of it had begun, so nothing is kept but this row"
    if checkpoint is None and state != "succeeded" and _had_started(run):
        kept[-1] += ", but no checkpoint: it would begin at the start again"
    return f"kept are {', '.join(kept)}"


def _retry(run: Row, state: str) -> str:
    if state == "running":
        return "a retry is possible once it has ended"
    if state == "waiting":
        return "a retry is not needed: it goes on by itself"
    if not _had_started(run):
        return "a retry is safe: its handler never started"
    if state == "succeeded":
        return "a retry does its work again, under the same idempotency key"
    return "a retry is safe where its handler sends the idempotency key, which stays the same: it had started"


def _had_started(run: Row) -> bool:
    return any(attempt["handler_started_at"] for attempt in run.get("attempts") or ())


def _values(run: Row) -> dict[str, str]:
    values = {name: _word(value) for name, value in run.items()}
    error = run.get("error") or {}
    message = (str(error.get("message") or "").splitlines() or [""])[0]
    values["error"] = ": ".join(filter(None, (error.get("type", "an error"), message)))
    return values


def _word(value: Any) -> str:
    if isinstance(value, datetime):
        return to_text(value)
    return "none" if value is None else str(value)


def _up(clause: str) -> str:
    return clause[:1].upper() + clause[1:]
