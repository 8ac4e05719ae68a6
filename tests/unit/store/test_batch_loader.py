"""A batch loader asks once for what is asked at the same time, or within the time that it keeps answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from worker.store.database import BatchLoader


class Read:
    """The length of each key but `none`."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def __call__(self, keys: Sequence[str]) -> Mapping[str, int]:
        self.asked.append(sorted(keys))
        return {key: len(key) for key in keys if key != "none"}


async def test_keys_asked_for_at_the_same_time_share_a_query() -> None:
    read = Read()
    loader = BatchLoader(read)

    assert await asyncio.gather(*(loader.of(key) for key in ("a", "bb", "none"))) == [1, 2, None]
    assert await loader.of("a") == 1

    assert read.asked == [["a", "bb", "none"], ["a"]]


async def test_a_value_answers_as_long_as_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    read, now = Read(), [0.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    loader = BatchLoader(read, keep=1.0)

    for at in (0.0, 0.9, 1.0):
        now[0] = at
        assert [await loader.of("a"), await loader.of("none")] == [1, None]

    # What is not there is asked for each time.
    assert read.asked == [["a"], ["none"], ["none"], ["a"], ["none"]]
