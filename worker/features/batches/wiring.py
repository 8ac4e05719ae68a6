"""The batches of one incarnation of a worker, as its settings have them."""

from __future__ import annotations

from collections.abc import Callable

from worker.clock import Clock
from worker.engine.attempt.tools import SecretSource
from worker.features.batches.accounts import Accounts, apis_of
from worker.features.batches.desk import Desk
from worker.features.batches.loop import BatchSender
from worker.features.batches.sealing import Sealer
from worker.features.batches.trying import TrialBatches
from worker.model.batches import BatchLimits
from worker.outbound import open_client
from worker.settings import Settings
from worker.wiring.addition import BatchParts


def make_batches(parts: BatchParts) -> BatchSender:
    """What sends the batches of the worker's pools."""
    settings = parts.settings
    known = {api.name: api for api in apis_of(settings)}
    configured = settings.batches
    limits = {name: BatchLimits(one.every, one.max_requests, one.bytes) for name, one in configured.items()}
    accounts = Accounts(known, settings.secrets_dir, parts.secrets, open_client())
    sealer = Sealer(parts.ring)
    desk = Desk(parts.database, parts.clock, known, limits, accounts, sealer, parts.ledger)
    return BatchSender(
        database=parts.database,
        worker_id=parts.worker_id,
        clock=parts.clock,
        pools=settings.execution.pools,
        lasts=settings.execution.lease,
        desk=desk,
        accounts=accounts,
        sealer=sealer,
        ledger=parts.ledger,
        known=known,
        limits=limits,
        polls={name: one.poll.total_seconds() for name, one in configured.items()},
        on_woken=parts.on_woken,
    )


def make_trial(
    settings: Settings, secrets: SecretSource, clock: Clock, say: Callable[[str], object]
) -> TrialBatches:
    """What sends the requests of `try --batch`; `say` gets what happens to them."""
    known = {api.name: api for api in apis_of(settings)}
    accounts = Accounts(known, settings.secrets_dir, secrets, open_client())
    polls = {name: one.poll.total_seconds() for name, one in settings.batches.items()}
    return TrialBatches(known, accounts, polls, clock, say)
