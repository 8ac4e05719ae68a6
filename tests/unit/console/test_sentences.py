"""Changes of the audit in words: every action that is written, every shape, and what is hidden stays so."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any, get_args

import pytest

import worker
from tests.browser.hostile import strings
from worker.features.console.api.endpoints import ROLLOUT_MOVES
from worker.features.console.sentences import MAX_PART, MAX_PARTS, WORDS, actor_name, sentence
from worker.operations.changes import Action, Kind
from worker.operations.orgs import _VERBS
from worker.store.lists.rows import ChangeRow
from worker.store.redaction import redacted

ROOT = Path(worker.__file__).parent
NAME = re.compile(r"[a-z]+\.[a-z_]+")
# Actions that are put together from a declaration: the text before the verb, and the verbs.
MADE = {f"{kind}.": frozenset[str](get_args(Action)) for kind in get_args(Kind)}
MADE["org."] |= frozenset(_VERBS.values())
MADE["rollout."] |= frozenset(ROLLOUT_MOVES)
# The place of the action among the arguments of what writes a row.
PLACES = {"note": 2, "Entry": 1, "_record": 2}


def actions_of(source: str) -> set[str]:
    """The actions that a module writes: texts, or names that texts are assigned to."""
    nodes = list(ast.walk(ast.parse(source)))
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    found = set[str]()
    for call in nodes:
        name = getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""
        if not isinstance(call, ast.Call) or len(call.args) <= PLACES.get(name, 99):
            continue
        action = call.args[PLACES[name]]
        values = [action]
        if isinstance(action, ast.Name):
            values = [each.value for each in assigned if action.id in ast.unparse(each.targets[0])]
        for node in (inner for value in values for inner in ast.walk(value)):
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                begin = str(node.values[0].value)
                found |= {f"{begin}{verb}" for verb in MADE.get(begin, ())}
            elif isinstance(node, ast.Constant) and NAME.fullmatch(str(node.value)):
                found.add(str(node.value))
    return found


@functools.cache
def written() -> frozenset[str]:
    sources = (path.read_text() for path in ROOT.rglob("*.py"))
    return frozenset().union(*(actions_of(source) for source in sources if "audit." in source))


def change(detail: Any, action: str = "definition.change", **more: Any) -> Any:
    row = {"action": action, "org": "org_a", "subject": "org_a digest", "actor": "operator:ada"}
    return sentence({**row, "detail": detail, **more})


def parts(detail: Any, **more: Any) -> list[str]:
    return list(change(detail, **more).parts)


def became(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}


def test_every_action_that_is_written_has_words() -> None:
    assert written() - WORDS.keys() == set()


@pytest.mark.feature("checkout")
def test_no_words_are_of_an_action_that_nothing_writes() -> None:
    assert WORDS.keys() - written() == set()


def test_a_new_action_would_be_missed() -> None:
    """The control: of the two tests above."""
    source = "from worker.store import audit\naudit.note(c, None, 'pool.paint', name, at=now, actor=actor)"

    assert actions_of(source) - WORDS.keys() == {"pool.paint"}


@pytest.mark.parametrize(
    ("key", "before", "after", "words"),
    [
        ("schedule", "every 15m", "every 1h", "schedule: every 15 minutes → every hour"),
        ("schedule", "0 3 * * *", "@daily", "schedule: at 03:00 every day → at 00:00 every day"),
        ("schedule", "every 60m", "every 1h", "schedule: every 60m → every 1h"),
        ("schedule", "soon", "later", "schedule: soon → later"),
        ("timeout", "2h", "1h30m", "timeout: 2 hours → 1 hour 30 minutes"),
        ("spread", "auto", "30s", "spread: auto → 30 seconds"),
        ("max_attempts", 3, None, "max attempts: 3 → the default"),
        ("max_attempts", None, 5, "max attempts: 5"),
        ("enabled", True, False, "enabled: yes → no"),
        ("scopes", ["a", "b"], ["b", "c"], "scopes: added c; removed a"),
        ("scopes", ["a", "b"], ["b", "a"], "scopes: a, b → b, a"),
        ("scopes", None, ["a", "b"], "scopes: a, b"),
        ("ends_at", None, "2027-01-01T08:00:00Z", "ends at: 2027-01-01 08:00 UTC"),
        ("params", {"a": 1, "b": 2}, {"a": 5, "b": 2}, "params.a: 1 → 5"),
        ("params", None, {"page_size": 1}, "params.page_size: 1"),
        ("params", {"timeout": "2h"}, {"timeout": "3h"}, "params.timeout: 2h → 3h"),
        ("variants", [], [{"flag": "f", "handler": "h"}], 'variants: added [{"flag": "f", "handler": "h"}]'),
        ("calendar_dates", ["2027-01-01"], [], "dates of its calendar: removed 2027-01-01"),
    ],
)
def test_a_changed_value_is_said_before_and_after(key: str, before: Any, after: Any, words: str) -> None:
    assert parts({key: became(before, after)}) == [words]


@pytest.mark.parametrize(
    ("action", "subject", "detail", "said"),
    [
        ("run.retry", "ID", {"retry_of": "OLD", "from_checkpoint": True, "reason": "the CRM is back"},
         ("Retried as the run", "ID", ["reason: the CRM is back", "retry of: OLD", "from the checkpoint"])),
        ("run.retry", "ID", {"retry_of": "OLD", "from_checkpoint": False},
         ("Retried as the run", "ID", ["retry of: OLD"])),
        ("definition.pause", "org_a digest", None, ("Paused the definition", "digest", [])),
        ("definition.run", "org_a digest", {"run": "ID", "request_key": None},
         ("Ran the definition", "digest", ["run: ID"])),
        ("org.suspend", "org_a", {"from": "active", "note": None, "cancelled": 1200},
         ("Suspended the org", "org_a", ["state before: active", "cancelled: 1,200"])),
        ("credential.retire", "org_a 3", {"now": True},
         ("Retired the credential of generation", "3", ["at once"])),
        ("credential.announce", "org_a 3", {"client_id": "m2m", "seconds": 300},
         ("Announced the credential of generation", "3", ["client id: m2m", "in use after: 5 minutes"])),
        ("budget.raise", "org_a llm", {"by": 50000, "per": "day", "until": "2027-01-01T00:00:00Z"},
         ("Raised the budget", "llm", ["by: 50,000", "per: day", "until: 2027-01-01 00:00 UTC"])),
        ("pool.approve", "eu gpu.render",
         {"digest": "d", "ceiling": {"secrets": ["openai"], "timeout": "2h"}},
         ("Approved the handler", "gpu.render in pool eu",
          ["digest: d", "ceiling.secrets: openai", "ceiling.timeout: 2 hours"])),
        ("template.add", "export", {"orgs": became(None, {"tags": ["pro"]})},
         ("Added the template", "export", ["orgs: orgs with the tag pro"])),
        ("calendar.change", "de", {"dates": became(["2027-01-01"], ["2027-02-02"])},
         ("Changed the calendar", "de", ["dates: added 2027-02-02; removed 2027-01-01"])),
        ("pool.paint", "eu", {"colour": {"of": "red"}, "coats": 2},
         ("pool.paint", "eu", ["colour.of: red", "coats: 2"])),
        ("pool.paint", "eu", ["red", "blue"], ("pool.paint", "eu", ["red, blue"])),
        ("pool.paint", "eu", 5, ("pool.paint", "eu", ["5"])),
    ],
)  # fmt: skip
def test_a_change_reads_as_a_sentence(action: str, subject: str, detail: Any, said: Any) -> None:
    org = "org_a" if subject.startswith("org_a ") else None
    found = change(detail, action, subject=subject, org=org)

    assert (found.words, found.name, list(found.parts)) == said


def test_parts_are_few_and_short_and_both_values_are_seen() -> None:
    many = change({f"k{number}": number for number in range(MAX_PARTS + 1)})
    long = parts({"x" * 9000: became("a" * 9000, "b" * 9000), "reason": "r" * 9000})
    deep: Any = "end"
    for _ in range(60):
        deep = {"deeper": deep}

    assert (len(many.parts), many.has_more) == (MAX_PARTS, True)
    assert long[0].startswith("reason: r")
    assert "a… → b" in long[1]
    assert max(map(len, long)) <= 2 * MAX_PART
    assert parts({"params": became({}, deep)})[0].startswith("params.deeper.deeper.deeper: {")


def test_why_and_what_comes_before_the_rest() -> None:
    added = {f"a{number}": became(None, number) for number in range(9)}
    added |= {"handler": became(None, "h"), "schedule": became(None, "@daily"), "reason": "asked"}

    assert parts(added)[:4] == ["reason: asked", "schedule: at 00:00 every day", "handler: h", "a0: 0"]


def test_any_text_is_taken_as_it_is() -> None:
    for evil in strings():
        detail = {
            evil: evil,
            "schedule": became(evil, evil[::-1]),
            "timeout": became(None, evil),
            "orgs": evil,
        }
        assert change(detail, evil, subject=evil, org=evil).words == evil
        assert actor_name(evil).name


def test_an_org_reads_no_more_than_its_row_has() -> None:
    """The control is the operator's sentence of the same row."""
    detail = {"schedule": became("every 15m", "every 1h"), "reason": "words of mallory", "template": "gold"}
    row: Any = {"id": "1", "at": None, "actor": "operator:mallory", "action": "definition.change"}
    row |= {"org": "org_a", "subject": "org_a digest", "detail": detail}

    seen = sentence(redacted(ChangeRow, row, "org_a"))
    whole = sentence(row)

    assert (seen.words, seen.name, list(seen.parts)) == ("Changed the definition", "digest", [])
    assert len(whole.parts) == 3


@pytest.mark.parametrize(
    ("actor", "name", "kind"),
    [
        ("operator:ada", "ada", "operator"),
        ("org:org_a", "org_a", "org"),
        ("person:kp_1@org_a", "kp_1", "of org_a"),
        ("person:a@b@org_a", "a@b", "of org_a"),
        ("sync:main", "sync", "with main"),
        ("worker", "worker", ""),
        ("operator", "operator", ""),
        ("provision", "provision", ""),
        ("ada", "ada", "CLI"),
        ("1000", "1000", "CLI"),
        ("cli:ada", "cli:ada", ""),
    ],
)
def test_an_actor_is_a_name(actor: str, name: str, kind: str) -> None:
    assert actor_name(actor) == (name, kind)
