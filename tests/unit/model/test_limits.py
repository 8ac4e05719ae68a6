"""The arithmetic of limits: no window of 10 s or more sees more than rate * (w + 1) + burst."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.model.limits import (
    AHEAD,
    LIFE,
    MAX_RATE,
    SLOT_LIFE,
    TURN,
    Ask,
    Bucket,
    BucketKey,
    Limit,
    Share,
    answer,
    divided,
    level,
    new_bucket,
    parse_rate,
)

KEY = BucketKey("limit", "org")
START = 1_900_000_000.0


def rated(rate: float, burst: int = 1) -> Limit:
    return Limit("limit", "https://api.example.com", "org", rate, burst)


def concurrent(number: int) -> Limit:
    return Limit("limit", "https://api.example.com", "org", concurrent=number)


def tokens(limit: Limit, bucket: Bucket, worker: str, want: int, now: float) -> int:
    return answer(limit, bucket, worker, Ask(KEY, want), now).tokens


def worst(times: list[float], rate: float, burst: int) -> float:
    """The most requests above the bound in any window of 10 s or more; negative if it holds.

    Any such window is at most a whole one that begins at a request and ends at one, or one of 10 s.
    """
    times = sorted(times)
    found = -math.inf
    for first, start in enumerate(times):
        for last in range(first, len(times)):
            length = max(times[last] - start, 10.0)
            found = max(found, last - first + 1 - (rate * (length + 1) + burst))
    return found


def test_the_lives_make_up_the_second_of_the_bound():
    assert pytest.approx(1) == LIFE + AHEAD


@pytest.mark.parametrize(
    ("text", "rate"), [("40/s", 40), ("100/m", 100 / 60), ("3600/h", 1), ("1000000/s", MAX_RATE)]
)
def test_rates(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["40", "40/d", "0/s", "-1/s", "1.5/s", "1000001/s", "٣/s", "", None])
def test_what_is_no_rate(text):
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate(text)


def test_a_worker_that_is_alone_gets_the_burst_and_then_the_rate():
    limit, bucket = rated(10, burst=5), new_bucket(rated(10, burst=5), START)

    first = tokens(limit, bucket, "a", 100, START)
    later = sum(tokens(limit, bucket, "a", 100, START + tick * 0.2) for tick in range(1, 51))

    assert first == 9  # the burst and what AHEAD gives
    assert later == 100


def test_unused_tokens_come_back_and_are_given_to_another_worker():
    limit, bucket = rated(1, burst=10), new_bucket(rated(1, burst=10), START)
    share = answer(limit, bucket, "a", Ask(KEY, 10), START)

    answer(limit, bucket, "a", Ask(KEY, 0, returned=10, granted_at=share.granted_at), START + 0.01)

    assert tokens(limit, bucket, "b", 10, START + 0.02) == 10


def test_what_comes_back_late_gives_nothing_that_the_bucket_gained_meanwhile():
    """Without the deduction a token would be given a second time: this is the control of the bound."""
    limit, bucket = rated(10, burst=10), new_bucket(rated(10, burst=10), START)
    share = answer(limit, bucket, "a", Ask(KEY, 10), START)
    full_again = START + 2
    assert tokens(limit, bucket, "b", 14, full_again) == 14

    answer(limit, bucket, "a", Ask(KEY, 0, returned=10, granted_at=share.granted_at), full_again)

    assert tokens(limit, bucket, "c", 10, full_again) == 0


def test_workers_that_wait_share_what_there_is():
    limit, bucket = rated(100, burst=1), new_bucket(rated(100, burst=1), START)
    got = {"a": 0, "b": 0, "c": 0}
    for tick in range(200):
        for place, worker in enumerate(got):
            # b and c ask right after a, which must not leave them nothing.
            got[worker] += tokens(limit, bucket, worker, 1000, START + tick * 0.2 + place * 0.001)

    assert sum(got.values()) > 0.98 * 100 * 40
    assert min(got.values()) > 0.15 * sum(got.values())


def test_a_slow_rate_serves_each_worker_in_its_turn():
    limit, bucket = rated(1, burst=1), new_bucket(rated(1, burst=1), START)
    got = {"a": 0, "b": 0, "c": 0, "d": 0}
    for tick in range(500):
        for place, worker in enumerate(got):
            got[worker] += tokens(limit, bucket, worker, 50, START + tick * 0.2 + place * 0.001)

    assert sum(got.values()) >= 99
    assert max(got.values()) - min(got.values()) <= 2


def test_a_worker_that_is_gone_reserves_nothing_for_long():
    limit, bucket = rated(1, burst=1), new_bucket(rated(1, burst=1), START)
    tokens(limit, bucket, "alive", 5, START)
    tokens(limit, bucket, "dead", 5, START)

    assert tokens(limit, bucket, "alive", 5, START + SLOT_LIFE + 0.1) == 1


def test_a_clock_that_is_set_back_gives_nothing_twice():
    limit, bucket = rated(10, burst=1), new_bucket(rated(10, burst=1), START)
    tokens(limit, bucket, "a", 100, START)

    assert tokens(limit, bucket, "a", 100, START - 0.5) == 0
    assert tokens(limit, bucket, "a", 100, START - 3600) == 0
    assert tokens(limit, bucket, "a", 100, START - 3600 + 0.2) == 2


def test_a_bucket_survives_its_json():
    limit, bucket = rated(10), new_bucket(rated(10), START)
    tokens(limit, bucket, "a", 7, START)

    assert Bucket.from_json(bucket.as_json()) == bucket


def test_a_bucket_is_idle_once_it_is_as_a_new_one():
    limit, bucket = rated(2, burst=10), new_bucket(rated(2, burst=10), START)
    tokens(limit, bucket, "a", 8, START)

    assert bucket.idle_at(limit) == pytest.approx(START + 4)
    assert level(limit, bucket, START + 4).tokens == pytest.approx(limit.capacity)
    assert new_bucket(concurrent(1), START).idle_at(concurrent(1)) == START


Actions = st.lists(
    st.tuples(
        st.floats(0.0, 0.7),  # seconds until the next action
        st.integers(0, 3),  # the worker
        st.integers(0, 40),  # what it wants
        st.sampled_from(["use", "late", "keep", "return", "return late", "freeze"]),
    ),
    min_size=20,
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([(40.0, 1), (40.0, 40), (1.0, 1), (5.0, 30), (0.5, 3)]), Actions)
def test_no_window_sees_more_than_the_bound(kind, actions):
    """Workers that use tokens at once or at their end, keep them, return them, or freeze with them.

    A frozen worker goes on after its tokens have ended, and must not use them.
    """
    rate, burst = kind
    limit, bucket = rated(rate, burst), new_bucket(rated(rate, burst), START)
    held: dict[int, list[Share]] = {}
    sent: list[float] = []
    now = START
    for step, worker, want, what in actions:
        now += step
        kept = held.pop(worker, [])
        usable = [share for share in kept if share.granted_at + LIFE >= now]
        returned, granted_at = 0, 0.0
        if what.startswith("return") and kept:
            # Also those that have ended, unless they were used.
            returned = sum(share.tokens for share in kept)
            granted_at = min(share.granted_at for share in kept)
        elif what == "use":
            sent += [now] * sum(share.tokens for share in usable)
        share = answer(limit, bucket, str(worker), Ask(KEY, want, returned, granted_at), now)
        match what:
            case "late":
                sent += [share.granted_at + LIFE] * share.tokens
            case "use":
                sent += [now] * share.tokens
            case _:
                held[worker] = [share]

    assert worst(sent, rate, burst) <= 1e-6


def test_tokens_without_an_end_would_break_the_bound():
    """The control: a worker that is frozen for 20 s goes on with all that it was granted before."""
    limit, bucket = rated(40, burst=1), new_bucket(rated(40, burst=1), START)
    granted = [answer(limit, bucket, "a", Ask(KEY, 50), START + tick * 0.2) for tick in range(100)]
    thawed = START + 20

    ended = [thawed for share in granted for _ in range(share.tokens) if share.granted_at + LIFE >= thawed]
    without_end = [thawed for share in granted for _ in range(share.tokens)]

    assert worst(ended, 40, 1) <= 0
    assert worst(without_end, 40, 1) > 300


def test_greedy_workers_use_nearly_all_of_the_rate_and_never_more():
    limit, bucket = rated(40, burst=1), new_bucket(rated(40, burst=1), START)
    sent: list[float] = []
    for tick in range(60 * 20):
        now = START + tick * 0.05
        sent += [now] * tokens(limit, bucket, f"worker {tick % 4}", 50, now)

    assert len(sent) >= 0.98 * 40 * 60
    assert worst(sent, 40, 1) <= 0


def test_slots_are_never_given_twice():
    limit, bucket = concurrent(3), new_bucket(concurrent(3), START)

    first = answer(limit, bucket, "a", Ask(KEY, slots=2), START)
    second = answer(limit, bucket, "b", Ask(KEY, slots=5), START)

    assert (first.slots, second.slots) == (2, 1)


def test_slots_of_a_frozen_worker_end():
    limit, bucket = concurrent(3), new_bucket(concurrent(3), START)
    answer(limit, bucket, "frozen", Ask(KEY, slots=3), START)

    early = answer(limit, bucket, "b", Ask(KEY, slots=3), START + SLOT_LIFE - 0.01)
    late = answer(limit, bucket, "b", Ask(KEY, slots=3), START + SLOT_LIFE)

    assert (early.slots, late.slots) == (0, 3)


def test_requests_under_way_keep_their_slots_when_others_wait():
    limit, bucket = concurrent(4), new_bucket(concurrent(4), START)
    answer(limit, bucket, "a", Ask(KEY, slots=9), START)
    waiting = answer(limit, bucket, "b", Ask(KEY, slots=9), START)

    # As many requests are under way as may be; as they end, a may only have its half.
    full = answer(limit, bucket, "a", Ask(KEY, slots=9, in_use=4), START + 0.1)
    still = answer(limit, bucket, "b", Ask(KEY, slots=9), START + 0.1)
    fewer = answer(limit, bucket, "a", Ask(KEY, slots=9, in_use=2), START + 0.2)
    after = answer(limit, bucket, "b", Ask(KEY, slots=9), START + 0.2)

    assert (waiting.slots, full.slots, still.slots) == (0, 2, 0)
    assert (fewer.slots, after.slots) == (2, 2)


def test_a_single_slot_goes_from_one_worker_to_the_next():
    limit, bucket = concurrent(1), new_bucket(concurrent(1), START)
    had: dict[str, int] = {"a": 0, "b": 0}
    for tick in range(200):
        for worker in had:
            had[worker] += answer(limit, bucket, worker, Ask(KEY, slots=5), START + tick * 0.2).slots

    assert min(had.values()) > 0.4 * sum(had.values())


@given(
    st.integers(0, 20),
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 9), min_size=1),
    st.integers(0, 9),
)
def test_slots_are_divided_evenly_and_whole(total, wanted, turn):
    found = divided(total, wanted, turn)

    assert sum(found.values()) == min(total, sum(wanted.values()))
    assert all(found[name] <= wanted[name] for name in wanted)
    hungry = sorted(found[name] for name in wanted if found[name] < wanted[name])
    assert all(later - earlier <= 1 for earlier, later in pairwise(hungry))


def test_every_worker_gets_the_odd_slot_in_some_turn():
    turns = {
        name
        for turn in range(3)
        for name, slots in divided(1, {"a": 1, "b": 1, "c": 1}, turn).items()
        if slots
    }

    assert turns == {"a", "b", "c"}
    assert TURN > SLOT_LIFE
