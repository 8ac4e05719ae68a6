"""What a feature adds to a worker's process: listeners of the process, and loops of each incarnation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.tools import Batches, LimitSource, SecretSource, Tools
from worker.engine.loops.supervisor import Loop
from worker.engine.signals import Signals
from worker.ids import WorkerId
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import OwnedRun
from worker.settings import Settings
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.tokens.sealing import KeyRing


@dataclass(frozen=True, slots=True)
class Parts:
    """An incarnation that is being put together; `resources` are closed after its drain."""

    id: WorkerId
    store: WorkerStore
    tools: Tools
    ring: Callable[[str | None], KeyRing | None]
    signals: Signals
    on_end: Callable[[EndedAttempt, InflightRun | None], None]
    resources: AsyncExitStack


@dataclass(frozen=True, slots=True)
class Joined:
    """What an incarnation gets: loops that begin runs, by name, and whether a run is held elsewhere."""

    loops: Mapping[str, Loop] = field(default_factory=dict)
    is_placed: Callable[[OwnedRun], bool] = lambda run: False


class Addition(Protocol):
    """Made before the zygote is started, with the settings and the clock."""

    def bind(self) -> None:
        """Bind addresses and read files, before the worker starts anything else.

        Raises:
            Busy: another process uses a port.
            ConfigurationError: an address, a file or a client library is not usable.
        """

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Serve until the block ends, over all incarnations."""

    async def prepare(self, database: Database) -> None:
        """Read what an incarnation needs, before it is put together. Raises Unavailable."""

    def join(self, parts: Parts) -> Joined:
        """Take part in an incarnation."""


MakeAddition = Callable[[Settings, Clock], Addition]


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What an incarnation has for its batches; `ledger` prices and reports what they use.

    `on_woken` is called when runs go on.
    """

    settings: Settings
    database: Database
    worker_id: WorkerId
    clock: Clock
    ring: Callable[[str | None], KeyRing | None]
    secrets: SecretSource
    ledger: WorkerStore
    on_woken: Callable[[], object]


# What sends model requests in batches, if worker.toml has `[batches]`.
MakeBatches = Callable[[BatchParts], Batches]
# The same for one run of `try --batch`; the last one gets what happens, as text.
MakeTrialBatches = Callable[[Settings, SecretSource, Clock, Callable[[str], object]], Batches]
# The limits of calls to other services, of one incarnation.
MakeLimits = Callable[[Database, WorkerId, Clock], LimitSource]
