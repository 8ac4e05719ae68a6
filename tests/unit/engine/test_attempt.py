"""The whole path of one attempt, with a token source and a runner that are told what to do."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from tests.fakes import exchanges
from tests.fakes.clock import START, ManualClock
from tests.unit.engine.runs import admitted
from worker.engine.attempt import answers
from worker.engine.attempt.attempt import attempt
from worker.engine.attempt.inflight import REPORTED, InflightRun, run_ended
from worker.engine.attempt.plan import AUTO, HandlerRegistry, NetworkPolicy, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import Tools
from worker.engine.runners.child import messages
from worker.engine.runners.contract import RunServices, StopSignal, Work
from worker.errors import (
    ConfigurationError,
    CredentialsRejected,
    IssuerUnavailable,
    LeaseLost,
    StoreUnavailable,
    TokenRefused,
)
from worker.guard.claims import Claims, Flag
from worker.handlers.calls import (
    AskToken,
    Call,
    LoadSteps,
    OpenWait,
    Progress,
    Save,
    StoreStep,
)
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.steps import NAME_LIMIT
from worker.ids import ALL_ORGS, OrgId, RunId
from worker.model.bindings import Binding, OrgSecret, OrgSecrets
from worker.model.claims import Enforced, PoolRules
from worker.model.egress import BoundSecret, Egress, placeholder_of
from worker.model.orgs import OrgRef, TokenWant
from worker.model.runs.budgets import BudgetState, OrgBudgets
from worker.model.runs.egress import MAX_ORIGINS, EgressRow
from worker.model.runs.outcome import EndedAttempt, Error, Failed, Outcome, Succeeded
from worker.model.runs.run import (
    AdmittedRun,
    LoadedState,
    LogLine,
    NewStep,
    RunContext,
    RunStep,
    StepPage,
    StoredProgress,
)
from worker.model.runs.waits import MAX_WAITS, NewWait, WaitState
from worker.telemetry import events
from worker.telemetry.alerts import Strikes
from worker.telemetry.masking import masker

CLAIMS = replace(
    exchanges.CLAIMS, scopes=frozenset({"read:kb"}), properties={"model_version": "gpt-4"}, flags={}
)


class Secrets:
    """The secrets of an org, and what was asked for; those with a binding are bound."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.bindings: dict[str, Binding] = {}
        self.error: Exception | None = None
        self.asked: list[list[str]] = []

    async def of(self, org: OrgRef, names: Collection[str]) -> OrgSecrets:
        self.asked.append(sorted(names))
        if self.error is not None:
            raise self.error
        found = [name for name in names if name in self.values]
        return {name: OrgSecret(self.values[name], self.bindings.get(name)) for name in found}


