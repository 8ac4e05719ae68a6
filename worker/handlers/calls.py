"""Calls: what a running handler may ask of the worker, each declared once.

A call is a frozen dataclass whose annotations say what its fields may contain. From the declaration come how
it is written and read (`parts.py`), what of it is masked, and how it is sent: within a process, over the
socket of a run's process, or over the attempt API of a host. `engine/attempt/answers.py` answers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from worker.clock import from_text, to_text
from worker.guard.claims import Claims
from worker.handlers.json_text import LIMIT, UNMASKED_LIMIT, check_json_text, clean, to_json_text
from worker.handlers.parts import (
    CallPart,
    Count,
    JsonText,
    KeyText,
    Maybe,
    Meter,
    Name,
    Number,
    OneOf,
    Row,
    Seconds,
    Several,
    Text,
    TextCheck,
    Those,
    Together,
    Truth,
    When,
    row_of,
    trusted,
)
from worker.handlers.span_parts import STEP_SPAN
from worker.handlers.steps import MAX_STEPS, RESULT_LIMIT, StepError
from worker.model.batches import MAX_BETAS, MAX_BODY, NewRequest
from worker.model.definitions.budgets import MAX_AMOUNT
from worker.model.limits import Limit, Share
from worker.model.prices import KINDS as PRICED_KINDS
from worker.model.prices import ModelUsage, model_name
from worker.model.runs.budgets import MAX_SPENDS, BudgetState, OrgBudgets
from worker.model.runs.children import (
    AT_ONCE,
    MAX_CHILD_PARAMS,
    MAX_CHILDREN,
    MAX_SPANS,
    MAX_WINDOW,
    ChildPage,
    ChildrenWait,
    EndedRow,
    NewChild,
    PlacedChild,
)
from worker.model.runs.run import NewStep, StepPage, StoredStep
from worker.model.runs.waits import KINDS, MAX_ASKED, MAX_WAITS, NewWait, WaitState, check_options
from worker.secret import AccessToken
from worker.telemetry.tracing import StepSpan

A = TypeVar("A")
C = TypeVar("C", bound="type[Call[Any]]")

# Spends of one step, of as many meters: those of one meter are added up.
MAX_METERS = 1000
# Requests of one step to models: further ones are added to those of the same model.
MAX_USED = 100
# Characters of an audience or a resource.
AUDIENCE_LIMIT = 2000
# Characters of an origin.
ORIGIN_LIMIT = 300
# Bytes that the body of a host's call may have: of a small one, of one with children, of a batch, of one with
# a checkpoint, which may double when it is quoted, and of one with results.
OWN_BYTES = 32 * 1024
CHILDREN_BYTES = 256 * 1024
BATCH_BYTES = 1024 * 1024
CHECKPOINT_BYTES = 2 * LIMIT + 64 * 1024
MAX_BYTES = 16 * 1024 * 1024

# What readers raise for a message that does not fit.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, StepError)
_SPEND_KEY = re.compile(r"[1-9][0-9]*:([1-9][0-9]*)")


class NotACall(ValueError):
    """A message is not a call, or exceeds a limit of one; the text names the key."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a call travels; what it may contain stands at its fields.

    `name` is its name in a message, and its path in the attempt API, where it may have others, `also`.
    """

    name: str
    also: tuple[str, ...] = ()
    waits: bool = True
    """It is repeated while the database is away. If not, the handler gets Unavailable."""
    kept: bool = False
    """It goes on if its handler is stopped meanwhile: what it stores was made and paid."""
    from_process: bool = True
    """A run's process may send it. If not, only a host does."""
    with_handler: bool = False
    """A host names the handler beside the run."""
    batch: str = ""
    """Hosts send many of them at once, as rows under this key."""
    each: bool = False
    """A call without an answer of which each counts, also on a host, which passes it on."""
    body: int = OWN_BYTES
    """Bytes that a host's call may have."""


class Call(Generic[A]):
    """A call whose answer is an `A`; None for one that only tells."""

    way: ClassVar[Way]
    row: ClassVar[Row[Any]]
    answer: ClassVar[CallAnswer[Any]]

    @property
    def path(self) -> str:
        """The name under which it is sent."""
        return self.way.name


class OneWayCall(Call[None]):
    """A call without an answer; of each kind only the newest counts, unless its `Way` says so."""


