"""The outbox on every database, by every driver: what is inserted, and what two relays make of it."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import django
import httpx
import pytest
from django.apps import apps
from django.conf import settings
from django.db.utils import ConnectionHandler
from sqlalchemy import MetaData, create_engine
from sqlalchemy import inspect as inspected

from tests.integration.client.conftest import INSERTS, KINDS, ProductDatabase
from tests.unit.client.api import TOKEN, URL, FakeApi
from worker.client import AsyncClient, ConfigurationError, InvalidRequest, Outbox

# What a driver might change on its way.
PARAMS = {"text": "ä ' \" % %s ? :org $1 \\ \u2028 \x00", "number": 2**60, "list": [1.5, None, True]}


PAIRS = [(kind, driver) for driver, (_, kinds) in INSERTS.items() for kind in kinds]


def relay(product: ProductDatabase, outbox: Outbox, api: FakeApi) -> Any:
    client = AsyncClient(URL, TOKEN, transport=httpx.MockTransport(api))
    return client.relay(outbox, once=True)


@pytest.mark.parametrize(("product", "driver"), PAIRS, indirect=["product"])
async def test_a_driver_inserts_in_the_callers_transaction(product: ProductDatabase, driver: str):
    insert, _ = INSERTS[driver]
    outbox, api = product.make(), FakeApi()
    # SQLite keeps milliseconds, too.
    at = datetime(2020, 1, 1, tzinfo=UTC)
    what = ("org_a", "export", PARAMS)
    for commit, key in ((True, "it's %s :key"), (False, "rolled-back")):
        done = insert(product, outbox, commit, what, {"key": key, "not_before": at})
        if inspect.isawaitable(done):
            await done

    await relay(product, outbox, api)

    assert {key for _, _, key in api.runs} == {"it's %s :key"}
    assert [row["params"] for row in api.runs.values()] == [PARAMS]
    row = product.execute(f"SELECT state, run_id, created_at, ended_at FROM {outbox.table}")[0]
    assert row[:2] == ("sent", "run-1")
    # By the database's own clock, whatever the session's zone.
    assert abs(row[2] / 1000 - time.time()) < 120 and row[3] >= row[2]


def test_the_ddl_and_sqlalchemys_table_are_the_same(product: ProductDatabase):
    by_ddl, by_table = product.outbox(table="by_ddl"), product.outbox(table="by_table")
    product.make(by_ddl)
    engine = create_engine(product.url)
    metadata = MetaData()
    by_table.sqlalchemy_table(metadata)
    metadata.create_all(engine)

    found = inspected(engine)
    shown = []
    for name in ("by_ddl", "by_table"):
        columns = [
            (one["name"], str(one["type"]).replace("BIGINT(20)", "BIGINT"), one["nullable"])
            for one in found.get_columns(name)
        ]
        indexes = sorted(
            (one["name"].removeprefix(name), one["column_names"], one["unique"])
            for one in found.get_indexes(name)
        )
        shown.append((columns, indexes, found.get_pk_constraint(name)["constrained_columns"]))
    engine.dispose()

    assert shown[0] == shown[1]


async def test_two_relays_send_each_row_once_and_in_order(product: ProductDatabase):
    outbox, api = product.make(), FakeApi()
    connection = product.connect()
    for number in range(60):
        outbox.start(connection, f"org_{number % 5}", "export", {"n": number}, key=f"k{number}")
    connection.commit()
    connection.close()

    counts = await asyncio.gather(*(relay(product, outbox, api) for _ in range(3)))
    while product.execute(f"SELECT id FROM {outbox.table} WHERE state <> 'sent'"):
        await relay(product, outbox, api)

    assert len(api.runs) == 60
    assert sum(one.sent for one in counts) == len(api.requests) == 60
    for org in range(5):
        keys = [int(key[1:]) for of, _, key in api.runs if of == f"org_{org}"]
        assert keys == sorted(keys)


@pytest.mark.parametrize("product", [kind for kind in KINDS if kind != "sqlite"], indirect=True)
async def test_an_open_transaction_of_the_product_holds_up_no_other(product: ProductDatabase):
    """It has inserted first, and commits last. On SQLite a writer holds up every other one."""
    outbox, api = product.make(), FakeApi()
    slow, fast = product.connect(), product.connect()
    outbox.start(slow, "org_a", "export", key="slow")
    outbox.start(fast, "org_a", "export", key="fast")
    fast.commit()

    began = time.monotonic()
    await relay(product, outbox, api)
    taken = time.monotonic() - began
    assert [key for _, _, key in api.runs] == ["fast"]
    assert taken < 10
    slow.commit()
    await relay(product, outbox, api)

    assert [key for _, _, key in api.runs] == ["fast", "slow"]
    slow.close()
    fast.close()


async def test_a_relay_holds_up_no_insert_while_it_sends(product: ProductDatabase):
    """No transaction is open meanwhile: the product inserts, also into the same definition."""
    outbox, api = product.make(), FakeApi()
    connection = product.connect()
    outbox.start(connection, "org_a", "export", key="first")
    connection.commit()
    taken: list[float] = []

    def insert(what: Any) -> None:
        if len(api.runs) == 1:
            began = time.monotonic()
            outbox.start(connection, "org_a", "export", key="second")
            connection.commit()
            taken.append(time.monotonic() - began)

    api.after = insert
    await relay(product, outbox, api)
    connection.close()

    assert [key for _, _, key in api.runs] == ["first", "second"]
    assert taken[0] < 5


async def test_threads_share_an_outbox(product: ProductDatabase):
    outbox, api = product.make(), FakeApi()

    def insert(number: int) -> None:
        connection = product.connect()
        for each in range(10):
            outbox.start(connection, "org_a", "export", key=f"{number}-{each}")
            connection.commit()
        connection.close()

    threads = [threading.Thread(target=insert, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await relay(product, outbox, api)

    assert len(api.runs) == 80


async def test_rows_are_shown_and_wait_again(product: ProductDatabase):
    outbox = product.make()
    connection = product.connect()
    outbox.start(connection, "org_a", "export", key="k")
    connection.commit()
    await relay(product, outbox, refusing := FakeApi())
    assert refusing.runs
    product.execute(f"UPDATE {outbox.table} SET state = 'refused', error = 'why'")

    [row] = outbox.show(connection)
    assert (row["key"], row["state"], row["error"]) == ("k", "refused", "why")
    again = outbox.again(connection, row["id"])
    connection.commit()
    found = outbox.find(connection, "org_a", "export", "k")

    assert again is not None and again["id"] == row["id"]
    assert found is not None and found["state"] == "waiting"
    assert outbox.again(connection, row["id"]) is None
    assert outbox.find(connection, "org_b", "export", "k") is None
    connection.close()


def test_djangos_connection_inserts_in_atomic(tmp_path: Path):
    """Django takes %s for every database; the product's own rows and the start live and die together."""
    if not settings.configured:
        settings.configure()
    if not apps.ready:
        django.setup()
    path = tmp_path / "product.db"
    handler = ConnectionHandler({"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path)}})
    connection = handler["default"]
    outbox = Outbox("sqlite")
    with connection.cursor() as cursor:
        for statement in outbox.ddl:
            cursor.execute(statement)
    # As django.db.transaction.atomic does for the process's own connections.
    connection.set_autocommit(False)
    outbox.start(connection, "org_a", "export", {"a": "100 %"}, key="kept")
    connection.commit()
    outbox.start(connection, "org_a", "export", key="gone")
    connection.rollback()
    connection.set_autocommit(True)

    assert [row["key"] for row in outbox.show(connection, "waiting")] == ["kept"]
    connection.close()


def test_what_is_wrong_is_said_before_anything_is_inserted(product: ProductDatabase):
    outbox = product.make()
    connection = product.connect()
    for what, more in (
        (("org_a", ".."), {}),
        (("", "export"), {}),
        (("org_a", "export", {"x": object()}), {}),
        (("org_a", "export", {"x": "y" * 70_000}), {}),
        (("org_a", "export"), {"key": "a\nb"}),
        (("org_a", "export"), {"not_before": datetime(2030, 1, 1)}),
    ):
        with pytest.raises(InvalidRequest):
            outbox.start(connection, *what, **more)  # type: ignore[arg-type]
    # The transaction goes on.
    outbox.start(connection, "org_a", "export", key="k")
    connection.commit()
    connection.close()

    assert len(product.execute(f"SELECT id FROM {outbox.table}")) == 1


@pytest.mark.parametrize(
    ("dialect", "table"), [("oracle", "x"), ("sqlite", "x; DROP TABLE y"), ("sqlite", 'x"'), ("mysql", "")]
)
def test_a_dialect_or_a_table_that_is_none(dialect: Any, table: str):
    with pytest.raises(ConfigurationError):
        Outbox(dialect, table=table)
