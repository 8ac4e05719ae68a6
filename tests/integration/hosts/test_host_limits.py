"""A host's token floods the workers: with logs, large bodies, incarnations and open calls.

Each attack has a control: it succeeds without the limit.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from tests.conftest import on_either
from tests.fakes.running import until
from tests.integration.hosts.conftest import HANDLER, Fleet, Host, Worker, end_of, fence, line_of, step_of
from worker.clock import to_text
from worker.engine.runners.output import CAP, LINE_COST, LINE_LIMIT, RunOutput
from worker.errors import Busy
from worker.features.hosts import attempt_api, checker, sent, wire
from worker.features.hosts import listener as web
from worker.features.hosts.body_check import ENDING, FRAME
from worker.features.hosts.sent import END, LAST_LINE, TOO_MUCH, TRUSTED, LineRow
from worker.handlers.parts import Count, row_of
from worker.handlers.steps import RESULT_LIMIT
from worker.model.runs import outcome as outcomes
from worker.model.runs.worker_ends import LOST_LINE
from worker.store import hosts as store_hosts
from worker.store import tables
from worker.telemetry.events import Emitted

MIB = 1024 * 1024


async def status(host: Host, worker: Worker, name: str, message: Any = b"{}") -> int:
    return (await host.send(worker, name, message)).status_code


# the log of an attempt


def lines(taken: wire.Taken, first: int, count: int, text: str = "x" * 1000) -> list[dict[str, Any]]:
    return [line_of(taken, text, first + n) for n in range(count)]


def stored_log(fleet: Fleet) -> tuple[int, list[dict[str, Any]]]:
    """The bytes of the log of the only run, and its lines."""
    rows = fleet.rows.all(tables.run_logs)
    return sum(len(row["text"].encode()) + LINE_COST for row in rows), rows


async def flood(fleet: Fleet, host: Host, taken: wire.Taken) -> tuple[int, list[dict[str, Any]]]:
    """600 KB of log, to both workers in turns."""
    for call in range(6):
        worker = fleet.workers[call % 2]
        text = "x" * 10_000
        assert await status(host, worker, "logs", {"lines": lines(taken, 10 * call + 1, 10, text)}) == 200
    return stored_log(fleet)


@on_either
async def test_the_log_of_an_attempt_is_cut_whichever_workers_get_it(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()

    size, rows = await flood(fleet, host, taken)

    assert CAP < size <= sent.MAX_LOG + len(fleet.workers) * TRUSTED
    assert (rows[-1]["seq"], rows[-1]["level"], rows[-1]["text"]) == (LAST_LINE, "warning", TOO_MUCH)
    assert await flood(fleet, host, taken) == (size, rows)


async def test_without_the_limit_all_of_it_is_stored(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(sent, "MAX_LOG", 2**40)
    host, taken = await fleet.busy_host()

    size, rows = await flood(fleet, host, taken)

    assert (size, len(rows)) == (60 * 10_016, 60)


@on_either
async def test_a_worker_that_did_not_ask_would_count_for_itself_alone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the count in the database: with it off, each worker takes a whole log."""
    monkeypatch.setattr(sent, "TRUSTED", 2**40)
    monkeypatch.setattr(sent, "MAX_LOG", 100_000)
    host, taken = await fleet.busy_host()
    for first in range(1, 180, 90):
        for call in range(3):
            worker = fleet.workers[first > 1]
            message = {"lines": lines(taken, first + 30 * call, 30)}
            assert await status(host, worker, "logs", message) == 200

    assert stored_log(fleet)[0] > 150_000


async def test_the_whole_log_of_a_local_run_is_taken_from_a_host(fleet: Fleet) -> None:
    """Also if its bytes are no text, or its lines are sent again by a host that got no answer."""
    host, taken = await fleet.busy_host()
    given: list[dict[str, Any]] = []

    def sink(level: str, source: str, text: str, at: Any) -> None:
        line = {"at": to_text(at), "level": level, "source": source, "text": text}
        given.append({**fence(taken), "seq": len(given) + 1, **line})

    output = RunOutput(sink, fleet.one.tools.clock)
    for _ in range(300):
        output.feed("stdout", (b"\xff" * 30 + b"abc \xe2\x82\xac" * 10 + b"\n") * 20)
    output.close()
    assert given and any("were dropped" in line["text"] for line in given)
    for start in range(0, len(given), 500):
        for worker in (fleet.one, fleet.two):
            body = {"lines": given[start : start + 500]}
            assert await status(host, worker, "logs", body) == 200

    stored = [(row["seq"], row["text"]) for row in stored_log(fleet)[1]]
    assert stored == [(line["seq"], line["text"]) for line in given]


