"""`python -m tests.integration.egress.in_flight CONTROL`: a run floods an account with descriptors in flight.

Prints JSON: how many there are, and what another run's requests get. For an account without capabilities.
With `CONTROL` 1 that run may not ask the broker for a stream.
"""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

import httpx

from tests.integration.egress.broker_in_test import broker_in_test
from tests.integration.egress.service import Service
from worker.engine.runners.child.main import FILES, MAX_FILES
from worker.handlers import door as door_module
from worker.handlers.brokered import BlockingBrokeredTransport
from worker.handlers.door import Door

# Of the broker and the worker.
LIMIT = 2 * MAX_FILES


def flood() -> int:
    """Have as many descriptors in flight as a run may; returns about how many."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    with open(os.devnull) as null:
        many, pairs, count = array.array("i", [null.fileno()] * 253), [], 0
        while True:
            pairs.append(socket.socketpair())
            pairs[-1][0].setblocking(False)
            try:
                while True:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)]
                    pairs[-1][0].sendmsg([b"x"], rights)
                    count += len(many)
            except BlockingIOError:
                continue
            except OSError as error:
                assert error.errno == errno.ETOOMANYREFS, error
                FLOOD.extend(pairs)
                return count


FLOOD: list[Any] = []


def in_child(work: Any) -> tuple[int, int]:
    """Fork; the child writes what `work` returns, and lives on. Returns its process and the pipe."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        signal.pause()
    os.close(writer)
    return pid, reader


def request(door: int, url: str, *, control: bool) -> list[Any]:
    """Three requests of a run, each over a stream of its own."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, MAX_FILES))
    found = []
    through = Door(door)
    if control:
        door_module.ASKED = 0
    for _ in range(3):
        with httpx.Client(transport=BlockingBrokeredTransport(through.connect)) as client:
            try:
                found.append(client.get(url).status_code)
            except httpx.HTTPError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


async def main(*, control: bool) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    async with Service().serving() as service, broker_in_test() as worker:
        worker.tokens = ["token-one"]
        loop = asyncio.get_running_loop()
        hostile, told = in_child(flood)
        inflight = json.loads(os.read(told, 4096))
        door = worker.attempt(1, service.url)  # the worker passes the door meanwhile
        run, answers = in_child(lambda: request(os.dup(door.fileno()), service.url, control=control))
        answered = asyncio.Event()
        loop.add_reader(answers, answered.set)
        await answered.wait()
        found = json.loads(os.read(answers, 4096))
        print(json.dumps({"inflight": inflight, "found": found}))
        for pid in (hostile, run):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(main(control=sys.argv[1] == "1"))
