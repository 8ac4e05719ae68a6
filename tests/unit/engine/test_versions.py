"""Which version of a handler an attempt gets by a rollout, and who is asked for it."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from tests.unit.engine.runs import admitted
from tests.unit.engine.test_attempt import CLAIMS, Site
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.plan import Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.runners.contract import StopSignal
from worker.guard.claims import Flag
from worker.ids import OrgId, RunId
from worker.model.orgs import Selector
from worker.model.rollouts.rollout import Rollout, RolloutBook, RunVersion, VersionAsk
from worker.model.runs.children import FamilyCap
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, RunContext

OLD, NEW = "acme.digest", "acme.digest_v2"
MORE = frozenset({"read:kb", "ask:model"})


class Versions(Site):
    """A site whose store gives each run that asks this version."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.claims = replace(CLAIMS, scopes=MORE)
        self.book = RolloutBook()
        self.version: RunVersion | None = RunVersion(NEW, "to")
        self.asks: list[VersionAsk] = []
        self.take()

    def take(self, **changed: Any) -> None:
        given = ("r", "digest-v2", "nightly", OLD, NEW, Selector(), None, ("50%",), False, {})
        self.book.take([replace(Rollout(*given, "running", 1), **changed)])

    async def keep_version(self, ask: VersionAsk) -> RunVersion | None:
        self.asks.append(ask)
        return self.version

    async def kept_version(self, run_id: RunId) -> str | None:
        return None

    async def cap_of(self, run_id: RunId) -> FamilyCap:
        return FamilyCap("acme.parent", MORE, frozenset(), (), frozenset())

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        spec = json.dumps(self.spec)
        return RunContext(OrgId("o1"), "org_acme", "Acme", None, "main", "nightly", spec, tags='["pro"]')

    async def attempt(self, **changes: Any) -> EndedAttempt:
        tools = Tools(
            plans=Plans(self, self.clock, api_origins={}, rollouts=self.book),
            tokens=self,
            handlers=self.handlers,
            runners={"child": self, "inline": self},
            store=self,
            steps=self,
            run_log=RunLogWriter(self, self.clock),
            clock=self.clock,
            random=Random(7),
            secrets=self.secrets,
            versions=self,
        )
        return await attempt(InflightRun(admitted(**changes), StopSignal()), tools)


@pytest.fixture
def site(clock: ManualClock) -> Versions:
    return Versions(clock)


async def test_a_run_has_the_version_that_the_store_keeps_under_its_scopes(site: Versions) -> None:
    ended = await site.attempt()

    assert (ended.trail.handler, [work.handler for work in site.works]) == (NEW, [NEW])
    assert site.asked[0].also_ask == MORE
    assert site.asks == [VersionAsk(RunId("r1"), 1, 1, "schedule", OrgId("o1"), "r", True, None)]


async def test_a_new_version_whose_scope_was_not_granted_is_refused(site: Versions) -> None:
    site.claims = CLAIMS

    ended = await site.attempt()

    assert (ended.state, ended.reason, ended.detail) == ("refused", "scope_missing", "ask:model")


@pytest.mark.parametrize(
    ("changed", "handler"),
    [
        # The version of its parent: what a run starts is named by that alone.
        ({"origin": "child"}, OLD),
        ({"origin": "child", "handler": NEW}, NEW),
        # A run by hand of what was a child's handler.
        ({"origin": "retry", "handler": NEW}, NEW),
    ],
)
async def test_children_keep_the_version_of_their_parent(
    site: Versions, changed: dict[str, Any], handler: str
) -> None:
    site.version = RunVersion(NEW if handler == OLD else OLD, "to")

    ended = await site.attempt(**changed)

    assert (ended.state, ended.trail.handler, site.asks) == ("succeeded", handler, [])


async def test_without_that_rule_a_child_would_get_another_version(
    site: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr("worker.engine.attempt.plan.AttemptPlan.rollout_of", lambda plan, run: plan.rollout)

    ended = await site.attempt(origin="child")

    assert (ended.trail.handler, len(site.asks)) == (NEW, 1)


@pytest.mark.parametrize("flag_on", [True, False])
async def test_the_flag_of_a_rollout_is_read_in_the_token(site: Versions, flag_on: bool) -> None:
    site.take(flag=SimpleNamespace(name="agent-v2", equals=True))
    site.claims = replace(site.claims, flags={"agent-v2": Flag("boolean", flag_on)})

    await site.attempt()

    assert [ask.flag_on for ask in site.asks] == [flag_on]


async def test_a_variant_whose_flag_is_on_goes_first(site: Versions) -> None:
    site.spec["variants"] = [{"flag": "agent-v2", "handler": NEW}]
    site.claims = replace(site.claims, flags={"agent-v2": Flag("boolean", True)})

    ended = await site.attempt()

    assert (ended.trail.handler, site.asks) == (NEW, [])


@pytest.mark.parametrize(
    ("kept", "asked"), [("acme.digest_v1", False), (OLD, True), (NEW, True), (None, True)]
)
async def test_a_run_whose_variant_has_stored_progress_has_no_other_version(
    site: Versions, kept: str | None, asked: bool
) -> None:
    site.handlers.add(replace(site.handlers._entries[OLD], name="acme.digest_v1"))
    site.kept_handler = kept
    site.version = RunVersion(kept or OLD, "from")

    ended = await site.attempt(fencing_token=2, attempt=2)

    assert (ended.trail.handler, [ask.stored for ask in site.asks]) == (kept or OLD, [kept] * asked)


async def test_a_run_that_is_no_longer_ours_is_handed_back_before_its_handler(site: Versions) -> None:
    site.version = None

    ended = await site.attempt()

    assert (ended.outcome, site.works) == ("handed_back", [])


async def test_a_rollout_whose_selector_does_not_match_is_not_asked(site: Versions) -> None:
    site.take(selector=Selector(tags=("free",)))

    ended = await site.attempt()

    assert (ended.trail.handler, site.asks) == (OLD, [])
