"""Changes of the audit in words, and actors as names. Pure.

A sentence is made of a row as its reader sees it: what `redaction` hides of the row is in no sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, NamedTuple, get_args

from worker.clock import from_text
from worker.model.definitions import CALENDAR_DATES
from worker.model.definitions.definition import DURATIONS
from worker.model.definitions.words import duration_in_words, in_brief
from worker.model.orgs import selector_in_words
from worker.operations.changes import Action, Kind, same

# Parts of one sentence, characters of one, and levels of tables that are shown key by key.
MAX_PARTS = 8
MAX_PART = 160
_HALF = MAX_PART // 2 - 2
_DEEPEST = 3
_DONE: Mapping[Action, str] = {
    "add": "Added",
    "change": "Changed",
    "reopen": "Reopened",
    "close": "Closed",
    "remove": "Removed",
}
# What was done, before the name of what it was done to.
WORDS: Mapping[str, str] = {
    f"{kind}.{action}": f"{_DONE[action]} the {kind}"
    for kind in get_args(Kind)
    for action in get_args(Action)
} | {
    "application.delete": "Deleted the application",
    "application.make": "Made an application for",
    "application.scopes": "Changed the scopes of the application of",
    "budget.raise": "Raised the budget",
    "credential.add": "Added the credential of generation",
    "credential.announce": "Announced the credential of generation",
    "credential.retire": "Retired the credential of generation",
    "definition.backfill": "Began a backfill of",
    "definition.cancel_backfill": "Cancelled a backfill of",
    "definition.clear_state": "Cleared the state of",
    "definition.pause": "Paused the definition",
    "definition.resume": "Resumed the definition",
    "definition.run": "Ran the definition",
    "definition.set_state": "Replaced the state of",
    "handler.forget": "Forgot the handler",
    "host.add": "Added the host",
    "host.remove": "Removed the host",
    "installation.adopt": "Adopted the database for the installation",
    "key.add": "Added the key",
    "key.remove": "Removed the key",
    "operator.add": "Added the operator",
    "operator.add_mcp_token": "Made a token for the MCP client of the operator",
    "operator.remove": "Removed the operator",
    "operator.remove_mcp_token": "Removed the token of the MCP client of the operator",
    "org.pause": "Paused the org",
    "org.resume": "Resumed the org",
    "org.suspend": "Suspended the org",
    "plan.confirm": "Confirmed the plan",
    "plan.make": "Made the plan",
    "pool.approve": "Approved the handler",
    "pool.forget_rules": "Forgot the rules of the pool",
    "pool.revoke": "Revoked the approval of the handler",
    "prices.update": "Read a price list into",
    "product.allow": "Allowed starts to the login",
    "product.revoke": "Took starts from the login",
    "property.set": "Set the property",
    "property.unset": "Unset the property",
    "rollout.advance": "Began the next step of the rollout",
    "rollout.finish": "Finished the rollout",
    "rollout.halt": "Halted the rollout",
    "rollout.resume": "Resumed the rollout",
    "rollout.undo": "Undid the rollout",
    "run.answer": "Answered the run",
    "run.cancel": "Cancelled the run",
    "run.retry": "Retried as the run",
    "run.retry_children": "Retried children of the run",
    "secret.add": "Added the secret",
    "secret.bind": "Changed the binding of the secret",
    "secret.remove": "Removed the secret",
    "secret.rotate": "Rotated the secret",
    "token.drop": "Dropped the access tokens of",
    "tzdata.change": "Computed all schedules with the zone data",
}
# Keys whose own name does not say what they are, of a value and of a flag that is set.
_LABELS = {
    CALENDAR_DATES: "dates of its calendar",
    "bytes": "size in bytes",
    "definitions": "definitions with other times",
    "from": "state before",
    "how": "form",
    "instants": "scheduled times",
    "limit_from": "limit",
    "replaces": "instead of",
    "retry_of": "retry of",
    "seconds": "in use after",
    "wait": "question",
}
_FLAGS = {"now": "at once", "from_checkpoint": "from the checkpoint"}
# What is not among the parts that are left out.
_FIRST = {key: place for place, key in enumerate(("reason", "note", "schedule", "handler", "orgs"))}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)")


class Sentence(NamedTuple):
    """A change: `words`, then the `name` of what was changed, a page of which `kind` may exist; then `parts`.

    `has_more` says that further parts are left out.
    """

    words: str
    kind: str
    name: str
    parts: Sequence[str]
    has_more: bool


def sentence(row: Mapping[str, Any]) -> Sentence:
    """A row of the audit in words; an unknown action or shape as it is."""
    action, detail = row["action"], row["detail"]
    kind = action.partition(".")[0]
    found = list(islice(_parts(kind, detail), MAX_PARTS + 1))
    return Sentence(WORDS.get(action, action), kind, _name(row), found[:MAX_PARTS], len(found) > MAX_PARTS)


def _name(row: Mapping[str, Any]) -> str:
    subject: str = row["subject"]
    if row["action"] in ("pool.approve", "pool.revoke"):
        pool, _, handler = subject.partition(" ")
        return f"{handler} in pool {pool}" if handler else subject
    return subject.removeprefix(f"{row['org']} ") if row["org"] else subject


def _parts(kind: str, detail: Any) -> Iterator[str]:
    if not isinstance(detail, Mapping):
        if detail:
            yield _cut(_words("", detail))
        return
    absent = "the default" if kind in ("definition", "template") else "none"
    for key, value in sorted(detail.items(), key=lambda item: _FIRST.get(item[0], len(_FIRST))):
        if isinstance(value, Mapping) and value.keys() == {"before", "after"}:
            yield from _difference(key, value["before"], value["after"], absent)
        else:
            yield from _value(key, value)


def _value(key: str, value: Any) -> Iterator[str]:
    if key in _FLAGS and isinstance(value, bool):
        if value:
            yield _FLAGS[key]
    elif _is_table(key, value):
        for inner, each in value.items():
            yield from _value(f"{key}.{inner}", each)
    elif value not in (None, "", [], {}):
        yield _part(key, _words(key, value))


def _difference(key: str, before: Any, after: Any, absent: str) -> Iterator[str]:
    """What changed of a value: of a table key by key, of a list what was added and removed."""
    old, new = ({} if each is None else each for each in (before, after))
    if _is_table(key, old) and _is_table(key, new) and (old or new):
        for inner in sorted(old.keys() | new.keys()):
            if not same(old.get(inner), new.get(inner)):
                yield from _difference(f"{key}.{inner}", old.get(inner), new.get(inner), absent)
        return
    if isinstance(before, list) and isinstance(after, list):
        gone, come = _without(before, after), _without(after, before)
        both = (("added", come), ("removed", gone))
        if said := "; ".join(f"{how} {_cut(_words(key, each), _HALF)}" for how, each in both if each):
            yield _part(key, said)
            return
    was, becomes = (absent if each is None else _words(key, each) for each in (before, after))
    if before is None:
        yield _part(key, becomes)
    else:
        if was == becomes:
            was, becomes = _text(before), _text(after)
        # Cut apart, so that the end of a long old value does not hide the new one.
        yield _part(key, f"{_cut(was, _HALF)} → {_cut(becomes, _HALF)}")


def _is_table(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and key != "orgs" and key.count(".") < _DEEPEST


def _without(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    known = {_text(each) for each in others}
    return [each for each in some if _text(each) not in known]


def _part(key: str, words: str) -> str:
    # Names below a key are not ours.
    first, dot, rest = key.partition(".")
    label = _LABELS.get(key, first.replace("_", " ") + dot + rest)
    return f"{_cut(label, _HALF)}: {_cut(words)}"


def _words(key: str, value: Any) -> str:
    """A value in words; JSON text if it is a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "orgs":
        return selector_in_words(value)
    if key == "seconds" and isinstance(value, int) and value >= 0:
        return duration_in_words(timedelta(seconds=min(value, 10**9)))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list) and not any(isinstance(each, list | Mapping) for each in value):
        return ", ".join(_text(each) for each in value)
    if not isinstance(value, str):
        return _text(value)
    if key == "schedule":
        return in_brief(value)
    # Also of a ceiling, below its key.
    if key.rpartition(".")[2] in DURATIONS and not key.startswith("params."):
        return duration_in_words(value)
    if _TIME.fullmatch(value):
        try:
            return f"{from_text(value):%Y-%m-%d %H:%M} UTC"
        except (ValueError, OverflowError):
            return value
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str, most: int = MAX_PART) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


class ActorName(NamedTuple):
    """Who made a change: a name, and what kind of actor has it, empty where the name says so."""

    name: str
    kind: str


def actor_name(actor: str) -> ActorName:
    """The name of an actor, as `Caller.actor`, the command line and the loops write it."""
    kind, _, rest = actor.partition(":")
    if not rest:
        # The command line writes the user of the operating system.
        return ActorName(actor, "" if actor in ("worker", "operator", "provision") else "CLI")
    if kind == "person":
        subject, _, org = rest.rpartition("@")
        return ActorName(subject, f"of {org}") if subject else ActorName(rest, kind)
    if kind == "sync":
        return ActorName("sync", f"with {rest}")
    return ActorName(rest, kind) if kind in ("operator", "org") else ActorName(actor, "")
