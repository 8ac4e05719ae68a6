"""Reconciler: keeps this process in line with the rows it owns. Recovery: takes over runs of dead workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from worker.engine.attempt.inflight import InflightRuns, run_fenced_out
from worker.errors import Unavailable
from worker.ids import RunId
from worker.model.runs.lease import Lease
from worker.model.runs.run import OwnedRun, Recovered
from worker.telemetry.events import emit


@dataclass(frozen=True, slots=True)
class Renewal:
    """One renewal: the runs held when it was sent, with their fencing tokens, and the runs owned."""

    held: Mapping[RunId, int]
    owned: Sequence[OwnedRun]
    registered: bool
    lease: Lease

    @property
    def all_ours(self) -> bool:
        """Whether each held run is owned, so that nothing has to be killed first."""
        owned = {run.id: run.fencing_token for run in self.owned}
        return self.registered and all(owned.get(id_) == token for id_, token in self.held.items())


class HandBackStore(Protocol):
    async def hand_back(self, owned: Sequence[OwnedRun]) -> object:
        """Let runs that this incarnation owns wait again, fenced."""


@dataclass(eq=False, repr=False)
class Reconciler:
    """Compares each renewal with the runs that this process holds.

    A run that is owned but not held at two renewals in a row was admitted by a statement whose answer was
    lost: it is handed back. A run that is held but not owned has ended or belongs to another incarnation:
    it is killed. Then `on_lease` gets the lease, or `on_lost` is called if it is not registered any more.
    """

    inflight_runs: InflightRuns
    store: HandBackStore
    cancel: Callable[[RunId, str], None]
    on_lease: Callable[[Lease], None]
    on_lost: Callable[[], None]
    # Whether a run is on its way to a host: no process of this worker has it.
    is_placed: Callable[[OwnedRun], bool] = lambda run: False
    _renewals: asyncio.Queue[Renewal] = field(default_factory=asyncio.Queue)
    _not_held: set[tuple[RunId, int]] = field(default_factory=set)

    def take(self, renewal: Renewal) -> None:
        self._renewals.put_nowait(renewal)

    async def run(self) -> None:
        while True:
            await self.reconcile(await self._renewals.get())

    async def reconcile(self, renewal: Renewal) -> None:
        """Compare one renewal with the runs held now, and act on the difference."""
        owned = {run.id: run.fencing_token for run in renewal.owned}
        for run_id, fencing_token in renewal.held.items():
            inflight = self.inflight_runs.get(run_id)
            if inflight is None or inflight.run.fencing_token != fencing_token:
                continue
            if owned.get(run_id) != fencing_token:
                run_fenced_out(run_id, inflight.run.attempt, fencing_token, inflight)
                inflight.stop.kill()
        if not renewal.registered:
            self.on_lost()
            return
        if not renewal.all_ours:
            self.on_lease(renewal.lease)
        not_held: set[tuple[RunId, int]] = set()
        for run in renewal.owned:
            inflight = self.inflight_runs.get(run.id)
            if inflight is not None and inflight.run.fencing_token >= run.fencing_token:
                if run.cancel_reason is not None and inflight.run.fencing_token == run.fencing_token:
                    self.cancel(run.id, run.cancel_reason)
            elif renewal.held.get(run.id) != run.fencing_token and not self.is_placed(run):
                not_held.add((run.id, run.fencing_token))
        twice = not_held & self._not_held
        self._not_held = not_held
        if twice:
            late = [run for run in renewal.owned if (run.id, run.fencing_token) in twice]
            # Before the database knows it: from then on another process may start them.
            self.inflight_runs.hand_back(late)
            # Without an answer now, the next renewal finds them again.
            with suppress(Unavailable):
                await self.store.hand_back(late)


class RecoveryStore(Protocol):
    async def recover(self, still: Callable[[], bool]) -> Sequence[Recovered]:
        """Take the runs of workers whose lease has expired; return what became of them.

        `still` is called again, in another thread, when the database has answered.
        """


async def recover_dead_workers(
    store: RecoveryStore,
    *,
    may_recover: Callable[[], bool],
    on_recovered: Callable[[Sequence[Recovered]], None],
) -> None:
    """Take over runs of dead workers. Raises Unavailable.

    After an outage every lease has expired. `may_recover` lets living owners renew first, and stops a
    recovery that the outage itself has delayed.
    """
    if not may_recover():
        return
    recovered = await store.recover(may_recover)
    emit_recovered(recovered)
    if recovered:
        on_recovered(recovered)


def emit_recovered(recovered: Sequence[Recovered]) -> None:
    for run in recovered:
        emit(
            "run.recovered",
            org=run.org,
            run=run.run_id,
            definition=run.definition,
            attempt=run.attempt,
            worker=run.worker,
            state=run.state,
        )
