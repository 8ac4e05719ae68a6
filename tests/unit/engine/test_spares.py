"""When spare processes are forked: not before the first run, not while a run waits, not in a loop; sealed or
open, as the runs are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from worker.engine.runners.child.pool import Spares


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Process:
    """A process that was forked, or was not."""

    def __init__(self, number: int, *, sealed: bool = False) -> None:
        self.number = number
        self.sealed = sealed
        self.usable = True


class Forks:
    """Counts forks; each fails while `broken`."""

    def __init__(self) -> None:
        self.made: list[Process] = []
        self.broken = False

    async def __call__(self, sealed: bool) -> Any:
        if self.broken:
            raise OSError("no descriptors")
        self.made.append(Process(len(self.made) + 100, sealed=sealed))
        return self.made[-1]


def run(number: int, *, sealed: bool = False) -> Any:
    """The process of a run."""
    return Process(number, sealed=sealed)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_none_before_the_first_run_has_started() -> None:
    forks = Forks()
    spares = Spares(2, forks)
    spares.refill()
    await settle()
    assert spares.take(sealed=False) is None

    spares.starting(run(1))
    spares.refill()
    await settle()
    assert forks.made == []

    spares.started(1)
    await settle()
    assert len(forks.made) == 2


async def test_none_while_a_run_waits_for_its_process() -> None:
    forks = Forks()
    spares = Spares(2, forks)
    for number in (1, 2):
        spares.starting(run(number))

    spares.started(1)
    await settle()
    assert forks.made == []

    spares.started(2)
    await settle()
    assert [spares.take(sealed=False) for _ in range(3)] == [*forks.made, None]


async def test_there_are_as_many_sealed_ones_once_a_run_was_sealed() -> None:
    forks = Forks()
    spares = Spares(2, forks)
    spares.starting(run(1))
    spares.started(1)
    await settle()
    assert spares.take(sealed=True) is None

    spares.starting(run(2, sealed=True))
    spares.started(2)
    await settle()

    assert [spares.take(sealed=True) for _ in range(3)] == [*forks.made[2:], None]
    assert [spares.take(sealed=False) for _ in range(3)] == [*forks.made[:2], None]


async def test_one_of_the_same_kind_takes_the_place_of_one_that_is_taken() -> None:
    forks = Forks()
    spares = Spares(1, forks)
    for number, sealed in enumerate((True, False, True)):
        process = spares.take(sealed=sealed) or run(number, sealed=sealed)
        spares.starting(process)
        spares.started(process.number)
        await settle()

    assert [process.sealed for process in forks.made] == [True, False, True]


async def test_those_that_died_are_not_taken() -> None:
    forks = Forks()
    spares = Spares(2, forks)
    spares.starting(run(1))
    spares.started(1)
    await settle()
    forks.made[0].usable = False

    assert [spares.take(sealed=False), spares.take(sealed=False)] == [forks.made[1], None]


async def test_one_that_ends_without_a_run_is_replaced_after_a_pause() -> None:
    forks = Forks()
    spares = Spares(1, forks)
    spares.starting(run(1))
    spares.started(1)
    await settle()

    assert spares.died(forks.made[0].number)
    assert not spares.died(forks.made[0].number)
    spares.refill()
    await settle()

    assert len(forks.made) == 1
    spares.close()


async def test_a_fork_that_fails_is_tried_again_with_the_next_run() -> None:
    forks = Forks()
    forks.broken = True
    spares = Spares(1, forks)
    spares.starting(run(1))
    spares.started(1)
    await settle()
    forks.broken = False

    spares.starting(run(2))
    spares.started(2)
    await settle()

    assert len(forks.made) == 1


async def test_none_after_it_is_closed() -> None:
    forks = Forks()
    spares = Spares(1, forks)
    spares.starting(run(1))
    spares.close()

    spares.started(1)
    await settle()

    assert forks.made == []
