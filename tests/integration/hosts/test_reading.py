"""While a worker still reads its own handlers it takes in no host; the hosts that it knows go on.

An entry point may hang for as long as it likes: no host's lease waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.hosts.conftest import ENTRIES, HANDLER, Fleet, Host, end_of, fence
from worker.clock import SystemClock
from worker.engine.loops import reading as module
from worker.engine.loops.reading import CatalogueReader
from worker.features.hosts import wire
from worker.handlers.installed import Distribution
from worker.store import tables
from worker.wiring.catalogue import StoredCatalogue

REGISTRATION = wire.REGISTRATION.write(wire.Registration("gpu1", 7, "1", {"child": 10}, ENTRIES))
OFFER = {"entries": [wire.ENTRY.write(entry) for entry in ENTRIES]}


class Reading:
    """The first worker reads its handlers, one of whose entry points hangs until `loaded` is set."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded, self.read = asyncio.Event(), asyncio.Event()
        attempts = fleet.one.listener.attempts

        async def read(**_: Any) -> AsyncIterator[Any]:
            yield ENTRIES[:1]
            await self.loaded.wait()
            yield ENTRIES[1:]

        def on_read() -> None:
            attempts.catalogue_read()
            self.read.set()

        monkeypatch.setattr(module, "read_catalogue", read)
        monkeypatch.setattr(module, "distributions", lambda: [Distribution("acme", "1", ())])
        fleet.one.store.register(version="1", handlers=[], capacity={})
        attempts.begin(attempts.api)
        reader = CatalogueReader(
            StoredCatalogue(fleet.database, fleet.one.store, SystemClock()),
            fleet.one.tools.handlers,
            on_offered=lambda: None,
            pass_environment=(),
            command=(),
            on_read=on_read,
        )
        self._task = asyncio.create_task(reader.run())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def lease_of(fleet: Fleet, host: Host) -> Any:
    [row] = fleet.rows.all(tables.workers, tables.workers.c.id == host.id)
    return row["lease_until"]


async def test_a_host_keeps_its_lease_and_its_runs_while_an_entry_point_hangs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, new = await fleet.host("h1"), await fleet.host("h2")
    reading = Reading(fleet, monkeypatch)
    run, lease = fleet.start(), lease_of(fleet, host)

    for name, message in (("register", REGISTRATION), ("handlers", OFFER)):
        response = await new.send(fleet.one, name, message)
        assert (response.status_code, response.json()["code"]) == (503, "busy"), name
        assert int(response.headers["retry-after"]) > 0
        # Another worker may have read its own.
        assert (await new.send(fleet.two, name, message)).status_code == 200

    [taken] = await host.take(fleet.one)
    assert (await host.call(fleet.one, "renew"))["registered"]
    assert lease_of(fleet, host) > lease
    for name, given in (
        *(("token", {"handler": HANDLER}), ("save", {"handler": HANDLER, "data": "1"})),
        *(
            ("steps", {}),
            ("totals", {}),
            ("budgets", {}),
            ("logs", {"lines": []}),
            ("hand_back", {"runs": []}),
        ),
    ):
        await host.call(fleet.one, name, **fence(taken), **given)
    assert await host.finish(fleet.one, end_of(taken)) == [run]
    assert not reading.read.is_set()

    reading.loaded.set()
    await reading.read.wait()
    await new.register(fleet.one)
    await new.call(fleet.one, "handlers", **OFFER)
    await reading.stop()


async def test_if_the_whole_api_waited_for_the_handlers_no_lease_would_be_renewed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a worker without an API until then answers no renewal, and hosts freeze."""
    host = await fleet.host()
    monkeypatch.setattr(fleet.one.listener.attempts, "api", None)
    lease = lease_of(fleet, host)

    assert (await host.send(fleet.one, "renew")).status_code == 503
    assert lease_of(fleet, host) == lease


async def test_without_waiting_a_host_offers_what_the_worker_has_not_read_yet(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: its handlers come before those of the worker, as they did in each restart."""
    host = await fleet.host(entries=())
    reading = Reading(fleet, monkeypatch)
    fleet.one.listener.attempts.reading = False

    await host.call(fleet.one, "handlers", **OFFER)

    assert not reading.read.is_set()
    await reading.stop()


async def test_a_worker_that_drains_while_it_reads_still_answers_its_hosts(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await fleet.host()
    reading = Reading(fleet, monkeypatch)
    fleet.one.listener.attempts.draining = True

    assert (await host.call(fleet.one, "renew"))["registered"]
    assert (await host.send(fleet.one, "take", {"wait": 0})).status_code == 503
    await reading.stop()
