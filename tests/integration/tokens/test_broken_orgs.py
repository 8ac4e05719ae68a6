"""Orgs whose applications are broken, and outages: who waits for a token, and what the issuer is asked."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import EC_KEY, App, FakeCredentials, FakeIssuer, ec_issuer, org
from worker.engine.attempt.attempt import pause_after
from worker.errors import TokenError, Unavailable
from worker.model.orgs import OrgRef, TokenWant
from worker.telemetry import events
from worker.tokens.cache import Tokens

STEP = 0.1
POLL = 1.0  # a run that may start again is admitted this late at most
LIFETIME = 20  # of tokens, in seconds: each org asks again every 10 to 16 s
LONGEST = 5.0  # seconds that a healthy org may wait for a token
FAULTS = ("status", "reset", "unreachable", "malformed", "large", "hang", "slow")


class Simulation:
    """Runs of many orgs, each of which needs its org's token every two seconds, as a worker carries them.

    Tokens, channel, budget, breaker, parking and the wait of a run without a token are
    the worker's own; the issuer answers as `faults` say.
    """

    def __init__(self, orgs: int, *, rate: float = 100.0, seed: int = 1) -> None:
        self.clock = ManualClock()
        self.random = random.Random(seed)
        self.issuer, self.credentials = FakeIssuer(self.clock, key=EC_KEY), FakeCredentials()
        self.issuer.answer = self._answer
        self.orgs = [org(number) for number in range(orgs)]
        self.faults: dict[str, str] = {}  # by client, or "*"
        self.needed: dict[str, float] = {}  # since when an org without a token needs one
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.served_at: dict[str, float] = {}
        self.emitted: list[str] = []
        for each in self.orgs:
            self.issuer.add(App(each.code, each.code, "secret", lifetime=LIFETIME))
            self.credentials.add(each, each.code, "secret")
        self._client = self.issuer.client()
        self.tokens = Tokens(
            {"main": ec_issuer(max_requests_per_second=rate)},
            self.credentials,
            client=self._client,
            clock=self.clock,
            rng=self.random,
        )
        self._runs: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Simulation:
        self._end_listening = events.listen(lambda emitted: self.emitted.append(emitted.event.name))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end_listening()
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        await self.tokens.close()
        await self._client.aclose()

    def start(self, orgs: Iterable[OrgRef], *, within: float) -> None:
        """Start the runs of these orgs, one after the other over so many seconds."""
        orgs = list(orgs)
        for place, each in enumerate(orgs):
            self._runs.append(asyncio.ensure_future(self._run(each, within * place / len(orgs))))

    def break_(self, orgs: Iterable[OrgRef], fault: str) -> None:
        self.faults |= {each.code: fault for each in orgs}

    def mend(self) -> None:
        self.faults.clear()

    async def go_on(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.clock.advance(STEP)
            await settle(12)

    def longest_wait(self, orgs: Iterable[OrgRef]) -> float:
        """The longest time that one of these orgs has waited, or waits, for a token."""
        now = self.clock.monotonic()
        waits = [wait for each in orgs for wait in self.waits[each.code]]
        return max(waits + [now - self.needed.get(each.code, now) for each in orgs])

    async def _run(self, of: OrgRef, after: float) -> None:
        await self.clock.sleep(after)
        while True:
            self.needed.setdefault(of.code, self.clock.monotonic())
            try:
                await self.tokens.ensure(TokenWant(of, "main"))
            except (TokenError, Unavailable) as error:
                pause = pause_after(error, self.random).total_seconds()
                await self.clock.sleep(pause + self.random.uniform(0, POLL))
            else:
                now = self.clock.monotonic()
                self.waits[of.code].append(now - self.needed.pop(of.code))
                self.served_at[of.code] = now
                await self.clock.sleep(2.0)

    def _answer(self, form: dict[str, str]) -> httpx.Response | None:
        match self.faults.get(form["client_id"], self.faults.get("*")):
            case "status":
                return httpx.Response(503)
            case "reset":
                raise httpx.ReadError("reset")
            case "unreachable":
                raise httpx.ConnectError("no route")
            case "malformed":
                return httpx.Response(200, text="<html>")
            case "large":
                return httpx.Response(200, content=b"x" * 70_000)
            case "hang":
                return self._hang()
            case "slow":
                return self._slow()
        return None

    async def _hang(self) -> httpx.Response:
        await self.clock.sleep(1e6)
        raise AssertionError

    async def _slow(self) -> httpx.Response:
        await self.clock.sleep(9.0)
        return httpx.Response(502)


@pytest.mark.parametrize("fault", FAULTS)
async def test_three_broken_orgs_of_98_hold_up_no_honest_one(fault: str) -> None:
    """The broken ones ask first, alone, and go on asking while the others come one by one."""
    async with Simulation(98) as simulation:
        broken, honest = simulation.orgs[:3], simulation.orgs[3:]
        simulation.break_(broken, fault)
        simulation.start(broken, within=0.1)
        await simulation.go_on(1.0)
        simulation.start(honest, within=30.0)
        await simulation.go_on(40.0)

        assert simulation.longest_wait(honest) <= LONGEST
        assert set(simulation.served_at) == {each.code for each in honest}


@pytest.mark.parametrize(("broken", "fault"), [(1, "hang"), (49, "status"), (97, "hang")])
async def test_orgs_that_are_broken_from_the_start_hold_up_no_healthy_one(broken: int, fault: str) -> None:
    """One, half, or all but one of 98, all started at once with the broken ones before the others."""
    async with Simulation(98, rate=200.0) as simulation:
        simulation.break_(simulation.orgs[:broken], fault)
        simulation.start(simulation.orgs, within=0.2)
        await simulation.go_on(30.0)

        assert simulation.longest_wait(simulation.orgs[broken:]) <= LONGEST


@pytest.mark.parametrize(("broken", "fault"), [(49, "status"), (97, "hang")])
async def test_orgs_that_break_later_hold_up_no_healthy_one(broken: int, fault: str) -> None:
    """All had tokens; then these applications stop, and later they come back by themselves."""
    async with Simulation(98) as simulation:
        simulation.start(simulation.orgs, within=10.0)
        await simulation.go_on(15.0)
        simulation.break_(simulation.orgs[:broken], fault)
        await simulation.go_on(40.0)
        assert simulation.longest_wait(simulation.orgs[broken:]) <= LONGEST

        simulation.mend()
        since = simulation.clock.monotonic()
        await simulation.go_on(75.0)
        assert simulation.longest_wait(simulation.orgs[broken:]) <= LONGEST
        assert all(simulation.served_at[each.code] > since for each in simulation.orgs)


@pytest.mark.parametrize(
    ("cold", "rate", "fault"),
    [
        (True, 100.0, "hang"),
        (True, 10.0, "status"),
        (False, 10.0, "hang"),
        (False, 100.0, "status"),
    ],
)
async def test_an_outage_of_twenty_seconds_costs_little_and_all_run_again(
    cold: bool, rate: float, fault: str
) -> None:
    """98 orgs that all need a token: 110 requests at most, and 75 s after its *start* all have one."""
    async with Simulation(98, rate=rate) as simulation:
        if not cold:
            simulation.start(simulation.orgs, within=10.0)
            await simulation.go_on(20.0)
        started, before = simulation.clock.monotonic(), simulation.issuer.count()
        simulation.faults["*"] = fault
        if cold:
            simulation.start(simulation.orgs, within=0.2)
        await simulation.go_on(20.0)
        assert simulation.issuer.count() - before <= 110
        assert simulation.emitted.count("issuer.paused") == 1

        simulation.mend()
        await simulation.go_on(55.0)
        assert all(simulation.served_at[each.code] > started + 20.0 for each in simulation.orgs)
        assert simulation.emitted.count("issuer.paused") == simulation.emitted.count("issuer.resumed") <= 2


async def test_an_outage_is_noticed_within_seconds() -> None:
    """98 orgs renew all the time, ten a second at most: it opens at the tenth that gets no answer."""
    async with Simulation(98, rate=10.0) as simulation:
        simulation.start(simulation.orgs, within=10.0)
        await simulation.go_on(20.0)
        simulation.faults["*"] = "status"
        await simulation.go_on(5.0)

        assert simulation.emitted.count("issuer.paused") == 1


async def test_answers_to_one_org_do_not_end_an_outage_of_the_others() -> None:
    """One org is answered all the time: it is not held up, and the others ask no more often for it."""
    async with Simulation(98) as simulation:
        lucky = simulation.orgs[0]
        simulation.issuer.apps[lucky.code].lifetime = 3
        simulation.start(simulation.orgs, within=10.0)
        await simulation.go_on(15.0)
        simulation.break_(simulation.orgs[1:], "status")
        before = len(
            [form for _, _, form in simulation.issuer.requests if form.get("client_id") != lucky.code]
        )
        await simulation.go_on(40.0)

        assert simulation.longest_wait([lucky]) <= LONGEST
        asked = len(
            [form for _, _, form in simulation.issuer.requests if form.get("client_id") != lucky.code]
        )
        assert asked - before <= 125
        assert simulation.emitted.count("issuer.resumed") == 0


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_healthy_org_never_waits_longer_than_five_seconds(data: st.DataObject) -> None:
    """Any mix of orgs that are broken, break later, flicker or come back, in any order and of any kind."""
    number = data.draw(st.integers(2, 40), label="orgs")
    kind_of_org = st.sampled_from((None, *FAULTS))
    kinds = data.draw(st.lists(kind_of_org, min_size=number, max_size=number), label="kinds")
    change = st.tuples(st.integers(1, 50), st.integers(0, number - 1), kind_of_org)
    changes = data.draw(st.lists(change, max_size=20), label="changes")
    within = data.draw(st.sampled_from((0.1, 5.0, 40.0)), label="within")
    seed = data.draw(st.integers(0, 1000), label="seed")
    ill = {place for place, kind in enumerate(kinds) if kind} | {place for _, place, kind in changes}

    async def run() -> None:
        async with Simulation(number, seed=seed) as simulation:
            for place, kind in enumerate(kinds):
                if kind:
                    simulation.break_([simulation.orgs[place]], kind)
            simulation.start(random.Random(seed).sample(simulation.orgs, number), within=within)
            passed = 0
            for at, place, kind in sorted(changes, key=lambda change: change[0]):
                await simulation.go_on(at - passed)
                passed = at
                simulation.faults.pop(simulation.orgs[place].code, None)
                if kind:
                    simulation.break_([simulation.orgs[place]], kind)
            await simulation.go_on(60 - passed)
            healthy = [each for place, each in enumerate(simulation.orgs) if place not in ill]
            assert not healthy or simulation.longest_wait(healthy) <= LONGEST

    asyncio.run(run())
