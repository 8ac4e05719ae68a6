"""The attempt API v1 stays as it is, byte by byte: hosts and workers of both releases run side by side.

`tests/fakes/record.py` says what is recorded and how.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import exchanges, record
from tests.fakes.exchanges import ACCESS, CLAIMS, EXCHANGES, TOKEN, WORKER, Exchange
from tests.fakes.record import Recorded, comparable, head_of, host, worker
from worker.engine.runners.child import messages
from worker.features.hosts import attempt_api, wire
from worker.handlers.calls import GRANTED, STEP, WAIT, BudgetsAnswer, CallAnswer, PageAnswer, StateAnswer
from worker.model.runs.budgets import OrgBudgets

RECORDS = record.read()
CLOSE = replace(exchanges.WORK, private_origins=("http://10.0.0.5",), insecure_origins=("http://a.test",))
BY_CASE = {(one.call, one.case): one for one in EXCHANGES}
ANSWERS: list[tuple[CallAnswer[Any], Any]] = [
    (StateAnswer(), exchanges.ANSWERED),
    (BudgetsAnswer(), OrgBudgets(tuple(exchanges.BUDGETS))),
    (PageAnswer(), exchanges.PAGE),
    (GRANTED, (ACCESS, CLAIMS)),
]
each = pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda one: f"{one.call}-{one.case}")


async def check_host(exchange: Exchange, recorded: Recorded) -> None:
    """A host sends what is recorded, and reads the recorded answer."""
    request, given = await host(exchange, recorded.head, recorded.answer)

    assert (request.url.path, request.content) == (recorded.path, recorded.request)
    assert comparable(given) == comparable(exchange.gives)
    headers = request.headers
    assert (headers["authorization"], headers["orgworker-incarnation"]) == (f"Bearer {TOKEN}", WORKER)


async def check_worker(exchange: Exchange, recorded: Recorded) -> None:
    """A worker reads what is recorded, and gives the recorded answer."""
    response, store = await worker(exchange, recorded.path, recorded.request)

    # As Python before 3.13 names the status for people.
    answer = response.content.replace(b"Unprocessable Entity", b"Unprocessable Content")
    assert (head_of(response), answer) == (recorded.head, recorded.answer)
    asked = store.asked(*(name for name, *_ in exchange.asked))
    assert comparable(asked) == comparable(exchange.asked)


@each
async def test_a_host_of_this_release_speaks_as_the_recorded_one(exchange: Exchange) -> None:
    await check_host(exchange, RECORDS[exchange.call, exchange.case])


@each
async def test_a_worker_of_this_release_answers_as_the_recorded_one(exchange: Exchange) -> None:
    await check_worker(exchange, RECORDS[exchange.call, exchange.case])


def test_every_call_is_recorded_and_every_record_is_tried() -> None:
    calls = {recorded.path.removeprefix(f"{wire.PREFIX}/") for recorded in RECORDS.values()}

    assert calls == {*attempt_api.CALLS, "register", "take"}
    assert RECORDS.keys() == BY_CASE.keys()


@pytest.mark.parametrize(
    ("written", "read", "value"),
    [
        (STEP.write, STEP.read, exchanges.STEP),
        (WAIT.write, WAIT.read, exchanges.ASK),
        (WAIT.write, WAIT.read, exchanges.CHOICE),
        *((answer.write, answer.read, value) for answer, value in ANSWERS),
        (lambda work: messages.work_message(work, 9.0), messages.work_of, CLOSE),
        *((messages.outcome_message, messages.outcome_of_message, one) for one in exchanges.OUTCOMES),
    ],
)
def test_what_crosses_the_childs_socket_is_read_as_it_was_sent(
    written: Callable[[Any], Any], read: Callable[[Any], Any], value: Any
) -> None:
    """Its format may change: worker and child are of one release."""
    assert comparable(read(json.loads(json.dumps(written(value))))) == comparable(value)


def turned(message: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(message.items()))


def longer(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"new": 1}


@pytest.mark.parametrize("change", [turned, longer])
async def test_control_another_order_of_keys_or_one_more_is_found(
    change: Callable[[dict[str, Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what a host sends, in what a worker answers, and in a part of both."""
    save, wait = BY_CASE["save", ""], BY_CASE["wait", "sleep"]
    fence, state = wire.FENCE.write, StateAnswer.write
    recorded = RECORDS["save", ""]
    await check_host(save, recorded)
    await check_worker(wait, RECORDS["wait", "sleep"])

    monkeypatch.setattr(wire.FENCE, "write", lambda of: change(fence(of)))
    with pytest.raises(AssertionError):
        await check_host(save, recorded)
    monkeypatch.setattr(StateAnswer, "write", lambda *of: {"state": change(state(*of)["state"])})
    with pytest.raises(AssertionError):
        await check_worker(wait, RECORDS["wait", "sleep"])


async def test_control_another_value_is_found() -> None:
    """Bytes of the same length that mean something else, read by either side."""
    save, totals = BY_CASE["save", ""], BY_CASE["totals", ""]
    recorded = RECORDS["save", ""]
    number = recorded.request.replace(b'"number":4', b'"number":5')
    assert number != recorded.request
    with pytest.raises(AssertionError):
        await check_worker(save, replace(recorded, request=number))
    answer = json.dumps({"last": 3, "bytes": 17}, separators=(",", ":")).encode()
    with pytest.raises(AssertionError):
        await check_host(totals, replace(RECORDS["totals", ""], answer=answer))