class CallAnswer(Generic[A]):
    """The answer of a call as keys of a message. The base is that of a call which has none."""

    def write(self, value: A) -> dict[str, Any]:
        return {}

    def read(self, message: Mapping[str, Any]) -> A:
        """The answer in a message of the worker, which is trusted."""
        return None  # type: ignore[return-value]


NOTHING: CallAnswer[None] = CallAnswer()


_CLAIMS = trusted(Claims)
_WAIT_STATE = trusted(WaitState)
_BUDGETS = Those(tuple, trusted(BudgetState))


class GrantedAnswer(CallAnswer[tuple[AccessToken, Claims]]):
    """A token and its claims; only for the process of its own run."""

    def write(self, value: tuple[AccessToken, Claims]) -> dict[str, Any]:
        token, claims = value
        text, expires_at = token.reveal(), to_text(token.expires_at)
        return {"granted": {"text": text, "expires_at": expires_at, "claims": _CLAIMS.write(claims)}}

    def read(self, message: Mapping[str, Any]) -> tuple[AccessToken, Claims]:
        granted = message["granted"]
        token = AccessToken(granted["text"], from_text(granted["expires_at"]))
        return token, _CLAIMS.read(granted["claims"])


GRANTED = GrantedAnswer()


class PageAnswer(CallAnswer[StepPage]):
    """Stored steps, each as a list."""

    def write(self, value: StepPage) -> dict[str, Any]:
        steps = [
            (step.seq, step.name, step.key, step.occurrence, step.size, step.result_json)
            for step in value.steps
        ]
        return {"steps": steps, "more": value.more}

    def read(self, message: Mapping[str, Any]) -> StepPage:
        return StepPage([StoredStep(*values) for values in message["steps"]], message["more"])


class SumsAnswer(CallAnswer[tuple[int, int]]):
    """The last place of a run's steps, and the bytes of their results."""

    def write(self, value: tuple[int, int]) -> dict[str, Any]:
        return {"last": value[0], "bytes": value[1]}

    def read(self, message: Mapping[str, Any]) -> tuple[int, int]:
        return message["last"], message["bytes"]


class StoredAnswer(CallAnswer["str | None"]):
    """The JSON text that was stored; None if it is as it was sent."""

    def write(self, value: str | None) -> dict[str, Any]:
        return {"stored": value}

    def read(self, message: Mapping[str, Any]) -> str | None:
        stored: str | None = message["stored"]
        return stored


class StateAnswer(CallAnswer[WaitState]):
    """How a wait stands."""

    def write(self, value: WaitState) -> dict[str, Any]:
        return {"state": _WAIT_STATE.write(value)}

    def read(self, message: Mapping[str, Any]) -> WaitState:
        return _WAIT_STATE.read(message["state"])


class BudgetsAnswer(CallAnswer[OrgBudgets]):
    """The budgets of the run's org now."""

    def write(self, value: OrgBudgets) -> dict[str, Any]:
        return {"budgets": _BUDGETS.write(value.states), "missing": value.missing}

    def read(self, message: Mapping[str, Any]) -> OrgBudgets:
        return OrgBudgets(_BUDGETS.read(message["budgets"], check_json_text), message.get("missing"))


class PlacedAnswer(CallAnswer[tuple[PlacedChild, ...]]):
    """Children that are stored, each as its place and its run."""

    def write(self, value: tuple[PlacedChild, ...]) -> dict[str, Any]:
        return {"placed": [(child.place, child.run_id) for child in value]}

    def read(self, message: Mapping[str, Any]) -> tuple[PlacedChild, ...]:
        return tuple(PlacedChild(*values) for values in message["placed"])


class ChildPageAnswer(CallAnswer[ChildPage]):
    """Children as their parent reads them, each as a list."""

    def write(self, value: ChildPage) -> dict[str, Any]:
        rows = [
            (row.place, row.state, row.reason, row.error, row.result_json, row.seen) for row in value.rows
        ]
        return {"children": rows, "more": value.more}

    def read(self, message: Mapping[str, Any]) -> ChildPage:
        return ChildPage(tuple(EndedRow(*values) for values in message["children"]), message["more"])


class KnownLimits(NamedTuple):
    """The limits of an origin, and the seconds for which it has paused the org."""

    limits: tuple[Limit, ...] = ()
    paused: float = 0.0


class LimitsAnswer(CallAnswer[KnownLimits]):
    """The limits of an origin."""

    def write(self, value: KnownLimits) -> dict[str, Any]:
        return {"limits": [limit.as_json() for limit in value.limits], "paused": value.paused}

    def read(self, message: Mapping[str, Any]) -> KnownLimits:
        return KnownLimits(tuple(map(Limit.from_json, message["limits"])), message["paused"])


