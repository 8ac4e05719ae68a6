"""Temporal as a placer: each run is a standalone activity whose payload is a ticket, and nothing else.

The only module of a worker that imports `temporalio`. No workflow is needed: an activity has one attempt, and
the database decides what follows it. Whatever an activity is given, returns or fails with is stored by
Temporal in plain text, so it gets a ticket that is valid once, returns nothing and never fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import TypeVar

from temporalio.client import ActivityExecutionStatus, Client, PendingActivityState
from temporalio.common import ActivityIDReusePolicy, RetryPolicy
from temporalio.exceptions import ActivityAlreadyStartedError
from temporalio.service import RetryConfig, RPCError, RPCStatusCode, TLSConfig

from worker.features.hosts.temporal import EngineUnavailable, Standing, TlsFiles
from worker.model.runs.hosts import Placement, Ticket
from worker.model.runs.run import Isolation

# The type of the activities.
ACTIVITY = "orgworker.attempt"
# Seconds for one request, with its retries.
PATIENCE = 5.0
# A host reports that an activity goes on this often, and Temporal gives it up after the other time.
HEARTBEAT = timedelta(seconds=10)
HEARTBEAT_TIMEOUT = timedelta(seconds=60)
# Temporal wants a limit. The database has the timeout of each run.
LONGEST = timedelta(days=365)

T = TypeVar("T")


def queue_of(pool: str, isolation: Isolation) -> str:
    """The task queue of a pool: each isolation has slots of its own on a host, so a queue of its own."""
    return f"orgworker.{pool}" if isolation == "child" else f"orgworker.{pool}:inline"


async def connect(address: str, namespace: str, *, identity: str, tls: TlsFiles | None) -> Client:
    """A client, once the server has answered. Raises RPCError and RuntimeError."""
    config = tls and TLSConfig(
        server_root_ca_cert=tls.ca_file, client_cert=tls.certificate, client_private_key=tls.key
    )
    retries = RetryConfig(max_elapsed_time_millis=int(PATIENCE * 1000), max_retries=5)
    return await Client.connect(
        address, namespace=namespace, identity=identity, retry_config=retries, tls=config or False
    )


@dataclass(eq=False, repr=False)
class TemporalPlacer:
    """Starts an activity for each placement; `installation` tells apart databases that share a namespace."""

    address: str
    namespace: str
    _: KW_ONLY
    installation: str
    place_timeout: timedelta
    identity: str
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def place(self, placement: Placement, ticket: Ticket) -> None:
        client = await self._connected()
        starting = client.start_activity(
            ACTIVITY,
            ticket.reveal(),
            id=self._id(placement),
            task_queue=queue_of(placement.pool, placement.isolation),
            schedule_to_start_timeout=self.place_timeout,
            start_to_close_timeout=LONGEST,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RetryPolicy(maximum_attempts=1),
            id_reuse_policy=ActivityIDReusePolicy.REJECT_DUPLICATE,
        )
        try:
            await self._answered(starting)
        except ActivityAlreadyStartedError:
            # An earlier request whose answer was lost.
            return

    async def withdraw(self, placement: Placement) -> None:
        client = await self._connected()
        try:
            await self._answered(client.get_activity_handle(self._id(placement)).cancel())
        except _NotKnown:
            return

    async def describe(self, placement: Placement) -> Standing:
        client = await self._connected()
        try:
            found = await self._answered(client.get_activity_handle(self._id(placement)).describe())
        except _NotKnown:
            return "gone"
        if found.status != ActivityExecutionStatus.RUNNING:
            return "gone"
        return "queued" if found.run_state == PendingActivityState.SCHEDULED else "taken"

    async def check(self) -> None:
        client = await self._connected()
        await self._answered(client.service_client.check_health(timeout=timedelta(seconds=PATIENCE)))

    def _id(self, placement: Placement) -> str:
        return f"{self.installation}.{placement.run_id}.{placement.fencing_token}"

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None:
                connecting = connect(self.address, self.namespace, identity=self.identity, tls=self.tls)
                self._client = await self._answered(connecting)
            return self._client

    async def _answered(self, request: Awaitable[T]) -> T:
        """The answer to a request. Raises EngineUnavailable, or `_NotKnown` for an unknown activity."""
        try:
            return await asyncio.wait_for(request, PATIENCE)
        except ActivityAlreadyStartedError:
            raise
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND and self._client is not None:
                raise _NotKnown from error
            raise EngineUnavailable(f"Temporal at {self.address}: {error.status.name.lower()}") from error
        except (TimeoutError, RuntimeError) as error:
            # RuntimeError is what the client raises if it cannot connect.
            raise EngineUnavailable(f"Temporal at {self.address} does not respond") from error


class _NotKnown(Exception):
    """Temporal knows no such activity, or it has ended."""
