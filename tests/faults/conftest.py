"""Fixtures of the fault suite: clusters with a short lease, and how long the suite may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import FULL
from tests.faults.cluster import Cluster
from tests.faults.proxy import Proxy
from worker.demo.provider import Provider, serve_provider

HERE = Path(__file__).parent
MakeCluster = Callable[..., Cluster]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "simulated: the simulation shows it too; only for the full suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Faults take their time; a test that says nothing else has five minutes."""
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))
    left = [item for item in ours if not FULL and item.get_closest_marker("simulated") is not None]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """A development provider on loopback, shared by the tests of a module."""
    made, thread = serve_provider()
    with thread:
        yield made


@pytest.fixture
def cluster_at(tmp_path: Path, provider: Provider) -> Iterator[MakeCluster]:
    """Makes a cluster on the database of a URL; its workers are killed at the end."""
    made: list[Cluster] = []

    def make(url: str, **settings: Any) -> Cluster:
        made.append(Cluster(tmp_path, url, provider, **settings))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def proxy(migrated_postgres_url: str) -> Iterator[Proxy]:
    """Between workers and their PostgreSQL server."""
    with Proxy(urlsplit(migrated_postgres_url).port or 5432) as made:
        yield made


@pytest.fixture
def on_file(cluster_at: MakeCluster, migrated_sqlite_url: str) -> Cluster:
    """One worker at a time on an SQLite file."""
    return cluster_at(migrated_sqlite_url)


@pytest.fixture
def on_server(cluster_at: MakeCluster, migrated_postgres_url: str) -> Cluster:
    """Several workers on PostgreSQL."""
    return cluster_at(migrated_postgres_url)


@pytest.fixture
def on_either(cluster_at: MakeCluster, migrated_url: str) -> Cluster:
    """The same test on both."""
    return cluster_at(migrated_url)