class ShareAnswer(CallAnswer[Share]):
    """A share of a limit; its ends are in seconds from the question on, since clocks of machines differ."""

    def write(self, value: Share) -> dict[str, Any]:
        return {"share": list(value)}

    def read(self, message: Mapping[str, Any]) -> Share:
        return Share(*message["share"])


class SpendKey(CallPart[str]):
    """The key of a spend, `attempt:number`; each counts once."""

    def read(self, value: Any, check: TextCheck) -> str:
        # One number has one form.
        found = _SPEND_KEY.fullmatch(value) if isinstance(value, str) else None
        if found is None or int(found[1]) > MAX_SPENDS:
            raise ValueError("not attempt:number, such as 1:25")
        return str(value)


class Options(CallPart[Any]):
    """The answers that a wait is limited to."""

    def read(self, value: Any, check: TextCheck) -> Any:
        if value is None:
            return ()
        options = check_options(value)
        to_json_text(options, "options", MAX_ASKED)
        return options

    def names(self, value: Any) -> Iterator[tuple[str, str]]:
        # Two masked options would be the same answer.
        return (("an option of a wait", option) for option in value if isinstance(option, str))


class Spans(CallPart[tuple[tuple[int, int], ...]]):
    """Rows of places of children, each as its first and last."""

    def read(self, value: Any, check: TextCheck) -> tuple[tuple[int, int], ...]:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_SPANS:
            raise ValueError(f"not a list of 1 to {MAX_SPANS:,} spans")
        place = Count(MAX_CHILDREN, 1)
        found: list[tuple[int, int]] = []
        for first, last in value:
            span = place.read(first, check), place.read(last, check)
            if span[0] > span[1] or (found and span[0] <= found[-1][1]):
                raise ValueError("not spans in order")
            found.append(span)
        return tuple(found)


@dataclass(frozen=True)
class ModelName(CallPart[str]):
    """The name of a model or a provider."""

    what: str

    def read(self, value: Any, check: TextCheck) -> str:
        return model_name(value)

    def names(self, value: str) -> Iterator[tuple[str, str]]:
        yield f"a {self.what}", value


def _each_kind_once(usage: ModelUsage) -> None:
    if len({kind for kind, _ in usage.kinds}) < len(usage.kinds):
        raise ValueError("not each kind once")


CHILD = Row(
    NewChild,
    {
        "handler": Text(200),
        "key": Maybe(KeyText("child")),
        "occurrence": Count(MAX_CHILDREN, 1),
        "params_json": JsonText("params of the child", MAX_CHILD_PARAMS),
        "map": Count(MAX_CHILDREN),
        "window": Count(MAX_WINDOW),
    },
    lean=("map", "window"),
)
REQUEST = Row(
    NewRequest,
    {
        "step": Name("step"),
        "key": Maybe(KeyText("step")),
        "occurrence": Count(2**31 - 1, 1),
        "api": Text(200),
        "path": Text(100),
        "body_json": JsonText("model request", MAX_BODY),
        "betas": Several(Text(100), MAX_BETAS),
        "meter": Maybe(Meter("spend")),
    },
    lean=("betas", "meter"),
)
CHILDREN_WAIT = Row(ChildrenWait, {"spans": Spans(), "any": Truth()})

USAGE = Row(
    ModelUsage,
    {
        "provider": Maybe(ModelName("provider")),
        "model": ModelName("model"),
        "kinds": Several(Together(OneOf(PRICED_KINDS), Count(MAX_AMOUNT)), len(PRICED_KINDS)),
    },
    then=_each_kind_once,
)

STEP = Row(
    NewStep,
    {
        "name": Name("step"),
        "key": Maybe(KeyText("step")),
        "occurrence": Count(2**31 - 1, 1),
        "seq": Count(MAX_STEPS, 1),
        "result_json": JsonText("result of the step", RESULT_LIMIT),
        "started_at": When(),
        "ended_at": When(),
        "spends": Several(Together(Meter("spend"), Count(MAX_AMOUNT)), MAX_METERS),
        "used": Several(USAGE, MAX_USED),
    },
    lean=("used",),
)


def _fits_its_kind(wait: NewWait) -> None:
    if wait.options and wait.kind != "answer":
        raise ValueError("only a wait for an answer has options")
    if (wait.kind == "children") != (wait.children is not None):
        raise ValueError("only a wait for children has spans of them, and each has")
    if (wait.kind == "batch") != (wait.request is not None):
        raise ValueError("only a wait for a batch has a request, and each has")