async def test_a_host_neither_writes_the_last_line_nor_one_that_is_too_long(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    places = (LAST_LINE, LOST_LINE, LOST_LINE - 1)
    last, lost, before = ({"lines": lines(taken, seq, 1, "x" * 60_000)} for seq in places)

    assert await status(host, fleet.one, "logs", last) == 422
    assert await status(host, fleet.one, "logs", lost) == 422
    assert await status(host, fleet.one, "logs", before) == 200

    [row] = stored_log(fleet)[1]
    assert (row["seq"], len(row["text"])) == (LOST_LINE - 1, LINE_LIMIT)


@dataclass(frozen=True, slots=True)
class AnyLine(LineRow):
    """A line in any place."""

    seq: Annotated[int, Count(LAST_LINE)]


@on_either
@pytest.mark.parametrize("is_reserved", [True, False])
async def test_a_host_cannot_take_the_place_of_the_line_that_says_it_crashed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, is_reserved: bool
) -> None:
    if not is_reserved:
        monkeypatch.setattr(attempt_api, "LINE", row_of(AnyLine))
    host, taken = await fleet.busy_host()
    line = {"lines": lines(taken, LOST_LINE, 1, "all is well")}

    assert await status(host, fleet.one, "logs", line) == (422 if is_reserved else 200)
    with fleet.database.transaction() as connection:
        connection.execute(tables.workers.update().values(lease_until=tables.workers.c.started_at))
    await fleet.one.store.recover(lambda: True)

    [row] = stored_log(fleet)[1]
    crashed = f"attempt 1 was lost: worker {host.id} crashed"
    assert row["text"].startswith(crashed if is_reserved else "all is well")


