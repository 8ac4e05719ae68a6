"""Defences of batches, taken out one at a time: see `ablations`."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from typing import Any
from unittest.mock import patch
from uuid import UUID

from tests.simulation.ablations import ablation
from worker.features.batches.advance import Advance
from worker.features.batches.loop import BatchSender
from worker.features.batches.openai import OpenAI
from worker.store import batch_requests, batches, budgets, spending
from worker.store.tables import batch_items

# Of so many requests each has another id.
REUSED = 16


@ablation("the id of a request is that of no other one")
def batch_row_reused(stack: ExitStack, url: str) -> None:
    """A number that comes again, with the row of the request that had it."""

    def insert(connection: Any, run: Any, new: Any, *rest: Any) -> Any:
        connection.execute(batch_items.delete().where(batch_items.c.id == new.id))
        return real(connection, run, new, *rest)

    real, numbers = batch_requests._insert, count()
    stack.enter_context(patch.object(batch_requests, "_insert", insert))
    stack.enter_context(
        patch.object(batch_requests, "new_item_id", lambda: str(UUID(int=next(numbers) % REUSED)))
    )


@ablation("a late result changes no run")
def batch_late_unfenced(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(batch_requests, "_is_awaited", lambda row, live: True))


@ablation("a reservation is settled by what was paid")
def batch_unsettled(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(spending, "settle", lambda *given: batch_requests.NOTHING))


@ablation("a run that waits for a budget goes on once a settlement gives it room")
def batch_wakes(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(budgets, "wake_free", lambda *given: 0))


@ablation("a batch whose submission was not answered is found again by its file")
def batch_found(stack: ExitStack, url: str) -> None:
    async def made_of(self: Any, file_id: str) -> None:
        return None

    stack.enter_context(patch.object(OpenAI, "made_of", made_of))


@ablation("the file of a batch that is not found is deleted before the next try")
def batch_file_deleted(stack: ExitStack, url: str) -> None:
    async def find(self: Any, row: Any, api: Any) -> None:
        found = await api.made_of(row["file_id"])
        if found is not None:
            await self._sent(row, found)
        else:
            await self._change(row, state="new", file_id=None, wait=0)

    stack.enter_context(patch.object(Advance, "_find_by_file", find))


@ablation("batches are changed under the lease of their pool", "postgresql")
def batch_lease(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(batches, "holds", lambda *given: True))
    stack.enter_context(patch.object(BatchSender, "_check", lambda *given: None))
