"""Attempts end: nothing that is queued is sent after a stop or a freeze, and nothing of a value is kept."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes.running import until
from tests.integration.egress.broker_in_test import (
    KEY_PLACEHOLDER,
    Stream,
    Worker,
    asks_token,
    broker_in_test,
    get,
    head,
    kinds,
    listening,
    text_of,
)
from tests.integration.egress.service import Service
from worker.handlers.frames import DATA, END, FAILED, frame

pytestmark = pytest.mark.anyio
LATE = 0.1
# Only parts of them are in this module.
SECRET = "".join(("sk-", "canary-", "9f8e7d6c5b4a"))
TOKEN = "".join(("token-", "canary-", "0a1b2c3d4e5f"))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().serving() as service:
        yield service


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with broker_in_test() as worker:
        worker.tokens = ["token-one"]
        yield worker


def stop(worker: Worker) -> None:
    worker.send({"op": "stop", "number": 1})


def freeze(worker: Worker) -> None:
    worker.send({"op": "lease", "freeze_at": time.monotonic()})


def end(worker: Worker) -> None:
    worker.send({"op": "end", "number": 1})


STOPS = {"stop": stop, "freeze": freeze, "end": end}


@pytest.mark.parametrize("how", ["stop", "freeze", "end", "go on"])
async def test_a_request_that_waits_for_its_token_is_not_sent(
    worker: Worker, service: Service, how: str
) -> None:
    worker.answers = False
    stream = Stream(worker.attempt(1, service.url))
    await stream.send(get(service.url))
    await until(lambda: [each for each in worker.told if asks_token(each)])
    if how != "go on":
        STOPS[how](worker)
        assert await stream.ended()
    worker.answer(next(each for each in worker.told if asks_token(each)))
    if how == "go on":  # the control
        assert kinds(await stream.answer())[-1] == END
    await asyncio.sleep(0.05)
    assert len(service.requests) == (1 if how == "go on" else 0)
    assert bool(service.raw) == (how == "go on")


@pytest.mark.parametrize("how", ["stop", "freeze", "end"])
async def test_a_body_that_is_half_sent_ends_and_its_connection_too(worker: Worker, how: str) -> None:
    got, closed = bytearray(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                got.extend(data)
        closed.set()
        writer.close()

    async with listening(serve) as url:
        stream = Stream(worker.attempt(1, url))
        await stream.send(head(url, method="POST") + frame(DATA, b"first" * 12_000) * 3)
        await until(lambda: b"first" in got)

        before = time.monotonic()
        STOPS[how](worker)
        with contextlib.suppress(OSError):
            await stream.send(frame(DATA, b"second") + frame(END))
        await asyncio.wait_for(closed.wait(), 5)

    assert time.monotonic() - before < LATE
    assert b"second" not in got
    assert await stream.ended()


async def test_a_frozen_broker_sends_again_once_its_lease_is_renewed(
    worker: Worker, service: Service
) -> None:
    door = worker.attempt(1, service.url)
    freeze(worker)
    await asyncio.sleep(0.02)
    stream = Stream(door)
    await stream.send(get(service.url))
    refused = await stream.answer()
    assert refused[-1].kind == FAILED and b"nothing was sent" in refused[-1].body and not service.raw

    worker.send({"op": "lease", "freeze_at": time.monotonic() + 60})
    await until(worker.broker.may_send)
    # A renewal that comes late ends the streams of before it.
    stream = Stream(door)
    await stream.send(get(service.url))
    assert kinds(await stream.answer())[-1] == END


async def test_an_idle_connection_of_before_a_freeze_is_not_kept(worker: Worker, service: Service) -> None:
    stream = Stream(worker.attempt(1, service.url))
    await stream.send(get(service.url))
    await stream.answer()
    assert worker.broker.pools._pools
    freeze(worker)
    await until(lambda: not worker.broker.pools._pools, within=LATE)


async def test_streams_that_come_after_a_stop_are_closed(worker: Worker, service: Service) -> None:
    door = worker.attempt(1, service.url)
    stop(worker)
    stream = Stream(door)
    with contextlib.suppress(OSError):
        await stream.send(get(service.url))
    assert await stream.ended() and not service.raw


async def test_connections_are_not_shared_between_orgs(worker: Worker) -> None:
    """A service that authenticates connections must not take one org for another."""
    peers: list[tuple[Any, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                peers.append((writer.get_extra_info("peername"), asked.split(b" ")[1]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with listening(serve) as url:
        for number, org in enumerate(("acme", "other", "acme", "other"), start=1):
            stream = Stream(worker.attempt(number, url, org=org))
            await stream.send(get(url, target=f"/{org}"))
            await stream.answer()
            stream.close()

    by_org = {org: {peer for peer, target in peers if target == b"/" + org} for org in (b"acme", b"other")}
    assert len(by_org[b"acme"]) == len(by_org[b"other"]) == 1  # the control: one org's are used again
    assert not by_org[b"acme"] & by_org[b"other"]


async def test_attempts_have_their_own_secrets_even_on_one_connection(
    worker: Worker, service: Service
) -> None:
    """The placeholder of another attempt, of the same org, is a text."""
    first, second = worker.attempt(1, service.url, value="secret-one"), worker.attempt(2, service.url)
    for door in (first, second):
        stream = Stream(door)
        await stream.send(get(service.url, headers=[["X-Key", KEY_PLACEHOLDER]]))
        await stream.answer()
        stream.close()
    assert [seen.headers["x-key"] for seen in service.requests] == ["secret-one", KEY_PLACEHOLDER]


async def test_an_attempt_may_not_have_tokens_renewed_without_end(worker: Worker, service: Service) -> None:
    worker.tokens = [f"token-{number}" for number in range(40)]
    stream = Stream(worker.attempt(1, service.url))
    for _ in range(40):
        await stream.send(get(service.url, fresh=True))
        assert kinds(await stream.answer())[-1] == END
    assert len([each for each in worker.told if asks_token(each)]) == 16


def references(*texts: str) -> dict[str, list[str]]:
    """For each text what has it of all that anything refers to, but for the constants of this module."""
    seen: set[int] = {id(TOKEN), id(SECRET), *map(id, texts)}
    found: dict[str, list[str]] = {text: [] for text in texts}
    needles = [(text, text.encode()) for text in texts]
    left: list[Any] = gc.get_objects()
    own = {id(each) for each in (left, seen, found, needles, *needles)} | {id(each) for _, each in needles}
    while left:
        each = left.pop()
        if id(each) in seen or id(each) in own:
            continue
        seen.add(id(each))
        # By its type: `isinstance` asks lazy objects of other libraries for theirs.
        kind = type(each)
        if issubclass(kind, (bytes, bytearray)):
            for text, needle in needles:
                if needle in each:
                    found[text].append(f"{kind.__name__} of {len(each)}")
        elif issubclass(kind, str):
            for text in texts:
                if text in each:
                    found[text].append(f"str of {len(each)}: {each[:30]!r}")
        elif not issubclass(kind, (memoryview, int, float)):
            left.extend(gc.get_referents(each))
    return found


async def normal(worker: Worker, url: str, door: socket.socket) -> None:
    stream = Stream(door)
    await stream.send(get(url, headers=[["X-Key", KEY_PLACEHOLDER]]))
    found = await stream.answer()
    assert kinds(found)[-1] == END and "[masked]" in text_of(found)


async def failed(worker: Worker, url: str, door: socket.socket) -> None:
    stream = Stream(door)
    await stream.send(get(url, target="/gone", headers=[["X-Key", KEY_PLACEHOLDER]]))
    assert kinds(await stream.answer())[-1] == FAILED


async def invalid(worker: Worker, url: str, door: socket.socket) -> None:
    """The value is refused where the request is written."""
    stream = Stream(door)
    body = frame(DATA, b"abc") + frame(END)
    await stream.send(head(url, headers=[["X-Key", KEY_PLACEHOLDER], ["Content-Length", "1"]]) + body)
    assert kinds(await stream.answer())[-1] == FAILED


async def cancelled(worker: Worker, url: str, door: socket.socket) -> None:
    """The run closes its stream while the service is silent."""
    stream = Stream(door)
    await stream.send(get(url, target="/silent", headers=[["X-Key", KEY_PLACEHOLDER]]))
    await asyncio.sleep(0.05)
    stream.close()
    await until(lambda: not worker.broker.attempts[1].streams)


async def streaming(worker: Worker, url: str, door: socket.socket) -> None:
    """The attempt ends while an answer streams, and the run reads nothing."""
    stream = Stream(door)
    await stream.send(get(url, target="/endless", headers=[["X-Key", KEY_PLACEHOLDER]]))
    await asyncio.sleep(0.1)


async def waiting(worker: Worker, url: str, door: socket.socket) -> None:
    """The run sends no body, and the attempt ends."""
    stream = Stream(door)
    await stream.send(head(url, headers=[["X-Key", KEY_PLACEHOLDER]]))
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", [normal, failed, invalid, cancelled, streaming, waiting])
async def test_nothing_refers_to_a_value_after_its_attempt(worker: Worker, how: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                match asked.split(b" ")[1]:
                    case b"/gone":
                        break
                    case b"/silent":
                        await reader.read()
                        break
                    case b"/endless":
                        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                        while True:
                            writer.write(asked * 100)
                            await writer.drain()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(asked) + asked)
                asked = b""
        writer.close()

    async with listening(serve) as url:
        worker.tokens = [TOKEN]
        await how(worker, url, worker.attempt(1, url, value=SECRET))
        # The control: the attempt has them.
        assert worker.broker.attempts[1]._secrets and worker.broker.attempts[1]._held
        assert all(references(TOKEN[3:], SECRET[3:]).values())
        await worker.end(1)
        await asyncio.sleep(0.1)

    for connection in list(Stream.all):
        connection.close()
    await asyncio.sleep(0.05)
    gc.collect()
    worker.told.clear()
    worker.tokens.clear()
    found = references(TOKEN[3:], SECRET[3:])
    assert not any(found.values()), found
