"""What happened to a run, in the console's terms: the clauses of `runs why`, and its next step as a link."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from worker.ids import RunId
from worker.operations import why as explanations
from worker.runs.why import Why, why_run
from worker.store import orgs
from worker.store.lists import runs
from worker.web.callers import Caller
from worker.web.pages.links import definition_path, org_path, search_of

_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z")
_WORKER = re.compile(r" on worker (?:[0-9a-f-]{36}|none)(?= since )")
_TONES = {"failed": "bad", "refused": "bad", "waiting": "warn", "skipped": "warn", "cancelled": "warn"}


@dataclass(frozen=True, slots=True)
class Step:
    """A next step: its text and the page that it leads to; `action` is a change that this page offers."""

    text: str
    href: str
    action: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Sentences in the order in which they are read; None for one that does not apply."""

    lead: str
    others: str | None
    other_orgs: int | None
    kept: str
    retry: str
    step: Step | None
    tone: str


def answer_of(connection: Connection, caller: Caller, run: Mapping[str, Any]) -> Answer:
    """The answer about a run as this caller sees it; an org learns nothing of other orgs."""
    if caller.org is None:
        return answer(explanations.why(connection, run["id"]), run)
    newer = run["retried_as"]
    retried = None
    if newer is not None:
        org_id = orgs.require(connection, caller.org)["id"]
        retried = runs.row(connection, org_id, RunId(newer))
    return answer(why_run(run, retried=retried), run)


def answer(why: Why, run: Mapping[str, Any]) -> Answer:
    """The clauses as sentences; `run` is its row."""
    tried = f" at attempt {run['attempt']}" if run["attempt"] else ""
    # The page has the worker's id below.
    cause = _WORKER.sub("", why.cause)
    return Answer(
        _sentence(f"{run['state']}{tried}: {cause}"),
        None if why.others is None else _sentence(why.others),
        why.facts.get("other_orgs"),
        _sentence(why.kept),
        _sentence(why.retry),
        step_of(why.next, run),
        _TONES.get(str(run["state"]), "good" if run["state"] == "succeeded" else "busy"),
    )


def step_of(command: str, run: Mapping[str, Any]) -> Step | None:
    """The page for the next command of a run; None if it is the run's own page."""
    noun, verb, *rest = [*command.split(), ""]
    org: str = run["org"]
    match noun, verb:
        case "runs", "retry":
            if "--from-checkpoint" in rest:
                return Step("Retry it from its checkpoint", "#retry-from-checkpoint", "retry")
            return Step("Retry it", "#retry", "retry")
        case "runs", "list":
            state = ("state", rest[rest.index("--state") + 1]) if "--state" in rest else ("state", "")
            href = search_of(("org", org), ("definition", run["definition"]), state)
            return Step("See its other runs", href)
        case "runs", "logs":
            return Step("Read its log", "#log")
        case "runs", "answer":
            return Step("Answer it", "#waits", "answer")
        case "runs", _ if rest[0] != run["id"]:
            return Step("Open the retry", f"/runs/{rest[0]}")
        case "orgs", "check":
            return Step("Check the org's credentials and claims", org_path(org))
        case "orgs", _:
            return Step("Open the org", org_path(org))
        case "definitions", _:
            return Step("Open the definition", definition_path(org, run["definition"]))
        case "handlers", _:
            return Step("See the handlers", "/handlers")
        case "pools", _:
            return Step("See what hosts declare", "/workers#approvals", "approve")
        case "doctor", _:
            return Step("See the workers", "/workers")
    return None


def _sentence(clause: str) -> str:
    text = _TIME.sub(r"\1 \2 UTC", clause)
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")
