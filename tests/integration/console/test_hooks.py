"""Webhooks over HTTP: a genuine one makes an org, and nothing else changes anything."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from sqlalchemy import select

from tests.fakes.clock import ManualClock
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from tests.fakes.kinde.webhooks import payload, signed
from worker.clock import SystemClock
from worker.demo.keys import KeyRotation
from worker.errors import Busy, IssuerUnavailable
from worker.features.provisioning.hooks import BURST, MAX_BODY, HookReceiver, Hooks, build_hooks
from worker.features.provisioning.management.contract import Notice
from worker.features.provisioning.provision_loop import MAX_QUEUED, ProvisionLoop
from worker.features.provisioning.scopes import Scopes
from worker.features.provisioning.wiring import fleet_of, open_provisioner, rules_of
from worker.kit.web.clients import Addresses
from worker.kit.web.health import Health
from worker.operations.installation import Ownership
from worker.store import tables
from worker.store.database import Database
from worker.telemetry import events
from worker.telemetry.metrics import Metrics
from worker.tokens.sealing import KeyRing

AUDIENCE = "https://api.acme.com"


@pytest.fixture(scope="module")
def kinde() -> Iterator[Kinde]:
    with serve_kinde() as served:
        served.api.add_api("Acme's API", AUDIENCE, ("read:kb",))
        yield served
        assert served.undocumented() == []


@pytest.fixture
async def loop(kinde: Kinde, migrated_sqlite_url: str, tmp_path: Path) -> AsyncIterator[ProvisionLoop]:
    """A loop that follows webhooks only: its rounds are not running."""
    (tmp_path / "management__main").write_text(kinde.secret)
    KeyRing.generate(tmp_path / "keyring")
    settings = kinde.settings(tmp_path, audience=AUDIENCE)
    clock = SystemClock()
    database = Database.open(migrated_sqlite_url, clock=clock)
    ownership = Ownership(database, "")
    async with open_provisioner(settings, ownership, "main", clock, actor="provision") as provisioner:
        rules = rules_of(settings, "main", absent="keep")
        made = ProvisionLoop(
            provisioner,
            rules,
            ["main"],
            timedelta(hours=1),
            Scopes(provisioner, False),
            partial(fleet_of, settings, provisioner),
        )
        following = asyncio.create_task(made._notices())
        yield made
        following.cancel()
    database.close()


@asynccontextmanager
async def served(receiver: HookReceiver, *, clock: Any = None) -> AsyncIterator[httpx.AsyncClient]:
    hooks = Hooks({"main": receiver}, clock or SystemClock(), Addresses())
    app = build_hooks(Health(Metrics(version="1.0")), hooks)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://provision.test") as client:
        yield client


def content(org: str = "org_new", **changes: Any) -> dict[str, Any]:
    at = changes.pop("at", datetime.now(UTC))
    return payload("organization.created", org, at=at, **changes)


def everything(database: Database) -> dict[str, list[Any]]:
    with database.autocommit() as connection:
        return {
            name: connection.execute(select(table)).all() for name, table in tables.metadata.tables.items()
        }


def part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def hostile(kinde: Kinde) -> dict[str, tuple[str | bytes, int]]:
    """What an attacker sends, and the status that comes back."""
    keys = kinde.provider.keys
    genuine = signed(keys, content())
    head, body, signature = genuine.split(".")
    other = part(content("org_1") | {"event_id": "event_other"})
    now = int(datetime.now(UTC).timestamp())
    kid = jwt.get_unverified_header(genuine)["kid"]
    token = {"iss": kinde.url, "aud": [AUDIENCE], "exp": now + 600, "iat": now, "org_code": "org_new"}
    return {
        "forged": (signed(keys, content(), forged=True), 401),
        "of another issuer": (signed(KeyRotation(), content()), 401),
        "old": (signed(keys, content(at=datetime.now(UTC) - timedelta(hours=37, minutes=5))), 401),
        "from the future": (signed(keys, content(at=datetime.now(UTC) + timedelta(minutes=6))), 401),
        "without a time": (signed(keys, content(timestamp=None)), 401),
        "an access token": (signed(keys, token), 401),
        "a token with the members of a webhook": (signed(keys, content() | token), 401),
        "typed as a token": (signed(keys, content(), typ="at+jwt"), 401),
        "another body": (f"{head}.{other}.{signature}", 401),
        "unsigned": (f"{part({'alg': 'none', 'typ': 'JWT', 'kid': kid})}.{body}.", 401),
        "symmetric": (jwt.encode(content(), "k" * 32, algorithm="HS256", headers={"kid": kid}), 401),
        "without an event": (signed(keys, content(event_id=None)), 400),
        "of no org": (signed(keys, content(data={})), 401),
        "JSON": (json.dumps(content()), 400),
        "empty": ("", 400),
        "not text": (b"\xff\xfe.a.b", 400),
        "too large": (b"a" * (MAX_BODY + 1), 413),
    }


async def test_only_a_genuine_webhook_changes_something(kinde: Kinde, loop: ProvisionLoop) -> None:
    kinde.api.add_org("org_new", "New")
    database = loop.provisioner.database
    before, requests = everything(database), kinde.carried_out()
    receiver = HookReceiver(loop.provisioner.management, loop.notify)
    async with served(receiver) as client:
        bodies = set()
        for name, (message, status) in hostile(kinde).items():
            answer = await client.post("/hooks/main", content=message)
            assert (name, answer.status_code) == (name, status)
            assert answer.headers["content-type"] == "application/problem+json"
            bodies.add((status, answer.text))
        # A sender does not learn which check failed.
        assert len({text for status, text in bodies if status == 401}) == 1
        genuine = signed(kinde.provider.keys, content())
        assert (await client.post("/hooks/other", content=genuine)).status_code == 404
        assert (await client.get("/hooks/main")).status_code == 405
        of_people = signed(kinde.provider.keys, content() | {"type": "user.created"})
        assert (await client.post("/hooks/main", content=of_people)).status_code == 204
        await asyncio.sleep(0.05)
        assert not loop._queue and everything(database) == before
        assert kinde.carried_out() == requests

        # The control: the same path, the same content, signed by the issuer.
        assert (await client.post("/hooks/main", content=genuine)).status_code == 204
        await until(lambda: any(row.state == "active" for row in everything(database)["applications"]))
        after = everything(database)
        assert len(kinde.applications_of("org_new")) == 1

        # A replay is taken, and changes nothing.
        for _ in range(3):
            assert (await client.post("/hooks/main", content=genuine)).status_code == 204
        made = kinde.carried_out()
        await until(lambda: kinde.carried_out() > made and not loop._queue and loop.doing == "idle")
        assert everything(database) == after
    kinde.provider.applications = {MANAGER: kinde.provider.applications[MANAGER]}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - it looks at rows as well
            await asyncio.sleep(0.02)


class Management:
    """Stands for one whose webhooks all are about some org, or that cannot tell."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def webhook(self, body: bytes) -> Notice:
        if self.error is not None:
            raise self.error
        return Notice("org_created", body.decode(), datetime.now(UTC))


