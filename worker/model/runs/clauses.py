"""The words of `Why`: the clauses about a run for any surface, and a text for the customer. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from worker.clock import to_text
from worker.model.runs.causes import FOR_CUSTOMER, STUCK, WHOSE, Whose, last_reason
from worker.model.runs.run import step_label
from worker.model.runs.why import OPTIONS, Question, Row, Why, can_continue, cause_of, values_of

InWords = Callable[[datetime], str]

# Maximum length of a checkpoint in a sentence, and of a question.
SHORT = 80
MAX_ASKED = 200

# What `row_of` has of the run, of `Why` and of its clauses.
_OF_RUN = ("org", "definition", "scheduled_for", "state", "reason", "retried_as")
_FACTS = ("other_orgs", "kind", "whose", "probably", "since")
_SAID = ("what", "cause", "since_then", "others", "kept", "retry", "customer")


class Clauses(NamedTuple):
    """The answer in words; None for a clause that does not apply. `customer` is a whole text to copy."""

    what: str
    cause: str
    whose: str | None
    since_then: str | None
    others: str | None
    question: str | None
    kept: str
    retry: str
    customer: str


def clauses(why: Why, when: InWords = to_text) -> Clauses:
    """The answer in words, each clause without a full stop; `when` formats times."""
    values = _Words(why.values, when)
    values["asked"] = ", ".join(_in_words(question, when) for question in why.questions)
    return Clauses(
        what=why.what or _what(why.run, when),
        cause="; ".join(part.format_map(values) for part in (why.text, why.addition) if part),
        whose=_whose(why.whose, why.probably),
        since_then=_since_then(why, when),
        others=None if why.other_orgs is None else _others(why),
        question=_asked(why.questions),
        kept=why.kept or _kept(why.run),
        retry=why.retry or _retry(why),
        customer=_customer(why, when),
    )


def listed(run: Row, when: InWords = to_text) -> str:
    """The cause for a list, from the columns of `runs list` alone: `Clauses.cause` begins with it.

    Of a run that is not done its progress follows. Empty for one that succeeded, where no row needs a cause.
    """
    if run["state"] == "succeeded":
        return ""
    cause = cause_of(run).format_map(_Words(values_of(run), when))
    progress = "" if run["finished_at"] is not None else _progress(run["progress"])
    return "; ".join(filter(None, (cause, progress)))


def _progress(progress: Mapping[str, Any] | None) -> str:
    """`3 of 10 done, pages`: progress, total and the handler's note."""
    if not progress or progress.get("done") is None:
        return ""
    total, note = progress.get("total"), progress.get("note")
    done = f"{progress['done']}" + ("" if total is None else f" of {total}")
    return f"{done} done" + ("" if note is None else f", {note}")


def sentence(why: Why) -> str:
    """All clauses as text, with the next command."""
    said = clauses(why)
    found = [f"{said.what}: {said.cause}", *said[2:8]]
    return " ".join(f"{up(clause)}." for clause in found if clause) + f" Next: `{why.step.command}`."


def row_of(why: Why) -> dict[str, Any]:
    """Facts and words, as `runs why -o json` and the API have them."""
    said = clauses(why)
    run, counted = why.run, why.since_then
    return {
        "run": run.get("id"),
        **{name: run.get(name) for name in _OF_RUN},
        **{name: getattr(why, name) for name in _FACTS},
        "later_runs": None if counted is None else dict(counted.later),
        "questions": [question.as_row() for question in why.questions],
        **why.step.as_row(),
        **{name: getattr(said, name) for name in _SAID},
        "next": why.step.command,
        "sentence": sentence(why),
    }


def up(clause: str) -> str:
    """The clause with a capital."""
    return clause[:1].upper() + clause[1:]


class _Words(dict[str, Any]):
    """The values of a template, with times as the surface writes them."""

    def __init__(self, values: Mapping[str, Any], when: InWords) -> None:
        super().__init__(values)
        self._when = when

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return self._when(value) if isinstance(value, datetime) else value


def _what(run: Row, when: InWords) -> str:
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    place = f"{run['org']}/{run['definition']}"
    return f"Run {run['id']} of {place} for {when(run['scheduled_for'])} {_is(str(run['state']))}{tried}"


def _whose(whose: Whose | None, probably: bool) -> str | None:
    if whose is None:
        return None
    return f"the cause {'probably ' if probably else ''}lies with {WHOSE[whose]}"


def _since_then(why: Why, when: InWords) -> str | None:
    """What became of the runs that came after it, and since when it has been like this."""
    found = why.since_then
    if found is None or why.run.get("state") not in ("failed", "refused", "skipped"):
        return None
    since = f"since {when(found.since)}" if found.since is not None else ""
    least = "at least " if found.more else ""
    succeeded = found.later.get("succeeded", 0)
    if not found.count:
        row = f"{least}{found.row} runs in a row ended like this {since}" if found.row > 1 else ""
        return "; ".join(filter(None, (row, "no later run has ended")))
    if succeeded == found.count:
        return f"{least}{_runs(succeeded, 'later run')} succeeded"
    if succeeded:
        other = found.count - succeeded
        return f"of {least}{_runs(found.count, 'later run')} {succeeded} succeeded and {other} did not"
    states = [state for state, count in found.later.items() if count]
    how = (
        f"{'were ' if states[0] in ('refused', 'skipped') else ''}{states[0]}"
        if len(states) == 1
        else "did not succeed"
    )
    if states == [why.run["state"]]:
        return f"all {least}{found.count + found.row} runs {since} {how}"
    return f"{least}{_runs(found.count, 'later run')} {how}"


