"""The double of the broker keeps the contract of the real one: one suite for both."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any

import httpx
import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import work
from tests.integration.egress.service import Service as LocalService
from tests.simulation.broker import Brokers, Door, StreamTransport
from tests.simulation.loop import SeededLoop, SimulatedProcess
from tests.simulation.network import Net
from tests.simulation.service import FREE, Service
from worker.clock import SystemClock
from worker.features.egress.handle import BrokerHandle
from worker.handlers.brokered import BrokeredTransport
from worker.handlers.calls import AskLimits, AskShare, KnownLimits, PauseOrigin
from worker.handlers.results import RateLimited
from worker.model.limits import Limit, Share
from worker.model.runs.lease import Lease

HEADERS = {"x-run": "run", "x-attempt": "1", "x-org": "org_acme", "x-number": "1"}
# Loops with tasks of a broker that was killed: what is collected would be unwound.
KEPT: list[SeededLoop] = []


@dataclass
class Bench:
    """A worker's side of one attempt, and the run's client; `sleep` lets what was sent arrive."""

    broker: BrokerHandle
    attempt: Any
    client: httpx.AsyncClient
    url: str
    worker: AnsweringWorker
    kill: Callable[[], None]
    now: Callable[[], float]

    async def get(self) -> str:
        return await self.send("GET")

    async def post(self) -> str:
        """With a body that cannot be sent again."""

        async def body() -> AsyncIterator[bytes]:
            yield b"once"

        return await self.send("POST", content=body())

    async def send(self, method: str, **more: Any) -> str:
        """A status, or the name of what was raised."""
        try:
            return str((await self.client.request(method, self.url, headers=HEADERS, **more)).status_code)
        except (httpx.TransportError, RateLimited) as error:
            return type(error).__name__


Scenario = Callable[[Bench], Awaitable[Any]]


def answering(*paused: float) -> AnsweringWorker:
    """A worker that answers the first questions of a broker with these pauses, and then with none."""
    left = list(paused)
    known = lambda call: KnownLimits((), left.pop(0) if left else 0.0)  # noqa: E731
    return AnsweringWorker({AskLimits: known, PauseOrigin: lambda call: None})


def renewed(broker: BrokerHandle, until: float) -> None:
    broker.renewed(Lease.begun(timedelta(seconds=10), until - 8))


def real(scenario: Scenario, worker: AnsweringWorker) -> Any:
    async def main() -> Any:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(LocalService().serving())
            clock = SystemClock()
            broker = BrokerHandle(clock, {"landlocked": False, "filtered": False})
            broker.start()
            stack.push_async_callback(broker.close)
            attempt = broker.serve(work("get", private_origins=(service.url,)), worker)
            client = await stack.enter_async_context(
                httpx.AsyncClient(transport=BrokeredTransport(attempt.connect))
            )

            def kill() -> None:
                assert broker.pid is not None
                os.kill(broker.pid, signal.SIGKILL)

            return await scenario(Bench(broker, attempt, client, service.url, worker, kill, clock.monotonic))

    return asyncio.run(main())


def simulated(scenario: Scenario, worker: AnsweringWorker, seed: int = 7) -> Any:
    loop = SeededLoop(Random(seed))
    service = Service(loop)
    brokers = Brokers(loop, service, Net(loop))

    async def main() -> Any:
        process, run = SimulatedProcess(loop, "w1"), SimulatedProcess(loop, "w1/zygote/1")

        async def live() -> Any:
            broker, door = brokers.of(brokers.clock()), Door(loop, run)
            attempt: Any = broker.serve(work("get"), worker)
            attempt.open(door)
            client = httpx.AsyncClient(transport=StreamTransport(door))
            kill = lambda: brokers.running[process].kill()  # noqa: E731
            bench = Bench(broker, attempt, client, f"{FREE}/things", worker, kill, loop.time)
            return await scenario(bench)

        found = await process.context.run(loop.create_task, live())
        left = [task for task in loop._tasks if task not in (asyncio.current_task(), None)]
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1)
        KEPT.append(loop)
        return found

    try:
        with brokers.simulated():
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(main())
    finally:
        assert loop.failures == []
        loop.close()


either = pytest.mark.parametrize("carried_out", [real, simulated])
Carried = Callable[[Scenario, AnsweringWorker], Any]


@either
def test_a_request_is_answered_and_counted(carried_out: Carried):
    worker = answering()

    async def scenario(bench: Bench) -> Any:
        found = [await bench.get(), await bench.get()]
        await bench.attempt.end()
        return found

    assert carried_out(scenario, worker) == ["200", "200"]
    assert [(row["requests"], row["statuses"]) for row in worker.sent] == [(2, {"200": 2})]


@either
def test_a_pause_that_lasts_too_long_is_refused(carried_out: Carried):
    async def scenario(bench: Bench) -> Any:
        return await bench.get()

    assert carried_out(scenario, answering(60)) == "RateLimited"


def test_a_request_that_waits_for_a_limit_learns_of_a_pause_of_another_broker():
    """Its token is granted after 2 s; after 1 s its worker has learned of a pause until 5 s."""
    loop_now: list[Callable[[], float]] = []

    def known(call: AskLimits) -> KnownLimits:
        now = loop_now[0]()
        return KnownLimits((Limit("limit", FREE, "all", rate=1.0),), 5.0 - now if 1.0 <= now < 5.0 else 0.0)

    def share(call: AskShare) -> Share:
        now = loop_now[0]()
        return Share(call.want if now > 2.0 else 0, 0, 0.0, wait=0.5, pace=1.0, until=1.0, slots_until=1.0)

    async def scenario(bench: Bench) -> Any:
        loop_now.append(bench.now)
        return await bench.get(), bench.now()

    status, at = simulated(scenario, AnsweringWorker({AskLimits: known, AskShare: share}))

    assert status == "200"
    assert at >= 5.0


@either
def test_without_a_lease_nothing_is_sent_until_it_is_renewed(carried_out: Carried):
    async def scenario(bench: Bench) -> Any:
        found = [await bench.get()]
        renewed(bench.broker, bench.now() - 1)
        await asyncio.sleep(0.2)
        found.append(await bench.get())
        renewed(bench.broker, bench.now() + 60)
        await asyncio.sleep(0.2)
        return [*found, await bench.get()]

    assert carried_out(scenario, answering()) == ["200", "ConnectError", "200"]


@either
def test_a_request_that_waits_ends_with_its_attempt(carried_out: Carried):
    async def scenario(bench: Bench) -> Any:
        waiting = asyncio.ensure_future(bench.post())
        await asyncio.sleep(0.5)
        bench.attempt.stop()
        return await waiting

    assert carried_out(scenario, answering(5)) == "ConnectError"


@either
def test_a_broker_that_dies_is_replaced_and_the_request_passed_again(carried_out: Carried):
    async def scenario(bench: Bench) -> Any:
        waiting = asyncio.ensure_future(bench.get())
        await asyncio.sleep(0.5)
        bench.kill()
        return await waiting

    assert carried_out(scenario, answering(2, 2)) == "200"


@pytest.mark.parametrize("seed", range(12))
def test_what_waits_ends_with_the_lease_of_a_broker_that_stood_still(seed: int):
    """It reads the renewal that came after that end before its own timer is due, or after."""

    async def scenario(bench: Bench) -> Any:
        handle: Any = bench.broker
        broker = handle._process
        renewed(bench.broker, 2.0)
        waiting = asyncio.ensure_future(bench.post())
        await asyncio.sleep(1.0)
        assert broker.broker.waiting() == 1
        broker.process.freeze()
        await asyncio.sleep(2.0)
        renewed(bench.broker, 60.0)
        await asyncio.sleep(0.5)
        broker.process.thaw()
        return await waiting

    assert simulated(scenario, answering(9), seed) == "ConnectError"
