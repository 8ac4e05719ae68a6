"""A run's process may send anything: it ends as an outcome, and raises nothing in the worker."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.answering import AnsweringWorker
from tests.fakes.clock import ManualClock
from tests.fakes.running import work
from worker.engine.runners.child import child_run, messages
from worker.engine.runners.child.child_process import InboxTurns
from worker.engine.runners.child.child_run import BROKEN, MAX_REQUESTS, ChildRun, Ended
from worker.engine.runners.child.messages import (
    JSON_LIMIT,
    LONG,
    MAX_TOKENS,
    TEXTS_LIMIT,
    BrokenMessage,
    RunFrames,
    run_frame,
)
from worker.engine.runners.contract import OWN_FAILURES, StopSignal
from worker.handlers.calls import CountSpend, NotACall, OpenWait, Progress
from worker.model.runs.budgets import OrgBudgets
from worker.model.runs.outcome import (
    Cancelled,
    Failed,
    NoHandler,
    Outcome,
    Parked,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
)

END = {"op": "end", "outcome": {"kind": "Succeeded", "result": None, "state": None}}
STEP = {
    **{"name": "ask", "key": None, "occurrence": 1, "seq": 1, "result_json": "1", "spends": []},
    **{"started_at": "2030-01-01T00:00:00Z", "ended_at": "2030-01-01T00:00:01Z"},
}
WAIT = {"name": "ok", "occurrence": 1, "kind": "sleep", "seconds": 5.0, "ask_json": None, "alert": False}
GOOD: list[dict[str, Any]] = [
    {"op": "started"},
    {"op": "progress", "done": 1, "total": 2, "note": "x"},
    {"op": "save", "n": 1, "data": "1"},
    {"op": "token", "n": 2, "fresh": False},
    {"op": "steps", "n": 3, "after": 0},
    {"op": "store", "n": 4, "step": STEP},
    {"op": "wait", "n": 5, "wait": WAIT},
    {"op": "budgets", "n": 6},
    {"op": "spend", "n": 7, "meter": "llm", "amount": 1, "key": "1:1"},
]


class Process:
    """A process that has sent something and ended; the end of the worker's channel."""

    is_behind = False
    has_read_all = True
    ended_unread = False

    def __init__(self) -> None:
        self.signals: list[str] = []
        self.sent: list[Any] = []
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def serve(self, receiver: Any, message: Any) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    async def drained(self, patience: float) -> None: ...

    def send(self, message: Any) -> None:
        self.sent.append(json.loads(json.dumps(message)))

    def signal(self, op: str, **fields: Any) -> None:
        self.signals.append(op)


def outcome_of(*parts: bytes, services: AnsweringWorker | None = None) -> Outcome:
    """The outcome of a run whose process sent this; fails if anything is raised in the loop."""

    async def main() -> Outcome:
        raised: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: raised.append(context))
        process: Any = Process()
        turns = InboxTurns(loop.call_soon)
        clock = ManualClock()
        answering = services or AnsweringWorker()
        run = ChildRun(process, work("ok"), answering, StopSignal(), clock, lambda: None, turns)
        for part in parts:
            run.on_data(part)
        for _ in range(20):
            await asyncio.sleep(0)
        process.ended.set_result(Ended())
        outcome = await run.finish()
        assert raised == []
        assert outcome is not None
        return outcome

    return asyncio.run(main())


def framed(message: Any) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("!II", len(body), 0) + body


START = framed({"op": "started"})


@pytest.mark.parametrize("message", GOOD, ids=lambda message: str(message["op"]))
def test_what_our_own_code_sends_is_understood(message: dict[str, Any]) -> None:
    assert outcome_of(START, run_frame(message), run_frame(END)) == Succeeded()


# What raised OverflowError in the worker's loop, and other numbers without a ceiling.
OVERFLOWS: list[dict[str, Any]] = [
    {"op": "progress", "done": 10**400, "total": None, "note": None},
    {"op": "steps", "n": 1, "after": float("inf")},
    {"op": "steps", "n": 1, "after": 10**30},
    {"op": "wait", "n": 1, "wait": {**WAIT, "seconds": 1e300}},
    {"op": "wait", "n": 1, "wait": {**WAIT, "seconds": 10**400}},
    {"op": "store", "n": 1, "step": {**STEP, "started_at": "0001-01-01T00:00:00+14:00"}},
    {"op": "token", "n": 10**400, "fresh": True},
]


NOT_OURS: list[Any] = [
    *OVERFLOWS,
    {"op": "save", "n": 1, "data": 5},
    {"op": "save", "n": 1, "data": "{"},
    {"op": "save", "n": 1, "data": "[" * 100_000},
    {"op": "save", "n": "1", "data": "1"},
    {"op": "store", "n": 1, "step": {**STEP, "result_json": "[" + "1," * 10_000}},
    {"op": "wait", "n": 1, "wait": {**WAIT, "options": ["yes"]}},
    {"op": "wait", "n": 1, "wait": {**WAIT, "kind": "answer", "options": [["yes"]]}},
    {"op": "end", "outcome": {"kind": "Succeeded", "result": "[" + "1," * 10_000}},
    {"op": "end", "outcome": {"kind": "TimedOut"}},
    # Longer than what is checked at once, as a text would be.
    {"op": "end", "outcome": {"kind": "Succeeded", "result": [1] * 5_000}},
    {"op": "save", "n": 1, "data": [1] * 5_000},
    {"op": "totals", "n": 1},
    {"op": "spend", "n": 1, "meter": "llm", "amount": 1, "key": "1:01"},
    {"op": "end"},
    {"op": "unknown"},
    {"op": ["end"]},
    {},
    [],
    b"{]",
    b"\xff",
    b"[" * 200_000,
    b"[[]" + b",[]" * 60_000 + b"]",
]


