"""The overdue monitor reports what no worker fires, and gives the sign of life."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import httpx
import pytest

from tests.fakes.clock import ManualClock
from worker.errors import StoreUnavailable
from worker.kit.web.health import Health
from worker.process.monitoring import OverdueMonitor
from worker.settings.sections import AlertSettings

Found = tuple[str, str, float]
LATE = ("org_a", "digest", 10.0)


class Post:
    """An overdue monitor and what it queries, settable; it is also the health of the worker."""

    def __init__(self, clock: ManualClock, *, deadman: bool = False) -> None:
        self.oldest: Found | Exception | None = None
        self.resting = False
        self.alive = True
        self.answer = 200
        self.pings = 0
        self.monitor = OverdueMonitor(
            self._oldest,
            clock,
            AlertSettings(
                overdue=timedelta(seconds=10),
                deadman_url="https://ping.example/x" if deadman else "",
                deadman_every=timedelta(minutes=1),
            ),
            cast(Health, self),
            client=httpx.Client(transport=httpx.MockTransport(self._ping)),
        )

    def draining(self) -> bool:
        return self.resting

    def stalled(self) -> list[str]:
        return [] if self.alive else ["scheduler"]

    def _oldest(self) -> Found | None:
        if isinstance(self.oldest, Exception):
            raise self.oldest
        return self.oldest

    def _ping(self, request: httpx.Request) -> httpx.Response:
        self.pings += 1
        return httpx.Response(self.answer)


@pytest.fixture
def post(clock: ManualClock) -> Post:
    return Post(clock)


def names(emitted: list[Any]) -> list[str]:
    return [one.event.name for one in emitted]


def test_what_two_looks_find_unfired_is_told_once_until_it_has_caught_up(post, emitted):
    post.oldest = LATE
    for _ in range(5):
        post.monitor.look()
    post.oldest = ("org_a", "digest", 0.4)
    post.monitor.look()
    post.monitor.look()

    assert names(emitted) == ["schedule.overdue", "schedule.caught_up"]
    assert emitted[0].fields == {"org": "org_a", "definition": "digest", "seconds": 10.0}


@pytest.mark.parametrize(
    "looks",
    [[LATE, None, LATE, None], [("org_a", "digest", 9.9)] * 3, [LATE, StoreUnavailable("gone"), LATE, None]],
)
def test_one_look_a_little_lateness_or_an_absent_database_raise_no_alarm(post, emitted, looks):
    for found in looks:
        post.oldest = found
        post.monitor.look()

    assert emitted == []


def test_a_worker_that_drains_fires_nothing_on_purpose(post, emitted):
    post.oldest, post.resting = LATE, True
    post.monitor.look()
    post.monitor.look()

    assert emitted == []


def test_the_sign_of_life_comes_at_its_interval_and_only_while_there_is_life(clock):
    post = Post(clock, deadman=True)
    for alive, advance in ((True, 30), (True, 30), (False, 60), (True, 60)):
        post.alive = alive
        post.monitor.ping()
        clock.advance(advance)

    assert post.pings == 2


def test_a_sign_of_life_that_nobody_takes_is_told_once(clock, emitted):
    post = Post(clock, deadman=True)
    post.answer = 500
    for _ in range(3):
        post.monitor.ping()
        clock.advance(60)

    assert (post.pings, names(emitted)) == (3, ["deadman.failed"])
