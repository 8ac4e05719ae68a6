"""Fixtures of the acceptance tests: a provider, and an installation that talks to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import copied
from tests.fakes import shared
from tests.fakes.handlers import install_handlers
from tests.fakes.hook import Hook
from tests.fakes.image import Image, build, built_at, remove, why_not
from tests.fakes.site import Site, opened
from worker.demo.provider import Provider, serve_provider

SHORT_LEASE = 'lease = "4s"\nrenew = "500ms"'


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """A development provider on loopback, shared by the tests of a module."""
    made, thread = serve_provider()
    with thread:
        yield made


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The file that the test handlers write to."""
    return tmp_path / "out" / "journal"


@pytest.fixture
def bare_site(tmp_path: Path, provider: Provider) -> Iterator[Site]:
    """An installation on SQLite with nothing in it, not even the schema."""
    with opened(Site(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}", provider)) as site:
        site.configure()
        yield site


@pytest.fixture
def site(bare_site: Site, migrated_sqlite_url: str) -> Site:
    """An installation on SQLite, migrated, with the test handlers installed."""
    assert bare_site.database_url == migrated_sqlite_url
    install_handlers(bare_site.plugins)
    return bare_site


@pytest.fixture
def site_on_either(tmp_path: Path, provider: Provider, migrated_url: str) -> Iterator[Site]:
    """The same on SQLite and on PostgreSQL, for what a worker does with its database.

    What a database decides is tested on both in tests/integration, at a hundredth of the time.
    """
    with opened(Site(tmp_path, migrated_url, provider)) as made:
        made.configure(execution=SHORT_LEASE)
        install_handlers(made.plugins)
        made.migrate()
        yield made


@pytest.fixture
def hook() -> Iterator[Hook]:
    """A receiver of alerts."""
    made = Hook()
    yield made
    made.server.stop()


@pytest.fixture(scope="module")
def shared_site(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite_file: Path, provider: Provider
) -> Iterator[Callable[..., Site]]:
    """Makes an installation that all tests of a module share, on SQLite."""
    with contextlib.ExitStack() as stack:

        def make(execution: str = "", **settings: str) -> Site:
            folder = tmp_path_factory.mktemp("site")
            site = stack.enter_context(opened(Site(folder, copied(migrated_sqlite_file, folder), provider)))
            site.configure(execution=execution, **settings)
            install_handlers(site.plugins)
            return site

        yield make


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image of config/Containerfile; where nobody may make one the test fails, or says so to a user."""
    reason = why_not()
    if reason is not None and os.getuid() != 0 and "CI" not in os.environ:
        pytest.skip(f"what is deployed is NOT tested: {reason}")
    assert reason is None, f"what is deployed cannot be tested here: {reason}"
    with shared.used(shared.folder(tmp_path_factory) / "image", build, remove) as folder:
        yield built_at(folder)
