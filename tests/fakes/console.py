"""The demo as a console to look at: its orgs, a day of history, and a worker that serves it."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser

from tests.fakes import browser as browsers
from tests.fakes import forked
from tests.fakes.site import wait_until
from worker.demo import history, installation
from worker.demo.installation import World
from worker.store import schema


@dataclass
class Console:
    """The running console; `state` has the cookies of an operator who is logged in."""

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


@contextlib.contextmanager
def serving(folder: Path, browser: Browser) -> Iterator[Console]:
    """Start it in this folder, on a database of its own or one that is already migrated there."""
    database, token = folder / "worker.db", secrets.token_urlsafe(24)
    url = f"sqlite:///{database}"
    if not database.exists():
        schema.upgrade(url)
    with installation.world() as world:
        listen = installation.free_address()
        made = Console(folder, f"http://{listen}", token, world)
        settings = installation.settings_file(database, world, listen=listen, token=token)
        (folder / "worker.toml").write_text(settings)
        (folder / "orgs.jsonl").write_text(world.import_lines())
        now = datetime.now(UTC)
        file = installation.definitions_file(world.orgs, world.api_url, now=now)
        (folder / "demo.toml").write_text(file)
        made.cli("orgs", "import", str(folder / "orgs.jsonl"))
        made.cli("apply", str(folder / "demo.toml"))
        history.add(url, world.orgs, world.api_url, until=now)
        with (folder / "worker.log").open("ab") as log:
            worker = forked.start(
                made.command("run"), cwd=folder, env=world.environment(), output=log, fork=True
            )
        try:
            wait_until(lambda: browsers.is_ready(made.base), "the console to answer")
            with browsers.tab(browser, made.base) as first:
                first.log_in(token)
                first.page.get_by_role("button", name="Log out").wait_for()
                made.state = first.page.context.storage_state()
            yield made
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=20)
