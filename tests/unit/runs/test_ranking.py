"""Ranking: fair over held slots, within every limit, and never idle while something could start."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.clock import START
from tests.fakes.ranking import Running, Share, Waiting, rank
from worker.ids import DefinitionId, OrgId, RunId


def waiting(org: str, number: int, **values: Any) -> Waiting:
    """The `number`th run of an org, available that many seconds after the start."""
    definition = DefinitionId(values.pop("definition", f"{org}-d"))
    return Waiting(
        RunId(f"{org}-{number:03}"),
        OrgId(org),
        definition,
        values.pop("handler", "h"),
        START + timedelta(seconds=number),
        **values,
    )


def started(runs: list[Waiting], free: int, **values: Any) -> list[str]:
    running = Running(values.get("orgs", {}), values.get("definitions", {}), values.get("handlers", {}))
    chosen = rank(
        runs,
        running,
        shares=values.get("shares", {}),
        handler_limits=values.get("limits", {"h": None, "g": None}),
        free={"child": free, "inline": values.get("inline", 0)},
    )
    return [run.id for run in chosen]


def test_an_org_with_a_long_line_does_not_keep_others_waiting():
    runs = [waiting("hog", n) for n in range(50)] + [waiting("new", 99)]

    assert started(runs, 3, orgs={"hog": 5}, shares={"hog": Share(100)}) == ["new-099", "hog-000", "hog-001"]


def test_weights_share_the_slots():
    runs = [waiting(org, n) for org in ("a", "b") for n in range(40)]
    shares = {"a": Share(100, 1), "b": Share(100, 3)}

    assert Counter(run[0] for run in started(runs, 40, shares=shares)) == {"a": 10, "b": 30}


def test_an_org_alone_takes_every_slot_up_to_its_limit():
    runs = [waiting("hog", n) for n in range(50)]

    assert len(started(runs, 20, shares={"hog": Share(100)})) == 20
    assert len(started(runs, 20, orgs={"hog": 7})) == 3


def test_priority_comes_before_age_within_an_org_but_not_between_orgs():
    runs = [waiting("a", 1), waiting("a", 2, priority=5), waiting("b", 3)]

    assert started(runs, 3) == ["a-002", "b-003", "a-001"]


def test_limits_of_definition_and_handler_hold_over_what_already_runs():
    runs = [waiting("a", n, definition="d", max_concurrent=3) for n in range(5)]
    assert started(runs, 9, definitions={"d": 1}) == ["a-000", "a-001"]

    runs = [waiting(org, n) for org in "abc" for n in range(3)]
    assert started(runs, 9, limits={"h": 4}, handlers={"h": 2}) == ["a-000", "b-000"]


def test_a_run_that_cannot_start_takes_no_place_in_line():
    runs = [
        waiting("a", 0, handler="unknown"),
        waiting("a", 1, handler="g"),
        waiting("a", 2, isolation="inline"),
        waiting("a", 3),
    ]

    assert started(runs, 1, limits={"h": None, "g": 1}, handlers={"g": 1}) == ["a-003"]


def test_child_and_inline_slots_are_told_apart():
    runs = [waiting("a", n, isolation="inline" if n % 2 else "child") for n in range(6)]

    assert started(runs, 1, inline=2) == ["a-000", "a-001"]


runs = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from("hg"),
        st.sampled_from(["child", "inline"]),
        st.sampled_from([None, 1, 2]),
        st.integers(0, 2),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(runs, st.integers(0, 6), st.integers(0, 6), st.integers(0, 3), st.integers(0, 8), st.integers(1, 9))
def test_no_limit_is_ever_passed(given_runs, child, inline, busy, handler_limit, org_limit):
    """Whatever waits and whatever runs, what starts keeps within slots and all three limits."""
    lines = [
        waiting(
            org,
            number,
            handler=handler,
            isolation=isolation,
            definition=f"{org}{limit}",
            max_concurrent=limit,
            priority=priority,
        )
        for number, (org, handler, isolation, limit, priority) in enumerate(given_runs)
    ]
    running = Running({OrgId(org): busy for org in "abc"}, {DefinitionId("a1"): 1}, {"h": busy})

    chosen = rank(
        lines,
        running,
        shares={OrgId(org): Share(org_limit) for org in "abc"},
        handler_limits={"h": handler_limit, "g": None},
        free={"child": child, "inline": inline},
    )

    assert len(set(chosen)) == len(chosen)
    per_isolation = Counter(run.isolation for run in chosen)
    assert per_isolation["child"] <= child
    assert per_isolation["inline"] <= inline
    for org, count in Counter(run.org_id for run in chosen).items():
        assert count + busy <= org_limit, org
    assert sum(run.handler == "h" for run in chosen) <= max(0, handler_limit - busy)
    for definition, count in Counter(run.definition_id for run in chosen).items():
        limit = next(run.max_concurrent for run in chosen if run.definition_id == definition)
        assert limit is None or count + running.definitions.get(definition, 0) <= limit
