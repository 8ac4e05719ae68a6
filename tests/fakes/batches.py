"""A worker's batches over a database and the fakes of the providers, moved by hand."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import and_

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Row, Stock
from worker.demo.model_apis import ModelApis, client_of
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import AttemptPlan
from worker.engine.runners.contract import StopSignal
from worker.features.batches.accounts import Accounts
from worker.features.batches.advance import LeaseGone, Patience
from worker.features.batches.desk import Desk
from worker.features.batches.loop import BatchSender
from worker.features.batches.sealing import Sealer
from worker.ids import OrgId, WorkerId, new_id
from worker.model.batches import BatchLimits, ModelApi, NewRequest, wait_name
from worker.model.bindings import OrgSecret, OrgSecrets
from worker.model.definitions.definition import Definition
from worker.model.orgs import OrgRef
from worker.model.prices import Prices
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait, WaitState
from worker.store import batches, tables
from worker.store.spending import CountedSpends
from worker.tokens.sealing import KeyRing

OPENAI = ModelApi("openai", "openai", "https://api.openai.com", "openai_key")
ANTHROPIC = ModelApi("anthropic", "anthropic", "https://api.anthropic.com", "anthropic_key")
LIMITS = BatchLimits(timedelta(minutes=10), 1000, 10_000_000)
KEY = "sk-operator-0001"


@dataclass
class OrgKeys:
    """The secrets of orgs, by id and name."""

    values: dict[tuple[str, str], OrgSecret] = field(default_factory=dict)

    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        found = {name: self.values.get((org.id, name)) for name in names}
        return {name: one for name, one in found.items() if one is not None}


@dataclass
class KnownPrices:
    """Prices that stay as they are; keeps what is reported."""

    known: Prices
    reported: list[CountedSpends]

    async def prices(self) -> Prices:
        return self.known

    def report(self, counted: CountedSpends) -> None:
        self.reported.append(counted)


@dataclass
class Rig:
    """Workers that share a database, and the runs that they have."""

    stock: Stock
    clock: ManualClock
    apis: ModelApis
    folder: Path
    limits: BatchLimits = LIMITS
    keys: OrgKeys = field(default_factory=OrgKeys)
    prices: Prices = field(default_factory=Prices)
    reported: list[CountedSpends] = field(default_factory=list)
    woken: int = 0
    definition: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ring = KeyRing.load_or_generate(self.folder / "keyring")
        for api in (OPENAI, ANTHROPIC):
            (self.folder / f"model_key__{api.name}").write_text(KEY)
        # Its lease outlasts the time that tests let pass.
        self.worker = self.stock.worker(lease=timedelta(days=30))

    def sender(self, worker: WorkerId | None = None, **values: Any) -> BatchSender:
        """What sends the batches of one worker."""
        known = {api.name: api for api in (OPENAI, ANTHROPIC)}
        limits = dict.fromkeys(known, self.limits)
        accounts = Accounts(known, str(self.folder), self.keys, client_of(self.apis))
        sealer = Sealer(lambda key_id: self.ring)
        database, ledger = self.stock.database, KnownPrices(self.prices, self.reported)

        def wake() -> None:
            self.woken += 1

        return BatchSender(
            database=database,
            worker_id=worker or WorkerId(new_id()),
            clock=self.clock,
            pools=("default",),
            lasts=timedelta(seconds=30),
            desk=Desk(database, self.clock, known, limits, accounts, sealer, ledger),
            accounts=accounts,
            sealer=sealer,
            ledger=ledger,
            known=known,
            limits=limits,
            polls=dict.fromkeys(known, 60.0),
            on_woken=wake,
            patience=replace(Patience(), skew=timedelta(minutes=5), grace=timedelta(minutes=2)),
            **values,
        )

    def running(self, org: OrgId | None = None, **values: Any) -> AdmittedRun:
        org = org or self.stock.org(limit=10_000)
        return self.stock.running(self.worker, org, self.stock.definition(org), **values)

    def inflight(self, run: AdmittedRun) -> InflightRun:
        definition = Definition("", "digest", HANDLER, "@daily", model_requests="batch", **self.definition)
        inflight = InflightRun(run, StopSignal())
        inflight.begin(AttemptPlan(definition, OrgRef(run.org_id, "acme"), "Acme", "main", ()))
        return inflight

    async def ask(
        self,
        sender: BatchSender,
        run: AdmittedRun,
        body: Mapping[str, Any] | None = None,
        *,
        api: ModelApi = OPENAI,
        step: str = "complete",
        key: str | None = None,
        meter: str | None = "llm_tokens",
    ) -> WaitState | None:
        """Open the request of a step, as a running attempt does."""
        if body is None:
            body = {"model": "gpt-5-mini", "input": f"of {run.id}"}
        path = "/v1/messages" if api.provider == "anthropic" else "/v1/responses"
        request = NewRequest(step, key, 1, api.name, path, json.dumps(body), (), meter)
        return await sender.open(self.inflight(run), wait_of(request))

    def park(self, run: AdmittedRun) -> None:
        end = self.stock.ended(run, "parked", outcome="parked", reason="batch", detail="openai")
        assert self.stock.finish(self.worker, end) == {run.id}

    def resumed(self, *runs: AdmittedRun) -> list[AdmittedRun]:
        """The next attempts of runs that were woken, in the same order."""
        found: dict[str, AdmittedRun] = {}
        for _ in range(20):
            found |= {each.id: each for each in self.stock.admit(self.worker)}
        return [found[run.id] for run in runs]

    async def hold(self, sender: BatchSender, pool: str = "default") -> bool:
        """Take or renew the lease, as the loop does; returns whether it is held."""
        began = self.clock.monotonic()
        database = sender.database
        lease = await database.call(batches.take_lease, pool, sender.worker_id, sender.lasts)
        if lease is None:
            sender._held.pop(pool, None)
            return False
        sender._held[pool] = lease, began + 0.8 * sender.lasts.total_seconds()
        return True

    async def look(self, sender: BatchSender, times: int = 1) -> None:
        for _ in range(times):
            assert await self.hold(sender)
            await sender.look("default")

    async def pass_time(self, sender: BatchSender, minutes: int, *, every: int = 1) -> None:
        """Let time pass, with a look every minute. What a look cannot do now, the next one does."""
        for _ in range(0, minutes, every):
            self.clock.advance(timedelta(minutes=every))
            try:
                await self.look(sender)
            except LeaseGone:
                continue

    def items(self) -> list[Row]:
        return sorted(self.stock.all(tables.batch_items), key=lambda row: row["opened_at"])

    def batches(self) -> list[Row]:
        return sorted(self.stock.all(tables.batches), key=lambda row: row["id"])

    def live(self, run: AdmittedRun) -> str:
        return str(self.stock.unended(run.id)["state"])

    def spent(self, run: AdmittedRun, meter: str = "llm_tokens") -> int:
        of = tables.spends.c.run_id == run.id, tables.spends.c.meter == meter
        return sum(row["amount"] for row in self.stock.all(tables.spends, and_(*of)))


def wait_of(request: NewRequest) -> NewWait:
    """The wait for a request, as the worker names it."""
    name = wait_name(request.step, request.key or "")
    return NewWait(name, request.occurrence, "batch", request=request)


def answer_of(state: WaitState | None) -> Any:
    """The response in an answer."""
    assert state is not None and state.state == "answered" and state.answer_json is not None
    answer = json.loads(state.answer_json)
    assert answer["status"] == "succeeded"
    return json.loads(answer["body"])


def text_of(response: Mapping[str, Any]) -> str:
    """The text of a response of either API."""
    if "output" in response:
        return str(response["output"][0]["content"][0]["text"])
    message = response.get("message", response)
    return str(message["content"][0]["text"])
