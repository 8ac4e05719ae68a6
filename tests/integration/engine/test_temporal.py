"""The Temporal placer against a real dev server: what it starts, ends and reports, and what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Worker

from tests.fakes.temporal import DevServer
from worker.features.hosts.temporal import EngineUnavailable
from worker.features.hosts.temporal.placer import ACTIVITY, TemporalPlacer, queue_of
from worker.ids import RunId, new_id
from worker.model.runs.hosts import Placement, Ticket


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    running = DevServer(tmp_path_factory.mktemp("temporal"))
    running.start()
    yield running
    running.stop()


def placer_of(
    server: DevServer, *, place_timeout: float = 30.0, installation: str = "here"
) -> TemporalPlacer:
    return TemporalPlacer(
        server.address,
        "default",
        installation=installation,
        place_timeout=timedelta(seconds=place_timeout),
        identity="a test",
    )


def placement(pool: str | None = None, fencing_token: int = 1) -> Placement:
    return Placement(RunId(new_id()), fencing_token, pool or f"pool-{new_id()}", "child")


async def gone(placer: TemporalPlacer, placed: Placement) -> None:
    """Wait until the activity has ended."""
    for _ in range(1000):
        if await placer.describe(placed) == "gone":
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"the activity of run {placed.run_id} has not ended")


class Host:
    """Takes the activities of a queue and holds each until `release`."""

    def __init__(self) -> None:
        self.tickets: asyncio.Queue[str] = asyncio.Queue()
        self.release = asyncio.Event()

    def worker(self, client: Client, queue: str) -> Worker:
        @activity.defn(name=ACTIVITY)
        async def hold(ticket: str) -> None:
            self.tickets.put_nowait(ticket)
            await self.release.wait()

        return Worker(client, task_queue=queue, activities=[hold], identity="a host")


async def test_a_host_gets_the_ticket_of_a_placed_run(server: DevServer) -> None:
    placer, placed, host = placer_of(server), placement(), Host()
    ticket = Ticket.new(placed.run_id, placed.fencing_token)

    await placer.place(placed, ticket)

    assert await placer.describe(placed) == "queued"
    async with host.worker(await Client.connect(server.address), queue_of(placed.pool, "child")):
        assert await asyncio.wait_for(host.tickets.get(), 10) == ticket.reveal()
        assert await placer.describe(placed) == "taken"
        host.release.set()
        await gone(placer, placed)


async def test_a_placement_whose_answer_was_lost_is_not_offered_twice(server: DevServer) -> None:
    placer, placed, host = placer_of(server), placement(), Host()
    ticket = Ticket.new(placed.run_id, placed.fencing_token)

    await placer.place(placed, ticket)
    await placer.place(placed, ticket)

    host.release.set()
    async with host.worker(await Client.connect(server.address), queue_of(placed.pool, "child")):
        await asyncio.wait_for(host.tickets.get(), 10)
        await gone(placer, placed)
        await placer.place(placed, ticket)
        # Once it has ended, its id cannot be used again.
        assert await placer.describe(placed) == "gone"
        assert host.tickets.empty()


async def test_a_withdrawn_placement_reaches_no_host(server: DevServer) -> None:
    placer, withdrawn, host = placer_of(server), placement(), Host()
    await placer.place(withdrawn, Ticket.new(withdrawn.run_id, 1))

    await placer.withdraw(withdrawn)

    assert await placer.describe(withdrawn) == "gone"
    other = placement(withdrawn.pool)
    await placer.place(other, Ticket.new(other.run_id, 1))
    host.release.set()
    async with host.worker(await Client.connect(server.address), queue_of(withdrawn.pool, "child")):
        ticket = Ticket.parse(await asyncio.wait_for(host.tickets.get(), 10))
    assert ticket is not None
    assert (ticket.run_id, host.tickets.qsize()) == (other.run_id, 0)


async def test_withdrawing_what_temporal_does_not_know_is_no_error(server: DevServer) -> None:
    placer, unknown = placer_of(server), placement()

    await placer.withdraw(unknown)

    assert await placer.describe(unknown) == "gone"


async def test_temporal_drops_what_no_host_takes_in_time(server: DevServer) -> None:
    placer, placed = placer_of(server, place_timeout=0.3), placement()

    await placer.place(placed, Ticket.new(placed.run_id, 1))

    await gone(placer, placed)


async def test_two_installations_and_two_fences_share_a_namespace(server: DevServer) -> None:
    placed = placement()
    again = Placement(placed.run_id, 2, placed.pool, placed.isolation)
    here, there = placer_of(server), placer_of(server, installation="there")

    await here.place(placed, Ticket.new(placed.run_id, 1))

    assert await here.describe(placed) == "queued"
    assert await here.describe(again) == "gone"
    assert await there.describe(placed) == "gone"


async def test_temporal_stores_the_ticket_and_the_ids_only(server: DevServer) -> None:
    placer, placed = placer_of(server), placement()
    ticket = Ticket.new(placed.run_id, placed.fencing_token)

    await placer.place(placed, ticket)

    client = await Client.connect(server.address)
    found = await client.get_activity_handle(f"here.{placed.run_id}.1").describe(include_input=True)
    assert await found.input() == [ticket.reveal()]
    assert (found.activity_type, found.task_queue) == (ACTIVITY, f"orgworker.{placed.pool}")
    assert len(found.typed_search_attributes) == 0
    assert ticket.reveal().encode() in server.stored()  # so a search in its file finds what is there


async def test_a_server_that_is_gone_is_named_and_found_again(tmp_path: Path) -> None:
    server = DevServer(tmp_path)
    placer, placed = placer_of(server), placement()
    ticket = Ticket.new(placed.run_id, 1)

    with pytest.raises(EngineUnavailable, match=server.address):
        await placer.check()
    server.start()
    try:
        await placer.place(placed, ticket)
        server.stop()
        with pytest.raises(EngineUnavailable, match=server.address):
            await placer.place(placement(placed.pool), ticket)
        server.start()
        assert await placer.describe(placed) == "queued"
        server.pause()
        with pytest.raises(EngineUnavailable, match=server.address):
            await placer.describe(placed)
        server.resume()
        await placer.check()
    finally:
        server.stop()


@pytest.mark.parametrize(
    "text", ["", "a", "a.b", "a.1", "a.1.", ".1.x", "a.-1.x", "a.٣.x", "a." + "9" * 19 + ".x"]
)
def test_what_is_no_ticket_is_not_read_as_one(text: str) -> None:
    assert Ticket.parse(text) is None


def test_a_ticket_survives_its_text_and_does_not_show_its_secret() -> None:
    ticket = Ticket.new(RunId(new_id()), 7)

    read = Ticket.parse(ticket.reveal())

    assert read is not None
    assert (read.run_id, read.fencing_token, read.sha256) == (ticket.run_id, 7, ticket.sha256)
    assert ticket.reveal().rpartition(".")[2] not in repr(ticket)
