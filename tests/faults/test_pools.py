"""Pools × regions × tokens: at random, no run is ever prepared in a pool that its token does not allow.

Workers serve random pools, and most of them know the rules from the database alone; tokens change while
runs wait and while they run. `FAULTS=full` makes it 100,000 admissions, with the seed FAULTS_SEED.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import START, ManualClock
from tests.fakes.stock import HANDLER, Stock
from worker.engine.attempt.attempt import Prepared, prepare
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.runners.contract import StopSignal
from worker.errors import TokenRefused
from worker.guard.claims import Claims
from worker.handlers.calls import AskToken
from worker.handlers.catalogue import HandlerEntry
from worker.ids import OrgId, WorkerId, new_id
from worker.model.claims import Enforced, PoolRules, Rules
from worker.model.definitions.pools import pool_of
from worker.model.orgs import TokenWant
from worker.model.runs.outcome import Trail
from worker.model.runs.run import AdmittedRun, RunContext
from worker.store.database import Database
from worker.store.worker_store import WorkerStore

POOLS = ("default", "eu", "us", "gpu", "eu-gpu")
RULES: dict[str, dict[str, Any]] = {
    "eu": {"region": "eu"},
    "us": {"region": "us"},
    "eu-gpu": {"region": "eu", "gpu": True},
}
REGIONS = ("eu", "us", "EU", None)
GPUS = ("true", "false", True, 1, None)
BATCH = 200


class Orgs:
    """The properties of each org, which change at random; source of tokens, plans and empty stores."""

    limits_in_claims = False

    def __init__(self, dice: random.Random, ids: Sequence[OrgId]) -> None:
        self.dice = dice
        self.properties: dict[OrgId, dict[str, Any]] = {org: {} for org in ids}
        for org in ids:
            self.change(org)

    def change(self, org: OrgId) -> None:
        found = {"region": self.dice.choice(REGIONS), "gpu": self.dice.choice(GPUS)}
        self.properties[org] = {name: value for name, value in found.items() if value is not None}

    def may(self, org: OrgId, pool: str) -> bool:
        """The oracle: whether the org's token allows the pool, in other words than the rules."""
        region, gpu = (self.properties[org].get(name) for name in ("region", "gpu"))
        if pool in ("eu", "eu-gpu") and region != "eu":
            return False
        if pool == "us" and region != "us":
            return False
        return pool != "eu-gpu" or gpu is True or gpu == "true"

    def _claims(self, org: OrgId) -> Claims:
        now = START
        return Claims(
            org, "client", frozenset(), dict(self.properties[org]), {}, now, now + timedelta(hours=1)
        )

    def at_hand(self, want: TokenWant) -> Enforced:
        return Enforced.of("ey.t", self._claims(want.org.id), ManualClock())

    async def ensure(self, want: TokenWant) -> Enforced:
        return self.at_hand(want)

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        spec = json.dumps({"handler": HANDLER, "schedule": "@hourly"})
        return RunContext(run.org_id, run.org_id, "Acme", None, "main", "digest", spec)

    def is_limited(self, org_id: OrgId) -> bool:
        return False


def tools_of(orgs: Orgs, clock: ManualClock, rules: PoolRules) -> Tools:
    handlers = HandlerRegistry()
    handlers.add(HandlerEntry(HANDLER, "acme-jobs", "1", "acme:note"))
    empty: Any = orgs
    return Tools(
        plans=Plans(empty, clock, api_origins={}),
        tokens=empty,
        handlers=handlers,
        runners={},
        store=empty,
        steps=empty,
        run_log=RunLogWriter(empty, clock),
        clock=clock,
        random=random.Random(7),
        pool_rules=rules,
    )


@dataclass
class Worker:
    """A worker with the pools that it names, its store and what its attempts use."""

    id: WorkerId
    pools: Sequence[str]
    store: WorkerStore
    tools: Tools


@dataclass
class Fleet:
    """Workers that start one after the other, each with its own configuration."""

    stock: Stock
    orgs: Orgs
    clock: ManualClock
    workers: list[Worker] = field(default_factory=list)

    def start(self, pools: Sequence[str], own: Rules) -> None:
        rules, id_ = PoolRules(own), WorkerId(new_id())
        store = WorkerStore(self.stock.database, id_, timedelta(days=1), pools=pools, pool_rules=rules)
        store.register(version="1", handlers=[HANDLER], capacity={})
        self.workers.append(Worker(id_, pools, store, tools_of(self.orgs, self.clock, rules)))


@dataclass
class Tally:
    admitted: int = 0
    wrong: list[str] = field(default_factory=list)
    prepared: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    renewals: Counter[str] = field(default_factory=Counter)