def _runs(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _others(why: Why) -> str:
    met = "had the same error in the hour around it"
    count = why.other_orgs or 0
    if why.run.get("reason") == "no_token":
        met = "is waiting for a token" if count < 2 else "are waiting for a token"
    if not count:
        return f"no other org {met}"
    return f"{'at least ' if why.more_orgs else ''}{_runs(count, 'other org')} {met}"


def _is(state: str) -> str:
    words = {"succeeded": "succeeded", "failed": "failed", "waiting": "is waiting", "running": "is running"}
    return words.get(state, f"was {state}")


def _kept(run: Row) -> str:
    state, kept = run["state"], []
    if state == "succeeded":
        kept.append("its result")
    checkpoint = run.get("checkpoint")
    if checkpoint is not None:
        text = json.dumps(checkpoint)
        kept.append("its last checkpoint" + (f" ({text})" if len(text) <= SHORT else ""))
    if count := run.get("step_count"):
        last = run["steps"][-1]
        step = step_label(last["name"], last["key"], last["occurrence"])
        kept.append("its step " + step if count == 1 else f"its {count:,} steps, the last one {step}")
    if run.get("attempts"):
        kept.append("its attempts and their log")
    if not kept:
        return "it had not started, so only this row is retained"
    if not can_continue(run) and state != "succeeded" and _had_started(run):
        kept[-1] += ", but no checkpoint: it would start from the beginning"
    return f"retained: {', '.join(kept)}"


def _retry(why: Why) -> str:
    run, retried = why.run, why.retried
    state = str(run["state"])
    if retried is not None:
        how = f"it was retried as run {retried['id']}, which {_is(str(retried['state']))}"
        return f"{how}: no other retry is needed" if retried["state"] == "succeeded" else how
    if state == "running":
        return "a retry is possible after it has ended"
    if state == "waiting":
        return _goes_on(why)
    if not _had_started(run):
        once = why.step.verb not in ("retry", "retry_from_checkpoint") and state in ("refused", "skipped")
        after = "retry it once that is fixed; that" if once else "a retry"
        return f"{after} is safe: its handler has not started"
    if state == "succeeded":
        return "a retry repeats its work, with the same idempotency key"
    return "its handler had started: a retry is safe if it sends the idempotency key, which stays the same"


def _goes_on(why: Why) -> str:
    """What a waiting run goes on by."""
    if why.questions:
        first = why.questions[0]
        offered = " / ".join(_plain(option) for option in first.options[:OPTIONS])
        who = "an operator raises the budget" if first.for_budget else "somebody answers"
        return f"it goes on when {who}" + (f": {offered}" if offered and not first.for_budget else "")
    if why.run["reason"] in STUCK or why.whose == "operator":
        return "no retry is needed: it goes on once that is fixed"
    if why.kind == "waiting.no_token" and why.whose == "org":
        return "no retry is needed: it goes on once that is fixed"
    return "no retry is needed: it continues automatically"


def _had_started(run: Row) -> bool:
    return any(attempt["handler_started_at"] for attempt in run.get("attempts") or ())


def _customer(why: Why, when: InWords) -> str:
    """A text for the customer, without handlers, workers, errors and ids."""
    run = why.run
    state = run.get("state")
    if state is None:
        return ""
    said = why.customer
    if not said or (state == "skipped" and last_reason(run.get("detail"))[0]):
        begun = "has not run yet" if state == "waiting" else "did not run to its end"
        said = begun if why.whose is None else f"{begun}, because {FOR_CUSTOMER[why.whose]}"
    job = f"The job {run['definition']}, planned for {when(run['scheduled_for'])}, {said}."
    retried = why.retried
    if retried is not None and retried["state"] == "succeeded":
        return f"{job} It was run again and has succeeded."
    later = why.since_then.later if why.since_then is not None else {}
    if state in ("failed", "refused", "skipped", "cancelled"):
        if later.get("succeeded"):
            return f"{job} It has run successfully since then."
        is_meant = state == "cancelled" or run["reason"] == "flag_off"
        return job if is_meant else f"{job} We are looking into it."
    if state == "waiting" and not why.questions and _goes_on(why).endswith("automatically"):
        return f"{job} It continues by itself."
    return job


def _asked(questions: Sequence[Question]) -> str | None:
    """What the first question asks, in words; None without one, or if its handler gave no text."""
    if not questions or questions[0].ask is None:
        return None
    text = _plain(questions[0].ask)
    return f"it asks: {text if len(text) <= MAX_ASKED else text[:MAX_ASKED] + '…'}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _in_words(question: Question, when: InWords) -> str:
    """A question's name with its times."""
    until = "" if question.until is None else f", until {when(question.until)}"
    return f"{step_label(question.name, None, question.occurrence)} (since {when(question.since)}{until})"
