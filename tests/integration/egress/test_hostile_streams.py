"""What a run does with its door and streams harms no other org, and leaves nothing behind."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running import until
from tests.integration.egress.broker_in_test import (
    KEY_PLACEHOLDER,
    Stream,
    Worker,
    broker_in_test,
    get,
    head,
    kinds,
    listening,
    text_of,
)
from tests.integration.egress.service import Service
from worker.engine.runners.child.main import MAX_FILES
from worker.handlers.door import GIVE, PASS
from worker.handlers.frames import ANSWER, DATA, END, FAILED, HEAD, SENDING, frame, json_frame

pytestmark = pytest.mark.anyio
SECRET = "sk-0123456789abcdef"
ROOT = Path(__file__).parents[3]


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().serving() as service:
        yield service


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with broker_in_test() as worker:
        worker.tokens = ["token-one"]
        yield worker


@pytest.fixture
async def door(worker: Worker, service: Service) -> socket.socket:
    """The door of a run of the org acme."""
    return worker.attempt(1, service.url, value=SECRET)


async def serves_another(worker: Worker, service: Service, number: int = 2) -> None:
    """A run of another org is answered, within half a second."""
    stream = Stream(worker.attempt(number, service.url, org="other"))
    async with asyncio.timeout(0.5):
        await stream.send(get(service.url))
        found = await stream.answer()
    assert kinds(found)[:2] == [SENDING, ANSWER] and found[-1].kind == END
    stream.close()
    await worker.end(number)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_stream_that_ends_at_any_place_leaves_nothing(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    whole = head(service.url, headers=[("X-Key", KEY_PLACEHOLDER), ("Content-Length", "3")])
    whole += frame(DATA, b"abc") + frame(END)
    await serves_another(worker, service)
    before = descriptors()

    for at in range(0, len(whole) + 1, 3):
        stream = Stream(door)
        await stream.send(whole[:at])
        if at % 2:
            await asyncio.sleep(0.001)
        stream.close()

    await until(lambda: not worker.broker.attempts[1].streams)
    await asyncio.sleep(0.1)
    await serves_another(worker, service, 3)
    await worker.end(1)
    await until(lambda: descriptors() <= before)


async def test_descriptors_that_are_not_streams_are_closed(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    await serves_another(worker, service)
    before = descriptors()
    reader, writer = os.pipe()
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with open(os.devnull) as null, datagrams, pair[0], pair[1]:
        given = [
            reader,
            writer,
            null.fileno(),
            datagrams.fileno(),
            pair[0].fileno(),
            os.pidfd_open(os.getpid()),
        ]
        for each in given * 20:
            socket.send_fds(door, [b"s"], [each])
            await asyncio.sleep(0)
        many = array.array("i", [null.fileno()] * 253)
        for _ in range(5):
            door.sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
            await asyncio.sleep(0.01)
        for each in (reader, writer, given[-1]):
            os.close(each)

    await serves_another(worker, service, 3)
    await until(lambda: descriptors() <= before)


async def test_what_is_no_stream_on_a_door_is_ignored(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    for data in (b"x" * 100_000, b"s", b"\0"):
        door.send(data)
    stream = Stream(door)
    await stream.send(get(service.url))
    assert kinds(await stream.answer())[-1] == END
    stream.close()
    with contextlib.suppress(BlockingIOError):
        while True:
            door.send(b"flood", socket.MSG_DONTWAIT)
    await serves_another(worker, service)


async def test_a_run_cannot_make_its_stream_block_the_broker(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    """O_NONBLOCK belongs to the open file, which the run has too."""
    stream = Stream(door, keeps=True)
    await stream.send(get(service.url))
    await stream.answer()
    flags = fcntl.fcntl(stream.theirs, fcntl.F_GETFL)
    assert flags & os.O_NONBLOCK  # the control: the broker had set it
    fcntl.fcntl(stream.theirs, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    body = b"x" * 4_000_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
        writer.close()

    async with listening(echo) as big:
        other = Stream(worker.attempt(4, big), keeps=True)
        await other.send(get(big))
        await asyncio.sleep(0.1)
        # The broker's socket is full now. Once there is room, it goes on until it is full again.
        fcntl.fcntl(other.theirs, fcntl.F_SETFL, 0)
        with contextlib.suppress(BlockingIOError):
            while other.socket.recv(65_536):
                pass
        await asyncio.sleep(0.1)
        await serves_another(worker, service)
        other.close()
        await worker.end(4)
    stream.close()


async def test_both_ends_of_a_stream_are_given_to_the_broker(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    one, other = socket.socketpair()
    one.sendall(get(service.url))
    with one, other:
        socket.send_fds(door, [b"s"], [other.fileno()])
        socket.send_fds(door, [b"s"], [one.fileno()])
    await asyncio.sleep(0.1)
    await until(lambda: not worker.broker.attempts[1].streams)
    await serves_another(worker, service)


async def test_streams_beyond_the_limit_are_closed_and_others_are_served(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    service.pause()
    streams = []
    for _ in range(300):
        streams.append(Stream(door))
        await streams[-1].send(get(service.url))
        await asyncio.sleep(0)
    await until(lambda: len(service.requests) == 256)
    service.go_on()
    await serves_another(worker, service)
    answers = await asyncio.gather(*(stream.answer() for stream in streams))
    assert sum(1 for found in answers if found) == 256
    for stream in streams:
        stream.close()
    (row,) = await worker.end(1)
    assert row["requests"] == 256


HOSTILE = {
    "a second head": lambda url: get(url) + get(url),
    "data first": lambda url: frame(DATA, b"x") + get(url),
    "end first": lambda url: frame(END) + get(url),
    "data after the end": lambda url: get(url) + frame(DATA, b"x"),
    "an answer": lambda url: json_frame(ANSWER, {"status": 200}),
    "a failure": lambda url: json_frame(FAILED, {}),
    "sending": lambda url: frame(SENDING),
    "an unknown kind": lambda url: b"\xff\0\0\0\0",
    "a length that is too long": lambda url: b"\1\xff\xff\xff\xff",
    "noise": lambda url: random.Random(1).randbytes(5000),
    "HTTP": lambda url: b"GET / HTTP/1.1\r\n\r\n",
    "deep JSON": lambda url: frame(HEAD, b"[" * 200_000),
    "NaN": lambda url: get(url, timeout={"read": float("nan"), "connect": float("nan")}),
    "more than its length": lambda url: (
        head(url, headers=[["Content-Length", "1"]]) + frame(DATA, b"abc") + frame(END)
    ),
    "less than its length": lambda url: (
        head(url, headers=[["Content-Length", "9"]]) + frame(DATA, b"abc") + frame(END)
    ),
    "a value that HTTP refuses": lambda url: get(url, headers=[["X-Key", KEY_PLACEHOLDER + "\n"]]),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_stream_ends_soon_and_others_go_on(
    worker: Worker, service: Service, door: socket.socket, what: str
) -> None:
    stream = Stream(door)
    await stream.send(HOSTILE[what](service.url))
    stream.socket.shutdown(socket.SHUT_WR)
    found = await stream.answer()
    assert not found or found[-1].kind in (FAILED, END) or await stream.ended()
    stream.close()
    await until(lambda: not worker.broker.attempts[1].streams)
    await serves_another(worker, service)
    assert b"abc" not in bytes(service.raw) or what == "less than its length"


async def test_a_secret_that_no_header_can_have_is_not_sent_and_not_repeated(
    worker: Worker, service: Service
) -> None:
    for number, value in enumerate(("one\r\nHost: evil", "one\ntwo", "one\0two"), start=10):
        stream = Stream(worker.attempt(number, service.url, value=value))
        await stream.send(get(service.url, headers=[["X-Key", KEY_PLACEHOLDER]]))
        found = await stream.answer()
        assert found[-1].kind == FAILED and b"one" not in found[-1].body and b"two" not in found[-1].body
        stream.close()
    assert b"evil" not in bytes(service.raw) and b"two" not in bytes(service.raw)


async def test_a_message_that_is_too_long_takes_none_of_others_with_it(worker: Worker) -> None:
    for origin in ("x" * 3_000_000, "of another"):
        worker.broker._unsent.append(json.dumps({"op": "denied", "origin": origin}).encode())
    worker.broker._flush()
    await until(lambda: [each for each in worker.told if each.get("origin") == "of another"])


async def test_statuses_that_a_service_chooses_stay_few(worker: Worker) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            status = 200
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
                status += 1
        writer.close()

    async with listening(answer) as url:
        stream = Stream(worker.attempt(1, url))
        for _ in range(100):
            await stream.send(get(url))
            await stream.answer()
        stream.close()
        (row,) = await worker.end(1)
    assert len(row["statuses"]) <= 22 and sum(row["statuses"].values()) == 100


async def test_an_answer_that_is_split_is_not_that_of_the_next_request(worker: Worker) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                own = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + asked[5:6]
                writer.write(own + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray")
        writer.close()

    async with listening(answer) as url:
        for number in range(1, 6):
            stream = Stream(worker.attempt(number, url))
            await stream.send(get(url, target=f"/{number}"))
            assert text_of(await stream.answer()) == str(number)
            stream.close()


async def test_what_arrives_does_not_tell_a_guess_of_the_secret(worker: Worker) -> None:
    """Without the defence the parts of a right guess were held back: a value was found sign by sign."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                part = asked.split(b" ")[1][1:]
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await asyncio.sleep(0.05)
                writer.write(b"1\r\n\n\r\n0\r\n\r\n")
        writer.close()

    async with listening(echo) as url:
        stream = Stream(worker.attempt(1, url, value=SECRET))
        shapes = []
        for guess in (SECRET[:9], SECRET[:8] + "X", "Z" * 9):
            await stream.send(get(url, target=f"/{guess}"))
            shapes.append([(found.kind, len(found.body)) for found in await stream.answer()])
        stream.close()
    assert shapes[0] == shapes[1] == shapes[2]