@pytest.mark.parametrize("message", NOT_OURS, ids=[str(place) for place in range(len(NOT_OURS))])
def test_what_it_does_not_send_ends_the_run(message: Any) -> None:
    assert outcome_of(START, framed(message), framed(END)) is BROKEN


@pytest.mark.parametrize("error", [NotACall("of another attempt"), None], ids=["", "control"])
def test_a_call_that_is_not_one_of_its_attempt_ends_the_run(error: NotACall | None) -> None:
    def spend(call: CountSpend) -> OrgBudgets:
        if error is not None:
            raise error
        return OrgBudgets([])

    services = AnsweringWorker({CountSpend: spend})
    outcome = outcome_of(START, framed(GOOD[-1]), framed(END), services=services)

    assert outcome == (Succeeded() if error is None else BROKEN)


@pytest.mark.parametrize(("place", "read"), [(0, Progress.row.read), (3, OpenWait.row.read)])
def test_control_their_readers_do_overflow(place: int, read: Any) -> None:
    with pytest.raises(OverflowError):
        read(OVERFLOWS[place])


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 10**400, 2**63, float("inf"), float("nan"), 1e308, -0.0])
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["2030-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "1", "{", "x" * 1_200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KINDS = [*messages._OUTCOMES, "TimedOut", "Gated", "Nothing"]


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, Any]:
    """A message of ours with some of its fields changed, at either level, or left out."""
    message: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from([*GOOD, END]))))
    if "outcome" in message:
        message["outcome"]["kind"] = draw(st.sampled_from(KINDS))
        for name in draw(st.sets(st.sampled_from(["reason", "detail", "after", "retry_after", "error"]))):
            message["outcome"][name] = draw(JUNK)
    inner = [part for part in message.values() if isinstance(part, dict)]
    for place in [message, *inner]:
        for name in draw(st.sets(st.sampled_from(sorted(place)), max_size=2)):
            if draw(st.booleans()):
                place[name] = draw(JUNK)
            else:
                del place[name]
    return message


def may_report(outcome: Outcome) -> bool:
    match outcome:
        case Succeeded() | Retried() | Snoozed() | Parked() | NoHandler():
            return True
        case Failed(reason=reason):
            return reason in OWN_FAILURES or reason == "handler_exited"
        case Cancelled("by_handler") | Refused("settings_invalid"):
            return True
    return False


@given(st.lists(hostile(), max_size=4))
@settings(deadline=None, max_examples=150)
def test_anything_that_it_sends_becomes_an_outcome_that_it_may_report(sent: list[dict[str, Any]]) -> None:
    assert may_report(outcome_of(START, *map(framed, sent)))


@given(st.lists(st.binary(max_size=40), max_size=4))
@settings(deadline=None, max_examples=100)
def test_any_bytes_become_an_outcome(parts: list[bytes]) -> None:
    assert may_report(outcome_of(START, *parts))


def test_the_first_end_counts() -> None:
    again = {"op": "end", "outcome": {"kind": "Snoozed", "after": 1, "detail": None}}

    assert outcome_of(START, framed(END), framed(again)) == Succeeded()


def test_an_end_counts_although_calls_before_it_wait_for_the_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as steps that the handler has given up after a time of its own."""
    monkeypatch.setattr(child_run, "LAST_STEPS", 0.01)

    class Away(AnsweringWorker):
        async def ask(self, call: Any) -> Any:
            await asyncio.Event().wait()

    calls = [framed({"op": "budgets", "n": n}) for n in range(MAX_REQUESTS)]

    assert outcome_of(START, *calls[1:], framed(END), services=Away()) == Succeeded()
    assert outcome_of(START, *calls, framed(END), services=Away()) == Succeeded()


def test_long_texts_arrive_as_they_were_sent_and_are_not_parsed() -> None:
    """However they are cut, and whatever they contain."""
    sent = {"op": "end", "outcome": {"result": '["é\\"\n"]' * LONG, "detail": "[" * LONG}}
    data = run_frame(sent) + run_frame({"op": "x"})
    frames = RunFrames()
    found = []
    for start in range(0, len(data), 100):
        frames.add(data[start : start + 100])
        while (next_ := frames.next()) is not None:
            found.append(next_[0])

    assert found == [sent, {"op": "x"}]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!II", JSON_LIMIT + 1, 0),
        struct.pack("!II", 2, TEXTS_LIMIT + 1),
        struct.pack("!II", 2, 3) + b"{}abc",
        *(
            struct.pack("!II", len(body), 3) + body + b"abc"
            for body in (
                b'{"texts":[[["a"],2]]}',
                b'{"texts":[[["a"],4]]}',
                b'{"texts":[[["a"],-1],[["b"],4]]}',
                b'{"texts":[[["a","b"],3]]}',
                b'{"texts":[[[],3]]}',
                b'{"texts":[[[[]],3]]}',
                b'{"texts":5}',
                b'{"a":[0],"texts":[[["a",0],3]]}',
            )
        ),
        struct.pack("!II", 17, 1) + b'{"texts":[["a",1]' + b"\xff",
    ],
)
def test_texts_that_are_not_where_the_frame_says_are_refused(data: bytes) -> None:
    frames = RunFrames()
    frames.add(data)
    with pytest.raises(BrokenMessage):
        frames.next()


def test_a_frame_with_too_many_parts_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    frames = RunFrames()
    frames.add(framed(b'{"op":"x","a":[' + b"[]," * MAX_TOKENS + b"1]}"))

    with pytest.raises(BrokenMessage):
        frames.next()

    assert parsed == []
