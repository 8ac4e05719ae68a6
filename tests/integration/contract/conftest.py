"""What a running attempt may ask of its worker, by every carrier and on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import copied
from tests.fakes import postgres
from tests.fakes.plugins import plugin_on_path
from tests.fakes.running import child_pool
from tests.integration.contract.carriers import CARRIERS, ENTRY, FILE, Carrier, Site, opened
from tests.integration.engine.conftest import anyio_backend
from tests.integration.hosts.conftest import database, fleet, migrated_url
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.store import catalogue, schema
from worker.store.database import Database

__all__ = ["anyio_backend", "database", "fleet", "migrated_url"]

SOURCE = Path(__file__).with_name("contract_jobs.py")


@pytest.fixture(scope="module")
async def children(
    postgres_server: postgres.Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ChildPool]:
    # A pool adopts what starts after it in this process, and ends that when it closes: also a server.
    with plugin_on_path(tmp_path_factory.mktemp("plugin"), SOURCE, {ENTRY.name: ENTRY.entry_point}):
        async with child_pool(attached=True, spares=1) as runner:
            yield runner


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A database for all tests of a module, each of which starts a run of its own."""
    if request.param == "sqlite":
        file: Path = request.getfixturevalue("migrated_sqlite_file")
        yield from _filled(copied(file, tmp_path_factory.mktemp("contract")))
        return
    server: postgres.Server = request.getfixturevalue("postgres_server")
    with server.new_database(server.template("migrated", schema.upgrade)) as url:
        yield from _filled(url)


def _filled(url: str) -> Iterator[Database]:
    filled = Database.open(url, clock=SystemClock(), threads=4)
    with filled.transaction() as connection:
        catalogue.put(connection, [ENTRY], at=filled.now(connection))
    apply(filled, parse_file(FILE), actor="test")
    yield filled
    filled.close()


@pytest.fixture(scope="module")
async def site(
    shared_database: Database, children: ChildPool, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    async with opened(shared_database, tmp_path_factory.mktemp("ring"), children) as made:
        yield made


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest, site: Site) -> Iterator[Carrier]:
    made = Carrier(site, request.param)
    yield made
    made.drop()
