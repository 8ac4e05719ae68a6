"""Health: alive while the loops tick, ready while work is taken, whatever one org's troubles are."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from tests.fakes.limits import no_limits
from tests.unit.telemetry.test_vitals import vitals
from worker.features.console.access import Access, Operator
from worker.features.console.server import build
from worker.kit.web.connections import MAX_CONNECTIONS
from worker.kit.web.health import PATHS, Health
from worker.kit.web.listener import MAX_REQUESTS, build_health
from worker.telemetry.metrics import Metrics


def watched(**changes: Any) -> Health:
    health = Health(Metrics(version="1.0"))
    health.watch(vitals(**changes))
    return health


def whole(health: Health, **given: Any) -> ASGIApp:
    """Everything that `listen` serves."""
    # Health is answered from memory: there is no database behind it here.
    nothing: Any = None
    return build(
        health, nothing, Access([], {}, nothing, org_role="viewer", limits=no_limits()), nothing, **given
    )


async def get(health: Health, path: str, **headers: str) -> httpx.Response:
    return await ask(whole(health), path, **headers)


async def ask(app: ASGIApp, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8470") as client:
        return await client.get(path, headers=headers)


async def test_a_worker_that_starts_is_alive_and_not_ready():
    health = Health(Metrics(version="1.0"))

    assert (await get(health, "/livez")).status_code == 200
    answer = await get(health, "/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "failing", "lacking": ["starting"]})


async def test_a_worker_that_takes_work_is_alive_and_ready():
    health = watched()

    assert (await get(health, "/livez")).json() == {"status": "ok", "stalled": []}
    assert (await get(health, "/readyz")).json() == {"status": "ok", "lacking": []}


async def test_readiness_says_how_far_handlers_are_confined():
    health = Health(Metrics(version="1.0"), sandbox="full: Landlock 7")

    assert (await get(health, "/readyz")).json()["sandbox"] == "full: Landlock 7"
    assert "sandbox" not in (await get(health, "/livez")).json()


async def test_a_loop_that_does_not_tick_is_named():
    health = watched(stalled=lambda: ["scheduler"])

    answer = await get(health, "/livez")

    assert (answer.status_code, answer.json()) == (503, {"status": "failing", "stalled": ["scheduler"]})
    assert (await get(health, "/readyz")).json()["lacking"] == ["loop scheduler"]


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"lease_remaining": lambda: 0.0}, ["lease"]),
        ({"admitting": lambda: False}, ["admission"]),
        ({"draining": lambda: True}, ["draining"]),
    ],
)
async def test_a_worker_that_takes_no_work_is_alive_and_not_ready(
    changes: dict[str, Any], lacking: list[str]
):
    health = watched(**changes)

    assert (await get(health, "/livez")).status_code == 200
    answer = await get(health, "/readyz")
    assert (answer.status_code, answer.json()["lacking"]) == (503, lacking)


async def test_a_worker_without_a_broker_says_why_and_is_not_ready():
    fault: list[str | None] = ["SSLError: no certificate"]
    health = watched(broker_fault=lambda: fault[0])

    answer = await get(health, "/readyz")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "failing", "lacking": ["broker"], "broker": "SSLError: no certificate"},
    )
    assert (await get(health, "/livez")).status_code == 200

    fault[0] = None
    assert (await get(health, "/readyz")).json() == {"status": "ok", "lacking": []}


async def test_loops_that_a_drain_has_ended_are_not_missed():
    """Else an orchestrator would kill a worker for draining."""
    health = watched(stalled=lambda: ["scheduler"], draining=lambda: True)

    assert (await get(health, "/livez")).status_code == 200


async def test_loops_of_an_incarnation_that_lost_its_lease_are_not_missed_while_the_next_begins():
    health = watched(stalled=lambda: ["scheduler"])
    health.starting()

    assert (await get(health, "/livez")).status_code == 200
    assert (await get(health, "/readyz")).json()["lacking"] == ["starting"]


async def test_metrics_are_served_in_the_text_format():
    answer = await get(watched(), "/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "orgworker_admitting 1.0" in answer.text


async def test_metrics_that_name_orgs_need_an_operator_on_any_listener():
    """Also where nothing but health is served, and before anything says who is one."""
    health = Health(Metrics(version="1.0", top_orgs=3))
    health_alone = httpx.ASGITransport(build_health(health))

    async with httpx.AsyncClient(transport=health_alone, base_url="http://127.0.0.1:8471") as client:
        ada = {"authorization": "Bearer adas-token"}
        assert (await client.get("/metrics", headers=ada)).status_code == 401
        digest = hashlib.sha256(b"adas-token").hexdigest()
        nothing: Any = None
        health.protect(
            Access([Operator("ada", "viewer", digest)], {}, nothing, org_role="viewer", limits=no_limits())
        )
        assert (await client.get("/metrics", headers=ada)).status_code == 200
        assert (await client.get("/metrics", headers={"authorization": "Bearer guess"})).status_code == 401
        answer = await client.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token")
        assert (await client.get("/livez")).status_code == 200


async def test_every_answer_has_the_security_headers():
    for path in ("/livez", "/metrics", "/nowhere"):
        headers = (await get(watched(), path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]


# ---- a listener of its own, and many requests


async def test_health_with_a_listener_of_its_own_is_answered_there_and_nowhere_else():
    health = watched()

    for path in PATHS:
        assert (await ask(build_health(health), path)).status_code == 200
        assert (await ask(whole(health), path)).status_code == 200
        assert (await ask(whole(health, with_health=False), path)).status_code == 404
    for path in ("/", "/login", "/api/v1/runs"):
        answer = await ask(build_health(health), path, authorization="Bearer x")
        assert answer.status_code == 404
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_while_as_many_requests_as_may_be_are_served_health_is_answered_and_others_get_503():
    asked: list[Any] = []
    full, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Access):
        async def caller_of(self, connection: Any) -> Any:
            asked.append(connection)
            if len(asked) == MAX_REQUESTS:
                full.set()
            await go_on.wait()
            return None

    nothing: Any = None
    app = build(watched(), nothing, Slow([], {}, nothing, org_role="viewer", limits=no_limits()), nothing)
    served = [asyncio.create_task(ask(app, "/api/v1/runs")) for _ in range(MAX_REQUESTS)]
    await full.wait()

    refused = await ask(app, "/api/v1/runs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
    assert refused.headers["retry-after"] == "5"
    for path in PATHS:
        assert (await ask(app, path)).status_code == 200
    go_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*served)} == {401}
    assert (await ask(app, "/api/v1/runs")).status_code == 401
    # What is over lets health in.
    assert MAX_CONNECTIONS - MAX_REQUESTS >= 100
