"""How matters are put in words: one or many, named up to three."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import pytest

from tests.fakes.clock import ManualClock
from worker.diagnosis import matters
from worker.diagnosis.matters import listed
from worker.store.lists import morning
from worker.store.lists.morning import Named, Waiting
from worker.store.tables import WAITING_REASONS


@pytest.mark.parametrize(
    ("names", "total", "words"),
    [
        ([], 0, ""),
        (["org_a"], 1, "org_a"),
        (["org_a", "org_b"], 2, "org_a and org_b"),
        (["org_a", "org_b", "org_c"], 3, "org_a, org_b and org_c"),
        (["org_a", "org_b", "org_c"], 4, "org_a, org_b, org_c and 1 more"),
        (["org_a", "org_b", "org_c"], 1203, "org_a, org_b, org_c and 1,200 more"),
        # Two credentials of an org.
        (["org_a", "org_a", "org_b"], 3, "org_a and org_b"),
    ],
)
def test_up_to_three_names_then_a_number(names: list[str], total: int, words: str):
    assert listed(Named(total, names)) == words


def test_a_bounded_count_is_at_least_that():
    assert listed(Named(5, ["a", "b", "c"]), at_least=True) == "a, b, c and at least 2 more"


def title_of(monkeypatch: pytest.MonkeyPatch, clock: ManualClock, *waiting: Waiting) -> list[str]:
    monkeypatch.setattr(morning, "waiting", lambda connection, scope: list(waiting))
    return [each.title for each in matters._of_waiting(cast(Any, None), clock.now())]


def test_each_reason_of_waiting_has_a_text_and_says_whose(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
):
    waits = [
        Waiting(reason, runs, clock.now() - timedelta(hours=1), Named(1, ["org_a"]), Named(1, ["x"]))
        for reason in WAITING_REASONS
        for runs in (1, 2)
    ]
    titles = title_of(monkeypatch, clock, *waits)

    # Runs without a token are matters of their issuer.
    assert len(titles) == len(waits) - 2
    assert not any("{" in title or "(" in title for title in titles)
    assert matters._WAITS.keys() == set(WAITING_REASONS)


@pytest.mark.parametrize(
    ("state", "reason", "message", "whose"),
    [
        ("failed", "error", "HTTPStatusError: the server answered 503", "remote_api"),
        ("failed", "error", "KeyError: 'name'", "handler"),
        ("failed", "lost", "lost", "operator"),
        ("refused", "org_mismatch", "org_mismatch: other_org", "provider"),
        ("refused", "of_tomorrow", "of_tomorrow", "operator"),
    ],
)
def test_whose_a_cause_is_comes_from_its_reason_or_error(state: str, reason: str, message: str, whose: str):
    cause = {"state": state, "reason": reason, "message": message}
    assert matters._whose(cast(Any, cause)) == whose
