"""Brokers that do not start, never answer, or die at once: what runs and their worker see of that."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock
from tests.fakes.running import until, work
from tests.integration.egress.conftest import CONFINED, MODULE
from tests.integration.egress.service import Service
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal, Work
from worker.engine.runners.egress import STARVED, unless_starved
from worker.engine.runners.inline import Inline
from worker.errors import ConfigurationError
from worker.features.egress import handle, restarts
from worker.features.egress.handle import BrokerHandle
from worker.kit.broker import broker_fault
from worker.model.egress import Egress
from worker.model.runs.outcome import Error, Failed, HandedBack, Succeeded, TimedOut
from worker.process.confinement import Confinement
from worker.settings import Settings
from worker.telemetry.events import Emitted
from worker.wiring import start

pytestmark = pytest.mark.anyio
WORKING = handle.COMMAND
FAILED = Failed(Error("ValueError", "no"), "error")


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().serving() as service:
        yield service


def broken(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """From now on brokers run this instead."""
    monkeypatch.setattr(handle, "COMMAND", (sys.executable, "-c", code))


def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "COMMAND", WORKING)


def given(service: Service, **fields: Any) -> Work:
    common = {"entry_point": f"{MODULE}:get", "api_origins": (service.url,), "egress": Egress((("api",),))}
    return work("get", **{**common, "params": {"url": f"{service.url}/things"}, **fields})


@pytest.fixture
async def pool(plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ChildPool]:
    """A pool whose broker ends at its start."""
    broken(monkeypatch, "raise SystemExit(3)")
    broker = BrokerHandle(SystemClock(), CONFINED)
    pool = ChildPool(SystemClock(), sandbox=Planner([]).rules([], []), broker=broker)
    pool.start()
    pool.attach()
    yield pool
    await pool.close()


async def test_a_broker_that_does_not_start_is_a_fault_until_one_does(
    pool: ChildPool, service: Service, monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    """A run that has sent something meanwhile waits for it."""
    assert pool.broker is not None
    await until(lambda: pool.broker.fault == "exit code 3")
    running = asyncio.create_task(pool.run(given(service), AnsweringWorker(), StopSignal()))
    await asyncio.sleep(0.3)
    assert not running.done()

    mended(monkeypatch)
    assert isinstance(await running, Succeeded)
    assert pool.broker.fault is None
    died = [one.fields for one in emitted if one.event.name == "broker.died"]
    assert 2 <= len(died) <= 10
    assert {one["reason"] for one in died} == {"exit code 3"}
    assert [one.event.name for one in emitted if one.event.name.startswith("broker.")][-1] == "broker.started"


@pytest.mark.parametrize("runner", ["child", "inline"])
async def test_a_run_that_ends_for_want_of_a_broker_is_not_counted(
    pool: ChildPool, service: Service, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    """With a broker that is up and a service that does not answer, the same run has timed out."""

    async def outcome() -> object:
        stop = StopSignal()
        chosen = pool if runner == "child" else Inline(SystemClock(), broker=pool.broker)
        running = asyncio.create_task(chosen.run(given(service, egress=Egress()), AnsweringWorker(), stop))
        await asyncio.sleep(1.0)
        stop.request("timeout", 0.2)
        return await running

    assert pool.broker is not None
    await until(lambda: pool.broker.fault is not None)
    assert await outcome() == HandedBack(STARVED)

    mended(monkeypatch)
    await until(lambda: pool.broker.fault is None)
    service.pause()
    assert isinstance(await outcome(), TimedOut)


async def test_an_attempt_that_ended_while_no_broker_was_up_is_not_in_the_next_one(
    pool: ChildPool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are asked for in the name of the org's first attempt: a later one would wait for it for good."""
    mended(monkeypatch)
    broker = pool.broker
    assert isinstance(broker, BrokerHandle)
    await until(lambda: broker._restarts.is_up)
    attempt = broker.serve(given(service), AnsweringWorker())
    with attempt.connect():
        assert broker._process is not None
        broker._process.kill()
        await until(lambda: broker._process is None)
        await attempt.end()
    await until(lambda: broker._restarts.is_up)

    async with asyncio.timeout(10):
        assert isinstance(await pool.run(given(service), AnsweringWorker(), StopSignal()), Succeeded)


