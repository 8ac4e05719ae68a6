"""Limits: so many at once and then at a rate, in bounded memory, and none at another's cost."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import TooManyRequests
from worker.kit.web.clients import Buckets, Client, ClientLimits

ALICE, BOB = (Client(ip_address(address)) for address in ("198.51.100.1", "198.51.100.2"))


def limits(clock: ManualClock) -> ClientLimits:
    return ClientLimits(clock, logins_per_minute=10, calls_per_second=50)


def wait_of(clock: ManualClock, count: int, made: ClientLimits, client: Client = ALICE) -> float:
    """After `count` logins: how long the next one has to wait."""
    for _ in range(count):
        made.login(client)
    with pytest.raises(TooManyRequests) as refused:
        made.login(client)
    assert refused.value.retry_after is not None
    return refused.value.retry_after


def test_ten_logins_at_once_and_then_one_each_six_seconds(clock: ManualClock):
    made = limits(clock)

    assert wait_of(clock, 10, made) == 6
    clock.advance(5.9)
    assert wait_of(clock, 0, made) == 1
    clock.advance(0.1)
    assert wait_of(clock, 1, made) == 6
    clock.advance(3600)
    assert wait_of(clock, 10, made) == 6


def test_whoever_is_refused_does_not_wait_longer_for_it(clock: ManualClock):
    made = limits(clock)
    wait_of(clock, 10, made)

    assert [wait_of(clock, 0, made) for _ in range(100)] == [6] * 100


def test_an_address_or_caller_that_is_limited_limits_no_other(clock: ManualClock):
    made = limits(clock)
    wait_of(clock, 10, made, ALICE)
    for _ in range(50):
        made.caller("org:org_a m2m", "org:org_a")
    with pytest.raises(TooManyRequests):
        made.caller("org:org_a m2m", "org:org_a")

    made.login(BOB)
    made.caller("org:org_b m2m", "org:org_b")
    made.stranger(ALICE)


def test_a_trusted_proxy_itself_is_not_limited(clock: ManualClock):
    made, proxy = limits(clock), Client(ip_address("10.0.0.1"), is_proxy=True)

    for _ in range(200):
        made.login(proxy)
        made.stranger(proxy)
        made.token("guess", proxy)


def test_bad_tokens_count_as_logins_and_good_ones_do_not(clock: ManualClock):
    made = limits(clock)
    for number in range(50):
        made.token(f"good {number}", ALICE)
        made.was_good(f"good {number}", ALICE)
    for number in range(10):
        made.token(f"guess {number}", ALICE)
        made.was_bad(f"guess {number}", ALICE)

    with pytest.raises(TooManyRequests):
        made.token("guess 10", ALICE)
    # Who was let in before stays, whatever others of the address try.
    made.token("good 7", ALICE)
    made.was_good("good 7", ALICE)
    with pytest.raises(TooManyRequests):
        made.token("guess 10", ALICE)


def test_new_tokens_that_come_at_once_do_not_stand_in_each_others_way(clock: ManualClock):
    """Such as those of many orgs behind one address, after a restart, while the issuer's keys are fetched."""
    made = limits(clock)
    for _ in range(3):
        for number in range(50):
            made.token(f"new {number}", ALICE)
        for number in range(50):
            made.was_good(f"new {number}", ALICE)


def test_guesses_that_come_at_once_are_paid_for_afterwards(clock: ManualClock):
    made = limits(clock)
    for number in range(50):
        made.token(f"guess {number}", ALICE)
    with pytest.raises(TooManyRequests):
        made.token("guess 50", ALICE)
    for number in range(50):
        made.was_bad(f"guess {number}", ALICE)

    clock.advance(40 * 6)
    with pytest.raises(TooManyRequests):
        made.token("guess 51", ALICE)
    clock.advance(6)
    made.token("guess 51", ALICE)


def test_a_good_token_that_turns_bad_counts_from_then_on(clock: ManualClock):
    made = limits(clock)
    made.token("token", ALICE)
    made.was_good("token", ALICE)
    for _ in range(11):
        made.token("token", ALICE)
        made.was_bad("token", ALICE)

    with pytest.raises(TooManyRequests):
        made.token("token", ALICE)


def test_only_so_many_keys_are_remembered(clock: ManualClock):
    buckets = Buckets(clock, size=1, rate=1, most=100)
    flood = [f"flood {number}" for number in range(10_000)]
    for number, key in enumerate(flood):
        assert buckets.take(key) == 0
        if number % 1000 == 0:
            assert sum(buckets.wait(each) > 0 for each in flood) <= 100

    assert 90 <= sum(buckets.wait(each) > 0 for each in flood) <= 100


def test_a_flood_of_keys_forgives_only_itself(clock: ManualClock):
    buckets = Buckets(clock, size=10, rate=1, most=100)
    for _ in range(10):
        buckets.take("limited")
    assert buckets.take("limited") > 0

    for number in range(10_000):
        assert buckets.take(f"other {number}") == 0

    assert buckets.take("limited") > 0
    clock.advance(1)
    assert buckets.take("limited") == 0


def test_full_buckets_are_forgotten_first(clock: ManualClock):
    buckets = Buckets(clock, size=1, rate=1, most=100)
    busy, full, new = ([f"{kind} {number}" for number in range(50)] for kind in ("busy", "full", "new"))
    for key in busy:
        for _ in range(3):
            buckets.charge(key)
    for key in full:
        buckets.take(key)
    clock.advance(2)

    for key in new:
        buckets.take(key)

    assert all(buckets.wait(key) > 0 for key in busy + new)
