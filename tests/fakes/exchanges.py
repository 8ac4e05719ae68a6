"""Every call of the attempt API v1 that a host makes, as `record.py` records it: with what is fixed in it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

from tests.fakes.clock import START, ManualClock
from tests.unit.engine.runs import admitted
from worker.clock import to_text
from worker.engine.attempt.answers import Running
from worker.engine.attempt.inflight import InflightRun
from worker.engine.loops.step_writer import StepWriter
from worker.engine.runners.contract import FORGED, StopSignal, Work
from worker.errors import (
    AccessDenied,
    AnswerTooLarge,
    Busy,
    ConfigurationError,
    CredentialsRejected,
    IssuerUnavailable,
    LeaseLost,
    RequestRejected,
    StoreUnavailable,
    Throttled,
    TokenError,
    TokenRefused,
    TooManyRequests,
    Unavailable,
)
from worker.features.hosts.control import ControlUnavailable
from worker.features.hosts.remote import HostedEnd, RemoteActs, RemoteStore, SentRow
from worker.features.hosts.sent import Sent
from worker.features.hosts.wire import Malformed, Registered, Registration, Taken, TemporalPlace
from worker.guard.claims import Claims, Flag
from worker.handlers.calls import (
    AskBudgets,
    AskLimits,
    AskShare,
    AskToken,
    Call,
    CountSpend,
    KnownLimits,
    LoadSteps,
    OpenWait,
    PauseOrigin,
    ReadChildren,
    ReadEnded,
    Save,
    StartChildren,
    StepTotals,
    StoreStep,
    TraceStep,
)
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.steps import StepError
from worker.ids import RunId, WorkerId
from worker.model.limits import Limit, Share
from worker.model.prices import ModelUsage
from worker.model.runs import outcome as outcomes
from worker.model.runs.budgets import BudgetState, OrgBudgets
from worker.model.runs.children import ChildPage, ChildrenWait, EndedRow, NewChild, PlacedChild
from worker.model.runs.hosts import HostCaller, PoolLoad
from worker.model.runs.outcome import Error, Outcome, Trail
from worker.model.runs.run import (
    Isolation,
    LogLine,
    NewStep,
    OwnedRun,
    RunContext,
    RunStep,
    StepPage,
    StoredStep,
)
from worker.model.runs.waits import NewWait, WaitState
from worker.secret import AccessToken
from worker.telemetry.tracing import StepSpan


def compact(message: Any) -> str:
    return json.dumps(message, separators=(",", ":"))


WORKER = WorkerId("0f0e0d0c-89ab-7def-8123-456789abcdef")
TOKEN = "owh_token-of-the-host"
CALLER = HostCaller("h1", "gpu1", "default", WORKER, token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
LATER = START + timedelta(hours=1)
RUN = replace(
    admitted("01234567-89ab-7def-8123-456789abcdef", fencing_token=7),
    attempt=2,
    params={"since": "2029 ü"},
    available_at=START + timedelta(microseconds=250_000),
)
ENTRY = HandlerEntry(
    "acme.digest",
    "acme",
    "1.0",
    "acme:digest",
    scopes=("read:kb",),
    timeout="2h",
    memory="512MiB",
    secrets=("openai",),
)
BROKEN = HandlerEntry("acme.broken", "acme", "1.0", "acme:broken", error="ImportError: no module ü")
CLAIMS = Claims(
    org_code="org_acme",
    client_id="client",
    scopes=frozenset({"read:kb", "ask:model"}),
    properties={"region": "eu", "note": "ü"},
    flags={"agent-v2": Flag("boolean", True)},
    issued_at=START,
    expires_at=LATER,
    issuer="https://id.example",
    jti="j",
)
ACCESS = AccessToken("ey.the.token", LATER)
STEP = NewStep("fetch", "k/1", 2, 3, '{"n":1,"text":"ü"}', START, START, (("tokens", 5), ("pages", 0)))
SLEEP = NewWait("nap", 1, "sleep", 90.5)
ASK = NewWait("approve", 2, "answer", 86_400.0, '{"text":"go on? ü"}', alert=True)
CHOICE = NewWait("approve", 1, "answer", None, '"which?"', options=("yes", 1, True, None))
LIMIT = NewWait("budget:tokens", 1, "budget", 60.0)
BUDGETS = (
    BudgetState("tokens", "day", 10, 4, LATER, "ask"),
    BudgetState("pages", "run", 5, 5, None, "wait", uses=False),
)
PAGE = StepPage(
    [StoredStep(3, "fetch", "k/1", 2, 9, '{"n":"ü"}'), StoredStep(4, "all", None, 1, 4, "null")], more=True
)
LINES = [
    LogLine(RUN.id, 2, 1, RUN.org_id, START, "info", "log", "hello ü"),
    LogLine(RUN.id, 2, 2, RUN.org_id, START, "error", "stderr", "a\nb"),
]
LOAD = PoolLoad(Counter({"child": 1}), 0.0, {WORKER: {"child": 4, "inline": 4}}, {WORKER: Counter()})
OWNED = [OwnedRun(RUN.id, 7, None), OwnedRun(RunId("r2"), 8, "requested")]
SPEND = CountSpend("tokens", 5, "2:7")
USAGE = ModelUsage(None, "gpt-5-mini", (("input", 3), ("cache_read", 0)))
PRICED = CountSpend("tokens", 3, "2:8", USAGE)
PROGRESS = {"done": 1.0, "total": 2, "note": "half ü"}
TICKET = f"{RUN.id}.7.{'a' * 43}"
SECRETS = {"openai": "sk-canary-1234567890"}
SPEC = json.dumps({"handler": "acme.digest", "schedule": "@hourly", "params": {"of": "all"}})
# What the worker kept of the token, sealed with the attempt.
TIMES = {"issued_at": to_text(START), "expires_at": to_text(LATER)}
KEPT = {
    "handler": "acme.digest",
    "token_ready_at": to_text(START),
    "claims": compact(
        {"org_code": "org_acme", "client_id": "client", "scopes": ["ask:model", "read:kb"]}
        | {"properties": {"note": "str", "region": "str"}, **TIMES}
    ),
    "flags": '{"agent-v2":true}',
    "jti": "j",
    "claims_hash": "05b1ef3822767e6c73194d40c0cf29fa",
}
SEALED = compact(KEPT | {"commits": True})
FREE: dict[Isolation, int] = {"child": 2, "inline": 0}
STEPS = [STEP, replace(STEP, key=None, seq=4, spends=())]
USED_STEP = replace(STEP, used=(USAGE, ModelUsage("openai", "gpt-5", (("output", 2), ("web_search", 1)))))
WORK = Work(
    run_id=RUN.id,
    attempt=2,
    fencing_token=7,
    idempotency_key=RUN.idempotency_key,
    scheduled_for=START,
    org_code="org_acme",
    org_name="Acme",
    handler="acme.digest",
    entry_point="acme:digest",
    params={"of": "all", "since": "2029 ü"},
    claims=CLAIMS,
    token=ACCESS,
    api_origins=("https://api.acme.test",),
    timeout_at=START + timedelta(hours=2),
    checkpoint={"done": [1, "ü"]},
    memory=512 * 1024 * 1024,
    budgets=BUDGETS,
    secrets=SECRETS,
    replays=True,
)
TAKEN = Taken(
    RUN,
    "org_acme",
    "nightly",
    timedelta(seconds=10),
    timedelta(hours=2),
    WORK,
    compact(KEPT | {"commits": False}),
)


ORIGIN = "https://api.example.com"
LIMITS = KnownLimits((Limit("0190-a", ORIGIN, "org", 40.0, 10, 4, 10.0),), 1.5)
SHARE_ASKED = AskShare("0190-a", want=5, returned=1, granted_at=1.25, slots=2, in_use=1)
SHARE = Share(3, 2, 1.5, 0.05, 40.0, 0.6, 1.0)
# A definition that may ask for tokens of another audience.
BILLING = {
    "org_and_definition": RunContext(
        RUN.org_id,
        "org_acme",
        "Acme",
        None,
        "main",
        "nightly",
        json.dumps({**json.loads(SPEC), "audiences": ["billing"]}),
    )
}


@dataclass(frozen=True)
class Exchange:
    """One call: what a host asks and is given, and what the worker's store is asked and answers.

    `gives` is a value, or the exception that is raised at the host; `asked` are calls with their arguments.
    """

    call: str
    case: str
    ask: Callable[[RemoteStore], Any]
    gives: Any = None
    asked: Sequence[tuple[Any, ...]] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)


def register(*entries: HandlerEntry) -> Callable[[RemoteStore], Any]:
    return lambda store: store.register(Registration("gpu1", 7, "9.1", FREE, entries))


def put(store: RemoteStore) -> Any:
    return store.put([ENTRY, BROKEN])


def take(store: RemoteStore) -> Any:
    return store.take(FREE, 0.0)


def take_by(store: RemoteStore) -> Any:
    return store.take_by(TICKET)


def asks(call: Call[Any]) -> Callable[[RemoteStore], Any]:
    """Ask as a handler of the run, without what `answers.py` does before."""

    def ask(store: RemoteStore) -> Any:
        acts = RemoteActs(store, StepWriter(store, ManualClock()))
        of = Running(
            InflightRun(RUN, StopSignal()), Trail("acme.digest"), acts, cast(Any, None), ManualClock()
        )
        return acts.act(call, of)

    return ask


def store_steps(store: RemoteStore, steps: Sequence[NewStep] = STEPS) -> Any:
    calls = [StoreStep(step) for step in steps]
    return store.store_steps([SentRow(RUN, Sent(RUN.id, 7, "acme.digest", call), 0) for call in calls])


def trace_steps(store: RemoteStore) -> Any:
    call = cast(Any, TraceStep(SPAN))
    return store.store_steps([SentRow(RUN, Sent(RUN.id, 7, "acme.digest", call), 0)])


def finish(case: str, outcome: Outcome) -> Callable[[RemoteStore], Any]:
    """Report the end of the run."""
    told: Any = {"asks": ("approve",), "peak_memory": 5, "progress": PROGRESS} if case == "succeeded" else {}
    end = HostedEnd(
        *(RUN.id, RUN.org_id, RUN.definition_id, RUN.fencing_token, RUN.attempt, START, START, "", ""),
        reason="result_unstorable" if case == "unstorable" else None,
        trail=Trail("acme.digest", handler_started_at=START - timedelta(seconds=1.5), **told),
        returned=outcome,
        sealed=SEALED,
        moved=True,
    )
    return lambda store: store.finish([end])


LOST = LeaseLost(f"run {RUN.id} is no longer this host's")
REFUSED = TokenRefused("org_mismatch", "other_org")
PENDING = WaitState("sleep", "pending", None, LATER)
ANSWERED = WaitState("answer", "answered", '{"ok":"ü"}', LATER)
OVER = WaitState("budget", "over")
CHOSEN = WaitState("answer", "pending")
GATHER = NewWait("children:gather", 1, "children", children=ChildrenWait(((1, 2), (4, 4))))
GATHERING = WaitState("children", "pending")
CHILDREN = (
    NewChild("acme.page", "ü", 1, '{"page":1}'),
    NewChild("acme.page", None, 2, "{}", map=1, window=5),
)
PLACED = (PlacedChild(1, RUN.id), PlacedChild(2, WORKER))
OF_CHILDREN = ChildPage(
    (
        EndedRow(1, "succeeded", None, None, '{"n":"ü"}', 1),
        EndedRow(2, "failed", "error", {"type": "E", "message": "no ü"}, None, 4),
    ),
    more=True,
)
ROWS = [RunStep(RUN, "acme.digest", step, 19) for step in STEPS]
SPAN = StepSpan(
    *("ask ü", "k", 1, START, START + timedelta(seconds=1.5)),
    error="ValueError",
    about={"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 12},
    texts={"gen_ai.input.messages": "hello ü"},
)
TOLD = [(RUN.id, RUN.fencing_token, PROGRESS)]
TEMPORAL = TemporalPlace("t:7233", "prod", tls=True)
REGISTERED = Registered(WORKER, "default", 30.0, 10.0, 0.5)
OFFERED = [("offer", WORKER, [ENTRY, BROKEN])]
ADMITTED = [("admit", WORKER, "default", {"acme.digest": None}, FREE)]
SAVED = [("save_checkpoint", RUN, "acme.digest", '{"done":[1,"ü"]}', 4)]

CALLS = [
    Exchange("register", "handlers", register(ENTRY, BROKEN), REGISTERED, OFFERED),
    Exchange(
        "register",
        "temporal",
        register(),
        replace(REGISTERED, pool="eu", temporal=TEMPORAL),
        answers={"find": replace(CALLER, pool="eu")},
    ),
    Exchange("handlers", "put", put, None, OFFERED),
    Exchange("handlers", "complete", lambda store: store.complete({})),
    Exchange("renew", "owned", RemoteStore.renew, (True, OWNED), answers={"renew": (True, OWNED)}),
    Exchange("renew", "lost", RemoteStore.renew, (False, []), answers={"renew": (False, [])}),
    Exchange("unregister", "", RemoteStore.unregister, None, [("unregister", WORKER)]),
    Exchange(
        "hand_back",
        "",
        lambda store: store.hand_back(OWNED[:1]),
        {RUN.id},
        [("hand_back", WORKER, OWNED[:1])],
        {"hand_back": {RUN.id}},
    ),
    Exchange("take", "one", take, [TAKEN], ADMITTED, {"pool_load": LOAD, "admit": [RUN]}),
    Exchange("take", "none", take, [], answers={"pool_load": None}),
    Exchange("take", "ticket", take_by, [TAKEN], answers={"take_ticket": RUN}),
    Exchange("take", "ticket of another", take_by, []),
    Exchange("token", "held", asks(AskToken(fresh=False)), (ACCESS, CLAIMS)),
    Exchange("token", "fresh", asks(AskToken(fresh=True)), (ACCESS, CLAIMS)),
    Exchange("token", "refused", asks(AskToken(fresh=True)), REFUSED, answers={"ensure": REFUSED}),
    Exchange("token_for", "", asks(AskToken(False, "billing")), (ACCESS, CLAIMS), answers=BILLING),
    Exchange("limits", "", asks(AskLimits(ORIGIN)), LIMITS, [("limits_of", RUN.org_id, ORIGIN)]),
    Exchange(
        "share",
        "",
        asks(SHARE_ASKED),
        SHARE,
        [("share_of", RUN.org_id, SHARE_ASKED, WORKER)],
        {"share_of": SHARE},
    ),
    Exchange("pause", "", asks(PauseOrigin(ORIGIN, 2.5))),
    Exchange("save", "", asks(Save('{"done":[1,"ü"]}', 4)), None, SAVED, {"save_checkpoint": True}),
    Exchange("save", "lost", asks(Save("null", 1)), LOST, answers={"save_checkpoint": False}),
    Exchange(
        "steps",
        "",
        asks(LoadSteps(2)),
        PAGE,
        [("load_steps", RUN.id, 2)],
        {"load_steps": PAGE},
    ),
    Exchange("totals", "", asks(StepTotals()), (2, 17), [("step_totals", RUN.id)]),
    Exchange(
        "store", "", store_steps, {(RUN.id, 7)}, [("store_steps", ROWS)], {"store_steps": {(RUN.id, 7)}}
    ),
    Exchange(
        "store",
        "of models",
        lambda store: store_steps(store, [USED_STEP]),
        {(RUN.id, 7)},
        [("store_steps", [RunStep(RUN, "acme.digest", USED_STEP, 19)])],
        {"store_steps": {(RUN.id, 7)}},
    ),
    Exchange("store", "lost", store_steps, set(), answers={"owned": []}),
    Exchange(
        "wait", "sleep", asks(OpenWait(SLEEP)), PENDING, [("open_wait", RUN, SLEEP)], {"open_wait": PENDING}
    ),
    Exchange(
        "wait", "answered", asks(OpenWait(ASK)), ANSWERED, [("open_wait", RUN, ASK)], {"open_wait": ANSWERED}
    ),
    Exchange("wait", "budget", asks(OpenWait(LIMIT)), OVER, answers={"open_wait": OVER}),
    Exchange("wait", "lost", asks(OpenWait(SLEEP)), LOST),
    Exchange(
        "choose", "", asks(OpenWait(CHOICE)), CHOSEN, [("open_wait", RUN, CHOICE)], {"open_wait": CHOSEN}
    ),
    Exchange(
        "wait_children",
        "",
        asks(OpenWait(GATHER)),
        GATHERING,
        [("open_wait", RUN, GATHER)],
        {"open_wait": GATHERING},
    ),
    Exchange(
        "start_children",
        "",
        asks(StartChildren(CHILDREN, keep=True)),
        PLACED,
        answers={"start_children": PLACED},
    ),
    Exchange("start_children", "lost", asks(StartChildren(CHILDREN)), LOST, answers={"start_children": None}),
    Exchange(
        "children",
        "",
        asks(ReadChildren((1, 2))),
        OF_CHILDREN,
        [("read_children", RUN.id, (1, 2))],
        {"read_children": OF_CHILDREN},
    ),
    Exchange(
        "ended_children",
        "",
        asks(ReadEnded(((1, 2),), 3)),
        OF_CHILDREN,
        [("read_ended", RUN, ((1, 2),), 3)],
        {"read_ended": OF_CHILDREN},
    ),
    Exchange("budgets", "", asks(AskBudgets()), OrgBudgets(BUDGETS), [("budgets_of", RUN)]),
    Exchange(
        "budgets",
        "missing",
        asks(AskBudgets()),
        OrgBudgets((), "cap"),
        answers={"budgets_of": OrgBudgets((), "cap")},
    ),
    Exchange(
        "spend",
        "",
        asks(SPEND),
        OrgBudgets(BUDGETS),
        [("spend", RUN, "tokens", 5, "2:7", None)],
        {"spend": OrgBudgets(BUDGETS)},
    ),
    Exchange(
        "spend",
        "of a model",
        asks(PRICED),
        OrgBudgets(BUDGETS),
        [("spend", RUN, "tokens", 3, "2:8", USAGE)],
        {"spend": OrgBudgets(BUDGETS)},
    ),
    Exchange("spend", "lost", asks(SPEND), LOST),
    Exchange("trace", "", trace_steps, {(RUN.id, 7)}),
    Exchange("progress", "", lambda store: store.write_progress(TOLD), None, [("write_progress", TOLD)]),
    Exchange("logs", "", lambda store: store.append_logs(LINES), None, [("append_logs", LINES)]),
    Exchange("finish", "of another", finish("", outcomes.SUCCEEDED), set(), answers={"owned": []}),
]

ERROR = Error("ValueError", "no ü", "Traceback:\n…")
# How the handler ended, and what the worker stores: outcome, state, reason, detail, result, the definition's
# state, peak memory and questions.
ENDS: Mapping[str, tuple[Outcome, str]] = {
    "succeeded": (
        outcomes.Succeeded('{"n":"ü"}', '{"seen":2}'),
        'succeeded succeeded - - {"n":"ü"} {"seen":2} 5 approve',
    ),
    "nothing": (outcomes.SUCCEEDED, "succeeded succeeded - - - - -"),
    "failed": (outcomes.Failed(ERROR), "failed waiting retry - - - -"),
    "permanent": (outcomes.Failed(ERROR, permanent=True), "failed failed error - - - -"),
    "exited": (
        outcomes.Failed(ERROR, "handler_exited", "SIGSEGV"),
        "failed waiting retry SIGSEGV - - -",
    ),
    "unstorable": (outcomes.SUCCEEDED, "failed failed result_unstorable - - - -"),
    "timed out": (outcomes.TimedOut(ERROR), "timed_out waiting retry - - - -"),
    "retried": (outcomes.Retried(timedelta(seconds=3), "ü"), "retry waiting retry ü - - -"),
    "retried soon": (outcomes.Retried(), "retry waiting retry - - - -"),
    "snoozed": (outcomes.Snoozed(timedelta(minutes=3), "ü"), "snoozed waiting snoozed ü - - -"),
    "parked": (outcomes.Parked("answer", "approve"), "parked parked answer approve - - -"),
    "cancelled": (outcomes.Cancelled("by_handler", "ü"), "cancelled cancelled by_handler ü - - -"),
    "handed back": (outcomes.HandedBack("drain"), "handed_back waiting handed_back drain - - -"),
    "lost": (outcomes.Lost("zygote"), "lost waiting recovered zygote - - -"),
    "refused": (
        outcomes.Refused("settings_invalid", "model", "model: wrong"),
        "refused refused settings_invalid model - - -",
    ),
    "no token": (
        outcomes.NoToken(timedelta(seconds=30), "throttled"),
        "no_token waiting no_token throttled - - -",
    ),
    "no handler": (
        outcomes.NoHandler("acme.digest"),
        "handed_back waiting no_handler acme.digest - - -",
    ),
    "not approved": (outcomes.NotApproved("approve it"), f"failed waiting retry {FORGED} - - -"),
}
OUTCOMES = [outcome for outcome, _ in ENDS.values() if not isinstance(outcome, outcomes.TimedOut)]

# What the worker's store raises, and the class at the host.
PROBLEMS: Mapping[str, tuple[Exception, type[Exception]]] = {
    "lost": (LeaseLost("run ü is lost"), LeaseLost),
    "database": (StoreUnavailable("no database"), StoreUnavailable),
    "issuer": (IssuerUnavailable("no issuer", retry_after=3.0), IssuerUnavailable),
    "busy": (Busy("busy", fix="wait"), Busy),
    "unavailable": (Unavailable("away"), Unavailable),
    "configuration": (ConfigurationError("no key ring", fix="make one"), Unavailable),
    "token": (TokenError("no token"), TokenError),
    "credentials": (CredentialsRejected("wrong secret"), CredentialsRejected),
    "request": (RequestRejected("no audience"), RequestRejected),
    "too large": (AnswerTooLarge("11 MiB"), AnswerTooLarge),
    "throttled": (Throttled("slow down", retry_after=20.0), Throttled),
    "too many": (TooManyRequests("too many", retry_after=2.0), ControlUnavailable),
    "denied": (AccessDenied("no"), LeaseLost),
    "invalid": (Malformed("not a valid wait: kind is missing"), Malformed),
    "step": (StepError("step ü: no room"), StepError),
}

MOVED = "its host is in another pool now"


def problem(case: str, error: Exception, kind: type[Exception]) -> Exchange:
    """An error of the worker's store; Retry-After is in whole seconds, 5 if the error does not say."""
    given: Any = kind(str(error))
    if issubclass(kind, Unavailable | Throttled) and kind is not LeaseLost:
        given.retry_after = getattr(error, "retry_after", None) or 5.0
    return Exchange("problems", case, asks(AskBudgets()), given, answers={"budgets_of": error})


EXCHANGES = [
    *CALLS,
    *(
        Exchange("finish", case, finish(case, outcome), {RUN.id}, [("finish", WORKER, [end])])
        for case, (outcome, end) in ENDS.items()
    ),
    *(problem(case, error, kind) for case, (error, kind) in PROBLEMS.items()),
    *(
        Exchange("problems", case, asks(AskBudgets()), kind(message), answers={"find": caller, "owned": []})
        for case, caller, kind, message in (
            ("not ours", CALLER, LeaseLost, f"run {RUN.id} is not, or no longer, this host's"),
            ("no host", None, LeaseLost, "this is not the token of a host"),
            ("moved", replace(CALLER, moved=True), LeaseLost, f"this incarnation has ended, or {MOVED}"),
        )
    ),
]