async def test_a_door_is_given_once_there_is_a_descriptor_for_it(
    pool: ChildPool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended(monkeypatch)
    assert pool.broker is not None
    await until(lambda: pool.broker.fault is None and pool.broker._restarts.is_up)
    refusals = [OSError(errno.EMFILE, "too many open files")] * 2

    def dup(descriptor: int) -> int:
        if refusals:
            raise refusals.pop()
        return os.dup(descriptor)

    monkeypatch.setattr(handle, "os", SimpleNamespace(dup=dup, getpid=os.getpid))
    assert isinstance(await pool.run(given(service), AnsweringWorker(), StopSignal()), Succeeded)
    assert not refusals


async def test_a_failure_long_after_the_broker_is_back_counts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "raise SystemExit(3)")
    clock = ManualClock()
    broker = BrokerHandle(clock, CONFINED)
    broker.start()
    broker.attach()
    await until(lambda: broker.fault is not None)
    attempt = broker.serve(given(service), AnsweringWorker())
    attempt.connect().close()
    assert unless_starved(FAILED, attempt) == HandedBack(STARVED)

    mended(monkeypatch)
    await until(lambda: broker.fault is None)
    clock.advance(handle.AFTERWARDS - 1)
    assert unless_starved(FAILED, attempt) == HandedBack(STARVED)
    clock.advance(2)
    assert unless_starved(FAILED, attempt) == FAILED
    attempt.drop()
    await broker.close()


async def test_one_that_never_answers_is_killed_and_replaced(
    plugin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "START_WITHIN", 0.3)
    broken(monkeypatch, "import time; time.sleep(60)")
    broker = BrokerHandle(SystemClock(), CONFINED)
    broker.start()
    broker.attach()
    first = broker.pid

    await until(lambda: broker.fault is not None)
    assert broker.fault == restarts.SILENT
    assert broker.pid != first
    await broker.close()


async def test_one_that_cannot_even_be_executed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "COMMAND", ("/nowhere/python",))
    broker = BrokerHandle(SystemClock(), CONFINED)
    broker.start()
    broker.attach()

    await until(lambda: broker.fault is not None)
    assert str(broker.fault).startswith("FileNotFoundError: ")
    mended(monkeypatch)
    await until(lambda: broker.fault is None)
    await broker.close()


async def test_one_that_dies_once_it_is_up_is_not_started_in_a_busy_loop(
    monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    told = '{"op": "ready"}'
    broken(monkeypatch, f"import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'{told}')")
    broker = BrokerHandle(SystemClock(), CONFINED)
    broker.start()
    broker.attach()
    await asyncio.sleep(4.0)
    assert broker.fault is None
    await broker.close()

    deaths = sum(one.event.name == "broker.died" for one in emitted)
    # 0.05, 0.1, 0.2, 0.4, and then one each half a second at most.
    assert 4 <= deaths <= 4 + 4.0 / restarts.LONGEST_AFTER_UP


@pytest.fixture
def no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


def test_a_broker_that_cannot_start_says_why(no_certificate: None) -> None:
    """Which is what `doctor` reports."""
    assert str(broker_fault(Settings(), SystemClock(), Confinement("off", 0))).startswith("SSLError: ")


def test_one_that_can_has_no_fault() -> None:
    assert broker_fault(Settings(), SystemClock(), Confinement("off", 0)) is None


@pytest.mark.parametrize("kind", ["worker", "host"])
def test_a_process_that_requires_sealed_runs_does_not_start_without_a_broker(
    no_certificate: None, kind: Any
) -> None:
    def started(network: str) -> start.ProcessTools:
        settings = Settings(execution={"network": network})
        nothing: Any = None
        broker = BrokerHandle(SystemClock(), {"landlocked": False, "filtered": False})
        confinement = Confinement("off", 0)
        return start.start(
            kind, settings, SystemClock(), nothing, nothing, confinement, broker, collect=(700, 10, 10)
        )

    with pytest.raises(ConfigurationError, match='"require": the broker, .* does not start: SSLError') as one:
        started("require")
    assert "SSL_CERT_FILE" in str(one.value.fix)
    asyncio.run(started("auto").children.close())


def test_one_that_ends_without_a_word_has_its_exit_code_as_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch, "raise SystemExit(3)")
    assert broker_fault(Settings(), SystemClock(), Confinement("off", 0)) == "exit code 3"