class Site:
    """Store, token source and runner of one attempt; tests set what each answers."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.spec: dict[str, Any] = {"handler": "acme.digest", "schedule": "@hourly"}
        self.claims = CLAIMS
        self.token_error: Exception | None = None
        self.outcome: Outcome = Succeeded('{"articles": 3}')
        self.checkpoint: Any = None
        self.still_ours = True
        self.works: list[Work] = []
        self.origins: dict[str, tuple[str, ...]] = {}
        self.asked: list[TokenWant] = []
        self.during: Any = None
        self.answers: list[Any] = []
        self.kept_handler: str | None = None
        self.steps: list[RunStep] = []
        self.waits: list[NewWait] = []
        self.spends: list[tuple[str, int, str]] = []
        self.noted: list[Claims] = []
        self.limits_in_claims = True
        self.stop, self.is_lost_meanwhile = StopSignal(), False
        self.budgets_found: OrgBudgets | None = None
        self.pages: list[int] = []
        self.totals = (0, 0)
        self.outdated: list[TokenWant] = []
        self.pool_rules = PoolRules()
        self.secrets = Secrets()
        self.brokered = True
        self.handlers = HandlerRegistry()
        self.handlers.add(HandlerEntry("acme.digest", "acme-jobs", "1.0", "acme:digest", scopes=("read:kb",)))
        self.handlers.add(
            HandlerEntry("acme.digest_v2", "acme-jobs", "1.0", "acme:v2", scopes=("read:kb", "ask:model"))
        )

    async def org_and_definition(self, run: AdmittedRun) -> RunContext:
        return RunContext(OrgId("o1"), "org_acme", "Acme", None, "main", "nightly", json.dumps(self.spec))

    def at_hand(self, want: TokenWant) -> None:
        return None

    async def ensure(self, want: TokenWant) -> Enforced:
        self.asked.append(want)
        if self.token_error is not None:
            raise self.token_error
        return Enforced.of("ey.the.token", self.claims, self.clock)

    async def outdate(self, want: TokenWant) -> None:
        self.outdated.append(want)

    async def save_checkpoint(self, run: AdmittedRun, handler: str, data_json: str, number: int = 0) -> bool:
        return self.still_ours

    async def load_progress(self, run_id: RunId) -> StoredProgress:
        return StoredProgress(self.checkpoint, self.kept_handler)

    def is_limited(self, org_id: OrgId) -> bool:
        return self.budgets_found is not None

    async def note_claims(self, org_id: OrgId, claims: Claims) -> None:
        self.noted.append(claims)
        if self.is_lost_meanwhile:
            self.stop.kill()

    async def budgets_of(self, run: AdmittedRun) -> OrgBudgets:
        return self.budgets_found or OrgBudgets(())

    async def spend(self, run: AdmittedRun, meter: str, amount: int, key: str) -> OrgBudgets | None:
        self.spends.append((meter, amount, key))
        return await self.budgets_of(run) if self.still_ours else None

    async def open_wait(self, run: AdmittedRun, wait: NewWait) -> WaitState | None:
        self.waits.append(wait)
        return WaitState(wait.kind, "pending") if self.still_ours else None

    async def store_step(self, step: RunStep) -> bool:
        self.steps.append(step)
        return self.still_ours

    async def load_steps(self, run_id: RunId, after: int) -> StepPage:
        self.pages.append(after)
        return StepPage()

    async def step_totals(self, run_id: RunId) -> tuple[int, int]:
        return self.totals

    async def write_progress(self, rows: Sequence[Any]) -> None: ...

    async def append_logs(self, rows: Sequence[LogLine]) -> None: ...

    async def run(self, work: Work, services: RunServices, stop: StopSignal) -> Outcome:
        self.works.append(work)
        services.started()
        if self.during is not None:
            await self.during(work, services, stop)
        return self.outcome

    def ask(self, *calls: Call[Any]) -> None:
        """Let the handler ask these, one after the other."""

        async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
            self.answers = [await services.ask(call) for call in calls]

        self.during = during

    async def attempt(self, **changes: Any) -> EndedAttempt:
        tools = Tools(
            plans=Plans(self, self.clock, api_origins={"main": ("https://api.acme.test",)}, **self.origins),
            tokens=self,
            handlers=self.handlers,
            runners={"child": self, "inline": self},
            store=self,
            steps=self,
            run_log=RunLogWriter(self, self.clock),
            clock=self.clock,
            random=Random(7),
            pool_rules=self.pool_rules,
            secrets=self.secrets,
            brokered=self.brokered,
        )
        return await attempt(InflightRun(admitted(**changes), self.stop), tools)


@pytest.fixture
def site(clock: ManualClock) -> Site:
    return Site(clock)


async def test_a_run_goes_the_whole_path_and_succeeds(site: Site) -> None:
    ended = await site.attempt()

    assert (ended.outcome, ended.state, ended.reason) == ("succeeded", "succeeded", None)
    assert ended.result == '{"articles": 3}'
    work = site.works[0]
    assert (work.org_code, work.handler, work.entry_point) == ("org_acme", "acme.digest", "acme:digest")
    assert work.api_origins == ("https://api.acme.test",)
    assert ended.trail.handler_started_at is not None


KEY = "sk-canary-0123456789"


def declare(site: Site) -> None:
    entry = HandlerEntry("acme.digest", "acme-jobs", "1.0", "acme:digest", secrets=("mail", "openai"))
    site.handlers.add(entry)


async def test_a_handler_that_declares_no_secret_costs_no_read_of_any(site: Site) -> None:
    await site.attempt()

    assert (site.secrets.asked, site.works[0].secrets) == ([], {})


async def test_a_run_gets_the_secrets_that_its_handler_declares_masked_before_it_starts(site: Site) -> None:
    declare(site)
    site.secrets.values = {"openai": KEY, "mail": "mail-canary-0123456789", "other": "not-declared-1"}

    async def leak(work: Work, services: RunServices, stop: StopSignal) -> None:
        assert masker.mask(f"a {KEY} b", ALL_ORGS) == "a [masked] b"

    site.during = leak
    site.outcome = Failed(Error("ValueError", f"{KEY} is wrong", f"trace {KEY}"))

    ended = await site.attempt()

    assert site.works[0].secrets == {"openai": KEY, "mail": "mail-canary-0123456789"}
    assert ended.error is not None
    assert ended.error["message"] == "[masked] is wrong"
    assert KEY not in repr(site.works[0]) + repr(ended)


async def test_an_org_that_lacks_a_secret_is_refused_and_keeps_its_token(site: Site) -> None:
    declare(site)
    site.secrets.values = {"mail": "mail-canary-0123456789"}

    ended = await site.attempt()

    assert (ended.state, ended.reason, ended.detail) == ("refused", "secret_missing", "openai")
    assert ended.error is not None
    assert ended.error["message"] == "org org_acme has no secret openai, which acme.digest declares"
    assert (site.works, site.outdated) == ([], [])


OPENAI = Binding("https://api.openai.com", "x-api-key")


async def test_a_run_gets_a_placeholder_of_a_bound_secret_and_only_the_broker_its_value(site: Site) -> None:
    declare(site)
    site.secrets.values = {"openai": KEY, "mail": "mail-canary-0123456789"}
    site.secrets.bindings = {"openai": OPENAI}

    async def echo(work: Work, services: RunServices, stop: StopSignal) -> None:
        # A service may have echoed the value, and a step may store the placeholder.
        assert masker.mask(f"a {KEY} b", ALL_ORGS) == "a [masked] b"
        site.outcome = Succeeded(json.dumps([KEY, work.secrets["openai"]]))

    site.during = echo
    ended = await site.attempt()

    [work] = site.works
    place = placeholder_of(work.run_id, "openai")
    assert work.secrets == {"openai": place, "mail": "mail-canary-0123456789"}
    assert work.bound == (BoundSecret("openai", KEY, OPENAI.origin, OPENAI.header, place),)
    assert work.clear_secrets == {"mail": "mail-canary-0123456789"}
    assert ended.result == json.dumps(["[masked]", place])
    # What goes to the process of the run.
    assert KEY.encode() not in messages.frame(messages.work_message(work, 60.0))
    assert place.encode() in messages.frame(messages.work_message(work, 60.0))


@pytest.mark.parametrize("bindings", [{}, {"openai": OPENAI}], ids=["in clear", "bound"])
async def test_without_a_broker_a_run_is_refused_that_has_a_bound_secret(
    site: Site, bindings: dict[str, Binding]
) -> None:
    """The control is in clear: its handler gets the value, as before."""
    declare(site)
    site.secrets.values = {"openai": KEY, "mail": "mail-canary-0123456789"}
    site.secrets.bindings, site.brokered = bindings, False

    ended = await site.attempt()

    if not bindings:
        assert (ended.state, site.works[0].secrets["openai"]) == ("succeeded", KEY)
        return
    assert (ended.state, ended.reason, ended.detail) == ("refused", "secret_bound", "openai")
    assert ended.error is not None
    assert ended.error["message"] == (
        "the secret openai of org org_acme is bound, and no broker is here that could send it: "
        "install the feature egress"
    )
    assert (site.works, site.outdated) == ([], [])


async def test_a_secret_that_does_not_open_lets_the_run_wait(site: Site) -> None:
    """The operator can put the key back: the org is not to blame."""
    declare(site)
    site.secrets.error = ConfigurationError("the secret openai is sealed with the key k1")

    ended = await site.attempt()

    assert (ended.state, ended.reason) == ("waiting", "no_token")
    assert "the secret openai is sealed with the key k1" in str(ended.detail)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        # Such a definition may have been stored before that was refused.
        (
            {"api_origins": ["http://api.acme.test"]},
            ["api_origins: http://api.acme.test would carry", "[execution] insecure_origins"],
        ),
        (
            {"api_base_url": "https://elsewhere.test"},
            ["api_base_url: its origin is not in api_origins"],
        ),
    ],
    ids=["the token would go unencrypted to an origin", "its base URL is of no listed origin"],
)
async def test_a_run_waits_and_asks_no_token_while(site: Site, own: dict[str, Any], words: list[str]) -> None:
    site.spec |= own

    ended = await site.attempt()

    assert (ended.state, ended.reason) == ("waiting", "no_token")
    assert all(word in str(ended.detail) for word in ["definition org_acme/nightly, ", *words])
    assert site.asked == site.works == []


@pytest.mark.parametrize(
    ("own", "base_url"),
    [
        ({}, "https://api.acme.test/v1"),
        ({"api_base_url": "https://api.acme.test/v2"}, "https://api.acme.test/v2"),
        ({"api_origins": ["https://other.acme.test"]}, ""),
    ],
)
async def test_the_base_url_is_the_definitions_or_that_of_an_issuer_whose_origins_hold(
    site: Site, own: dict[str, Any], base_url: str
) -> None:
    site.spec = site.spec | own
    site.origins = {"api_base_urls": {"main": "https://api.acme.test/v1"}}

    await site.attempt()

    [work] = site.works
    assert work.api_base_url == base_url


class Stateful(Site):
    """The same with a handler that declares state."""

    loaded = LoadedState({"cursor": 5}, commits=True)

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.handlers.add(HandlerEntry("acme.digest", "acme-jobs", "1.0", "acme:digest", state=True))
        self.outcome = Succeeded("1", '{"cursor":6}')

    async def load_state(self, run: AdmittedRun) -> LoadedState:
        return self.loaded


async def test_a_handler_with_state_gets_it_and_a_success_has_the_new_one(clock: ManualClock) -> None:
    site = Stateful(clock)

    ended = await site.attempt()

    assert site.works[0].state == {"cursor": 5}
    assert (ended.state, ended.definition_state) == ("succeeded", '{"cursor":6}')


async def test_a_run_that_only_reads_state_succeeds_without_it(clock: ManualClock) -> None:
    site = Stateful(clock)
    site.loaded = LoadedState({"cursor": 5}, commits=False)

    ended = await site.attempt()

    assert (ended.state, ended.result, ended.definition_state) == ("succeeded", "1", None)


async def test_a_process_whose_handler_declares_no_state_leaves_none(site: Site) -> None:
    site.outcome = Succeeded("1", '{"forged":true}')

    ended = await site.attempt()

    assert site.works[0].state is None
    assert (ended.state, ended.definition_state) == ("succeeded", None)


async def test_an_unencrypted_origin_that_the_operator_allows_goes_to_the_handler(site: Site) -> None:
    site.spec = site.spec | {"api_origins": ["http://api.acme.test"]}
    site.origins = {
        "private_origins": ("http://10.0.0.5:8080",),
        "insecure_origins": ("http://api.acme.test",),
    }

    await site.attempt()

    [work] = site.works
    assert work.api_origins == work.insecure_origins == ("http://api.acme.test",)
    assert work.private_origins == ("http://10.0.0.5:8080",)


LISTS = HandlerEntry(
    "acme.digest", "acme-jobs", "1.0", "acme:digest", egress=("api", "public"), audiences=("mcp", "kb")
)


@pytest.mark.parametrize(
    ("entry", "spec", "policy", "lists"),
    [
        (HandlerEntry("acme.digest", "acme-jobs", "1.0", "a:d"), {}, NetworkPolicy(), ()),
        (LISTS, {}, NetworkPolicy(), (("api", "public"),)),
        (LISTS, {"egress": ["api"]}, NetworkPolicy(), (("api", "public"), ("api",))),
        (LISTS, {"egress": []}, NetworkPolicy("auto", ("api",)), (("api", "public"), (), ("api",))),
        (HandlerEntry("acme.digest", "acme-jobs", "1.0", "a:d"), {}, NetworkPolicy("require"), (("api",),)),
        (
            HandlerEntry("acme.digest", "x", "1", "a:d"),
            {},
            NetworkPolicy("auto", ("public",)),
            (("public",),),
        ),
        (LISTS, {"egress": ["api"]}, NetworkPolicy("open"), ()),
    ],
)
async def test_the_lists_of_a_run_are_those_of_handler_definition_and_operator(
    site: Site,
    entry: HandlerEntry,
    spec: dict[str, Any],
    policy: NetworkPolicy,
    lists: tuple[tuple[str, ...], ...],
) -> None:
    site.handlers.add(entry)
    site.spec, site.origins = site.spec | spec, {"network": policy}

    await site.attempt()

    assert site.works[0].egress.lists == lists
    assert len(site.works[0].egress.owners) == len(lists)
    assert site.works[0].egress.is_open is (lists == ())


@pytest.mark.parametrize(
    ("of_handler", "own", "audiences"),
    [
        ((), None, ()),
        (("mcp", "kb"), None, ("mcp", "kb")),
        (("mcp", "kb"), ["kb", "other"], ("kb",)),
        (("mcp",), [], ()),
        ((), ["other"], ("other",)),
    ],
)
async def test_the_audiences_of_a_run_are_the_definitions_of_those_of_its_handler(
    site: Site, of_handler: tuple[str, ...], own: list[str] | None, audiences: tuple[str, ...]
) -> None:
    site.handlers.add(replace(LISTS, audiences=of_handler))
    site.spec = site.spec | {"audiences": own, "reveal_token": own is None}

    await site.attempt()

    assert site.works[0].egress.audiences == audiences
    assert site.works[0].egress.reveal_token is (own is None)


@pytest.mark.parametrize(
    ("egress", "policy", "runs"),
    [
        (None, NetworkPolicy(), True),
        (("open",), NetworkPolicy("require"), True),
        (("api",), NetworkPolicy("open"), True),
        (("api",), NetworkPolicy(), False),
        (None, NetworkPolicy("require"), False),
        (("open",), NetworkPolicy("auto", ("public",)), False),
    ],
)
async def test_an_inline_run_whose_egress_is_not_open_fails_at_once(
    site: Site, egress: tuple[str, ...] | None, policy: NetworkPolicy, runs: bool
) -> None:
    site.handlers = HandlerRegistry(frozenset({"acme-jobs"}))
    site.handlers.add(replace(LISTS, egress=egress))
    site.origins = {"network": policy}

    ended = await site.attempt(isolation="inline")

    assert (len(site.works), ended.state) == ((1, "succeeded") if runs else (0, "failed"))
    if not runs:
        assert ended.error is not None
        assert 'set isolation = "child"' in ended.error["message"]
    # In a process of its own it runs.
    assert (await site.attempt()).state == "succeeded"


def test_a_host_makes_of_it_what_its_own_network_says() -> None:
    lists, nothing = Egress((("api",),), True, ("mcp",)), Egress()

    assert [AUTO.of_host(one) for one in (lists, nothing)] == [lists, nothing]
    assert NetworkPolicy("require").of_host(lists) == lists
    assert NetworkPolicy("require").of_host(nothing) == Egress((("api",),), owners=("handler",))
    assert NetworkPolicy("open").of_host(lists) == Egress((), True, ("mcp",))


async def test_the_handlers_scopes_are_asked_for_where_the_definition_names_none(site: Site) -> None:
    await site.attempt()
    site.spec = site.spec | {"scopes": ["write:kb"]}
    await site.attempt()

    assert site.asked[0].scopes == frozenset({"read:kb"})
    assert site.asked[1].scopes == frozenset({"write:kb"})


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (TokenRefused("org_mismatch", "other_org"), "refused", "org_mismatch"),
        (TokenRefused("token_invalid", "expired"), "refused", "token_invalid"),
        (CredentialsRejected("invalid_client"), "waiting", "no_token"),
        (IssuerUnavailable("503"), "waiting", "no_token"),
        (StoreUnavailable("away"), "waiting", "handed_back"),
    ],
)
async def test_without_an_enforced_token_no_handler_starts(
    site: Site, error: Exception, state: str, reason: str
) -> None:
    site.token_error = error

    ended = await site.attempt()

    assert (ended.state, ended.reason) == (state, reason)
    assert site.works == []
    assert ended.keep_start_by


async def test_a_run_whose_lease_is_lost_as_it_is_prepared_does_not_start(site: Site) -> None:
    """An inline handler would act at once."""
    site.is_lost_meanwhile = True

    await site.attempt()

    assert site.works == []


async def test_a_parked_org_waits_a_minute_at_most_so_that_a_new_secret_is_seen_soon(site: Site) -> None:
    site.token_error = CredentialsRejected("parked")
    site.token_error.retry_after = 3600.0  # type: ignore[attr-defined]

    ended = await site.attempt()

    assert timedelta(seconds=60) <= (ended.available_after or timedelta()) <= timedelta(seconds=72)


@pytest.mark.parametrize(
    ("changes", "spec", "run", "ended"),
    [
        ({"claims": replace(CLAIMS, org_code="org_other")}, {}, {}, ("refused", "org_mismatch", None)),
        ({}, {"requires_flag": "agent-v2"}, {}, ("skipped", "flag_off", "agent-v2")),
        (
            {"claims": replace(CLAIMS, flags={"agent-v2": Flag("boolean", True)})},
            {"variants": [{"flag": "agent-v2", "handler": "acme.digest_v2"}]},
            {},
            ("refused", "scope_missing", "ask:model"),
        ),
        (
            {"budgets_found": OrgBudgets([], missing="daily_tokens")},
            {},
            {},
            ("refused", "property_missing", "daily_tokens"),
        ),
        ({}, {}, {"isolation": "inline"}, ("waiting", "no_handler", None)),
    ],
    ids=[
        *("claims of another org, even if the token source gave them", "a required flag that is off"),
        "a variant whose scope was not granted",
        "a budget whose limit the token lacks",
        "an inline run whose distribution is not allowed",
    ],
)
async def test_what_ends_a_run_before_its_handler(
    site: Site, changes: dict[str, Any], spec: dict[str, Any], run: dict[str, Any], ended: tuple[Any, ...]
) -> None:
    vars(site).update(changes)
    site.spec |= spec

    found = await site.attempt(**run)

    assert (found.state, found.reason, ended[2] and found.detail) == ended
    assert (found.outcome == "gated") is (ended[0] == "skipped")
    assert site.works == []


async def test_a_required_property_that_is_missing_refuses_the_run(site: Site) -> None:
    site.spec["requires_properties"] = ["region"]

    ended = await site.attempt()

    assert (ended.state, ended.reason, ended.detail) == ("refused", "property_missing", "region")
    # The property may be there by the next run, whose token must then be a new one.
    org = OrgRef(OrgId("o1"), "org_acme")
    assert site.outdated == [TokenWant(org, "main", scopes=frozenset({"read:kb"}))]


async def test_the_variant_whose_flag_is_on_runs_under_its_own_scopes(site: Site) -> None:
    site.spec["variants"] = [{"flag": flag, "handler": "acme.digest_v2"} for flag in ("off", "agent-v2")]
    site.claims = replace(
        CLAIMS,
        flags={"agent-v2": Flag("boolean", True)},
        scopes=frozenset({"read:kb", "ask:model"}),
    )

    ended = await site.attempt()

    assert site.asked[0].also_ask == frozenset({"read:kb", "ask:model"})
    assert (ended.state, ended.trail.handler) == ("succeeded", "acme.digest_v2")


async def test_a_run_past_its_start_deadline_expires_before_a_token_is_asked_for(site: Site) -> None:
    ended = await site.attempt(start_by=START - timedelta(seconds=1))

    assert (ended.outcome, ended.state, ended.reason) == ("gated", "skipped", "expired")
    assert site.asked == []


async def test_params_of_the_run_stand_over_those_of_the_definition(site: Site) -> None:
    site.spec["params"] = {"collection": "faq", "limit": 5}

    await site.attempt(params={"limit": 1})

    assert site.works[0].params == {"collection": "faq", "limit": 1}


@pytest.mark.parametrize("rules", [{"eu": {"region": "eu"}}, {"eu": {"model_version": "gpt-5"}}])
@pytest.mark.parametrize("source", ["own", "stored"])
async def test_a_token_that_its_pool_does_not_allow_ends_the_run_before_anything_is_read(
    clock: ManualClock, rules: dict[str, dict[str, str]], source: str
) -> None:
    site = Stateful(clock)
    site.pool_rules = PoolRules(**{source: rules})
    read: list[str] = []

    async def noted(what: str) -> Any:
        read.append(what)

    site.load_progress = lambda run_id: noted("progress")  # type: ignore[method-assign, return-value]
    site.load_state = lambda run: noted("state")  # type: ignore[method-assign, return-value]

    ended = await site.attempt(pool="eu", attempt=2)

    (property_name,) = rules["eu"]
    assert (ended.state, ended.reason, ended.detail) == ("refused", "pool_mismatch", property_name)
    assert site.works == read == []
    assert len(site.outdated) == 1
    assert ended.trail.claims is not None


async def test_a_token_that_its_pool_allows_goes_on_and_so_does_one_in_another_pool(site: Site) -> None:
    site.pool_rules = PoolRules({"eu": {"model_version": "gpt-4"}, "us": {"region": "us"}})

    for pool in ("eu", "default"):
        assert (await site.attempt(pool=pool)).state == "succeeded"


async def test_a_renewed_token_that_the_pool_no_longer_allows_ends_the_run_refused(site: Site) -> None:
    site.pool_rules = PoolRules({"eu": {"model_version": "gpt-4"}})

    async def renew(work: Work, services: RunServices, stop: StopSignal) -> None:
        site.claims = replace(CLAIMS, properties={"model_version": "gpt-3"})
        with pytest.raises(TokenRefused):
            await services.ask(AskToken(fresh=True))
        assert stop.killed

    site.during = renew

    ended = await site.attempt(pool="eu")

    assert (ended.state, ended.reason, ended.detail) == ("refused", "pool_mismatch", "model_version")


async def test_being_lost_is_counted_from_the_last_checkpoint_that_moved(site: Site) -> None:
    site.checkpoint = {"done": 1}

    async def save(text: str) -> EndedAttempt:
        site.ask(Save(text))
        return await site.attempt(attempt=2, recoveries=2)

    assert (await save('{"done": 1}')).recoveries == 2
    assert (await save('{"done": 2}')).recoveries == 0


async def test_evidence_names_properties_and_shows_no_value_of_them(site: Site) -> None:
    ended = await site.attempt()

    assert ended.trail.claims is not None
    assert json.loads(ended.trail.claims)["properties"] == {"model_version": "str"}
    assert "gpt-4" not in ended.trail.claims


async def test_services_reject_the_calls_of_an_abandoned_handler(site: Site) -> None:
    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        services.close()
        with pytest.raises(LeaseLost):
            await services.ask(Save("{}"))
        with pytest.raises(LeaseLost):
            await services.ask(AskToken(fresh=True))
        with pytest.raises(LeaseLost):
            services.tell(Progress(1, None, None))

    site.during = during

    assert (await site.attempt()).state == "succeeded"
    assert len(site.asked) == 1


def step(seq: int = 1, result: str = "1", began: datetime = START, ended: datetime = START) -> NewStep:
    return NewStep("ask", None, 1, seq, result, began, ended)


async def test_a_step_is_stored_masked_and_forgives_lost_workers(site: Site) -> None:
    masker.register("canary-5ecret-step")
    site.ask(StoreStep(step(1, '["canary-5ecret-step"]')))

    ended = await site.attempt(attempt=2, recoveries=2)

    assert ended.recoveries == 0
    (row,) = site.steps
    assert site.answers == [row.step.result_json] == ['["[masked]"]']
    assert (row.run.fencing_token, row.handler, row.size) == (1, "acme.digest", len('["[masked]"]'))


async def test_replayed_steps_do_not_forgive_lost_workers(site: Site) -> None:
    site.ask(LoadSteps(0))

    assert (await site.attempt(attempt=2, recoveries=2)).recoveries == 2
    assert site.pages == [0]


async def test_a_run_keeps_the_variant_that_stored_progress(site: Site) -> None:
    """A flag that flips between two attempts hands no version the progress of the other."""
    site.spec["variants"] = [{"flag": "agent-v2", "handler": "acme.digest_v2"}]
    off = replace(CLAIMS, scopes=frozenset({"read:kb", "ask:model"}))
    site.claims = on = replace(off, flags={"agent-v2": Flag("boolean", True)})

    assert (await site.attempt()).trail.handler == "acme.digest_v2"
    site.kept_handler = "acme.digest"
    assert (await site.attempt(attempt=2)).trail.handler == "acme.digest"
    site.kept_handler, site.claims = "acme.digest_v2", off
    assert (await site.attempt(attempt=2)).trail.handler == "acme.digest_v2"
    # A first attempt has stored nothing, and does not ask.
    assert (await site.attempt()).trail.handler == "acme.digest"
    site.kept_handler, site.claims = "acme.gone", on
    gone = await site.attempt(attempt=2)
    assert (gone.state, gone.reason, gone.detail) == ("waiting", "no_handler", "acme.gone")


@pytest.mark.parametrize("once", [True, False], ids=["", "control"])
async def test_a_wait_that_is_opened_again_asks_once(
    site: Site, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that repeats one wait; the control notes each call, as before."""
    repeats = MAX_WAITS + 1

    class Unknown(set[Any]):
        def __contains__(self, key: object) -> bool:
            return False

        def __len__(self) -> int:
            return 0

    async def during(work: Work, services: Any, stop: StopSignal) -> None:
        if not once:
            services.asked = Unknown()
        for _ in range(repeats):
            await services.ask(OpenWait(NewWait("ok", 1, "answer", alert=True)))
        await services.ask(OpenWait(NewWait("ok", 2, "answer", alert=True)))

    site.during = during
    asks = (await site.attempt()).trail.asks

    assert asks == (("ok", "ok#2") if once else (*("ok",) * repeats, "ok#2"))
    # What a host reports of it is valid either way.
    assert len(asks) <= MAX_WAITS or not once


