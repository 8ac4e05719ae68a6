"""A sealed run's process has its token and secret nowhere: memory, environment, files, descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.memory import places_of
from tests.fakes.running import token, work
from tests.integration.egress.broker_in_test import listening
from tests.integration.egress.conftest import MODULE
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal, Work
from worker.model.egress import BoundSecret, Egress, placeholder_of
from worker.model.runs.outcome import Succeeded

pytestmark = pytest.mark.anyio
AT_ONCE = 4
TOKEN, SECRET = f"token-canary-{secrets.token_hex(12)}", f"secret-canary-{secrets.token_hex(12)}"
NEEDLES = tuple(text.encode() for text in (TOKEN, SECRET))


class Looking:
    """A service that gives back what it gets, and looks into the process with its second request."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self.sent = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                self.sent += all(needle in asked for needle in NEEDLES)
                if b" /look" in asked and (pid := re.search(rb"(?i)x-pid: (\d+)", asked)):
                    self.found.append(places_of(int(pid[1]), NEEDLES))
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Echo: 1\r\n\r\n" % len(asked) + asked
                )
        writer.close()


def work_for(url: str, *, sealed: bool, memory: int | None) -> Work:
    made = work(
        "look",
        entry_point=f"{MODULE}:look",
        params={"url": url},
        token=token(TOKEN),
        api_origins=(url,),
        egress=Egress((("api",),)) if sealed else Egress(),
        memory=memory,
    )
    made.secrets = {"KEY": placeholder_of(made.run_id, "KEY") if sealed else SECRET}
    made.bound = (BoundSecret("KEY", SECRET, url),) if sealed else ()
    return made


@pytest.mark.timeout(600)
async def test_no_sealed_run_has_its_token_or_secret_anywhere(children: ChildPool, full: bool) -> None:
    """Both for processes that were forked ahead and for those that are forked for their run."""
    looking, runs = Looking(), 1000 if full else 100
    async with listening(looking.serve) as url:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def run(number: int) -> None:
            async with at_once:
                work_of = work_for(url, sealed=True, memory=None if number % 2 else 512 * 2**20)
                outcome = await children.run(work_of, AnsweringWorker(), StopSignal())
                assert isinstance(outcome, Succeeded), outcome

        await asyncio.gather(*(run(number) for number in range(runs)))

    assert len(looking.found) == runs
    assert looking.sent == 2 * runs  # the broker had them
    assert [each for each in looking.found if each] == []


async def test_the_control_an_open_run_has_both(children: ChildPool) -> None:
    looking = Looking()
    async with listening(looking.serve) as url:
        await children.run(work_for(url, sealed=False, memory=None), AnsweringWorker(), StopSignal())
    assert looking.sent == 2
    (found,) = looking.found
    assert any(each.startswith("memory") for each in found)
