"""The health of `serve` and `provision` is what the last look at the database found."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tests.fakes.clock import settle
from tests.fakes.manager import Manager
from worker.errors import ConfigurationError, RolesMissing, StoreUnavailable
from worker.features.provisioning.process import ProvisionHealth
from worker.kit.web import database_health as module
from worker.kit.web.database_health import CHECK_EVERY, DatabaseHealth
from worker.telemetry.metrics import Metrics


class Schema:
    """What each check raises, in order; after the last one nothing more is found, and `looked` is set."""

    def __init__(self, *raised: Exception | None) -> None:
        self._raised = list(raised)
        self.looked = asyncio.Event()

    async def check(self) -> None:
        if not self._raised:
            self.looked.set()
            await asyncio.Event().wait()
        if (found := self._raised.pop(0)) is not None:
            raise found


@pytest.mark.parametrize(
    ("raised", "lacking"),
    [
        (StoreUnavailable("away"), ["database"]),
        (RolesMissing("no role"), ["roles"]),
        (ConfigurationError("old"), ["schema"]),
        (None, []),
    ],
)
async def test_it_lacks_what_the_check_found_and_drains_at_the_end(
    raised: Exception | None, lacking: list[str]
) -> None:
    health, stop, manager = (
        DatabaseHealth(Metrics(version="1"), Schema(raised).check),
        asyncio.Event(),
        Manager(),
    )
    assert health.lacking() == ["starting"]
    watching = asyncio.create_task(health.look_until(stop, manager, last=1.0))
    await settle()
    assert health.lacking() == lacking
    assert not health.draining()

    stop.set()
    await watching

    assert health.lacking() == ["draining"] and health.draining()
    assert manager.told == ["alive", f"stopping: {CHECK_EVERY + 1:g}"]


async def test_provision_is_ready_once_and_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY", 0.01)
    schema = Schema(ConfigurationError("old"), None, StoreUnavailable("away"), None)
    health, stop, manager = ProvisionHealth(Metrics(version="1"), schema.check), asyncio.Event(), Manager()
    health.follow({"main": SimpleNamespace(doing="idle")})
    watching = asyncio.create_task(health.look_until(stop, manager))
    await schema.looked.wait()
    stop.set()
    await watching

    idle = "main: idle"
    said = [text for text in manager.told if text != "alive"]
    assert said[:5] == [f"no schema; {idle}", f"ready: {idle}", idle, f"no database; {idle}", idle]
    assert health.details() == {"issuers": {"main": "idle"}}