async def attempt(worker: Worker, run: AdmittedRun, orgs: Orgs, tally: Tally) -> None:
    """Prepare an admitted run, then renew its token after the org may have changed."""
    tally.admitted += 1
    if run.pool not in worker.pools:
        tally.wrong.append(f"{run.pool} on a worker of {worker.pools}")
    inflight = InflightRun(run, StopSignal())
    allowed = orgs.may(run.org_id, run.pool)
    try:
        prepared = await prepare(inflight, Trail(run.handler), worker.tools)
    except TokenRefused as refused:
        assert refused.reason == "pool_mismatch"
        assert not allowed, (run.pool, orgs.properties[run.org_id])
        tally.refused[run.pool] += 1
        return
    assert isinstance(prepared, Prepared)
    tally.prepared[run.pool] += 1
    if not allowed:
        tally.wrong.append(f"{run.pool} with {orgs.properties[run.org_id]}")
    if orgs.dice.random() < 0.2:
        orgs.change(run.org_id)
        allowed = orgs.may(run.org_id, run.pool)
        try:
            await worker.tools.renew(inflight, AskToken(fresh=True))
        except TokenRefused as refused:
            assert (refused.reason, allowed) == ("pool_mismatch", False)
            tally.renewals["refused"] += 1
        else:
            tally.renewals["renewed"] += 1
            if not allowed:
                tally.wrong.append(f"{run.pool} renewed with {orgs.properties[run.org_id]}")


async def admit_all(fleet: Fleet, orgs: Orgs, count: int, tally: Tally) -> None:
    """Make runs in random pools and let the workers take them, until so many were admitted."""
    stock, dice, ids = fleet.stock, orgs.dice, list(orgs.properties)
    while tally.admitted < count:
        stock.put(*(stock.run(dice.choice(ids), pool=random_pool(dice)) for _ in range(BATCH)))
        for _ in range(3):
            orgs.change(dice.choice(ids))
        for worker in dice.sample(fleet.workers, len(fleet.workers)):
            admitted = await worker.store.admit({HANDLER: None}, {"child": dice.randrange(1, BATCH)})
            for run in admitted:
                await attempt(worker, run, orgs, tally)
            if admitted:
                stock.finish(worker.id, *(stock.ended(run) for run in admitted))


def random_pool(dice: random.Random) -> str:
    """The pool of a run of which definition, handler and org name one or none."""
    return pool_of(*(dice.choice((None, *POOLS)) for _ in range(3)))


@pytest.fixture
def fleet(database_of_pools: Database, clock: ManualClock) -> Callable[[int], Fleet]:
    def start(seed: int) -> Fleet:
        dice, stock = random.Random(seed), Stock(database_of_pools)
        fleet = Fleet(stock, Orgs(dice, [stock.org(limit=1000) for _ in range(40)]), clock)
        # The first has the rules of an older configuration, the second stores those in force, and the
        # others have none, or the same.
        fleet.start(POOLS, {"us": {"region": "usa"}})
        fleet.start(POOLS, RULES)
        for number in range(6):
            fleet.start(dice.sample(POOLS, dice.randrange(1, 4)), RULES if number % 3 == 0 else {})
        return fleet

    return start


@pytest.fixture
def database_of_pools(migrated_url: str, clock: ManualClock) -> Any:
    with clock.moves(migrated_url):
        database = Database.open(migrated_url, clock=clock)
        yield database
        database.close()


@pytest.mark.timeout(1800)
async def test_no_run_executes_in_a_pool_that_its_token_does_not_allow(
    fleet: Callable[[int], Fleet], full: bool
) -> None:
    seed = int(os.environ.get("FAULTS_SEED", 17))
    started, tally = fleet(seed), Tally()
    for worker in started.workers:
        await worker.store.look_at_pools()

    await admit_all(started, started.orgs, 100_000 if full else 3_000, tally)

    print(
        f"seed {seed}: {tally.admitted} admissions, prepared {dict(tally.prepared)}, "
        f"refused {dict(tally.refused)}, renewals {dict(tally.renewals)}"
    )
    assert tally.wrong == []
    assert set(tally.prepared) == set(POOLS)
    assert set(tally.refused) == set(RULES)
    assert min(tally.renewals["refused"], tally.renewals["renewed"]) > 0
    assert "us" not in {run for run in started.workers[0].store.pool_rules.usable(POOLS)}


async def test_without_the_rules_the_same_admissions_are_wrong(fleet: Callable[[int], Fleet]) -> None:
    """The control: what is counted as wrong happens once nothing is enforced."""
    started, tally = fleet(17), Tally()
    for worker in started.workers:
        worker.tools = replace(worker.tools, pool_rules=PoolRules())

    await admit_all(started, started.orgs, 1_000, tally)

    assert len(tally.wrong) > 100
