"""The desk: takes the model requests of runs for batches, and hands their results back."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from worker.clock import Clock
from worker.engine.attempt.inflight import InflightRun
from worker.errors import LeaseLost
from worker.features.batches.accounts import Accounts, Ledger
from worker.features.batches.sealing import Sealer
from worker.guard.urls import origin_of
from worker.handlers.steps import StepError
from worker.ids import DefinitionId
from worker.model.batches import (
    PATHS,
    BatchLimits,
    Experience,
    Fallback,
    ModelApi,
    NewRequest,
    Pool,
    forecast,
    most_usage,
)
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait, WaitState
from worker.store import batch_requests
from worker.store.batch_requests import NewItem, Opened
from worker.store.database import Database
from worker.store.dialect import Row
from worker.telemetry.events import emit

# Seconds for which what is known of a definition is used, and definitions that are known.
FRESH = 60.0
KNOWN = 10_000
# Bytes that a request takes in a batch, besides its body.
ENVELOPE = 200
_BETA = re.compile(r"[A-Za-z0-9._-]{1,100}")
_MODEL = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """What is stored of a request; if it is new, the requests of its run so far."""

    item: Row | None
    turns: int


def look(connection: Connection, run: AdmittedRun, request: NewRequest) -> KnownRequest:
    """Find the request of a step."""
    key = request.step, request.key or "", request.occurrence
    item = batch_requests.find_item(connection, run.id, *key)
    return KnownRequest(item, batch_requests.turns_of(connection, run.id) if item is None else 0)


@dataclass(eq=False)
class Desk:
    """Opens requests of running attempts."""

    database: Database
    clock: Clock
    apis: Mapping[str, ModelApi]
    limits: Mapping[str, BatchLimits]
    accounts: Accounts
    sealer: Sealer
    ledger: Ledger
    _known: OrderedDict[tuple[DefinitionId, str, str, str], tuple[float, Experience]] = field(
        default_factory=OrderedDict
    )

    async def open(self, inflight: InflightRun, wait: NewWait) -> WaitState | None:
        """As `Batches.open`. Raises StepError for a request that no provider would take."""
        run, request = inflight.run, wait.request
        if request is None or inflight.plan is None:
            raise LeaseLost(f"run {run.id} has not started")
        looked = await self.database.call_autocommit(look, run, request)
        if looked.item is not None and (done := self._result(looked.item)) is not None:
            return done
        new = self._again(request) if looked.item is not None else await self._new(inflight, request, looked)
        opened = await inflight.store(self._store(run, replace(wait, request=None), new))
        if opened is None:
            return None
        if looked.item is None and new.fallback is not None:
            emit("batch.fell_back", reason=new.fallback, requests=1)
        return self._state(opened)

    async def _store(self, run: AdmittedRun, wait: NewWait, new: NewItem) -> Opened | None:
        """Store a request, and report what it reserves, also if the run's process has ended meanwhile."""
        prices = await self.ledger.prices()
        opened = await self.database.call(batch_requests.open_item, run, wait, new, prices)
        if opened is not None:
            self.ledger.report(opened.spends)
        return opened

    def _again(self, request: NewRequest) -> NewItem:
        """What finds a stored request: nothing else of it counts."""
        pool = Pool(request.api, None, request.path, "", "")
        key = request.step, request.key or "", request.occurrence
        return NewItem(batch_requests.new_item_id(), *key, pool, 0, None, None, None, fallback="refused")

    async def _new(self, inflight: InflightRun, request: NewRequest, looked: KnownRequest) -> NewItem:
        run, plan = inflight.run, inflight.plan
        key = request.step, request.key or "", request.occurrence
        api = self.apis.get(request.api)
        if plan is None or api is None:
            return replace(self._again(request), fallback="no_api")
        body = checked_body(request, api)
        own = await self.accounts.own_key(api, plan.org)
        account = plan.org.id if own is not None else None
        # The model of the body: it decides which requests share a batch, and a run may say anything.
        pool = Pool(api.name, account, request.path, str(body["model"]), ",".join(sorted(set(request.betas))))
        size = len(request.body_json.encode()) + ENVELOPE
        fallback: Fallback | None = None
        if own is None and self.accounts.operators_key(api) is None:
            fallback = "no_key"
        elif size > self.limits[api.name].max_bytes:
            fallback = "too_large"
        elif inflight.gate is not None and not inflight.gate.allows(origin_of(api.base_url)):
            # The run sends it, and gets the error of a request that it may not send.
            fallback = "egress"
        until = plan.definition.batch_deadline(run.scheduled_for, plan.org_timezone)
        known = await self._experience(run, pool)
        found = forecast(self.clock.now(), until, looked.turns, known)
        if fallback is None and found.late:
            fallback = "late"
        id_ = batch_requests.new_item_id()
        sealed = None
        if fallback is None:
            sealed = self.sealer.seal("request", request.body_json, item=id_, org=run.org_id, run=run.id)
            fallback = "no_key" if sealed is None else None
        most = most_usage(api.provider, pool.model, body, size)
        at = found.fall_back_at
        return NewItem(id_, *key, pool, size, sealed, request.meter, most, at, fallback)

    def _state(self, opened: Opened) -> WaitState:
        item, wait = opened.item, opened.wait
        if item is None:
            return wait
        if item["state"] in ("pending", "sent"):
            return WaitState("batch", "pending")
        return self._result(item) or WaitState("batch", "over")

    def _result(self, item: Row) -> WaitState | None:
        """The answer of a request that has one which opens."""
        if item["state"] != "done":
            return None
        place = {"item": item["id"], "org": item["org_id"], "run": item["run_id"]}
        answer = self.sealer.open("result", item["result"], **place)
        return None if answer is None else WaitState("batch", "answered", answer)

    async def _experience(self, run: AdmittedRun, pool: Pool) -> Experience:
        """What is known of such runs and a model, with the time that requests wait for a batch."""
        key, now = (run.definition_id, run.handler, pool.api, pool.model), self.clock.monotonic()
        kept = self._known.get(key)
        if kept is not None and now - kept[0] < FRESH:
            return kept[1]
        found = await self.database.call_autocommit(batch_requests.experience, *key)
        pooling: timedelta = self.limits[pool.api].every
        seconds = [took + pooling.total_seconds() for took in found.seconds]
        known = Experience(found.turns, seconds)
        self._known[key] = (now, known)
        self._known.move_to_end(key)
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return known


def checked_body(request: NewRequest, api: ModelApi) -> Mapping[str, Any]:
    """The body of a request, which a run may have made up. Raises StepError."""
    what = f"model request {request.step}"
    body: Any = json.loads(request.body_json)
    if request.path not in PATHS[api.provider]:
        raise StepError(f"{what}: {api.name} has no batches of {request.path}")
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, str) or not _MODEL.fullmatch(model):
        raise StepError(f"{what}: its body has no model")
    if body.get("stream") or body.get("background"):
        raise StepError(f"{what}: a request with stream or background has no result to store")
    if any(not _BETA.fullmatch(beta) for beta in request.betas):
        raise StepError(f"{what}: a beta flag consists of letters, digits and . _ -")
    return dict(body)
