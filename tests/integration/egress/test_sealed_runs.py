"""A sealed run reaches what its list names, by the broker, and holds a placeholder of its token."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.running import until, work
from tests.integration.egress.conftest import MODULE
from tests.integration.egress.service import Service
from worker.engine.runners.child import linux
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal, Work
from worker.features.egress.handle import BrokerHandle
from worker.handlers.calls import AskLimits, KnownLimits, Save
from worker.model.egress import TOKEN, BoundSecret, Egress, placeholder_of
from worker.model.runs.outcome import Failed, Outcome, Succeeded
from worker.telemetry.events import Emitted

pytestmark = pytest.mark.anyio
ONLY_API = Egress((("api",),))
SECRET = "sk-proj-0123456789/abc+def"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().serving() as service:
        yield service


def given(handler: str, service: Service, **fields: Any) -> Work:
    """The work of a run whose API is the service."""
    common = {"entry_point": f"{MODULE}:{handler}", "api_origins": (service.url,), "egress": ONLY_API}
    return work(handler, **{**common, "params": {"url": f"{service.url}/things"}, **fields})


def result(outcome: Outcome) -> Any:
    assert isinstance(outcome, Succeeded), outcome
    return None if outcome.result is None else json.loads(outcome.result)


def failure(outcome: Outcome) -> str:
    assert isinstance(outcome, Failed), outcome
    return f"{outcome.error.type}: {outcome.error.message}"


@pytest.mark.parametrize("handler", ["get", "blocking_get"])
async def test_the_api_gets_the_token_and_the_run_does_not(
    children: ChildPool, service: Service, handler: str
) -> None:
    link = AnsweringWorker()

    seen = result(await children.run(given(handler, service), link, StopSignal()))

    assert service.requests[-1].headers["authorization"] == "Bearer token-one"
    # The service gives all headers back.
    assert "token-one" not in json.dumps(seen)
    assert json.loads(seen["text"])["authorization"] == "Bearer [masked]"
    rows = [(row["origin"], row["requests"], row["statuses"]) for row in link.sent]
    assert rows == [(service.url, 1, {"200": 1})]


async def test_what_waits_for_a_limit_is_counted(
    children: ChildPool, service: Service, emitted: list[Emitted]
) -> None:
    """Here for a pause that the service has asked for."""
    pauses = [1.5]
    answers = {AskLimits: lambda call: KnownLimits(paused=pauses.pop() if pauses else 0.0)}
    assert result(await children.run(given("get", service), AnsweringWorker(answers=answers), StopSignal()))

    def counted() -> dict[str, float]:
        rows = [one.fields for one in emitted if one.event.name == "limit.counted"]
        assert {row["origin"] for row in rows} <= {service.url}
        sums = {name: sum(row[name] for row in rows) for name in ("waited", "seconds", "refused")}
        return {**sums, "waiting": rows[-1]["waiting"] if rows else 0}

    await until(lambda: counted()["waited"])
    assert (counted()["waited"], counted()["waiting"], counted()["refused"]) == (1, 0, 0)
    assert 1.0 < counted()["seconds"] < 5.0


async def test_an_open_run_has_its_token(children: ChildPool, service: Service) -> None:
    work_of = given("reveal", service, egress=Egress())
    assert result(await children.run(work_of, AnsweringWorker(), StopSignal())) == "token-one"


async def test_a_sealed_run_has_a_placeholder_unless_its_definition_reveals_the_token(
    children: ChildPool, service: Service
) -> None:
    sealed = given("reveal", service)
    seen = result(await children.run(sealed, AnsweringWorker(), StopSignal()))
    assert seen == placeholder_of(sealed.run_id, TOKEN)

    revealed = given("reveal", service, egress=Egress((("api",),), reveal_token=True))
    assert result(await children.run(revealed, AnsweringWorker(), StopSignal())) == "token-one"


async def test_an_origin_that_is_not_listed_is_denied_before_its_name_is_resolved(
    children: ChildPool, service: Service
) -> None:
    link = AnsweringWorker()

    outcome = await children.run(
        given("get", service, params={"url": "https://nobody.invalid/x"}), link, StopSignal()
    )

    assert "EgressDenied: https://nobody.invalid is not in the egress list" in failure(outcome)
    assert link.denials == [("https://nobody.invalid", "not listed")]


async def test_a_connection_of_its_own_needs_an_open_network(children: ChildPool, service: Service) -> None:
    params = {"host": "127.0.0.1", "port": service.port}

    sealed = await children.run(given("connect", service, params=params), AnsweringWorker(), StopSignal())
    opened = await children.run(
        given("connect", service, params=params, egress=Egress()), AnsweringWorker(), StopSignal()
    )

    assert "PermissionError" in failure(sealed)
    assert result(opened) == "connected"


async def test_a_process_that_waits_for_a_sealed_run_has_no_network_already(
    children: ChildPool, service: Service
) -> None:
    """Of those that wait, one for each kind, that for open runs is the control."""
    for egress in (Egress(), ONLY_API):
        result(await children.run(given("reveal", service, egress=egress), AnsweringWorker(), StopSignal()))

    await until(lambda: len(filters_of_spares(children)) == 2)
    one, other = filters_of_spares(children)
    assert other == one + 1


def filters_of_spares(children: ChildPool) -> list[int]:
    """The numbers of filters of processes that wait for a run; the zygote's own is among them."""
    found = []
    for pid, process in linux.processes().items():
        if process.parent == children.zygote_pid and process.state == "S":
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            found.append(int(status["Seccomp_filters"]))
    return sorted(found)


async def test_a_bound_secret_is_put_in_for_its_origin_only(children: ChildPool, service: Service) -> None:
    bound = BoundSecret(
        "openai", SECRET, service.url, placeholder=placeholder_of(work("get").run_id, "openai")
    )
    async with Service().serving() as other:
        lists = Egress(((service.url, other.url),))
        placeholder = placeholder_of(work("get").run_id, "openai")
        for target in (service, other):
            await children.run(
                given(
                    "get",
                    service,
                    egress=lists,
                    bound=(bound,),
                    private_origins=(service.url, other.url),
                    params={"url": target.url, "headers": {"X-Key": placeholder}},
                ),
                AnsweringWorker(),
                StopSignal(),
            )
        assert service.requests[-1].headers["x-key"] == SECRET
        assert other.requests[-1].headers["x-key"] == placeholder


async def test_a_run_that_may_pass_no_descriptor_gets_its_stream_from_the_broker(
    children: ChildPool, service: Service
) -> None:
    assert result(await children.run(given("get_given", service), AnsweringWorker(), StopSignal())) == 200


async def test_a_broker_that_dies_is_replaced_and_knows_the_attempt(
    children: ChildPool, broker: BrokerHandle, service: Service
) -> None:
    async def kill(call: Save) -> None:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)

    link = AnsweringWorker(answers={Save: kill})
    outcome = await children.run(given("get_twice", service), link, StopSignal())

    assert result(outcome) == [200, 200]
    assert len(service.requests) == 2
