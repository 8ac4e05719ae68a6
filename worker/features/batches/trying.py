"""Batches of a trial: each request in a batch of its own, whose result the handler waits for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.features.batches.accounts import Accounts
from worker.features.batches.desk import checked_body
from worker.features.batches.remote import BatchApi, Failure, Line, Remote
from worker.model.batches import TITLES, ModelApi, NewRequest
from worker.model.runs.waits import NewWait, WaitState
from worker.store.batch_requests import new_item_id

OVER = WaitState("batch", "over")


@dataclass(eq=False)
class TrialBatches:
    """Implements `engine.attempt.tools.Batches`. `polls` has seconds by API; `say` gets what happens."""

    known: Mapping[str, ModelApi]
    accounts: Accounts
    polls: Mapping[str, float]
    clock: Clock
    say: Callable[[str], object]

    @property
    def apis(self) -> tuple[ModelApi, ...]:
        return tuple(self.known.values())

    def serves(self, pool: str) -> bool:
        """As `Batches.serves`."""
        return True

    async def run(self) -> None:
        """As `Batches.run`: requests are sent as they come."""

    async def close(self) -> None:
        """As `Batches.close`."""
        await self.accounts.client.aclose()

    async def open(self, inflight: InflightRun, wait: NewWait) -> WaitState | None:
        """As `Batches.open`, but it returns once the result is there. Raises StepError."""
        request, plan = wait.request, inflight.plan
        if request is None or plan is None or (api := self.known.get(request.api)) is None:
            return OVER
        checked_body(request, api)
        own = await self.accounts.own_key(api, plan.org)
        remote_api = await self.accounts.open(api.name, None if own is None else plan.org.id)
        if remote_api is None:
            self.say(f"there is no key for {api.name}: the request is sent on its own")
            return OVER
        try:
            return await self._sent(remote_api, api, request)
        except Failure as error:
            self.say(f"{TITLES[api.provider]} did not take the batch ({error.code}): it is sent on its own")
            return OVER

    async def _sent(self, remote_api: BatchApi, api: ModelApi, request: NewRequest) -> WaitState:
        line = Line(new_item_id(), request.body_json.encode())
        betas = ",".join(request.betas)
        file_id = None
        if remote_api.takes_file:
            file_id = await remote_api.upload(f"orgworker-try-{line.id}.jsonl", request.path, [line])
        remote = await remote_api.create(request.path, betas, file_id, [line])
        self.say(f"in batch {remote.id} of {TITLES[api.provider]}, which may take up to a day")
        while remote.state == "open":
            await self.clock.sleep(self.polls[api.name])
            remote = await remote_api.get(remote.id)
        state = await self._result(remote_api, remote, line.id)
        for file in (file_id, *remote.files):
            if file is not None:
                await remote_api.delete_file(file)
        return state

    async def _result(self, remote_api: BatchApi, remote: Remote, id_: str) -> WaitState:
        async with aclosing(remote_api.results(remote)) as results:
            async for result in results:
                if result.id == id_ and result.status == "succeeded":
                    return WaitState("batch", "answered", result.answer())
                if result.id == id_:
                    said = json.loads(result.body or "null")
                    self.say(f"the request {result.status} in its batch: {str(said)[:500]}")
        return OVER