async def test_the_second_question_of_a_name_has_an_alert_of_its_own(
    site: Site, emitted: list[events.Emitted], clock: ManualClock
) -> None:
    """The run may ask it before the alert of the first is over."""
    name = "w" * NAME_LIMIT
    causes = set()
    for occurrence in (1, 2):
        site.ask(OpenWait(NewWait(name, occurrence, "answer", alert=True)))
        ended = await site.attempt()
        run_ended(replace(ended, state="parked"), None)
        # A host's end has no longer ones.
        assert all(len(label) <= NAME_LIMIT for label in ended.trail.asks)

        strikes = Strikes(clock, lambda: None)
        for each in emitted:
            strikes.hear(each)
        causes.update(strike.cause for strike in strikes.take() if strike.kind == "waiting")

    assert len(causes) == 2


async def test_an_attempt_lasts_no_less_than_nothing_although_the_clock_goes_back(
    site: Site, emitted: list[events.Emitted], clock: ManualClock
) -> None:
    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        clock.set(START - timedelta(hours=1))

    site.during = during
    run_ended(await site.attempt(), None)

    assert [one.fields["seconds"] for one in emitted if one.event.name == "run.ended"] == [0.0]


async def test_a_run_asks_no_more_than_it_may_wait_for(site: Site) -> None:
    site.ask(*(OpenWait(NewWait(f"w{number}", 1, "answer", alert=True)) for number in range(MAX_WAITS + 5)))

    assert len((await site.attempt()).trail.asks) == MAX_WAITS


