"""One browser and one installation for all tests of a process: the demo's, with its day of history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.conftest import copied
from tests.fakes import browser as browsers
from tests.fakes.browser import Tab
from tests.fakes.console import Console, serving


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. Only of this package: while Playwright runs, this thread has an event loop."""
    with browsers.launched() as opened:
        yield opened


@pytest.fixture(scope="package")
def console(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite_file: Path, browser: Browser
) -> Iterator[Console]:
    """A worker with the demo's four orgs and its history, and an operator who is logged in."""
    folder = tmp_path_factory.mktemp("console")
    copied(migrated_sqlite_file, folder)
    with serving(folder, browser) as made:
        yield made


@pytest.fixture
def tab(browser: Browser, console: Console) -> Iterator[Tab]:
    """A tab of the operator who is logged in; at the end, that nothing on its pages went wrong."""
    with browsers.tab(browser, console.base, state=console.state) as opened:
        yield opened
    assert opened.wrongs == []
    assert opened.foreign() == []