async def test_what_cannot_be_taken_now_is_to_be_sent_again() -> None:
    management, seen = Management(), []
    end = events.listen(lambda emitted: seen.append(emitted.fields))

    def full(notice: Notice) -> None:
        raise Busy("the queue of org_a is full", fix="wait")

    async with served(HookReceiver(management, full)) as client:  # type: ignore[arg-type]
        busy = await client.post("/hooks/main", content="org_a")
        management.error = IssuerUnavailable("no keys at http://10.0.0.7")
        unknown = await client.post("/hooks/main", content="org_a")
    end()

    for answer in (busy, unknown):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert "org_a" not in answer.text and "10.0.0.7" not in answer.text
    assert [(each["status"], each["reason"]) for each in seen] == [(503, "busy"), (503, "issuer_unavailable")]


async def test_an_address_may_send_so_many_and_a_body_is_read_only_so_far() -> None:
    clock, taken = ManualClock(), []

    async def endless() -> AsyncIterator[bytes]:
        sent = 0
        while True:
            sent += 8192
            assert sent <= MAX_BODY + 2 * 8192, "the body is read to its end"
            yield b"a" * 8192

    async with served(HookReceiver(Management(), taken.append), clock=clock) as client:  # type: ignore[arg-type]
        assert (await client.post("/hooks/main", content=endless())).status_code == 413
        statuses = [(await client.post("/hooks/main", content="org")).status_code for _ in range(BURST)]
        assert statuses == [204] * (BURST - 1) + [429]
        clock.advance(1)
        assert (await client.post("/hooks/main", content="org")).status_code == 204
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/metrics")).status_code == 404


async def test_the_queue_is_bounded_and_holds_each_org_once(loop: ProvisionLoop) -> None:
    def notice(org: str) -> Notice:
        return Notice("org_updated", org, datetime.now(UTC))

    for number in range(MAX_QUEUED):
        loop.notify(notice(f"org_{number}"))
        loop.notify(notice(f"org_{number}"))
    with pytest.raises(Busy):
        loop.notify(notice("one_more"))
    loop.notify(notice("org_7"))
    assert len(loop._queue) == MAX_QUEUED
    loop._queue.clear()