WAIT = Row(
    NewWait,
    {
        "name": Name("wait"),
        "occurrence": Count(MAX_WAITS, 1),
        "kind": OneOf(KINDS),
        "seconds": Maybe(Seconds()),
        "ask_json": Maybe(JsonText("ask", MAX_ASKED)),
        "alert": Truth(),
        "options": Options(),
        "children": Maybe(CHILDREN_WAIT),
        "request": Maybe(REQUEST),
    },
    lean=("options", "children", "request"),
    then=_fits_its_kind,
)

CALLS: dict[str, type[Call[Any]]] = {}
ONE_WAY: dict[str, type[OneWayCall]] = {}


def declared(way: Way, answer: CallAnswer[Any] = NOTHING, *, lean: Sequence[str] = ()) -> Any:
    """Complete the class of a call, and make it known under its names; `lean` as for `Row`."""

    def declare(kind: C) -> C:
        kind.way, kind.answer, kind.row = way, answer, row_of(kind, lean=lean)
        known: dict[str, Any] = ONE_WAY if issubclass(kind, OneWayCall) and not way.each else CALLS
        known.update(dict.fromkeys((way.name, *way.also), kind))
        return kind

    return declare


@declared(Way("save", with_handler=True, body=CHECKPOINT_BYTES))
@dataclass(frozen=True, slots=True)
class Save(Call[None]):
    """Store a checkpoint. `number` counts the saves of the attempt: a late one overwrites no later one."""

    data: Annotated[str, JsonText("checkpoint", LIMIT)]
    number: Annotated[int, Count(2**31 - 1)] = 0


@declared(
    Way("token", also=("token_for",), waits=False, with_handler=True), GRANTED, lean=("audience", "resource")
)
@dataclass(frozen=True, slots=True)
class AskToken(Call[tuple[AccessToken, Claims]]):
    """A token with some life left; with `fresh` a new one.

    With an `audience` it is for that one, with a `resource` for that URL (RFC 8707).
    """

    fresh: Annotated[bool, Truth()] = False
    audience: Annotated[str, Text(AUDIENCE_LIMIT)] = ""
    resource: Annotated[str, Text(AUDIENCE_LIMIT)] = ""

    @property
    def path(self) -> str:
        # A name of its own: a worker that does not know it would answer with the token of the run.
        return "token_for" if self.audience or self.resource else "token"


@declared(Way("limits", from_process=False, waits=False), LimitsAnswer())
@dataclass(frozen=True, slots=True)
class AskLimits(Call[KnownLimits]):
    """The limits of an origin for the run's org; a broker asks for them."""

    origin: Annotated[str, Text(ORIGIN_LIMIT)]


@declared(Way("share", from_process=False, waits=False), ShareAnswer())
@dataclass(frozen=True, slots=True)
class AskShare(Call[Share]):
    """A share of a limit, by its id, as `model.limits.Ask` asks for it."""

    limit: Annotated[str, Text(ORIGIN_LIMIT)]
    want: Annotated[int, Count(2**31)] = 0
    returned: Annotated[int, Count(2**31)] = 0
    granted_at: Annotated[float, Number()] = 0.0
    slots: Annotated[int, Count(2**31)] = 0
    in_use: Annotated[int, Count(2**31)] = 0


@declared(Way("pause", from_process=False, waits=False))
@dataclass(frozen=True, slots=True)
class PauseOrigin(Call[None]):
    """Let the requests of the run's org to an origin wait: it has asked for that."""

    origin: Annotated[str, Text(ORIGIN_LIMIT)]
    seconds: Annotated[float, Number()]


@declared(Way("steps"), PageAnswer())
@dataclass(frozen=True, slots=True)
class LoadSteps(Call[StepPage]):
    """The stored steps of earlier attempts after this place."""

    after: Annotated[int, Count(MAX_STEPS)] = 0


@declared(Way("totals", from_process=False), SumsAnswer())
@dataclass(frozen=True, slots=True)
class StepTotals(Call[tuple[int, int]]):
    """The last place of the run's steps, and the bytes of their results."""


@declared(Way("store", kept=True, with_handler=True, batch="steps", body=MAX_BYTES), StoredAnswer())
@dataclass(frozen=True, slots=True)
class StoreStep(Call["str | None"]):
    """Store the result of a step, with what it has spent."""

    step: Annotated[NewStep, STEP]


