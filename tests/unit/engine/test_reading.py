"""The worker offers each handler as its child reports it, and says what it cannot check itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from worker.engine.attempt.plan import HandlerRegistry
from worker.engine.loops import reading as module
from worker.engine.loops.reading import MAX_REPORTED, CatalogueReader
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.installed import Distribution
from worker.telemetry.events import Emitted


class Sink:
    """Keeps nothing."""

    async def put(self, entries: Any) -> None: ...

    async def offer(self, names: Any) -> None: ...

    async def complete(self, known: Any) -> None: ...


async def offered(schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> HandlerRegistry:
    """What is offered once a worker has read one handler whose params have this schema."""
    entry = HandlerEntry("acme.x", "acme-jobs", "1.0", "acme:x", params_schema=schema)

    async def read(**_: Any) -> Any:
        yield [entry]

    monkeypatch.setattr(module, "read_catalogue", read)
    monkeypatch.setattr(module, "distributions", lambda: [Distribution("acme-jobs", "1.0", ())])
    offers, taken = HandlerRegistry(), asyncio.Event()
    cataloguing = CatalogueReader(
        Sink(),
        offers,
        on_offered=taken.set,
        pass_environment=(),
        command=(),
    )
    reading = asyncio.create_task(cataloguing.run())
    await taken.wait()
    reading.cancel()
    return offers


async def test_rules_that_only_the_run_checks_are_said_once(
    monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    schema = {"properties": {"a": {"pattern": "^(?!b)"}, "c": {"pattern": "^c"}}}

    offers = await offered(schema, monkeypatch)

    assert offers.get("acme.x") is not None
    [said] = [each.fields for each in emitted if each.event.name == "handler.unchecked"]
    assert (said["handler"], said["distribution"], said["place"]) == (
        "acme.x",
        "acme-jobs",
        "/properties/a/pattern",
    )
    assert said["reason"].startswith("'^(?!b)': look-around")


async def test_a_plug_in_cannot_flood_the_log(
    monkeypatch: pytest.MonkeyPatch, emitted: list[Emitted]
) -> None:
    await offered({"allOf": [{"pattern": "("}] * 1_000}, monkeypatch)

    assert len([each for each in emitted if each.event.name == "handler.unchecked"]) == MAX_REPORTED