async def test_progress_is_written_as_often_as_that_of_a_local_run(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, taken = await fleet.busy_host()
    written: list[int] = []
    real = fleet.one.store.write_progress

    async def write(rows: Any) -> None:
        written.append(len(rows))
        await real(rows)

    monkeypatch.setattr(fleet.one.store, "write_progress", write)
    for done in range(30):
        rows = [{**fence(taken), "progress": {"done": done, "total": 30, "note": None}}]
        await host.call(fleet.one, "progress", rows=rows)
    await fleet.flush()

    live = fleet.rows.unended(taken.run.id)
    assert (written, live["progress"]["done"]) == ([1], 29)


# large bodies


def longest_parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The longest JSON that this process, which is the worker, parses from now on."""
    sizes = [0]
    real = json.loads

    def loads(text: Any, **given: Any) -> Any:
        sizes.append(len(text))
        return real(text, **given)

    monkeypatch.setattr(json, "loads", loads)
    return lambda: max(sizes)


def large_calls(taken: wire.Taken) -> Mapping[str, Mapping[str, Any]]:
    """Valid calls with as large texts as they may have."""
    text = f'"{"é" * (RESULT_LIMIT // 2 - 10)}"'
    value = json.dumps({"text": 'a "quoted" word ' * 50_000, "lists": [[]] * 20_000}, separators=(",", ":"))
    assert MIB * 0.8 < len(value) < MIB
    return {
        "save": {**fence(taken), "handler": HANDLER, "data": value},
        "store": {"steps": [step_of(taken, result_json=text, seq=n + 1) for n in range(3)]},
        "finish": {"ends": [END.write(end_of(taken, outcomes.Succeeded(value)))]},
    }


async def test_a_worker_never_parses_a_large_body_itself(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, taken = await fleet.busy_host()
    calls = large_calls(taken)
    longest = longest_parsed(monkeypatch)
    for name, message in calls.items():
        assert await status(host, fleet.one, name, message) == 200, name

    assert longest() <= wire.OWN_BYTES
    monkeypatch.undo()
    [checkpoint] = fleet.rows.all(tables.checkpoints)
    steps = fleet.rows.all(tables.steps)
    for row in (checkpoint["data"], fleet.rows.run(taken.run.id)["result"]):
        assert row == json.loads(calls["save"]["data"])
    assert [row["result"] for row in steps] == ["é" * (RESULT_LIMIT // 2 - 10)] * 3


async def test_without_the_other_process_a_worker_parses_all_of_a_body(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    host, taken = await fleet.busy_host()
    calls = large_calls(taken)
    monkeypatch.setattr(web, "OWN_BYTES", 2**30)
    longest = longest_parsed(monkeypatch)

    for name, message in calls.items():
        assert await status(host, fleet.one, name, message) == 200, name
    assert longest() > MIB


async def test_a_large_body_that_is_no_call_is_refused_and_the_next_one_is_answered(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, taken = await fleet.busy_host()
    longest = longest_parsed(monkeypatch)
    end = END.write(end_of(taken))
    wrong = {**end, "fencing_token": -1, "sealed": "x" * 40_000}

    for body in (
        b'{"ends":[' + b"[]," * 5_500_000 + b"[]]}",
        b"[" * 200_000,
        b"\xff" * 200_000,
        json.dumps({"ends": [wrong]}).encode(),
        json.dumps({"ends": [end] * 2001}).encode(),
    ):
        response = await host.send(fleet.one, "finish", body)
        assert (response.status_code, response.json()["code"]) == (422, "invalid"), body[:20]
    deep = {**fence(taken), "handler": HANDLER, "data": "[" * 300 + "]" * 300 + " " * 40_000}
    assert await status(host, fleet.one, "save", deep) == 422
    assert longest() <= wire.OWN_BYTES
    assert await status(host, fleet.one, "finish", large_calls(taken)["finish"]) == 200


async def test_a_body_that_ends_the_process_is_refused_and_another_process_is_started(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    host, taken = await fleet.busy_host()
    given = fleet.one.listener.attempts.checker
    monkeypatch.setattr(given, "_command", ("/bin/true",))

    assert await status(host, fleet.one, "save", large_calls(taken)["save"]) == 422
    monkeypatch.setattr(given, "_command", checker.COMMAND)
    assert await status(host, fleet.one, "save", large_calls(taken)["save"]) == 200
    assert [(one.fields["call"]) for one in emitted if one.event.name == "checker.died"] == ["save"]


async def test_a_check_that_takes_too_long_is_tried_later(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, taken = await fleet.busy_host()
    given = fleet.one.listener.attempts.checker
    monkeypatch.setattr(given, "_command", ("/bin/sleep", "60"))
    monkeypatch.setattr(given, "_deadline", 0.1)

    response = await host.send(fleet.one, "save", large_calls(taken)["save"])
    assert (response.status_code, response.json()["code"]) == (503, "busy")
    monkeypatch.undo()
    assert await status(host, fleet.one, "save", large_calls(taken)["save"]) == 200


async def test_a_process_that_writes_without_end_is_killed_and_closed() -> None:
    """Asyncio does not read all of it, and so would wait for the end of the process for good."""
    endless = f"import sys\nwhile True: sys.stdout.buffer.write({FRAME.pack(ENDING, 0)!r} * 10_000)"
    checking = checker.Checker((sys.executable, "-c", endless), deadline=1.0)
    check = asyncio.create_task(checking.check("save", b"{}"))
    while (process := checking._process) is None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)

    async with asyncio.timeout(20):
        with pytest.raises(Busy, match="not checked in time"):
            await check
        await checking.close()

    assert process._transport.is_closing()  # type: ignore[attr-defined]


async def test_a_worker_that_stops_leaves_large_bodies_to_others(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    body = large_calls(taken)["finish"]
    await fleet.one.listener.attempts.checker.close()

    response = await host.send(fleet.one, "finish", body)
    assert (response.status_code, response.json()["code"]) == (503, "busy")
    # The control: the end is not lost, and one that still checks takes it.
    fleet.one.listener.attempts.checker = checker.Checker()
    assert await status(host, fleet.one, "finish", body) == 200


async def test_a_body_beyond_its_calls_limit_is_refused_unread(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await fleet.host()
    read: list[int] = []

    async def check(name: str, body: bytes) -> Any:
        read.append(len(body))
        raise wire.Malformed("read")

    monkeypatch.setattr(fleet.one.listener.attempts.checker, "check", check)
    for name in (*wire.BODY_BYTES, "take", "register", "token", "nothing"):
        read.clear()
        most = wire.BODY_BYTES.get(name, wire.OWN_BYTES)
        assert most <= MIB or name in ("finish", "store", "save")

        response = await host.send(fleet.one, name, b" " * (most + 1))
        # Hosts of the previous release send their lines again and again, unless the run is lost.
        assert response.status_code == (409 if name in ("logs", "progress") else 413), name
        assert read == [], name
        # The control: one byte less is read.
        assert await status(host, fleet.one, name, b" " * most) == 422, name
        assert read == ([most] if most > wire.OWN_BYTES else []), name


async def test_one_token_holds_one_large_body_and_others_have_theirs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "LARGE_WAIT", 0.05)
    mine, other = await fleet.host("h1"), await fleet.host("h2")
    entered, may_go = asyncio.Event(), asyncio.Event()

    async def check(name: str, body: bytes) -> Any:
        entered.set()
        await may_go.wait()
        raise wire.Malformed("checked")

    monkeypatch.setattr(fleet.one.listener.attempts.checker, "check", check)
    body = b" " * (wire.OWN_BYTES + 1)
    first = asyncio.create_task(status(mine, fleet.one, "save", body))
    await entered.wait()
    entered.clear()

    assert await status(mine, fleet.one, "save", body) == 503
    theirs = asyncio.create_task(status(other, fleet.one, "save", body))
    await entered.wait()
    may_go.set()
    assert await asyncio.gather(first, theirs) == [422, 422]
    # The control: once it is free, the same token gets a place.
    assert await status(mine, fleet.one, "save", body) == 422


# calls and incarnations


async def test_one_token_does_not_take_all_calls(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = await fleet.host("h1"), await fleet.host("h2")
    monkeypatch.setattr(web, "MAX_CALLS_OF_A_TOKEN", 2)
    attempts = fleet.one.listener.attempts
    waiting = [asyncio.create_task(mine.take(fleet.one, wait=5.0)) for _ in range(2)]
    await until(lambda: attempts._calls.total() == 2)

    assert await status(mine, fleet.one, "renew") == 503
    assert await status(other, fleet.one, "renew") == 200
    monkeypatch.setattr(web, "MAX_CALLS_OF_A_TOKEN", 3)
    assert await status(mine, fleet.one, "renew") == 200
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await until(lambda: not attempts._calls)


REGISTRATION = wire.REGISTRATION.write(wire.Registration("gpu1", 7, "1", {"child": 10, "inline": 10}))


async def register(host: Host, fleet: Fleet, times: int) -> list[int]:
    calls = (status(host, fleet.workers[n % 2], "register", REGISTRATION) for n in range(times))
    return sorted(await asyncio.gather(*calls))


@on_either
@pytest.mark.parametrize("limit", ["MAX_BEGUN", "MAX_ALIVE"])
async def test_the_incarnations_of_a_token_are_limited_also_at_once_at_several_workers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    host, other = await fleet.host("h1"), await fleet.host("h2")
    # The control: without the limit.
    assert await register(host, fleet, 5) == [200] * 5
    monkeypatch.setattr(store_hosts, limit, 9)

    assert await register(host, fleet, 6) == [200] * 3 + [429] * 3

    response = await host.send(fleet.one, "register", REGISTRATION)
    assert response.json()["code"] == "too_many_requests"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert await register(other, fleet, 1) == [200]
    # Those that it has go on.
    assert await status(host, fleet.one, "renew") == 200


@on_either
async def test_incarnations_that_ended_or_lost_their_lease_make_room(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await fleet.host()
    monkeypatch.setattr(store_hosts, "MAX_ALIVE", 1)
    assert await register(host, fleet, 1) == [429]

    await host.call(fleet.one, "unregister")
    await host.register(fleet.one)
    assert await register(host, fleet, 1) == [429]
    with fleet.database.transaction() as connection:
        lost = tables.workers.c.started_at
        connection.execute(tables.workers.update().values(lease_until=lost))
    assert await register(host, fleet, 1) == [200]
