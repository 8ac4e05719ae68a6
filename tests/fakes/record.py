"""Messages of the attempt API v1: what a host sends and what a worker answers, byte by byte.

`python -m tests.fakes.record` writes `tests/unit/engine/recorded/CALL.json` from the code of this tree. Do
that for a call that is new, never for one that a release has: hosts and workers of both releases run side by
side. Each body is one line of its file, as it is sent.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import httpx

from tests.fakes import exchanges
from tests.fakes.answering import Answering
from tests.fakes.clock import ManualClock
from tests.fakes.exchanges import ENTRY, RUN, Exchange
from worker.engine.attempt.inflight import InflightRuns
from worker.engine.attempt.plan import HandlerRegistry, Plans
from worker.engine.attempt.run_log import RunLogWriter
from worker.engine.attempt.tools import GivenSecrets, Tools
from worker.features.hosts import wire
from worker.features.hosts.attempt_api import AttemptApi
from worker.features.hosts.control import AsyncControl, BlockingControl, Controls
from worker.features.hosts.delivery import HostTools
from worker.features.hosts.listener import Attempts
from worker.features.hosts.remote import RemoteStore
from worker.features.hosts.sharing import Sharing
from worker.handlers.ceiling import Grant, Offered
from worker.ids import OrgId
from worker.model.bindings import in_clear
from worker.model.claims import Enforced
from worker.model.runs.budgets import OrgBudgets
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import RunContext, StoredProgress
from worker.secret import AccessToken

FOLDER = Path(__file__).parents[1] / "unit" / "engine" / "recorded"
# What counts of an answer's headers.
HEADERS = ("content-type", "retry-after")


@dataclass(frozen=True)
class Recorded:
    """A call's path and body, and the status, headers and body of its answer."""

    path: str
    request: bytes
    head: Mapping[str, Any]
    answer: bytes

    def lines(self) -> str:
        """As a JSON object, each body as it is sent."""
        path, head = json.dumps(self.path), json.dumps(self.head)
        bodies = self.request.decode(), self.answer.decode()
        return f'"path": {path},\n"request": {bodies[0]},\n"head": {head},\n"answer": {bodies[1]}'


class Canned(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """A worker that gives every call the same answer, and keeps what it is sent."""

    def __init__(self, head: Mapping[str, Any], answer: bytes) -> None:
        self.head = head
        self.answer = answer
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        headers = {name: self.head[name] for name in HEADERS if name in self.head}
        return httpx.Response(self.head["status"], headers=headers, content=self.answer)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.handle_request(request)


async def host(exchange: Exchange, head: Mapping[str, Any], answer: bytes) -> tuple[httpx.Request, Any]:
    """What a host sends, and what it makes of that answer: a value, or an exception."""
    clock, transport, runs = ManualClock(), Canned(head, answer), InflightRuns()
    controls = Controls(["http://w:1"], exchanges.TOKEN, clock)
    controls.incarnation = exchanges.WORKER
    if exchange.call != "take":
        runs.add(RUN)
    blocking = BlockingControl(controls, 1.0, transport=transport)
    store = RemoteStore(AsyncControl(controls, transport=transport), blocking, runs, clock.now)
    given: Any
    try:
        given = exchange.ask(store)
        given = await given if inspect.isawaitable(given) else given
    except Exception as error:
        given = error
    (request,) = transport.requests
    return request, given


def enforced() -> Enforced:
    """The token of the run, which serves for longer than any test takes."""
    return Enforced(
        exchanges.ACCESS,
        exchanges.CLAIMS,
        credential_id="",
        received_at=0.0,
        renew_at=0.0,
        usable_until=1e9,
        expires_at=1e9,
        minted=False,
    )


async def worker(exchange: Exchange, path: str, request: bytes) -> tuple[httpx.Response, Answering]:
    """What a worker answers to a host that sends this, and what was asked of its store."""
    spec, clock = exchanges.SPEC, ManualClock()
    entry = replace(ENTRY, children=("acme.page",)) if exchange.call == "start_children" else ENTRY
    usual = {
        "find": exchanges.CALLER,
        "begin": exchanges.WORKER,
        "offered": Offered("default", {ENTRY.name: Grant(entry)}, frozenset({ENTRY.name})),
        "owned": [RUN],
        "org_and_definition": RunContext(OrgId("o1"), "org_acme", "Acme", None, "main", "nightly", spec),
        "orgs_and_definitions": {},
        "load_progress": StoredProgress({"done": [1, "ü"]}, ENTRY.name),
        "step_totals": (2, 17),
        "budgets_of": OrgBudgets(exchanges.BUDGETS),
        "is_limited": True,
        "limits_of": exchanges.LIMITS,
        "log_size": (0, 0, set()),
        "finish": lambda _, ended: {end.run_id for end in ended},
        **dict.fromkeys(("at_hand", "ensure"), enforced()),
        **dict.fromkeys(("seal", "open"), lambda text, place: text),
        **dict.fromkeys(("hand_back", "ended", "often_handed_back", "load"), frozenset()),
    }
    store = Answering(
        {**usual, **exchange.answers}, at_once=("at_hand", "is_limited", "seal", "open", "forget")
    )
    fake = cast(Any, store)
    tools = Tools(
        plans=Plans(fake, clock, api_origins={"main": ("https://api.acme.test",)}),
        tokens=fake,
        handlers=HandlerRegistry(),
        runners={},
        store=fake,
        steps=fake,
        run_log=RunLogWriter(fake, clock),
        clock=clock,
        random=Random(1),
        secrets=GivenSecrets(in_clear(exchanges.SECRETS)),
        limits=fake,
    )
    shared = HostTools(tools, fake, fake, Sharing(fake, clock, 2.0), lambda ended, inflight: None)
    places = {"eu": exchanges.TEMPORAL}
    attempts = Attempts(clock)
    attempts.api = AttemptApi(shared, fake, lease=30.0, renew_every=10.0, poll=0.5, temporal=places)
    headers = {"Authorization": f"Bearer {exchanges.TOKEN}", wire.INCARNATION: exchanges.WORKER}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(attempts.app())) as client:
        response = await client.post(f"http://w:1{path}", content=request, headers=headers)
    await tools.run_log.flush()
    await attempts.api.close()
    return response, store