async def test_an_attempt_keeps_the_newest_totals_of_what_it_sent(site: Site) -> None:
    rows = EgressRow("https://api.acme.test", 2, 30), EgressRow("https://b.test", denied=1)

    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        services.egress([asdict(EgressRow("https://api.acme.test", 1, 10))])
        services.egress([asdict(row) for row in (*rows, rows[1])])
        # A broker that is not to be trusted does not end the run with it.
        services.egress([asdict(EgressRow("https://api.acme.test", 2**70))])
        services.egress([{"origin": "https://api.acme.test"}])

    site.during = during

    assert (await site.attempt()).trail.egress == (rows[0], EgressRow("https://b.test", denied=2))


async def test_events_of_an_end_count_what_it_sent_and_name_few_origins(
    site: Site, emitted: list[events.Emitted]
) -> None:
    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        row = EgressRow(
            "https://api.acme.test", 9, statuses={"200": 5, "204": 1, "503": 1}, waited_seconds=1.5
        )
        many = [EgressRow(f"https://{number}.test", 1, denied=1) for number in range(50)]
        services.egress([asdict(each) for each in (*many, row)])

    site.during = during
    run_ended(await site.attempt(), None)

    counted = [one.fields for one in emitted if one.event.name == "egress.counted"]
    assert [fields["origin"] for fields in counted][:2] == ["https://api.acme.test", "https://0.test"]
    assert (len(counted), counted[-1]["origin"]) == (REPORTED + 1, "others")
    assert (counted[0]["seconds"], sum(fields["denied"] for fields in counted)) == (1.5, 50)
    sent = [one.fields for one in emitted if one.event.name == "egress.sent"]
    assert sent[:3] == [
        {"origin": "https://api.acme.test", "status": status, "count": count}
        for status, count in (("2xx", 6), ("5xx", 1), ("none", 2))
    ]
    assert sum(fields["count"] for fields in sent) == 59


