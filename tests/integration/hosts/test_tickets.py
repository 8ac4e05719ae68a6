"""What a host gets for a ticket: the run that was placed with it, once, however long its token takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import sha256

import pytest

from tests.conftest import on_either
from tests.integration.hosts.conftest import HANDLER, LEASE, Fleet, Host, end_of
from worker.features.hosts import delivery, wire
from worker.ids import RunId, WorkerId, new_id
from worker.model.runs.hosts import Ticket
from worker.model.runs.run import OwnedRun
from worker.store import placements, workers
from worker.store.ring_walk import RingWalk


def place(fleet: Fleet) -> tuple[RunId, Ticket]:
    """A run of the pool `eu` that another worker has placed; a host of it must be there."""
    placer = WorkerId(new_id())
    with fleet.database.transaction() as connection:
        identity = {"host": "w", "pid": 1, "version": "1"}
        workers.register(connection, placer, lease=LEASE, handlers=(), capacity={}, **identity)
    run = fleet.start("elsewhere")
    walk = RingWalk(fleet.database, placer, pools=("eu",), placing=True)
    [admitted] = walk.admit({HANDLER: None}, {"child": 1, "inline": 0})
    ticket = Ticket.new(run, admitted.fencing_token)
    with fleet.database.transaction() as connection:
        placements.place(connection, placer, "eu", {(run, admitted.fencing_token): ticket.sha256})
    return run, ticket


async def take_by(
    host: Host, fleet: Fleet, ticket: Ticket, *, two: bool = False, wait: float = 5.0
) -> tuple[list[wire.Taken], bool]:
    worker = fleet.two if two else fleet.one
    answer = await host.call(worker, "take", ticket=ticket.reveal(), wait=wait)
    return [wire.taken_of(taken) for taken in answer["attempts"]], answer["again"]


@on_either
async def test_a_ticket_is_taken_at_any_worker_once(fleet: Fleet) -> None:
    host, other = await fleet.host(pool="eu"), await fleet.host("h2", pool="eu")
    run, ticket = place(fleet)

    [taken], again = await take_by(host, fleet, ticket, two=True)

    assert (taken.run.id, taken.run.pool, again) == (run, "eu", False)
    for each, two in ((host, True), (host, False), (other, False)):
        assert await take_by(each, fleet, ticket, two=two) == ([], False)
    assert await host.finish(fleet.one, end_of(taken)) == [run]


async def test_a_host_asks_again_while_the_token_is_on_its_way(fleet: Fleet) -> None:
    host = await fleet.host(pool="eu")
    run, ticket = place(fleet)
    fleet.tokens.may_answer.clear()

    assert await take_by(host, fleet, ticket, wait=0.1) == ([], True)
    registered, owned = wire.renewed_of(await host.call(fleet.one, "renew"))
    fleet.tokens.may_answer.set()
    [taken], again = await take_by(host, fleet, ticket)

    # What the host has not got yet it does not hand back.
    assert (registered, owned, again) == (True, [], False)
    assert taken.run.id == run


@on_either
async def test_a_run_that_the_host_no_longer_asks_for_waits_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await fleet.host(pool="eu")
    run, ticket = place(fleet)
    fleet.tokens.may_answer.clear()
    assert await take_by(host, fleet, ticket, wait=0.1) == ([], True)
    monkeypatch.setattr(delivery, "TICKET_AGE", 0.05)
    await asyncio.sleep(0.1)

    await host.call(fleet.one, "renew")

    live = fleet.rows.unended(run)
    assert (live["state"], live["reason"], live["recoveries"]) == ("waiting", "handed_back", 0)
    fleet.tokens.may_answer.set()
    assert await take_by(host, fleet, ticket) == ([], False)


async def test_a_run_that_the_host_asks_for_as_it_is_handed_back_is_not_delivered(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that stood still renews its lease and asks for its ticket at once."""
    host = await fleet.host(pool="eu")
    run, ticket = place(fleet)
    fleet.tokens.may_answer.clear()
    assert await take_by(host, fleet, ticket, wait=0.1) == ([], True)
    fleet.tokens.may_answer.set()
    monkeypatch.setattr(delivery, "TICKET_AGE", -1.0)
    assert fleet.one.api is not None
    store = fleet.one.api.shared.store
    hand_back, got = store.hand_back, []

    async def asked_meanwhile(worker: WorkerId, owned: Sequence[OwnedRun]) -> set[RunId]:
        got.append(await take_by(host, fleet, ticket))
        return await hand_back(worker, owned)

    monkeypatch.setattr(store, "hand_back", asked_meanwhile)

    await host.call(fleet.one, "renew")

    assert got == [([], False)]
    assert fleet.rows.unended(run)["state"] == "waiting"


async def test_the_ticket_of_a_host_that_has_gone_is_not_taken(fleet: Fleet) -> None:
    """Its call waited while the worker was busy; a run taken for nobody would start again after a lease."""
    host = await fleet.host(pool="eu")
    run, ticket = place(fleet)
    caller = await fleet.one.api.caller(sha256(host.token.encode()).hexdigest(), host.id, "take")

    answer = await fleet.one.api.call(caller, "take", {"ticket": ticket.reveal(), "wait": 0.1}, lambda: True)

    assert answer == b'{"attempts":[],"again":true}'
    live = fleet.rows.live(run)
    assert live is not None and str(live["worker_id"]) != host.id
    # The control: the same call of one that is there starts it.
    [taken], _ = await take_by(host, fleet, ticket)
    assert taken.run.id == run
