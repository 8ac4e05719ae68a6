"""What hosts had declared before version 0026 is theirs after it, and what workers had stays the workers'."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alembic import command
from sqlalchemy import Connection, Table, insert, select, update

from tests.migrations.test_schema import alembic, connected
from worker.clock import SystemClock
from worker.handlers.catalogue import HandlerEntry
from worker.ids import new_id
from worker.store import catalogue, host_grants, places, schema, tables
from worker.store.database import Database

AT = datetime(2020, 1, 1, tzinfo=UTC)


def add(connection: Connection, table: Table, **values: Any) -> str:
    id_ = new_id()
    connection.execute(insert(table).values(id=id_, **values))
    return id_


def host(connection: Connection, name: str, pool: str, *handlers: str, **more: Any) -> None:
    given = {"name": name, "pool": pool, "token_sha256": name, "created_at": AT, "created_by": "x"}
    id_ = add(connection, tables.hosts, **given, **more)
    worker(connection, *handlers, host_id=id_)


def worker(connection: Connection, *handlers: str, **more: Any) -> None:
    times = dict.fromkeys(("started_at", "renewed_at", "lease_until", "ended_at"), AT)
    given = {"host": "h", "pid": 1, "version": "0", "handlers": list(handlers), "capacity": {}, "pools": []}
    add(connection, tables.workers, **given, **times, **more)


def handler(connection: Connection, name: str, distribution: str = "d", **more: Any) -> None:
    given = {"version": "1", "entry_point": "m:f", "scopes": ["read"], "seen_at": AT}
    connection.execute(insert(tables.catalogue).values(name=name, distribution=distribution, **given, **more))


def test_what_hosts_declared_is_copied_under_their_pools(database_url: str) -> None:
    alembic(database_url, command.upgrade, "0025")
    with connected(database_url) as connection:
        worker(connection, "acme.note")
        host(connection, "one", "eu", "acme.note", "gpu.render")
        host(connection, "two", "us", "gpu.render", "gpu.gone")
        host(connection, "idle", "us")
        host(connection, "removed", "eu", "gpu.removed", removed_at=AT)
        handler(connection, "acme.note")
        handler(connection, "acme.note", "aaa", pool="eu")
        handler(connection, "gpu.render", pool="eu", secrets=["openai"], params_schema={"type": "object"})
        handler(connection, "gpu.removed")
        handler(connection, "old.note")
        before = connection.execute(select(tables.catalogue.c.name)).all()

    schema.upgrade(database_url)

    with connected(database_url) as connection:
        rows = host_rows(connection)
        assert connection.execute(select(tables.catalogue.c.name)).all() == before
    assert {(row["pool"], row["name"]) for row in rows} == {("eu", "gpu.render"), ("us", "gpu.render")}
    for row in rows:
        assert (row["secrets"], row["params_schema"]) == (["openai"], {"type": "object"})
        assert row["seen_at"] > AT
        assert row["bytes"] > 100

    database = Database.open(database_url, clock=SystemClock())
    with database.transaction() as connection:
        # They place no run, and count against what is approved, before any worker of this release runs.
        assert set(catalogue.declared(connection)) == {"acme.note"}
        assert set(catalogue.of_workers(connection, ["gpu.render", "acme.note", "old.note"])) == {"acme.note"}
        [eu, _] = host_grants.declared_by_hosts(connection)
        assert (eu["pool"], eu["hosts"], eu["pending"]) == ("eu", ["one"], ["secrets", "scopes"])
        assert host_grants.approve(connection, "eu", "gpu.render", eu["digest"], by="ana", at=AT)
        assert [row["approved"] for row in host_grants.declared_by_hosts(connection)] == [True, False]
        # A worker that has read its own settles what of the name is the workers'.
        catalogue.put(connection, [HandlerEntry("acme.note", "d", "1", "m:f")], at=AT)
        assert [row["distribution"] for row in catalogue.entries(connection)] == ["d"]
        [of_us] = places.declared_in(connection, "gpu.render", "us")
        assert of_us["host_id"] != places.declared_in(connection, "gpu.render", "eu")[0]["host_id"]
    database.close()


def test_a_worker_of_the_previous_release_still_stores_and_reads_its_rows(migrated_url: str) -> None:
    """It knows no `of_worker`: its rows have null there, or what this release wrote."""
    with connected(migrated_url) as connection:
        handler(connection, "acme.note")
        handler(connection, "gpu.render")
        worker(connection, "acme.note")
        connection.execute(update(tables.workers).values(ended_at=None))
        named = [row["name"] for row in catalogue.entries(connection)]
    assert named == ["acme.note"]


def host_rows(connection: Connection) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(select(tables.host_handlers)).mappings()]
