"""Why: what happened to a run, whose it is, what is retained, whether a retry is safe, what to do next. Pure.

`Why` is data; `worker.model.runs.clauses` puts it into words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from worker.model.runs.causes import (
    BLOCKS,
    CAUSES,
    VERB_OF_STATE,
    Meaning,
    Whose,
    denial_of,
    last_reason,
    whose_error,
    whose_token,
)
from worker.model.runs.egress import NAMED
from worker.model.runs.next_steps import NextStep
from worker.model.runs.waits import is_open_question

Row = Mapping[str, Any]

# Options of a question that its command names.
OPTIONS = 6
# What of a run no text names.
_NOT_IN_TEXTS = frozenset(
    {
        *("attempts", "waits", "steps", "spends", "egress"),
        *("spec", "claims", "checkpoint", "result"),
    }
)


@dataclass(frozen=True, slots=True)
class SinceThen:
    """How the other runs of the run's definition went.

    `row` runs in a row ended like this one, the first of them at `since`. `later` counts the runs after this
    one by state; with `more` there are others.
    """

    since: datetime | None = None
    row: int = 1
    later: Mapping[str, int] = field(default_factory=dict)
    more: bool = False

    @property
    def count(self) -> int:
        return sum(self.later.values())


@dataclass(frozen=True, slots=True)
class Question:
    """What a run asks. With `binds` only `options` are taken; `for_budget`: it asks to raise a budget."""

    name: str
    occurrence: int
    ask: Any
    options: Sequence[Any]
    binds: bool
    since: datetime
    until: datetime | None
    for_budget: bool

    @property
    def data(self) -> str:
        """The answer as the command line takes it; several options in a form that is refused as it stands."""
        if self.for_budget:
            return '{"by": N}'
        if not 0 < len(self.options) <= OPTIONS:
            return "JSON"
        return " | ".join(json.dumps(option, ensure_ascii=False) for option in self.options)

    def as_row(self) -> dict[str, Any]:
        names = ("name", "occurrence", "ask", "options", "binds", "since", "until")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Why:
    """The answer as data. `kind` is a stable word, `text` the cause as a template of `values`.

    `addition` is what is known beyond the columns of `runs list`, a template, too; it follows the cause.
    `since` is when this began for the org, `other_orgs` the number of others with the same error; None for
    what is unknown. `run` is the row of `runs show`, or the time of a definition that has no run.
    """

    kind: str
    text: str
    values: Mapping[str, Any]
    whose: Whose | None
    probably: bool
    step: NextStep
    run: Row
    customer: str = ""
    since: datetime | None = None
    since_then: SinceThen | None = None
    addition: str = ""
    questions: Sequence[Question] = ()
    other_orgs: int | None = None
    more_orgs: bool = False
    retried: Row | None = None
    # Instead of what follows from the run, for a time without one.
    what: str = ""
    kept: str = ""
    retry: str = ""


def why_run(
    run: Row,
    *,
    others: int | None = None,
    more: bool = False,
    retried: Row | None = None,
    since_then: SinceThen | None = None,
) -> Why:
    """Explain one run, from its row of `runs show`.

    `others` is the number of other orgs with the same error in the hour around it (None if unknown),
    a minimum with `more`. `retried` is the last run of its retries, if it was retried.
    """
    state, reason = str(run["state"]), run["reason"]
    meaning = _meaning_of(run)
    text, addition, whose, probably = cause_of(run), "", meaning.whose, meaning.probably
    questions = tuple(_question(wait) for wait in run.get("waits") or () if is_open_question(wait))
    values = _values(run, questions)
    denial = denial_of(_error_of(run)) if (state, reason) == ("failed", "error") else None
    match state, reason:
        case "failed", "error" if denial is not None:
            whose, probably = denial.whose, False
        case "failed", "error":
            whose = whose_error(_error_of(run))
            if not_sent := [row["origin"] for row in run.get("egress") or () if row["denied"]]:
                addition = "requests to {denied} were not sent: it may not reach that"
                values["denied"] = ", ".join(not_sent[:NAMED])
        case "waiting", "retry":
            error = _error_of(run)
            whose, addition = whose_error(error), "it failed with {last_error}" if error else ""
        case "waiting", "no_token":
            whose, probably = whose_token(run["detail"])
        case "waiting", "answer" if questions:
            addition = "it asked for {asked}"
        case "skipped", "expired":
            whose, probably = _whose_expired(run, meaning)
        case "running", _ if run.get("cancel_requested_at"):
            addition = "it was asked to stop"
    step = NextStep.of(_verb(run, meaning, questions) if denial is None else denial.verb, values)
    if retried is not None:
        verb = "show_run" if retried["state"] == "succeeded" else "explain_run"
        step = NextStep.of(verb, {"run": str(retried["id"])})
    return Why(
        kind=".".join(filter(None, (state, reason))),
        text=text,
        values=values,
        whose=whose,
        probably=probably,
        step=step,
        run=run,
        customer=meaning.customer,
        since=_since(run, since_then, questions),
        since_then=since_then,
        addition=addition,
        questions=questions,
        other_orgs=others,
        more_orgs=more,
        retried=retried,
        retry="" if denial is None or retried is not None else denial.retry,
    )


def blocked(found: Why, block: str, *, since: datetime | None = None, **values: Any) -> Why:
    """The same with what blocks the run, one of `BLOCKS`; `values` are those of its text."""
    meaning = BLOCKS[block]
    known = {**found.values, **values}
    words = {name: str(value) for name, value in known.items()}
    return replace(
        found,
        kind=f"waiting.{block}",
        addition="; ".join(filter(None, (found.addition, meaning.text))),
        values=known,
        whose=meaning.whose or found.whose,
        probably=meaning.probably if meaning.whose else found.probably,
        customer=meaning.customer or found.customer,
        since=since or found.since,
        step=NextStep.of(meaning.verb, words) if meaning.verb else found.step,
    )


def limited(found: Why, limits: Sequence[str]) -> Why:
    """The same with the limits of other services that requests of the run's org wait for now."""
    if not limits:
        return found
    addition = "requests of its org wait for {limits}"
    return replace(
        found,
        addition="; ".join(filter(None, (found.addition, addition))),
        values={**found.values, "limits": " and ".join(limits)},
    )