async def test_an_origin_that_was_denied_is_reported_once_an_attempt(
    site: Site, emitted: list[events.Emitted]
) -> None:
    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        for _ in range(3):
            services.denied("https://evil.test", "not listed")
        services.denied("https://other.test", "x" * 1_000)
        for number in range(2 * MAX_ORIGINS):
            services.denied(f"https://{number}.test", "not listed")

    site.during = during
    await site.attempt()

    denied = [one.fields for one in emitted if one.event.name == "egress.denied"]
    assert len(denied) == MAX_ORIGINS
    run = admitted()
    assert denied[0] == {
        "org": "org_acme", "run": run.id, "attempt": run.attempt, "handler": "acme.digest",
        "origin": "https://evil.test", "reason": "not listed",
    }  # fmt: skip
    assert len(denied[1]["reason"]) < 300


@pytest.mark.parametrize("masks", [True, False], ids=["", "control"])
async def test_a_host_that_is_named_by_a_secret_is_recorded_masked(
    site: Site, emitted: list[events.Emitted], masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler, or what it has read, asks for `https://TOKEN.evil.test`."""
    if not masks:
        monkeypatch.setattr(masker, "mask", lambda text, org: text)

    async def during(work: Work, services: RunServices, stop: StopSignal) -> None:
        origin = f"https://{work.token.reveal()}.evil.test"
        services.egress([asdict(EgressRow(each, 1)) for each in (origin, origin.replace("https", "http"))])
        services.denied(origin, f"no {work.token.reveal()}")

    site.during = during
    ended = await site.attempt()

    [denied] = [one.fields for one in emitted if one.event.name == "egress.denied"]
    shown = f"{ended.trail.egress} {denied}"
    assert (site.works[0].token.reveal() in shown) == (not masks)
    assert len(ended.trail.egress) == 2


@pytest.mark.parametrize("clamped", [True, False], ids=["", "control"])
async def test_a_steps_times_are_within_its_attempt(
    site: Site, clamped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's process writes them; the control believes it."""
    if not clamped:
        monkeypatch.setattr(answers, "believed_step", lambda step, run, now: step)
    first, last = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
    site.ask(StoreStep(step(1, "1", first, last)), StoreStep(step(2, "1", last, first)))

    await site.attempt()

    times = [(row.step.started_at, row.step.ended_at) for row in site.steps]
    began, now = min(admitted().started_at, site.clock.now()), site.clock.now()
    assert times == ([(began, now), (began, began)] if clamped else [(first, last), (last, first)])


BUDGET = BudgetState("llm_tokens", "day", 100, 40, START + timedelta(hours=9), "wait")


async def test_the_handler_gets_the_budgets_of_its_org(site: Site):
    await site.attempt()
    site.budgets_found = OrgBudgets([BUDGET])
    await site.attempt()

    assert [work.budgets for work in site.works] == [None, (BUDGET,)]
    assert site.noted == [CLAIMS, CLAIMS]