class Repeating:
    """A service that begins to answer its first request, and ends it with the token of a later one."""

    def __init__(self) -> None:
        self.authorizations: list[bytes] = []
        self.has_later = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        lines = [line for line in asked.split(b"\r\n") if line.lower().startswith(b"authorization:")]
        is_first = not self.authorizations
        self.authorizations += lines
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if is_first:
            writer.write(b"6\r\nfirst\n\r\n")
            await self.has_later.wait()
            text = self.authorizations[-1]
            writer.write(b"%x\r\n%b\r\n" % (len(text), text))
        else:
            self.has_later.set()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()


async def test_an_answer_that_has_begun_is_masked_with_later_values_too(worker: Worker) -> None:
    """The control is what the service got: a token that was not there when its answer began."""
    service = Repeating()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        door = worker.attempt(1, url)
        worker.tokens[:] = ["token-of-before", "token-of-later"]
        first, later = Stream(door), Stream(door)
        await first.send(get(url))
        await until(lambda: service.authorizations)
        await later.send(get(url, fresh=True))
        assert kinds(await later.answer())[-1] == END

        text = text_of(await first.answer())

    assert service.authorizations[-1].endswith(b"token-of-later")
    assert text.startswith("first")
    assert "token-of-later" not in text and "[masked]" in text


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_descriptors_in_flight_keep_no_other_run_from_the_broker(control: bool) -> None:
    """The kernel counts them by account: a run that has as many as it may stops those that others pass.

    The control may not ask the broker for a stream instead.
    """
    # Root is exempt from that limit, and no account needs more than to read this repository.
    account: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [sys.executable, "-m", "tests.integration.egress.in_flight", str(int(control))]
    told = json.loads(subprocess.check_output(command, cwd=ROOT, timeout=60, **account))

    assert told["inflight"] > MAX_FILES
    if control:
        assert all("Too many references" in each for each in told["found"])
    else:
        assert told["found"] == [200, 200, 200]


async def test_a_run_that_asks_for_streams_and_takes_none_fills_its_own_door_only(
    worker: Worker, service: Service, door: socket.socket
) -> None:
    await serves_another(worker, service)
    before = descriptors()
    for _ in range(200):
        door.send(GIVE)
        await asyncio.sleep(0)
    await serves_another(worker, service, 3)
    # Both ends of each that it has not taken; the kernel has some in flight.
    assert descriptors() - before < 20

    taken = 0
    door.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, found, _, _ = socket.recv_fds(door, 16, 1)
            assert data == PASS
            taken += len(found)
            for each in found:
                os.close(each)
    assert 1 <= taken < 20
    await worker.end(1)
    await until(lambda: descriptors() <= before)
