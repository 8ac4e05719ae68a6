"""Reconciler: after each renewal, makes what this process runs agree with what the database says it owns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from worker.errors import Unavailable
from worker.execution.attempts.events import tell_fenced_out
from worker.execution.attempts.inflight import Inflight
from worker.ids import RunId
from worker.runs.lease import Lease
from worker.runs.run import OwnedRun


@dataclass(frozen=True, slots=True)
class Renewal:
    """One renewal: what we held when it was sent, and what the database said we own."""

    held: Mapping[RunId, int]
    owned: Sequence[OwnedRun]
    registered: bool
    lease: Lease

    @property
    def all_ours(self) -> bool:
        """Whether each run that was held is owned, so that nothing has to be killed first."""
        owned = {run.id: run.fencing_token for run in self.owned}
        return self.registered and all(owned.get(id_) == token for id_, token in self.held.items())


class HandBackStore(Protocol):
    async def hand_back(self, owned: Sequence[OwnedRun]) -> object:
        """Let runs wait again that this incarnation owns, fenced."""
        ...


class Reconciler:
    """Makes what this process does agree with what the database says it owns.

    Owned but not held at two renewals running: an admission whose answer never
    came; handed back. Held but not owned: another incarnation has it, or it has
    ended; killed, and whatever it still writes is fenced out. `on_lease` hears of
    the renewed lease then; `on_lost` that this incarnation was given up.
    """

    def __init__(
        self,
        holdings: Inflight,
        store: HandBackStore,
        *,
        cancel: Callable[[RunId, str], None],
        on_lease: Callable[[Lease], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._holdings = holdings
        self._store = store
        self._cancel = cancel
        self._on_lease = on_lease
        self._on_lost = on_lost
        self._renewals: asyncio.Queue[Renewal] = asyncio.Queue()
        self._strangers: set[tuple[RunId, int]] = set()

    def take(self, renewal: Renewal) -> None:
        """Take a renewal, to be looked at next."""
        self._renewals.put_nowait(renewal)

    async def run(self) -> None:
        """Reconcile renewal by renewal for ever; ends by cancellation only."""
        while True:
            await self.reconcile(await self._renewals.get())

    async def reconcile(self, renewal: Renewal) -> None:
        """Compare one renewal with what is held now, and act on the difference."""
        owned = {run.id: run.fencing_token for run in renewal.owned}
        for run_id, fencing_token in renewal.held.items():
            held = self._holdings.get(run_id)
            if held is None or held.run.fencing_token != fencing_token:
                continue
            if owned.get(run_id) != fencing_token:
                tell_fenced_out(run_id, held.run.attempt, fencing_token, held)
                held.stop.kill()
        if not renewal.registered:
            self._on_lost()
            return
        if not renewal.all_ours:
            self._on_lease(renewal.lease)
        strangers: set[tuple[RunId, int]] = set()
        for run in renewal.owned:
            held = self._holdings.get(run.id)
            if held is not None and held.run.fencing_token >= run.fencing_token:
                if run.cancel_reason is not None and held.run.fencing_token == run.fencing_token:
                    self._cancel(run.id, run.cancel_reason)
            elif renewal.held.get(run.id) != run.fencing_token:
                strangers.add((run.id, run.fencing_token))
        again = [run for run in renewal.owned if (run.id, run.fencing_token) in strangers & self._strangers]
        self._strangers = strangers
        if again:
            # Where the database does not answer now, the next renewal finds them again.
            with suppress(Unavailable):
                await self._store.hand_back(again)