@declared(Way("wait", also=("choose", "wait_children"), body=BATCH_BYTES), StateAnswer())
@dataclass(frozen=True, slots=True)
class OpenWait(Call[WaitState]):
    """Store what the run waits for, and say how that stands."""

    wait: Annotated[NewWait, WAIT]

    @property
    def path(self) -> str:
        # A name of its own: a worker that does not know it refuses it, where it would ignore a key of `wait`.
        if self.wait.children is not None:
            return "wait_children"
        return "choose" if self.wait.options else "wait"


@declared(Way("start_children", with_handler=True, body=CHILDREN_BYTES), PlacedAnswer())
@dataclass(frozen=True, slots=True)
class StartChildren(Call[tuple[PlacedChild, ...]]):
    """Store children of the run, or find those that are stored; with `keep` they go on if it fails."""

    children: Annotated[tuple[NewChild, ...], Several(CHILD, AT_ONCE)]
    keep: Annotated[bool, Truth()] = False


@declared(Way("children"), ChildPageAnswer())
@dataclass(frozen=True, slots=True)
class ReadChildren(Call[ChildPage]):
    """Children of the run by their places, as many as fit into one answer."""

    places: Annotated[tuple[int, ...], Several(Count(MAX_CHILDREN, 1), AT_ONCE)]


@declared(Way("ended_children", body=BATCH_BYTES), ChildPageAnswer())
@dataclass(frozen=True, slots=True)
class ReadEnded(Call[ChildPage]):
    """The next children of these spans that have ended; the order in which the run sees them is stored."""

    spans: Annotated[tuple[tuple[int, int], ...], Spans()]
    after: Annotated[int, Count(MAX_CHILDREN)] = 0


@declared(Way("budgets"), BudgetsAnswer())
@dataclass(frozen=True, slots=True)
class AskBudgets(Call[OrgBudgets]):
    """The budgets of the run's org now."""


@declared(Way("spend", kept=True), BudgetsAnswer(), lean=("used",))
@dataclass(frozen=True, slots=True)
class CountSpend(Call[OrgBudgets]):
    """Count what was spent, once for each key; the budgets after it. `used` says of which model it was."""

    meter: Annotated[str, Meter("spend")]
    amount: Annotated[int, Count(MAX_AMOUNT)]
    key: Annotated[str, SpendKey()]
    used: Annotated[ModelUsage | None, Maybe(USAGE)] = None


@declared(Way("progress"))
@dataclass(frozen=True, slots=True)
class Progress(OneWayCall):
    """Show how far the run is."""

    done: Annotated[float, Number()]
    total: Annotated[float | None, Maybe(Number())] = None
    note: Annotated[str | None, Maybe(Text(UNMASKED_LIMIT))] = None


@declared(Way("trace", waits=False, batch="spans", each=True, body=BATCH_BYTES))
@dataclass(frozen=True, slots=True)
class TraceStep(OneWayCall):
    """Make a span of a step; asked for by `Work.traces`."""

    span: Annotated[StepSpan, STEP_SPAN]


class Port(Protocol):
    """How a handler reaches its worker. That of a handler that blocks blocks in `ask`; see `finish`."""

    async def ask(self, call: Call[A], /) -> A:
        """The answer. Raises LeaseLost, StepError, TokenRefused, TokenError and Unavailable."""

    def tell(self, notice: OneWayCall, /) -> None:
        """Tell the worker, without an answer."""


def message_of(call: Call[Any]) -> dict[str, Any]:
    """The keys of a call's message."""
    return call.row.write(call)


def answer_in(call: Call[A], message: Mapping[str, Any]) -> A:
    """The answer to a call in a message of the worker, which is trusted."""
    given: A = call.answer.read(message)
    return given


def read(name: Any, message: Mapping[str, Any], check: TextCheck = check_json_text) -> Call[Any]:
    """The call of a message that is not trusted; `check` may put off the check of long JSON text.

    Raises:
        NotACall: it is not a known call, or exceeds a limit.
    """
    try:
        kind = CALLS.get(name) or ONE_WAY[name]
    except (KeyError, TypeError):
        raise NotACall(f"there is no call {clean(str(name), 50)}") from None
    try:
        call: Call[Any] = kind.row.read(message, check)
    except _MALFORMED as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise NotACall(clean(f"not a valid {kind.way.name}: {reason}", 300)) from error
    return call


def known_in(kind: type[Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has of a class's fields."""
    return {key.name: message[key.name] for key in fields(kind) if key.name in message}
