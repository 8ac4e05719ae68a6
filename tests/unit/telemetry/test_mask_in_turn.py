"""Long texts are masked in a thread, short ones a few in each turn of the loop; no org waits long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from worker.ids import OrgId
from worker.pacing import Turns
from worker.telemetry import mask_in_turn as module
from worker.telemetry.mask_in_turn import AT_ONCE, Masking
from worker.telemetry.masking import MASK, masker
from worker.telemetry.secret_index import SecretIndex

A = OrgId("a")
B = OrgId("b")
SECRET = 'cañary"5ecret\\value&with%more☃'


class Watched:
    """Notes in which thread texts are masked; holds texts that begin with `wait` until `go`."""

    def __init__(self) -> None:
        self.loop_thread = threading.get_ident()
        self.on_loop: list[str] = []
        self.elsewhere: list[str] = []
        self.go = threading.Event()

    def mask(self, text: str, org: OrgId) -> str:
        is_loop = threading.get_ident() == self.loop_thread
        (self.on_loop if is_loop else self.elsewhere).append(text[:6].strip("."))
        if text.startswith("wait"):
            assert not is_loop
            assert self.go.wait(30)
        return text


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched()
    monkeypatch.setattr(module, "masker", watched)
    yield watched
    watched.go.set()


def long(text: str) -> str:
    return text.ljust(AT_ONCE + 1, ".")


async def test_a_short_text_is_masked_at_once(watched: Watched) -> None:
    masking = module.Masking().each([("short", A)])

    with pytest.raises(StopIteration):  # it does not wait for anything
        masking.send(None)

    assert watched.on_loop == ["short"]


async def test_the_loop_goes_on_while_a_long_text_is_masked(watched: Watched) -> None:
    masking = Masking()
    slow = asyncio.create_task(masking.each([(long("wait"), A)]))
    await asyncio.sleep(0)

    assert await masking.each([("short", B)]) == ["short"]

    assert not slow.done()
    watched.go.set()
    assert await slow == [long("wait")]
    assert (watched.on_loop, watched.elsewhere) == (["short"], ["wait"])


async def test_a_text_of_several_is_as_long_as_all_of_them(watched: Watched) -> None:
    await Masking().each([("." * (AT_ONCE // 2), A), ("." * (AT_ONCE // 2 + 1), B)])

    assert watched.on_loop == []


async def test_short_texts_of_one_turn_are_limited_together(watched: Watched) -> None:
    masking, turns, done = Masking(), 0, list[int]()

    async def mask(number: int) -> None:
        await masking.each([("x" * (AT_ONCE // 2), A)])
        done.append(number)

    tasks = [asyncio.create_task(mask(number)) for number in range(10)]
    while len(done) < 10:
        before = len(done)
        await asyncio.sleep(0)
        turns += 1
        assert len(done) - before <= 2
    assert done == list(range(10))
    assert turns >= 5
    await asyncio.gather(*tasks)


async def test_without_a_limit_all_would_be_masked_in_one_turn(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before."""
    masking = Masking()
    monkeypatch.setattr(masking, "_turns", Turns(10**9))

    tasks = [asyncio.create_task(masking.each([("x" * (AT_ONCE // 2), A)])) for _ in range(10)]
    await asyncio.sleep(0)

    assert len(watched.on_loop) == 10
    await asyncio.gather(*tasks)


async def test_an_org_has_one_text_at_once_in_the_thread(watched: Watched) -> None:
    masking = Masking()
    first = [(long(f"wait{number}"), A) for number in range(3)]
    tasks = [asyncio.create_task(masking.each([each])) for each in [*first, (long("b"), B)]]
    for _ in range(5):
        await asyncio.sleep(0)
    watched.go.set()
    await asyncio.gather(*tasks)

    assert watched.elsewhere == ["wait0", "b", "wait1", "wait2"]
    assert not masking._lanes


async def test_a_text_whose_caller_is_gone_does_not_stop_the_others(watched: Watched) -> None:
    masking = Masking()
    gone, waits = (asyncio.create_task(masking.each([(long("wait"), A)])) for _ in range(2))
    for _ in range(5):
        await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    watched.go.set()

    assert await waits == [long("wait")]
    assert not masking._lanes


async def test_secrets_may_change_while_a_text_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread adds and drops secrets in the midst of a search: nothing is held locked meanwhile."""
    masker.hold(SECRET, A, private=True)
    changed = list[bool]()
    around: Callable[..., object] = SecretIndex.around

    def change() -> None:
        for number in range(50):
            other = f'an"other\\{number}&{"x" * number}'
            masker.hold(other, A, private=True)
            masker.hold(f"to ken{number}", B)
            masker.release(other, A, private=True)
        changed.append(True)

    def in_between(self: SecretIndex, *values: object) -> object:
        if not changed:
            thread = threading.Thread(target=change)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
        return around(self, *values)

    monkeypatch.setattr(SecretIndex, "around", in_between)
    text = long(f"{SECRET} and ") + SECRET.replace("\\", "\\\\").replace('"', '\\"')

    [masked] = await Masking().each([(text, A)])

    assert changed
    assert masked == text.replace(SECRET, MASK).replace(
        SECRET.replace("\\", "\\\\").replace('"', '\\"'), MASK
    )
