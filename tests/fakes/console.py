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
from sqlalchemy import delete, insert, select, text

from tests.fakes import browser as browsers
from tests.fakes import forked
from tests.fakes.cli import Completed
from tests.fakes.site import wait_until
from worker.clock import SystemClock
from worker.demo import history, installation
from worker.demo.installation import World
from worker.store import tables
from worker.store.database import Database


@dataclass
class Console:
    """The running console; `state` has the cookies of an operator who is logged in."""

    folder: Path
    url: str
    base: str
    token: str
    world: World
    state: Any = None

    def cli(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        return self.run(*arguments, "-o", "json").json()

    def run(self, *arguments: str) -> Completed:
        """A command that succeeds."""
        done = forked.run(self.command(*arguments), cwd=self.folder, env=self.world.environment())
        return done.checked(arguments)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "worker", "--config", str(self.folder / "worker.toml"), *arguments]

    def runs(self, *options: str) -> list[dict[str, Any]]:
        """Rows of `runs list`."""
        rows: list[dict[str, Any]] = self.cli("runs", "list", *options)
        return rows


def copy_rows(source: str, target: str) -> None:
    """Copy the rows of all tables to a new database on PostgreSQL."""
    with (
        contextlib.closing(Database.open(source, clock=SystemClock())) as old,
        contextlib.closing(Database.open(target, clock=SystemClock())) as new,
        old.transaction() as reading,
        new.transaction() as writing,
    ):
        # No trigger adds to the rows, and no foreign key wants an order of them.
        writing.execute(text("SET LOCAL session_replication_role = replica"))
        for table in tables.metadata.sorted_tables:
            writing.execute(delete(table))
            if rows := [dict(row) for row in reading.execute(select(table)).mappings()]:
                writing.execute(insert(table), rows)


@contextlib.contextmanager
def serving(folder: Path, browser: Browser, url: str = "") -> Iterator[Console]:
    """Start it in this folder, on a migrated database, or without `url` on a new one in the folder.

    The history is made in an SQLite file, at times of its own; on PostgreSQL its rows are copied, because
    there the server's clock would give their times.
    """
    database, token = folder / "worker.db", secrets.token_urlsafe(24)
    file_url = f"sqlite:///{database}"
    url = url or file_url
    with installation.world() as world:
        listen = installation.free_address()
        made = Console(folder, url, f"http://{listen}", token, world)
        settings = installation.settings_file(database, world, listen=listen, token=token)
        (folder / "worker.toml").write_text(settings)
        now = datetime.now(UTC)
        installation.begin(folder, world, made.run, now=now)
        history.add(file_url, world.orgs, world.api_url, until=now)
        if url != file_url:
            copy_rows(file_url, url)
            # Beside a file the key ring is there too, else among the secrets.
            (folder / "keyring").rename(folder / installation.SECRETS / "keyring")
            assert file_url in settings
            (folder / "worker.toml").write_text(settings.replace(file_url, url))
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
