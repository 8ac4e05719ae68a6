"""The examples of docs/reference/client.md and of its README, as an installed `orgworker_client`."""

from __future__ import annotations

import asyncio
import importlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.pages import ROOT, blocks
from tests.unit.client.api import FakeApi, problem

CLIENT = ROOT / "worker" / "client"
PAGE = ROOT / "docs" / "reference" / "client.md"
FILES = {block.file: block.text for block in blocks(PAGE.read_text()) if block.language == "python"}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files and a shop's database, and orgworker_client on the path."""
    (tmp_path / "orgworker_client").symlink_to(CLIENT)
    token = tmp_path / "token"
    token.write_text("orgworker_op_canary-4711")
    for name, text in FILES.items():
        (tmp_path / str(name)).write_text(text.replace("/run/secrets/orgworker_token", str(token)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with sqlite3.connect("shop.db") as connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, state TEXT)")
        connection.execute("INSERT INTO orders VALUES (7, 'new')")
    connection.close()
    yield tmp_path
    for name in list(sys.modules):
        if name.partition(".")[0] == "orgworker_client" or f"{name}.py" in FILES:
            del sys.modules[name]


def load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def test_an_order_and_its_export_are_committed_together(shop: Path):
    outbox, pay = load("paying:outbox"), load("paying:pay")
    connection = load("paying").connect()
    for statement in outbox.ddl:
        connection.execute(statement)

    pay("org_a", 7)
    with pytest.raises(load("orgworker_client").InvalidRequest):
        pay("..", 8)

    assert [row["key"] for row in outbox.show(connection, "waiting")] == ["order-7"]
    assert connection.execute("SELECT state FROM orders").fetchall() == [("paid",)]
    connection.close()


async def test_the_relay_of_the_page_starts_it_until_it_is_stopped(
    shop: Path, monkeypatch: pytest.MonkeyPatch
):
    outbox, api, stop = load("paying:outbox"), FakeApi(), asyncio.Event()
    connection = load("paying").connect()
    for statement in outbox.ddl:
        connection.execute(statement)
    load("paying:pay")("org_a", 7)
    transport = httpx.MockTransport(api)
    made = load("orgworker_client").AsyncClient
    monkeypatch.setattr(load("relaying"), "AsyncClient", lambda *what: made(*what, transport=transport))
    api.after = lambda what: stop.set()

    await load("relaying:relay")(stop)

    assert list(api.runs) == [("org_a", "export", "order-7")]
    assert outbox.find(connection, "org_a", "export", "order-7")["state"] == "sent"
    connection.close()


def test_an_export_is_started_and_waited_for(shop: Path):
    starting = load("starting")
    answers = [
        httpx.Response(201, json={"id": "r", "org": "org_a", "definition": "export", "state": "waiting"}),
        httpx.Response(204),
        httpx.Response(200, json={"id": "r", "org": "org_a", "definition": "export", "state": "succeeded"}),
        problem(409, "conflict"),
        problem(404, "not_found"),
    ]
    starting.client._transport = httpx.MockTransport(lambda request: answers.pop(0))

    assert starting.export("org_a", 7) == "succeeded"
    assert starting.export("org_a", 8) == "not now: the detail of conflict"
    assert starting.export("org_a", 9) == "not_found: the detail of not_found (the fix)"


def test_the_readmes_examples_use_what_there_is():
    """They need a server and a database, so here their names are looked up."""
    package = importlib.import_module("worker.client")
    for block in blocks((CLIENT / "README.md").read_text()):
        compile(block.text, "README.md", "exec")
        for line in block.text.splitlines():
            if line.startswith("from orgworker_client import "):
                assert all(hasattr(package, name) for name in line.partition("import ")[2].split(", "))
