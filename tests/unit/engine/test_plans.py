"""Plans: read in one query for many runs, and one definition in memory for all orgs of a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta

import pytest

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt.plan import MAX_AGE, AttemptPlan, HandlerRegistry, Plans, Revision
from worker.errors import ConfigurationError, DefinitionError, StoreUnavailable
from worker.handlers.catalogue import HandlerEntry
from worker.ids import DefinitionId, OrgId
from worker.model.orgs import TokenWant
from worker.model.runs.run import AdmittedRun, RunContext

SPEC = {"handler": "acme.digest", "schedule": "@hourly"}


class Store:
    """A definition for each run, of an org of its own; counts queries."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        self.specs: dict[str, dict[str, object]] = {}
        self.fault: Exception | None = None

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        key = (run.definition_id, run.revision)
        return (await self.orgs_and_definitions([key]))[key]

    async def orgs_and_definitions(self, wanted: Sequence[Revision]) -> Mapping[Revision, RunContext]:
        self.queries.append(len(wanted))
        if self.fault is not None:
            raise self.fault
        return {
            (id_, revision): RunContext(
                OrgId(f"id of {id_}"),
                f"org_{id_}",
                id_,
                None,
                "main",
                "nightly",
                json.dumps(self.specs.get(id_, SPEC)),
            )
            for id_, revision in wanted
        }


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def plans(store: Store, clock: ManualClock) -> Plans:
    return Plans(store, clock, api_origins={"main": ("https://api.acme.test",)})


def runs_of(*definitions: str) -> list[AdmittedRun]:
    return [admitted(f"r{id_}", definition_id=DefinitionId(id_)) for id_ in definitions]


async def test_the_plans_of_many_runs_are_read_in_one_query(plans: Plans, store: Store) -> None:
    runs = runs_of("a", "b", "a")

    loaded = await plans.load(runs)

    assert {plan.org.code for plan in loaded} == {"org_a", "org_b"}
    assert [(await plans.of(run)).org.code for run in runs] == ["org_a", "org_b", "org_a"]
    assert store.queries == [2]
    assert len(await plans.load(runs)) == 3
    assert store.queries == [2]


async def test_orgs_of_a_template_share_its_definition(plans: Plans, store: Store) -> None:
    store.specs["c"] = SPEC | {"timeout": "5m"}
    a, b, c = await plans.load(runs_of("a", "b", "c"))

    assert a.definition is b.definition
    assert a._limits is b._limits
    assert a.org != b.org
    assert c.definition.timeout != a.definition.timeout


async def test_a_plan_is_read_again_after_some_seconds_and_not_kept_longer(
    plans: Plans, store: Store, clock: ManualClock
) -> None:
    await plans.load(runs_of("a", "b"))
    clock.advance(MAX_AGE)

    await plans.of(runs_of("c")[0])

    assert [key[0] for key in plans._plans] == ["c"]
    await plans.load(runs_of("a", "c"))
    assert store.queries == [2, 1, 1]


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (SPEC | {"unknown": 1}, DefinitionError),
        (SPEC | {"api_origins": ["http://api.acme.test"]}, ConfigurationError),
    ],
)
async def test_what_is_wrong_with_one_definition_is_reported_for_its_run(
    plans: Plans, store: Store, spec: dict[str, object], error: type[Exception]
) -> None:
    """The message names the org, although the definition is shared."""
    store.specs["a"] = spec
    (b,) = await plans.load(runs_of("a", "b"))

    assert b.org.code == "org_b"
    with pytest.raises(error, match="org_a/nightly"):
        await plans.of(runs_of("a")[0])


async def test_a_database_that_is_away_is_reported_for_each_run(plans: Plans, store: Store) -> None:
    store.fault = StoreUnavailable("away")

    assert await plans.load(runs_of("a")) == []
    with pytest.raises(StoreUnavailable):
        await plans.of(runs_of("a")[0])


@pytest.mark.parametrize("variants", [[], [{"flag": "v2", "handler": "acme.digest_v2"}]], ids=["one", "two"])
async def test_the_token_of_a_plan_is_the_orgs_own_and_follows_the_handlers(
    plans: Plans, store: Store, variants: list[dict[str, str]]
) -> None:
    """A request is cached with its plan: not for another org, and not once other scopes are declared."""
    store.specs = {id_: SPEC | {"max_claims_age": "5m", "variants": variants} for id_ in ("d1", "d2")}
    handlers = HandlerRegistry()
    first, second = [await plans.of(run) for run in runs_of("d1", "d2")]

    def want(plan: AttemptPlan) -> TokenWant:
        return plan.want(plan.limits("acme.digest", handlers.get("acme.digest")), handlers)

    none = frozenset[str]()
    assert want(first) == TokenWant(first.org, "main", max_age=timedelta(minutes=5))
    assert (want(second).org, want(first).org) == (second.org, first.org)
    handlers.add(HandlerEntry("acme.digest", "acme-jobs", "1", "acme:digest", scopes=("read:kb",)))
    assert (want(first).scopes, want(first).also_ask) == ({"read:kb"}, none)
    assert (want(first) is want(first)) is not bool(variants)
    handlers.add(HandlerEntry("acme.digest_v2", "acme-jobs", "1", "acme:v2", scopes=("ask:model",)))
    assert want(first).also_ask == (frozenset({"ask:model"}) if variants else none)
