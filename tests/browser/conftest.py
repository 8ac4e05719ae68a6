"""One browser and one installation for all tests of a process: the demo's, with its day of history.

On SQLite; `BROWSER=full` runs everything on PostgreSQL too, and looks at more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.conftest import copied
from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console, serving
from worker.store import schema

FULL = os.environ.get("BROWSER") == "full"
DATABASES = ("sqlite", "postgresql") if FULL else ("sqlite",)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. Only of this package: while Playwright runs, this thread has an event loop."""
    with browsers.launched() as opened:
        yield opened


@pytest.fixture(scope="package", params=DATABASES)
def dialect(request: pytest.FixtureRequest) -> str:
    """The database that the tests run on."""
    return str(request.param)


@contextlib.contextmanager
def migrated(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The URL of a migrated database of the test's dialect, an SQLite file in the folder."""
    if request.getfixturevalue("dialect") == "sqlite":
        yield copied(request.getfixturevalue("migrated_sqlite_file"), folder)
        return
    server = request.getfixturevalue("postgres_server")
    with server.new_database(server.template("migrated", schema.upgrade)) as url:
        yield url


@pytest.fixture(scope="package")
def console(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Browser, dialect: str
) -> Iterator[Console]:
    """A worker with the demo's four orgs and its history, and an operator who is logged in."""
    folder = tmp_path_factory.mktemp(f"console-{dialect}")
    with migrated(request, folder) as url, serving(folder, browser, url) as made:
        yield made


@pytest.fixture
def tab(browser: Browser, console: Console) -> Iterator[Tab]:
    """A tab of the operator who is logged in; at the end, that nothing on its pages went wrong."""
    with browsers.tab(browser, console.base, state=console.state) as opened:
        yield opened
    assert opened.wrongs == []
    assert opened.foreign() == []