def comparable(value: Any) -> Any:
    """A value that compares by content: tokens by their text, errors by what is shown of them."""
    match value:
        case Exception():
            return type(value), str(value), getattr(value, "retry_after", None)
        case EndedAttempt():
            how = value.outcome, value.state, value.reason, value.detail, value.result
            kept = value.definition_state, value.trail.peak_memory, *value.trail.asks
            return " ".join(str(one or "-") for one in (*how, *kept))
        case AccessToken():
            return value.reveal(), value.expires_at
        case _ if is_dataclass(value):
            return {one.name: comparable(getattr(value, one.name)) for one in fields(value)}
        case Mapping():
            return {name: comparable(one) for name, one in value.items()}
        case list() | tuple():
            return [comparable(one) for one in value]
    return value


def head_of(response: httpx.Response) -> dict[str, Any]:
    """The status of an answer, and its headers that count."""
    headers = {name: response.headers[name] for name in HEADERS if name in response.headers}
    return {"status": response.status_code, **headers}


async def record(exchange: Exchange) -> Recorded:
    """The messages of one exchange, as the code of this tree writes them."""
    request, _ = await host(exchange, {"status": 500}, b"{}")
    response, _ = await worker(exchange, request.url.path, request.content)
    assert response.status_code != 500, (exchange, response.text)
    return Recorded(request.url.path, request.content, head_of(response), response.content)


def read() -> dict[tuple[str, str], Recorded]:
    """All records, by call and case."""
    found: dict[tuple[str, str], Recorded] = {}
    for path in FOLDER.glob("*.json"):
        parts: dict[str, str] = {}
        for line in path.read_text().splitlines():
            name, _, text = line.removesuffix(",").partition(": ")
            if text == "{":
                case = json.loads(name)
            elif text:
                parts[json.loads(name)] = text
            elif name == "}" and parts:
                bodies = parts["request"].encode(), json.loads(parts["head"]), parts["answer"].encode()
                found[path.stem, case] = Recorded(json.loads(parts["path"]), *bodies)
                parts = {}
    return found


async def main() -> None:
    """Write all records anew."""
    written: dict[str, list[str]] = {}
    for one in exchanges.EXCHANGES:
        lines = (await record(one)).lines()
        written.setdefault(one.call, []).append(f"{json.dumps(one.case)}: {{\n{lines}\n}}")
    for call, cases in written.items():
        (FOLDER / f"{call}.json").write_text("{\n" + ",\n".join(cases) + "\n}\n")


if __name__ == "__main__":
    asyncio.run(main())
