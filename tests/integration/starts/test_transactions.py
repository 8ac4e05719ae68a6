"""A product's transactions with random rollbacks, by each client, while workers make runs: one a commit."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import NullPool, create_engine, text

from tests.fakes.clock import ManualClock
from tests.fakes.product import Product, start
from tests.fakes.site import definition
from tests.fakes.stock import await_lock
from worker.ids import OrgId
from worker.model.runs.fire import decide
from worker.model.runs.run import Decision, Declared, DueDefinition
from worker.operations import starts as operations
from worker.operations.starts import make_runs
from worker.store import firing, starts
from worker.store.database import Database
from worker.store.sql import statements
from worker.store.sql.contract import Rollups

TRANSACTIONS = 60
WORKERS = 2
SHOP = "CREATE TABLE shop_orders (id serial PRIMARY KEY, name text, run uuid)"
PLACE = "INSERT INTO shop_orders (name, run) VALUES ({}, orgworker_start('org_acme', {}, {}, {}))"


class RolledBack(Exception):
    """A transaction of the product that it rolls back."""


@pytest.fixture
def shop(product: Product, define) -> Product:
    """With a table of the product in the same database, and three definitions."""
    for name in ("one", "two"):
        define(definition("org_acme", name, "acme.plain", "@yearly", overlap="allow"))
    product.change(f"{SHOP}; GRANT ALL ON shop_orders, shop_orders_id_seq TO {product.login}")
    return product


@contextmanager
def workers(product: Product, count: int = WORKERS) -> Iterator[list[Exception]]:
    """Make runs in threads, as that many workers do, until the block ends and nothing is left."""
    ended, failed = threading.Event(), list[Exception]()

    def make() -> None:
        database = Database.open(product.url, clock=ManualClock())
        try:
            after = None
            while True:
                last = ended.is_set()
                made = make_runs(database, after)
                after = made.passed
                if last and not made.made and after is None:
                    return
        except Exception as error:
            failed.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=make) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


def orders(seed: int) -> Iterator[tuple[str, str, bool]]:
    """Definition, key and whether it is committed, some keys more than once."""
    drawn = random.Random(seed)
    for number in range(TRANSACTIONS):
        name = drawn.choice(("digest", "one", "two"))
        yield name, f"{seed} {number // 2 if drawn.random() < 0.3 else number}", drawn.random() < 0.6


def with_psycopg(shop: Product, seed: int) -> None:
    place = PLACE.format("%s", "%s", "%s", "%s")
    with psycopg.connect(shop.url_of()) as connection:
        for name, key, commits in orders(seed):
            connection.execute(place, (key, name, Jsonb({"key": key}), key))
            connection.commit() if commits else connection.rollback()


def with_asyncpg(shop: Product, seed: int) -> None:
    async def place() -> None:
        connection = await asyncpg.connect(shop.url_of())
        try:
            for name, key, commits in orders(seed):
                transaction = connection.transaction()
                await transaction.start()
                given = (key, name, json.dumps({"key": key}), key)
                await connection.execute(PLACE.format("$1", "$2", "$3::jsonb", "$4"), *given)
                await (transaction.commit() if commits else transaction.rollback())
        finally:
            await connection.close()

    asyncio.run(place())


def with_sqlalchemy(shop: Product, seed: int) -> None:
    engine = create_engine(shop.url_of().replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    place = text(PLACE.format(":key", ":name", "CAST(:params AS jsonb)", ":key"))
    for name, key, commits in orders(seed):
        with engine.connect() as connection, connection.begin() as transaction:
            connection.execute(place, {"key": key, "name": name, "params": json.dumps({"key": key})})
            if not commits:
                transaction.rollback()
    engine.dispose()


CLIENTS = {"psycopg": with_psycopg, "asyncpg": with_asyncpg, "sqlalchemy": with_sqlalchemy}


@pytest.mark.parametrize("client", CLIENTS)
def test_runs_are_commits_and_one_a_key(shop: Product, client: str) -> None:
    with workers(shop) as failed:
        threads = [threading.Thread(target=CLIENTS[client], args=(shop, seed)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
    assert not failed

    committed = {(name, key) for seed in (1, 2) for name, key, commits in orders(seed) if commits}
    placed = {str(row["run"]) for row in shop.query("SELECT run FROM shop_orders")}
    made = shop.query(
        "SELECT r.id, d.name, s.key, r.params->>'key' AS given FROM runs r "
        "JOIN definitions d ON d.id = r.definition_id JOIN starts s ON s.id = r.id AND s.state = 'made'"
    )
    assert {str(run["id"]) for run in made} == placed
    assert {(run["name"], run["key"]) for run in made} == committed
    assert len(made) == len(committed)
    assert all(run["given"] == run["key"] for run in made)
    assert shop.query("SELECT count(*) AS n FROM runs") == [{"n": len(committed)}]


def test_two_workers_keep_the_order_of_a_definition(shop: Product) -> None:
    ids: dict[str, list[str]] = {"one": [], "two": []}
    with workers(shop) as failed, shop.transaction() as connection:
        for number in range(300):
            name = ("one", "two")[number % 2]
            ids[name].append(start(connection, str(number), name))
            if number % 7 == 0:
                connection.commit()
    assert not failed

    for name, started in ids.items():
        order = shop.query(
            "SELECT l.id FROM live_runs l JOIN definitions d ON d.id = l.definition_id "
            "WHERE d.name = %s ORDER BY l.available_at, l.id",
            name,
        )
        assert [str(row["id"]) for row in order] == started


def test_a_worker_that_gets_the_lock_after_another_one_has_the_later_time(
    shop: Product, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shop.transaction() as connection:
        started = [start(connection, str(number), "one") for number in range(2)]
    monkeypatch.setattr(operations, "RUNS", 1)
    lock = starts.lock
    other = Database.open(shop.url, clock=ManualClock())

    def after_another(*args: Any) -> Any:
        monkeypatch.setattr(starts, "lock", lock)
        assert make_runs(other).made == 1
        return lock(*args)

    monkeypatch.setattr(starts, "lock", after_another)
    assert make_runs(database).made == 1
    other.close()

    order = shop.query("SELECT id FROM live_runs ORDER BY available_at, id")
    assert [str(row["id"]) for row in order] == started


def test_a_start_is_refused_while_a_run_of_its_definition_fails(shop: Product, define) -> None:
    """Ends lock the sums of their org, then what failed last of their definitions."""
    define(definition("org_acme", "noted", "acme.note", "@yearly", overlap="allow", params={"text": "a"}))
    failed = shop.start("1", "noted")
    assert shop.make() == 1
    shop.start("2", "noted", params={"text": 1})
    [run] = shop.query("SELECT org_id::text, now()::date AS day FROM runs")
    end = text("UPDATE runs SET state = 'failed', finished_at = now(), attempt = 1 WHERE id = :id")

    with ThreadPoolExecutor(1) as pool:
        with shop.database.transaction() as batch:
            sums = Rollups([(run["day"], run["org_id"], 1, 1, 0)], [])
            statements(batch).add_rollups(batch, sums)
            made = pool.submit(shop.make)
            await_lock(shop.database)
            batch.execute(end, {"id": failed})
        assert made.result() == 1

    assert [row["state"] for row in shop.query("SELECT state FROM runs ORDER BY id")] == ["failed", "refused"]


def test_starts_of_one_org_are_refused_while_those_of_another_replace_runs(shop: Product, define) -> None:
    """Ends lock the sums of all orgs in the order of ids."""
    define(definition("org_acme", "noted", "acme.note", "@yearly", overlap="allow", params={"text": "a"}))
    define(definition("org_globex", "newest", "acme.plain", "@yearly", overlap="replace"))
    acme, globex = (shop.id_of_org(code) for code in ("org_acme", "org_globex"))
    assert acme < globex
    login = shop.new_login("org_acme", "org_globex")
    shop.start("1", "newest", org="org_globex", login=login)
    assert shop.make() == 1
    shop.start("2", "newest", org="org_globex", login=login)
    shop.start("3", "noted", params={"text": 1}, login=login)
    [row] = shop.query("SELECT now()::date AS day")

    with ThreadPoolExecutor(1) as pool:
        with shop.database.transaction() as batch:
            add = statements(batch).add_rollups
            add(batch, Rollups([(row["day"], OrgId(acme), 1, 1, 0)], []))
            made = pool.submit(shop.make)
            await_lock(shop.database)
            add(batch, Rollups([(row["day"], OrgId(globex), 1, 1, 0)], []))
        assert made.result() == 2

    states = shop.query("SELECT state FROM runs ORDER BY id")
    assert [row["state"] for row in states] == ["cancelled", None, "refused"]
    ends = shop.query("SELECT org_id::text, state, runs FROM rollup_hours ORDER BY org_id")
    assert [tuple(row.values()) for row in ends] == [(acme, "refused", 1), (globex, "cancelled", 1)]


def test_batches_with_the_same_keys_in_any_order_end(shop: Product) -> None:
    """One waits for the other, and neither for a deadlock."""
    entries = [{"org": "org_acme", "definition": "digest", "key": str(number)} for number in range(200)]
    found: list[dict[str, str]] = []

    def batch(seed: int) -> None:
        mine = random.Random(seed).sample(entries, len(entries))
        with shop.transaction() as connection:
            row = connection.execute("SELECT orgworker_start_many(%s)", (Jsonb(mine),)).fetchone()
        found.append({entry["key"]: str(id_) for entry, id_ in zip(mine, row[0], strict=True)})

    threads = [threading.Thread(target=batch, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(found) == 4
    assert all(ids == found[0] for ids in found)
    assert shop.make() == 200


def test_a_transaction_left_open_delays_nothing(shop: Product, define) -> None:
    """It holds a start of each definition: others are started, fired and edited meanwhile."""
    define(definition("org_acme", "serial", "acme.plain", "* * * * *", overlap="skip"))
    database = shop.database
    with shop.transaction() as open_one:
        for name in ("digest", "one", "serial"):
            start(open_one, "open", name)
        with shop.transaction() as impatient:
            # Everything that waits for a lock longer than this fails.
            impatient.execute("SET lock_timeout = '1s'")
            began = time.monotonic()
            for number in range(20):
                shop.start(f"other {number}", "digest")
            assert shop.make() == 20
            make_due(database)
            with database.transaction() as connection:
                report = firing.fire(connection, decided, limit=100, specs={})
            assert [run.scheduled_for for run in report.inserted]
            define(definition("org_acme", "serial", "acme.plain", "* * * * *", overlap="replace"))
            with database.transaction() as connection:
                connection.execute(text("SET LOCAL lock_timeout = '1s'"))
                connection.execute(text("LOCK TABLE live_runs, runs IN SHARE ROW EXCLUSIVE MODE"))
            assert time.monotonic() - began < 20
        held = shop.query(
            "SELECT DISTINCT relation::regclass::text AS name, mode FROM pg_locks l "
            "JOIN pg_class c ON c.oid = l.relation WHERE l.pid = %s AND c.relkind = 'r' AND relnamespace = "
            "'public'::regnamespace ORDER BY 1",
            open_one.info.backend_pid,
        )
        assert [tuple(row.values()) for row in held] == [
            ("definitions", "AccessShareLock"),
            ("orgs", "AccessShareLock"),
            ("product_logins", "AccessShareLock"),
            ("starts", "RowExclusiveLock"),
        ]
    assert shop.make() == 3


def decided(due: DueDefinition, now: datetime) -> Decision:
    return decide(due, now, lambda handler: Declared())


def make_due(database: Database) -> None:
    with database.transaction() as connection:
        at: datetime = database.now(connection) - timedelta(minutes=2)
        at = at.replace(second=0, microsecond=0)
        due = text(
            "UPDATE schedule SET next_scheduled_for = :at, next_fire_at = :at WHERE definition_id IN "
            "(SELECT id FROM definitions WHERE name = 'serial')"
        )
        connection.execute(due, {"at": at})


def test_a_worker_that_dies_in_the_middle_makes_nothing(shop: Product) -> None:
    """The runs and the mark of their starts are one transaction."""
    ids = {shop.start(str(number)) for number in range(10)}

    with pytest.raises(RolledBack), workers(shop, 0):
        from worker.operations import starts as operations

        with shop.database.transaction() as connection:
            found = shop.query("SELECT DISTINCT definition_id::text AS id FROM starts")
            made = operations._make(connection, [row["id"] for row in found])
            assert made.made == 10
            raise RolledBack

    assert shop.query("SELECT id FROM runs") == []
    assert shop.make() == 10
    assert {str(run["id"]) for run in shop.query("SELECT id FROM runs")} == ids