def solved(found: Why) -> Why:
    """The same for what prevented a run and does so no more: a retry is what comes next."""
    return replace(
        found,
        step=NextStep.of("retry", {"run": str(found.run["id"])}),
        retry="what prevented it is over: a retry is safe, since its handler has not started",
    )


def last_error(run: Row) -> Row | None:
    """The last attempt if its error explains the state of the run, else None."""
    if run["state"] not in ("failed", "refused") and run["reason"] not in ("retry", "recovered"):
        return None
    ended = [attempt for attempt in run.get("attempts") or () if attempt["ended_at"] is not None]
    return ended[-1] if ended and ended[-1]["error_cause"] is not None else None


def _verb(run: Row, meaning: Meaning, questions: Sequence[Question]) -> str:
    state, reason = str(run["state"]), run["reason"]
    verb = meaning.verb or VERB_OF_STATE.get(state, "show_run")
    if state == "skipped" and reason == "expired" and (last := last_reason(run["detail"])[0]):
        verb = CAUSES["waiting", last].verb or verb
    if questions and (state, reason) in (("waiting", "budget"), ("waiting", "answer")):
        return "answer" if questions[0].occurrence == 1 else "answer_again"
    if verb == "answer":
        return "show_run"
    return "retry_from_checkpoint" if verb == "retry" and can_continue(run) else verb


def _meaning_of(run: Row) -> Meaning:
    unknown = Meaning("its reason is {reason}{with_detail}", None)
    return CAUSES.get((str(run["state"]), run["reason"]), unknown)


def cause_of(run: Row) -> str:
    """The cause of a run's state, from its row of `runs list`, as a template of `values_of`.

    It is all that a list says of it, and every answer begins with it.
    """
    if (run["state"], run["reason"]) == ("skipped", "expired"):
        # What kept it from starting within its start_deadline: the reason that it had last.
        last = CAUSES.get(("waiting", last_reason(run["detail"])[0]))
        if last is not None:
            waited = last.expired or "it had another reason to wait ({last})"
            return f"{waited}, until its start_deadline passed"
    return _meaning_of(run).text


def _whose_expired(run: Row, meaning: Meaning) -> tuple[Whose | None, bool]:
    reason, detail = last_reason(run["detail"])
    last = CAUSES.get(("waiting", reason), meaning)
    return whose_token(detail) if reason == "no_token" else (last.whose, last.probably)


def _since(run: Row, since_then: SinceThen | None, questions: Sequence[Question]) -> datetime | None:
    """When the problem of the run began, for its org."""
    if questions:
        return min(question.since for question in questions)
    if since_then is not None and since_then.since is not None:
        return since_then.since
    state = run["state"]
    if state == "succeeded":
        return None
    if state == "running":
        found: datetime | None = run["started_at"]
        return found
    ended = [one["ended_at"] for one in run.get("attempts") or () if one.get("ended_at")]
    first = min(ended, default=None)
    return run.get("finished_at") or first or run.get("created_at")


def can_continue(run: Row) -> bool:
    return run.get("checkpoint") is not None or bool(run.get("step_count"))


def _question(wait: Row) -> Question:
    """An open wait as a question; options within `ask` are suggestions, those of the wait bind."""
    ask, bound = wait["ask"], wait.get("options")
    offered = bound if bound is not None else ask.get("options") if isinstance(ask, Mapping) else None
    return Question(
        name=wait["name"],
        occurrence=wait["occurrence"],
        ask=ask,
        options=tuple(offered) if isinstance(offered, list) else (),
        binds=bound is not None,
        since=wait["opened_at"],
        until=wait["until"],
        for_budget=wait["kind"] == "budget",
    )


def values_of(run: Row) -> dict[str, Any]:
    """The values of `cause_of`, from the columns of `runs list` alone. Times stay times."""
    values: dict[str, Any] = {
        name: value if isinstance(value, datetime) else "none" if value is None else str(value)
        for name, value in run.items()
        if name not in _NOT_IN_TEXTS
    }
    _, last = last_reason(run["detail"])
    return values | {
        "error": _in_words(run["error"] or {}),
        "last": last.partition(": ")[2] or last,
        "with_detail": f" ({run['detail']})" if run["detail"] else "",
    }


def _values(run: Row, questions: Sequence[Question]) -> dict[str, Any]:
    """The values of all templates: those of the cause, the run's last error and its first question."""
    first = questions[0] if questions else None
    values = values_of(run)
    return values | {
        "run": str(run["id"]),
        "last_error": _in_words(_error_of(run)),
        "secret": values["detail"],
        "wait": first.name if first else "NAME",
        "occurrence": str(first.occurrence) if first else "1",
        "data": first.data if first else "JSON",
    }


def _in_words(error: Mapping[str, Any]) -> str:
    """The type of an error and the first line of its message."""
    message = (str(error.get("message") or "").splitlines() or [""])[0]
    return ": ".join(filter(None, (error.get("type", "an error"), message)))


def _error_of(run: Row) -> Mapping[str, Any]:
    """The error of the run; of one that waits, that of its last attempt."""
    attempts = [one for one in run.get("attempts") or () if one.get("error")]
    return run.get("error") or (attempts[-1]["error"] if attempts else {})
