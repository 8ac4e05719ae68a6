"""What hosts declare, in the database: whose it is, how much, how long, and what was approved of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Connection, select

from tests.fakes.stock import Stock
from tests.integration.store.test_hosts import added, begin
from worker.features.hosts import operations as operations
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Ceiling, digest
from worker.ids import WorkerId
from worker.model.runs.hosts import HostCaller, TooManyHandlers
from worker.store import catalogue, host_grants, host_handlers, places, tables
from worker.store.dialect import Row

RENDER = HandlerEntry("gpu.render", "gpu", "1", "gpu:render")
KEYED = replace(RENDER, name="gpu.keyed", secrets=("openai",), scopes=("b", "a"), timeout="2h")


def declare(stock: Stock, worker: WorkerId, *entries: HandlerEntry) -> None:
    stock.within(host_handlers.report, worker, entries)


def declared(stock: Stock, pool: str | None = None) -> list[Row]:
    return stock.reading(host_grants.declared_by_hosts, pool)


def approve(stock: Stock, handler: str, of_digest: str, pool: str = "eu") -> Row | None:
    return stock.within(host_grants.approve, pool, handler, of_digest, by="ana", at=stock.now())


def in_eu(stock: Stock, name: str = "gpu1") -> tuple[HostCaller, WorkerId]:
    _, host = added(stock, name, pool="eu")
    return host, begin(stock, host)


def stored(stock: Stock) -> set[tuple[str, str]]:
    with stock.database.autocommit() as connection:
        rows = connection.execute(select(tables.host_handlers.c.pool, tables.host_handlers.c.name))
        return {(pool, name) for pool, name in rows}


def test_what_a_host_declares_is_of_its_pool_and_not_in_the_catalogue(stock: Stock) -> None:
    _, worker = in_eu(stock)
    declare(stock, worker, replace(RENDER, pool="us"), replace(RENDER, name="gpu.broken", error="no"))

    with stock.database.autocommit() as connection:
        here = places.declared_in(connection, "gpu.render", "eu")
        elsewhere = places.declared_in(connection, "gpu.render", "us")
        assert catalogue.entries(connection) == []
        assert catalogue.declared(connection) == {}
    assert [(row["version"], row["error"]) for row in here] == [("1", None)]
    assert elsewhere == []
    assert stored(stock) == {("eu", "gpu.render"), ("eu", "gpu.broken")}


def test_a_handler_of_workers_is_theirs(stock: Stock) -> None:
    _, worker = in_eu(stock)
    declare(stock, worker, RENDER)
    with stock.database.transaction() as connection:
        assert set(catalogue.of_workers(connection, ["gpu.render"])) == set()
        catalogue.put(connection, [replace(RENDER, error="no")], at=stock.now())
        assert set(catalogue.of_workers(connection, ["gpu.render", "x"])) == {"gpu.render"}
        assert places.only_of_hosts(connection) == set()

        assert catalogue.forget_name(connection, "gpu.render") == 1
        assert places.only_of_hosts(connection) == {"gpu.render"}


def test_rows_of_the_previous_release_count_if_a_worker_lists_the_handler(stock: Stock) -> None:
    """A worker of it stores its own handlers and those of hosts alike, and does not say which is which."""
    _, host = in_eu(stock)
    theirs = worker_with(stock, ["acme.note"])
    rows = [replace(RENDER, name="acme.note"), RENDER, replace(RENDER, name="acme.note", distribution="aaa")]
    with stock.database.transaction() as connection:
        catalogue.put(connection, rows, at=stock.now())
        connection.execute(tables.catalogue.update().values(of_worker=None))
        host_and_names(connection, host, ["gpu.render"])
        assert set(catalogue.of_workers(connection, ["acme.note", "gpu.render"])) == {"acme.note"}
        assert len(catalogue.entries(connection)) == 2

        connection.execute(
            tables.workers.update().where(tables.workers.c.id == theirs).values(ended_at=stock.now())
        )
        assert set(catalogue.of_workers(connection, ["acme.note"])) == {"acme.note"}

        # Once a worker or command of this release has read it, no other row of the name counts.
        catalogue.put(connection, rows[:1], at=stock.now())
        assert [row["distribution"] for row in catalogue.entries(connection)] == ["gpu"]
        assert catalogue.offered(connection) == {("gpu", "1", "acme.note")}


def worker_with(stock: Stock, names: Iterable[str]) -> WorkerId:
    return stock.worker(handlers=list(names))


def host_and_names(connection: Connection, worker: WorkerId, names: list[str]) -> None:
    connection.execute(tables.workers.update().where(tables.workers.c.id == worker).values(handlers=names))


@pytest.mark.parametrize("what", ["rows", "bytes"])
def test_one_token_declares_no_more_than_its_share(stock: Stock, what: str) -> None:
    _, worker = in_eu(stock)
    schema = {"description": "x" * 200_000} if what == "bytes" else None
    count = 501 if what == "rows" else 21
    many = [replace(RENDER, name=f"gpu.h{n}", params_schema=schema) for n in range(count)]

    with pytest.raises(TooManyHandlers, match="500 handlers, and 4 MiB"):
        declare(stock, worker, *many)
    assert stored(stock) == set()
    # The control, and not by several calls either: also not by another incarnation of the token.
    declare(stock, worker, *many[:-1])
    assert len(stored(stock)) == count - 1
    with pytest.raises(TooManyHandlers):
        declare(stock, worker, many[-1])
    declare(stock, worker, *many[:3])
    _, other = in_eu(stock, "gpu2")
    declare(stock, other, many[-1])
    assert len(stored(stock)) == count


def test_what_no_incarnation_has_any_more_makes_room(stock: Stock) -> None:
    host, worker = in_eu(stock)
    declare(stock, worker, *(replace(RENDER, name=f"gpu.h{n}") for n in range(500)))
    stock.change(tables.workers, worker, ended_at=stock.now())

    declare(stock, begin(stock, host), RENDER)

    assert stored(stock) == {("eu", "gpu.render")}


def test_a_declaration_goes_with_its_token_or_when_it_was_not_seen_for_30_days(stock: Stock) -> None:
    (_, one), (_, two), (_, three) = (in_eu(stock, f"gpu{n}") for n in range(3))
    for worker, name in ((one, "gpu.a"), (two, "gpu.b"), (three, "gpu.c")):
        declare(stock, worker, replace(RENDER, name=name))
    operations.remove_host(stock.database, "gpu0", actor="test")
    assert stored(stock) == {("eu", "gpu.b"), ("eu", "gpu.c")}

    before = stock.now() - timedelta(days=29)
    with stock.database.transaction() as connection:
        connection.execute(tables.host_handlers.update().values(seen_at=before))
        connection.execute(tables.workers.update().values(started_at=before - timedelta(days=60)))
        stop = tables.workers.update().where(tables.workers.c.id == three)
        connection.execute(stop.values(ended_at=before))
        assert host_handlers.forget_unseen(connection) == 0
        # A live incarnation keeps its own: only what stopped 30 days ago is forgotten.
        assert host_handlers.forget_unseen(connection, timedelta(days=28)) == 1
    assert stored(stock) == {("eu", "gpu.b")}

    # The previous release removes a host without them.
    with stock.database.transaction() as connection:
        connection.execute(tables.hosts.update().values(removed_at=stock.now()))
        assert host_handlers.forget_unseen(connection) == 1
    assert stored(stock) == set()


def test_handlers_that_declare_no_egress_are_counted_once(stock: Stock) -> None:
    _, one = in_eu(stock)
    _, two = in_eu(stock, "gpu2")
    theirs = HandlerEntry("acme.note", "acme", "1", "acme:note", egress=("api",))
    stock.within(catalogue.put, [theirs], at=stock.now())
    listed = replace(RENDER, name="gpu.listed", egress=())
    # What workers have is theirs, and of two hosts the one counts that declares nothing.
    declare(stock, one, RENDER, listed, replace(theirs, egress=None))
    declare(stock, two, replace(RENDER, egress=("api",)), replace(RENDER, name="gpu.broken", error="no"))

    assert stock.reading(places.undeclared_egress) == (3, ["gpu.render"])


def test_a_list_is_stored_as_it_was_declared(stock: Stock) -> None:
    _, worker = in_eu(stock)
    egress = ("https://a.example", "api")
    declare(stock, worker, replace(RENDER, egress=egress, audiences=("mcp",)), replace(KEYED, egress=()))

    [row] = [row for row in declared(stock) if row["handler"] == "gpu.render"]
    assert (row["beyond"], row["egress"], row["audiences"]) == (
        ["egress", "audiences"],
        ["api", "https://a.example"],
        ["mcp"],
    )
    stored = stock.reading(places.declared_in, "gpu.render", "eu")
    assert [catalogue.entry_of(one).egress for one in stored] == [egress]
    assert [one["egress"] for one in stock.reading(places.declared_in, "gpu.keyed", "eu")] == [[]]
    granted = stock.reading(host_grants.offered, worker).grants["gpu.render"]
    assert (granted.entry.egress, granted.entry.audiences) == (("api",), ())
    approve(stock, "gpu.render", row["digest"])
    granted = stock.reading(host_grants.offered, worker).grants["gpu.render"]
    assert (granted.beyond, granted.entry.egress, granted.entry.audiences) == (set(), egress, ("mcp",))


def test_what_goes_beyond_the_defaults_is_approved_by_its_digest(stock: Stock) -> None:
    _, worker = in_eu(stock)
    in_eu(stock, "gpu2")
    declare(stock, worker, RENDER, KEYED)
    plain, keyed = sorted(declared(stock), key=lambda row: row["beyond"])

    assert (plain["handler"], plain["beyond"], plain["approved"]) == ("gpu.render", [], True)
    assert keyed["beyond"] == keyed["pending"] == ["secrets", "scopes", "timeout"]
    assert (keyed["secrets"], keyed["scopes"], keyed["timeout"]) == (["openai"], ["a", "b"], "2h")
    assert (keyed["hosts"], keyed["approved"], keyed["approved_by"]) == (["gpu1"], False, None)
    assert keyed["digest"] == digest("eu", "gpu.keyed", Ceiling.of(KEYED))
    assert declared(stock, "us") == []

    assert approve(stock, "gpu.keyed", keyed["digest"], pool="us") is None
    assert approve(stock, "gpu.keyed", keyed["digest"][:-1] + "x") is None
    assert approve(stock, "gpu.render", keyed["digest"]) is None
    assert approve(stock, "gpu.keyed", keyed["digest"]) is not None
    [keyed] = [row for row in declared(stock) if row["beyond"]]
    assert (keyed["approved"], keyed["pending"], keyed["approved_by"]) == (True, [], "ana")


def test_a_declaration_that_grows_after_its_approval_is_pending_again(stock: Stock) -> None:
    _, worker = in_eu(stock)
    declare(stock, worker, KEYED)
    [row] = declared(stock)
    approve(stock, "gpu.keyed", row["digest"])

    declare(stock, worker, replace(KEYED, secrets=("openai", "stripe")))

    [row] = declared(stock)
    assert (row["approved"], row["pending"], row["approved_by"]) == (False, ["secrets"], "ana")
    approve(stock, "gpu.keyed", row["digest"])
    declare(stock, worker, KEYED)
    assert [row["approved"] for row in declared(stock)] == [True]


def test_what_a_live_incarnation_of_the_same_token_declares_otherwise_is_shown_too(stock: Stock) -> None:
    """Two versions under one token, as in a rolling update: the table has the one that reported last."""
    host, older = in_eu(stock)
    newer = begin(stock, host)
    declare(stock, newer, KEYED)
    declare(stock, older, replace(KEYED, secrets=()))

    rows = declared(stock)

    assert {tuple(row["secrets"]) for row in rows} == {(), ("openai",)}
    [with_secrets] = [row for row in rows if row["secrets"]]
    assert approve(stock, "gpu.keyed", with_secrets["digest"]) is not None
    assert all(row["approved"] for row in declared(stock))


def test_what_workers_declare_needs_no_approval(stock: Stock) -> None:
    _, worker = in_eu(stock)
    declare(stock, worker, KEYED)
    stock.within(catalogue.put, [replace(KEYED, timeout="3h")], at=stock.now())

    [row] = declared(stock)

    assert (row["of_workers"], row["beyond"], row["approved"]) == (True, [], True)
