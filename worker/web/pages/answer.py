"""What happened to a run, in the console's terms: the clauses of `runs why`, and its next step as a link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.operations import why as explanations
from worker.runs.clauses import clauses, up
from worker.runs.why import Why
from worker.web.callers import Caller
from worker.web.pages.links import step_path

_TONES = {"failed": "bad", "refused": "bad", "waiting": "warn", "skipped": "warn", "cancelled": "warn"}


@dataclass(frozen=True, slots=True)
class StepLink:
    """A next step: its text and the page that it leads to; `right` is a change that this page offers."""

    text: str
    href: str
    right: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Sentences in the order in which they are read; None for one that does not apply.

    `customer` is a text without internals, to copy.
    """

    lead: str
    whose: str | None
    since_then: str | None
    others: str | None
    other_orgs: int | None
    question: str | None
    kept: str
    retry: str
    customer: str
    step: StepLink | None
    tone: str


def answer_of(connection: Connection, caller: Caller, run: Mapping[str, Any]) -> Answer:
    """The answer about a run as this caller sees it; an org learns nothing of other orgs and of workers."""
    return answer(explanations.explain(connection, run, across_orgs=caller.org is None), run)


def answer(why: Why, run: Mapping[str, Any]) -> Answer:
    """The clauses as sentences; `run` is its row."""
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    said = clauses(why, _in_words)
    own = f"/runs/{run['id']}"
    href = step_path(why.step)
    return Answer(
        lead=_sentence(f"{run['state']}{tried}: {said.cause}") or "",
        whose=_sentence(said.whose),
        since_then=_sentence(said.since_then),
        others=_sentence(said.others),
        other_orgs=why.other_orgs,
        question=_sentence(said.question),
        kept=_sentence(said.kept) or "",
        retry=_sentence(said.retry) or "",
        customer=said.customer,
        # A part of this page, or another page; not this page as a whole.
        step=None
        if href == own
        else StepLink(why.step.text, href.removeprefix(own), why.step.declared.right),
        tone=_TONES.get(str(run["state"]), "good" if run["state"] == "succeeded" else "busy"),
    )


def _in_words(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _sentence(clause: str | None) -> str | None:
    return clause and up(clause) + ("" if clause.endswith((".", "!", "?")) else ".")
