"""One browser and one installation for all tests of a process: the demo's, with its day of history."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from tests.conftest import copied
from tests.fakes import browser as browsers
from tests.fakes import forked
from tests.fakes.browser import Tab
from tests.fakes.site import wait_until
from worker.demo import history, installation
from worker.demo.installation import World


@dataclass
class Console:
    """The running console of the demo's installation."""

    folder: Path
    base: str
    token: str
    world: World
    state: Any = None

    def cli(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        command = [*self.command(*arguments), "-o", "json"]
        done = forked.run(command, cwd=self.folder, env=self.world.environment())
        return done.checked(arguments).json()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "worker", "--config", str(self.folder / "worker.toml"), *arguments]

    def runs(self, *options: str) -> list[dict[str, Any]]:
        """Rows of `runs list`."""
        rows: list[dict[str, Any]] = self.cli("runs", "list", *options)
        return rows


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
    url = copied(migrated_sqlite_file, folder)
    token = secrets.token_urlsafe(24)
    with installation.world() as world:
        listen = installation.free_address()
        made = Console(folder, f"http://{listen}", token, world)
        settings = installation.settings_file(folder / "worker.db", world, listen=listen, token=token)
        (folder / "worker.toml").write_text(settings)
        (folder / "orgs.jsonl").write_text(world.import_lines())
        (folder / "demo.toml").write_text(installation.definitions_file(world.orgs, world.api_url))
        made.cli("orgs", "import", str(folder / "orgs.jsonl"))
        made.cli("apply", str(folder / "demo.toml"))
        history.add(url, world.orgs, world.api_url, until=datetime.now(UTC))
        with (folder / "worker.log").open("ab") as log:
            worker = forked.start(
                made.command("run"), cwd=folder, env=world.environment(), output=log, fork=True
            )
        try:
            wait_until(lambda: is_ready(made.base), "the console to answer")
            with browsers.tab(browser, made.base) as first:
                first.log_in(token)
                made.state = first.page.context.storage_state()
            yield made
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=20)


def is_ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def tab(browser: Browser, console: Console) -> Iterator[Tab]:
    """A tab of the operator who is logged in; at the end, that nothing on its pages went wrong."""
    with browsers.tab(browser, console.base, state=console.state) as opened:
        yield opened
    assert opened.wrongs == []
    assert opened.foreign() == []
