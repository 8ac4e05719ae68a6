"""What a host may ask of the workers, and what they write for it: at one worker or at several."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.running import until
from tests.integration.hosts.conftest import HANDLER, Fleet, end_of, fence, line_of, step_of
from worker.engine.loops.finisher import Finisher
from worker.features.hosts.hosted_runs import HostedRuns
from worker.handlers.calls import GrantedAnswer
from worker.handlers.job import MAX_DESCRIPTION
from worker.ids import OrgId
from worker.model.runs import outcome as outcomes
from worker.model.runs.outcome import EndedAttempt
from worker.pacing import Turns
from worker.store import tables
from worker.telemetry import mask_in_turn
from worker.telemetry.mask_in_turn import AT_ONCE
from worker.telemetry.masking import Masker


@on_either
async def test_a_host_takes_a_run_and_reports_its_end(fleet: Fleet) -> None:
    host = await fleet.host()
    run = fleet.start(since="2029")

    [taken] = await host.take(fleet.one)
    assert (taken.run.id, taken.org, taken.definition) == (run, "org_a", "render")
    assert taken.work.params == {"since": "2029"}
    assert taken.work.token.reveal() == fleet.tokens.texts[0]
    live = fleet.rows.unended(run)
    assert (live["state"], live["worker_id"]) == ("running", host.id)

    assert await host.finish(fleet.one, end_of(taken, peak_memory=5)) == [run]
    assert fleet.rows.live(run) is None
    assert fleet.rows.run(run)["result"] == {"n": 1}
    [attempt] = fleet.rows.attempts(run)
    assert (attempt["worker_id"], attempt["handler"], attempt["peak_memory"]) == (host.id, HANDLER, 5)
    assert attempt["claims"]["org_code"] == "org_a"
    assert [ended.run_id for ended in fleet.one.ended] == [run]


@on_either
async def test_any_worker_goes_on_where_another_stopped(fleet: Fleet) -> None:
    """Taken at one; checkpoint, step, wait, log, progress, token and end at the other."""
    host, taken = await fleet.busy_host()
    run = taken.run.id
    mine, two = fence(taken), fleet.two

    await host.call(two, "save", **mine, handler=HANDLER, data='{"done":3}')
    stored = await host.call(two, "store", steps=[step_of(taken)])
    again = await host.call(two, "store", steps=[step_of(taken)])
    totals = await host.call(two, "totals", **mine)
    line = line_of(taken, "hello")
    await host.call(two, "logs", lines=[line, line])
    await host.call(two, "progress", rows=[{**mine, "progress": {"done": 1, "total": 2, "note": "half"}}])
    await fleet.flush()
    granted = await host.call(two, "token", **mine, handler=HANDLER, fresh=True)
    wait = {"name": "ok", "occurrence": 1, "kind": "answer", "seconds": None, "ask_json": None, "alert": True}
    waits = await host.call(two, "wait", **mine, wait=wait)

    assert stored == again == {"stored": [[run, taken.run.fencing_token]]}
    assert totals == {"last": 1, "bytes": 3}
    assert waits["state"]["state"] == "pending"
    assert GrantedAnswer().read(granted)[0].reveal() in fleet.tokens.texts
    live = fleet.rows.unended(run)
    assert live["progress"]["note"] == "half"
    assert [row["text"] for row in fleet.rows.all(tables.run_logs)] == ["hello"]
    [checkpoint] = fleet.rows.all(tables.checkpoints)
    assert (checkpoint["data"], checkpoint["handler"]) == ({"done": 3}, HANDLER)
    assert await host.finish(two, end_of(taken, outcomes.Parked("answer", "ok"), asks=("ok",))) == [run]
    live = fleet.rows.unended(run)
    assert (live["state"], live["recoveries"]) == ("parked", 0)
    assert [ended.trail.asks for ended in fleet.two.ended] == [("ok",)]


@on_either
async def test_an_end_that_is_sent_again_is_accepted_at_each_worker(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()

    for worker in (fleet.two, fleet.two, fleet.one):
        assert await host.finish(worker, end_of(taken)) == [taken.run.id]
    assert len(fleet.rows.attempts(taken.run.id)) == 1
    [days] = fleet.rows.all(tables.rollup_days)
    assert (days["runs"], days["attempts"]) == (1, 1)


@on_either
async def test_two_workers_that_get_an_end_at_once_write_it_once(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()

    both = await asyncio.gather(*(host.finish(worker, end_of(taken)) for worker in fleet.workers))

    assert both == [[taken.run.id], [taken.run.id]]
    assert len(fleet.rows.attempts(taken.run.id)) == 1
    [days] = fleet.rows.all(tables.rollup_days)
    assert (days["runs"], days["attempts"]) == (1, 1)


@pytest.mark.parametrize("limited", [True, False], ids=["", "control"])
async def test_what_a_host_sends_is_masked_off_the_loop_if_it_is_long(
    fleet: Fleet, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop, loop, mask = list[int](), threading.get_ident(), Masker.mask

    def watched(self: Masker, text: str, org: Any) -> str:
        if threading.get_ident() == loop:
            on_loop.append(len(text))
        return mask(self, text, org)

    monkeypatch.setattr(Masker, "mask", watched)
    if not limited:
        monkeypatch.setattr(mask_in_turn, "AT_ONCE", 10_000_000)
        monkeypatch.setattr(mask_in_turn._masking, "_turns", Turns(10_000_000))
    host, taken = await fleet.busy_host()
    text = "x " * 20_000

    for name, message in {
        "save": {**fence(taken), "handler": HANDLER, "data": json.dumps(text)},
        "store": {"steps": [step_of(taken, result_json=json.dumps(text))]},
        "logs": {"lines": [line_of(taken, "x " * 500, number) for number in range(1, 30)]},
    }.items():
        on_loop.clear()
        await host.call(fleet.one, name, **message)
        assert (sum(on_loop) <= AT_ONCE) == limited, name
    on_loop.clear()
    assert await host.finish(fleet.one, end_of(taken, outcomes.Succeeded(json.dumps(text)))) == [taken.run.id]
    assert (sum(on_loop) <= AT_ONCE) == limited


@pytest.mark.parametrize("once", [True, False], ids=["", "control"])
async def test_an_end_that_comes_again_while_it_is_masked_is_written_once(
    fleet: Fleet, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, written, go = list[str](), list[str](), asyncio.Event()
    put = Finisher.put

    async def mask(text: str, org: OrgId) -> str:
        masked.append(text)
        await go.wait()
        return text

    def put_first(self: Finisher, ended: EndedAttempt) -> None:
        written.append(ended.run_id)
        if len(written) == 1:
            put(self, ended)

    monkeypatch.setattr("worker.engine.attempt.run_log.mask_in_turn", mask)
    monkeypatch.setattr(Finisher, "put", put_first)
    if not once:
        monkeypatch.setattr(HostedRuns, "_write_once", HostedRuns._write)
    host, taken = await fleet.busy_host()

    both = [asyncio.create_task(host.finish(fleet.one, end_of(taken))) for _ in range(2)]
    await until(lambda: len(masked) == 2)
    go.set()
    if once:
        assert await asyncio.gather(*both) == [[taken.run.id], [taken.run.id]]
    else:
        await until(lambda: len(written) == 2)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)

    assert written == [taken.run.id] * (1 if once else 2)


async def test_a_host_that_waits_gets_a_run_as_soon_as_it_is_due(fleet: Fleet) -> None:
    host = await fleet.host()
    waiting = asyncio.create_task(host.take(fleet.one, wait=10.0))
    await asyncio.sleep(0.3)
    assert not waiting.done()

    run = fleet.start()
    assert fleet.one.api is not None
    fleet.one.api.wake()

    assert [taken.run.id for taken in await waiting] == [run]


async def test_a_take_without_runs_ends_after_its_wait(fleet: Fleet) -> None:
    host = await fleet.host()

    assert await host.take(fleet.one, wait=0.2) == []
    assert await host.take(fleet.one, wait=0) == []


@on_either
async def test_no_more_runs_are_taken_than_there_are_slots(fleet: Fleet) -> None:
    host = await fleet.host()
    for _ in range(5):
        fleet.start()

    assert len(await host.take_all(fleet.one, 2)) == 2
    assert len(await host.take(fleet.one, 0, wait=0.2)) == 0
    assert len(await host.take_all(fleet.two, 3)) == 3


async def test_what_another_token_delays_comes_with_a_later_take(fleet: Fleet) -> None:
    """Its host does not hold it, but must not hand it back either."""
    host, run = await fleet.without_token()
    assert (await host.call(fleet.one, "renew"))["owned"] == []
    # Another worker cannot know that it is being prepared.
    assert [row[0] for row in (await host.call(fleet.two, "renew"))["owned"]] == [run]
    second = fleet.start()
    later = asyncio.create_task(host.take(fleet.one, 2, wait=10.0))
    await asyncio.sleep(0.2)
    fleet.tokens.may_answer.set()

    found = {taken.run.id for taken in await later}
    found |= {taken.run.id for taken in await host.take(fleet.one, 2 - len(found), wait=1.0)}
    assert found == {run, second}
    assert {row[0] for row in (await host.call(fleet.one, "renew"))["owned"]} == {run, second}


@on_either
async def test_what_a_stopping_host_never_got_is_handed_back(fleet: Fleet) -> None:
    host, run = await fleet.without_token()

    await host.call(fleet.one, "unregister")

    live = fleet.rows.unended(run)
    assert (live["state"], live["reason"], live["recoveries"]) == ("waiting", "handed_back", 0)


async def test_a_cancelled_run_that_waits_for_its_token_ends_at_the_worker(fleet: Fleet) -> None:
    host, run = await fleet.without_token()
    with fleet.database.transaction() as connection:
        change = tables.live_runs.update().values(
            cancel_requested_at=fleet.database.now(connection), cancel_reason="requested"
        )
        connection.execute(change)

    await host.call(fleet.one, "renew")

    await until(lambda: fleet.rows.live(run) is None)
    assert fleet.rows.run(run)["state"] == "cancelled"


async def test_a_host_hears_nothing_of_a_run_whose_token_is_anothers(fleet: Fleet) -> None:
    host = await fleet.host()
    run = fleet.start()
    fleet.tokens.of_org = "org_b"

    assert await host.take(fleet.one, wait=0.5) == []

    assert (fleet.rows.run(run)["state"], fleet.rows.run(run)["reason"]) == ("refused", "org_mismatch")
    assert [row["outcome"] for row in fleet.rows.attempts(run)] == ["refused"]
    assert (await host.call(fleet.one, "renew"))["owned"] == []


async def test_a_renewed_token_that_is_refused_ends_the_run_so(fleet: Fleet) -> None:
    """Whatever the host reports."""
    host, taken = await fleet.busy_host()
    fleet.tokens.of_org = "org_b"

    answer = await host.call(fleet.one, "token", **fence(taken), handler=HANDLER, fresh=True)
    assert answer["refused"]["reason"] == "org_mismatch"
    assert "org_b" not in str(answer)
    assert await host.finish(fleet.one, end_of(taken)) == [taken.run.id]
    assert fleet.rows.run(taken.run.id)["state"] == "refused"


@on_either
async def test_the_end_counts_by_the_workers_clock(fleet: Fleet) -> None:
    """A host cannot say that its handler began before the token was there, or that it ends tomorrow."""
    host, taken = await fleet.busy_host()

    assert await host.finish(fleet.one, end_of(taken, handler_seconds=1e12)) == [taken.run.id]

    [attempt] = fleet.rows.attempts(taken.run.id)
    assert attempt["started_at"] <= attempt["token_ready_at"] == attempt["handler_started_at"]
    assert attempt["handler_started_at"] <= attempt["ended_at"]


@on_either
async def test_a_result_that_the_database_does_not_take_fails_its_run_alone(fleet: Fleet) -> None:
    host = await fleet.host()
    runs = [fleet.start(), fleet.start()]
    first, second = await host.take_all(fleet.one, 2)

    bad = outcomes.Succeeded('{"n":1e999}') if fleet.database.dialect == "postgresql" else None
    ends = [end_of(first, bad), end_of(second)]
    assert sorted(await host.finish(fleet.one, *ends)) == sorted(runs)
    assert fleet.rows.run(second.run.id)["state"] == "succeeded"


@on_either
async def test_handlers_of_a_host_are_kept_apart_from_those_of_workers(fleet: Fleet) -> None:
    host = await fleet.host()
    entry = {
        **{"name": "gpu.only", "distribution": "gpu", "version": "2", "entry_point": "gpu:only"},
        **{"isolation": "child", "scopes": ["render"], "memory": "1GiB", "pool": "eu", "unknown": 1},
    }
    broken = {
        "name": "gpu.broken",
        "distribution": "gpu",
        "version": "2",
        "entry_point": "gpu:b",
        "error": "no",
    }

    await host.call(fleet.two, "handlers", entries=[entry, broken], complete=True)

    found = {row["name"]: row for row in fleet.rows.all(tables.host_handlers)}
    assert (found["gpu.only"]["scopes"], found["gpu.only"]["memory"]) == (["render"], "1GiB")
    assert (found["gpu.broken"]["error"], found["gpu.broken"]["pool"]) == ("no", "default")
    assert not {row["name"] for row in fleet.rows.all(tables.catalogue)} & {"gpu.only", "gpu.broken"}
    [row] = fleet.rows.all(tables.workers, tables.workers.c.id == host.id)
    assert "gpu.only" in row["handlers"]
    assert row["offers"]["gpu.only"]["scopes"] == ["render"]
    assert "gpu.broken" not in row["handlers"]


async def test_what_a_host_says_of_its_handlers_is_bounded_here_again(fleet: Fleet) -> None:
    """A host need not run our code: its text is a claim."""
    host = await fleet.host()
    entry = {"name": "gpu.said", "distribution": "gpu", "version": "2", "entry_point": "gpu:said"}
    said = [entry | {"description": "\x1b[2J" + "x " * 50_000}, entry | {"name": "gpu.silent"}]

    await host.call(fleet.two, "handlers", entries=said)
    invalid = await host.send(fleet.two, "handlers", {"entries": [entry | {"description": ["x"]}]})

    found = {row["name"]: row["description"] for row in fleet.rows.all(tables.host_handlers)}
    assert found["gpu.silent"] is None
    assert found["gpu.said"].startswith("[2Jx x ")
    assert len(found["gpu.said"]) == MAX_DESCRIPTION
    assert invalid.status_code == 422
    assert "description of gpu.said is not a text" in invalid.text


async def test_a_closed_connection_leaves_what_it_would_have_got_to_the_next_take(fleet: Fleet) -> None:
    host = await fleet.host()
    fleet.tokens.may_answer.clear()
    run = fleet.start()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await host.take(fleet.one, wait=10.0)
    await asyncio.sleep(0.3)  # until the worker has noticed
    fleet.tokens.may_answer.set()

    assert [taken.run.id for taken in await host.take(fleet.one)] == [run]


async def test_a_worker_that_drains_gives_out_no_runs_but_answers_running_ones(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    fleet.one.listener.attempts.draining = True

    assert (await host.send(fleet.one, "take", {"free": {"child": 1}})).status_code == 503
    await host.call(fleet.one, "save", **fence(taken), handler=HANDLER, data="1")
    assert await host.finish(fleet.one, end_of(taken)) == [taken.run.id]


async def test_a_worker_that_drains_ends_the_takes_that_wait(fleet: Fleet) -> None:
    host = await fleet.host()
    waiting = asyncio.create_task(host.take(fleet.one, wait=20.0))
    await asyncio.sleep(0.3)
    fleet.one.listener.attempts.draining = True

    async with asyncio.timeout(5):
        assert await waiting == []


async def test_a_worker_that_stops_lets_what_it_did_not_deliver_wait_again(fleet: Fleet) -> None:
    _, run = await fleet.without_token()

    assert fleet.one.api is not None
    await fleet.one.api.close()

    live = fleet.rows.unended(run)
    assert (live["state"], live["reason"]) == ("waiting", "handed_back")


async def test_renewals_that_hear_at_once_that_the_incarnation_has_ended(fleet: Fleet) -> None:
    host = await fleet.host()
    await host.call(fleet.one, "renew")
    with fleet.database.transaction() as connection:
        connection.execute(tables.workers.update().values(ended_at=fleet.database.now(connection)))

    answers = await asyncio.gather(*(host.call(fleet.one, "renew") for _ in range(5)))

    assert [answer["registered"] for answer in answers] == [False] * 5


async def test_the_versions_are_listed_without_a_token(fleet: Fleet) -> None:
    response = await fleet.client.get(f"{fleet.one.url}/attempts")

    assert response.json() == {"versions": ["v1"]}
