"""The worker reads what runs send in turns of its loop: a flood takes little of each, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from worker.engine.runners.child import child_process as inbox_module
from worker.engine.runners.child.child_process import BURST, MESSAGE, RATE, TURN, Inbox, InboxTurns
from worker.engine.runners.child.messages import BrokenMessage, Message, run_frame
from worker.handlers.json_text import LIMIT, NotStorable

MiB = 1024 * 1024


class Loop:
    """A loop that a test turns by hand, and its clock."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.now = 0.0
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.turns = InboxTurns(self.soon.append)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        self.later.append((self.now + seconds, callback))
        return self

    def cancel(self) -> None:
        self.later.clear()

    def turn(self) -> None:
        """One iteration: what was scheduled before it."""
        soon, self.soon[:] = self.soon[:], []
        for callback in soon:
            callback()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [callback for at, callback in self.later if at <= self.now]
        self.later = [(at, callback) for at, callback in self.later if at > self.now]
        for callback in due:
            callback()


class Run:
    """The inbox of one run, what it has received, and whether its channel is read."""

    def __init__(self, loop: Loop) -> None:
        self.received: list[Message] = []
        self.reading = True
        self.busy = self.broken = False
        self.inbox = Inbox(
            loop.turns,
            self,
            self.receive,
            holds=lambda: self.busy,
            on_broken=lambda: setattr(self, "broken", True),
            time=lambda: loop.now,
            call_later=loop.call_later,
        )

    def receive(self, message: Message) -> None:
        if message["op"] == "bad":
            raise BrokenMessage("bad")
        self.received.append(message)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def numbered(count: int, first: int = 0) -> bytes:
    return b"".join(run_frame({"op": "x", "n": n}) for n in range(first, first + count))


async def test_a_turn_reads_only_so_much_of_a_flood() -> None:
    loop = Loop()
    run = Run(loop)

    run.inbox.feed(numbered(1_000))

    in_one = len(run.received)
    assert 0 < in_one <= TURN // MESSAGE
    assert not run.reading  # its process waits
    loop.turn()
    assert len(run.received) <= 2 * in_one
    while not run.reading:
        loop.turn()
    assert [message["n"] for message in run.received] == list(range(1_000))


async def test_control_without_turns_a_flood_is_read_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "TURN", 10**12)
    run = Run(Loop())

    run.inbox.feed(numbered(1_000))

    assert len(run.received) == 1_000


async def test_runs_share_each_turn_one_after_the_other() -> None:
    loop = Loop()
    runs = [Run(loop) for _ in range(10)]
    for run in runs:
        run.inbox.feed(numbered(500))
    assert sum(len(run.received) for run in runs) <= TURN // MESSAGE

    for _ in range(20):
        before = [len(run.received) for run in runs]
        loop.turn()
        assert sum(len(run.received) for run in runs) - sum(before) <= TURN // MESSAGE

    counts = [len(run.received) for run in runs]
    assert max(counts) - min(counts) <= TURN // MESSAGE


async def test_a_channel_has_a_rate() -> None:
    """Nothing is dropped: what comes too early stays in the socket, and is read later."""
    loop = Loop()
    run = Run(loop)
    flood = numbered(20_000)

    run.inbox.feed(flood)
    for seconds in range(1, 5):
        for _ in range(2_000):
            loop.turn()
        assert len(run.received) <= (BURST + (seconds - 1) * RATE) // MESSAGE + 1
        loop.advance(1.0)
    for _ in range(2_000):
        loop.turn()

    assert run.reading
    assert [message["n"] for message in run.received] == list(range(20_000))


async def test_control_without_a_rate_all_of_it_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "BURST", 10**12)
    loop = Loop()
    run = Run(loop)

    run.inbox.feed(numbered(20_000))
    for _ in range(2_000):
        loop.turn()

    assert len(run.received) == 20_000


async def test_large_messages_of_a_good_run_do_not_wait() -> None:
    """A burst of 200 checkpoints of 64 KiB and a result of 1 MiB: a turn each, and no pause."""
    loop = Loop()
    run = Run(loop)

    for _ in range(200):
        run.inbox.feed(run_frame({"op": "save", "n": 1, "data": "x" * 64 * 1024}))
        loop.turn()
    run.inbox.feed(run_frame({"op": "end", "outcome": {"result": "x" * MiB}}))

    assert len(run.received) == 201
    assert len(run.received[-1]["outcome"]["result"]) == MiB
    loop.turn()
    assert run.reading
    assert loop.later == []


async def test_a_run_with_too_many_open_requests_is_not_read() -> None:
    loop = Loop()
    run = Run(loop)
    run.busy = True
    run.inbox.feed(numbered(3))
    assert (run.received, run.reading) == ([], False)

    run.busy = False
    run.inbox.go_on()

    assert (len(run.received), run.reading) == (3, True)


async def test_nothing_is_read_after_a_broken_message() -> None:
    run = Run(Loop())

    run.inbox.feed(numbered(1) + run_frame({"op": "bad"}) + numbered(1))
    run.inbox.feed(numbered(1))

    assert (len(run.received), run.broken) == (1, True)
    await asyncio.wait_for(run.inbox.emptied(), 1)


@pytest.mark.parametrize(("text", "fits"), [("[" + "[]," * 300_000 + "1]", True), ("[" * 50_000, False)])
async def test_a_hostile_text_takes_a_turn_for_each_part(text: str, fits: bool) -> None:
    running = asyncio.get_running_loop()
    turns, ticks, done = InboxTurns(running.call_soon), 0, False

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if not done:
            running.call_soon(tick)

    inbox = Run(Loop()).inbox
    inbox.turns = turns
    tick()
    try:
        await inbox.check(text, "result", LIMIT)
    except NotStorable:
        assert not fits
    else:
        assert fits
        assert ticks > 3
    finally:
        done = True
