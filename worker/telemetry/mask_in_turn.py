"""Masks the texts of runs for the worker's loop: short ones a few in each turn, long ones in a thread.

A hostile text of 1 MiB takes a second to mask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from worker.ids import OrgId
from worker.pacing import Turns
from worker.telemetry.masking import masker

# Characters that are masked in one turn of the loop, for all runs together: some milliseconds at most.
AT_ONCE = 8 * 1024


class Masking:
    """Masks texts of at most `AT_ONCE` characters a turn; others in one thread, one at a time for an org.

    So one org's texts do not keep those of others waiting for longer than one of them takes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "mask")
        self._turns = Turns(AT_ONCE)
        # One for each org that has texts in the thread, or that wait for it.
        self._lanes: WeakValueDictionary[OrgId | None, asyncio.Lock] = WeakValueDictionary()

    async def each(self, texts: Sequence[tuple[str, OrgId]]) -> list[str]:
        """These texts of orgs, masked."""
        size = sum(len(text) for text, _ in texts)
        if size <= AT_ONCE:
            await self._turns.take(size)
            return _mask(texts)
        orgs = {org for _, org in texts}
        key = orgs.pop() if len(orgs) == 1 else None
        async with self._lanes.setdefault(key, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._thread, _mask, texts)


def _mask(texts: Sequence[tuple[str, OrgId]]) -> list[str]:
    return [masker.mask(text, org) for text, org in texts]


_masking = Masking()
mask_each = _masking.each


async def mask_in_turn(text: str, org: OrgId) -> str:
    """A text of an org, masked."""
    return (await mask_each([(text, org)]))[0]
