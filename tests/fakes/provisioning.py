"""Orgs of a fake Kinde, and an installation that takes them over: commands, kills, and what must hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import text
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.fakes import forked
from tests.fakes.cli import Completed
from tests.fakes.kinde.document import document
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from worker.clock import SystemClock
from worker.settings import load
from worker.store import schema
from worker.store.database import Database
from worker.tokens.sealing import KeyRing
from worker.wiring import open_keyring

AUDIENCE = "https://api.acme.com"
SCOPES = ("read:kb", "write:kb")
TEMPLATE = f"""
[[template]]
name = "nightly"
orgs = "all"
handler = "acme.fetch"
schedule = "0 3 * * *"
scopes = ["{SCOPES[0]}", "{SCOPES[1]}"]
"""
# Management and token requests of one org that were carried out, lists and those of all orgs included.
MAX_REQUESTS = 5 + len(SCOPES)
BUSY = 75
FAILED = 1
# Calls without a kill until every org has a credential; a few end with orgs that failed for now.
MAX_CALLS = 6

Moment = Literal["before", "after", "answered"]
MOMENTS: tuple[Moment, ...] = ("before", "after", "answered")


@dataclass
class Killer:
    """Kills a process at one of its requests: before or after it is carried out, or once answered."""

    app: ASGIApp
    started: threading.Event = field(default_factory=threading.Event)
    victim: int = 0
    left: int = 0
    moment: Moment = "before"
    delay: float = 0.0

    def aim(self, request: int, moment: Moment, delay: float) -> None:
        """Choose the request; `fire` names the process once it is started."""
        self.started.clear()
        self.left, self.moment, self.delay = request, moment, delay

    def fire(self, process: int) -> None:
        self.victim = process
        self.started.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_call = scope["type"] == "http" and scope["path"].startswith(("/api/", "/oauth2/"))
        self.left -= is_call
        if not is_call or self.left != 0:
            await self.app(scope, receive, send)
            return
        if self.moment == "before":
            await self._kill()
        elif self.moment == "after":
            await self.app(scope, receive, _ignore)
            await self._kill()
        else:
            await self.app(scope, receive, send)
            await asyncio.sleep(self.delay)
            await self._kill()

    async def _kill(self) -> None:
        await asyncio.to_thread(self.started.wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.victim, signal.SIGKILL)


async def _ignore(message: Message) -> None:
    pass


@dataclass
class Fleet:
    """The orgs at the provider, and the commands of one installation in `folder`."""

    folder: Path
    kinde: Kinde
    url: str
    codes: list[str]
    killer: Killer
    calls: Counter[int] = field(default_factory=Counter)

    def start(self, *arguments: str, output: Any, errors: Any = None, fork: bool = True) -> Any:
        command = [sys.executable, "-m", "worker", "--config", str(self.folder / "worker.toml"), *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        return forked.start(
            command, cwd=self.folder, env=environment, output=output, errors=errors, fork=fork
        )

    def run(self, *arguments: str, timeout: float = 90, fork: bool = True) -> Completed:
        """Run a command to its end."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = self.start(*arguments, output=output, errors=errors, fork=fork)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            output.seek(0)
            errors.seek(0)
            return Completed(code, output.read().decode(), errors.read().decode())

    def kill_at(
        self,
        request: int,
        moment: Moment,
        *,
        delay: float = 0.0,
        fork: bool = True,
        command: Sequence[str] = ("orgs", "sync", "--provision", "-o", "jsonl"),
    ) -> bool:
        """Run a command, by default `orgs sync`, until a certain request; False if it ended before."""
        self.killer.aim(request, moment, delay)
        with tempfile.TemporaryFile() as output:
            process = self.start(*command, output=output, fork=fork)
            self.killer.fire(process.pid)
            code = process.wait(90)
            self.killer.left = 0
            output.seek(0)
            if code not in (0, FAILED, BUSY, -signal.SIGKILL):
                raise AssertionError(f"{command} ended with {code}: {output.read().decode()}")
        self.calls[code] += 1
        return bool(code == -signal.SIGKILL)

    def kill_often(self, kills: int, seed: int, *, most: int = 24, fork: bool = True) -> int:
        """Kill the command at random points until it has nothing left to do; returns the number of kills."""
        numbers, done = random.Random(seed), 0
        while done < kills:
            request, moment = numbers.randint(1, most), numbers.choice(MOMENTS)
            if self.kill_at(request, moment, delay=numbers.uniform(0, 0.03), fork=fork):
                done += 1
            elif self.calls[0]:
                break
        return done

    def finish(self, *, timeout: float = 90, fork: bool = True) -> list[Completed]:
        """Provision until every org has a credential; returns the calls that it took."""
        made: list[Completed] = []
        while len(made) < MAX_CALLS:
            done = self.run("orgs", "sync", "--provision", "-o", "jsonl", timeout=timeout, fork=fork)
            if done.code == BUSY:  # the server has not noticed yet that the last one is dead
                time.sleep(0.1)
                continue
            made.append(done)
            if done.code == 0:
                return made
        raise AssertionError(f"orgs still fail: {made[-1].err[-4000:]}")

    def requests(self) -> int:
        """The management and token requests that were carried out."""
        return self.kinde.carried_out() + self.kinde.token_requests()

    def wrongs(self) -> list[str]:
        """What is not as it must be: one verified, working application for each org, and no other."""
        mine = {app.client_id: app for app in self.kinde.provider.applications.values()}
        del mine[MANAGER]
        made = Counter(app.org_code for app in mine.values())
        wrong = [f"{org}: {made[org]} applications at the provider" for org in self.codes if made[org] != 1]
        wrong += [f"{org}: an application without an org here" for org in made.keys() - set(self.codes)]
        rows = self.stored()
        if sorted(row["org"] for row in rows) != sorted(self.codes):
            wrong.append(f"{len(rows)} credentials for {len(self.codes)} orgs")
        ring = open_keyring(load(str(self.folder / "worker.toml"), environ={}))
        for row in rows:
            app = mine.get(row["client_id"])
            ids = {"org_id": row["org_id"], "credential_id": row["credential_id"]}
            if app is None or app.org_code != row["org"]:
                wrong.append(f"{row['org']}: its client is not its own")
            elif ring.unseal(row["sealed"], row["key_id"], **ids) != app.client_secret:
                wrong.append(f"{row['org']}: its secret is not that of its application")
            elif (set(app.scopes), app.audiences) != (set(SCOPES), (AUDIENCE,)):
                wrong.append(f"{row['org']}: scopes {app.scopes} for {app.audiences}")
            elif (row["credential"], row["application"]) != ("active", "active") or not row["token_seconds"]:
                wrong.append(f"{row['org']}: {row['credential']}, {row['application']}")
        return wrong

    def undocumented(self, newest: int = 2_000) -> list[str]:
        """What of the newest exchanges Kinde's document does not allow.

        401 is in its guides only; with 500 the fake notes that a killed client did not send its body.
        """
        exchanges = [each for each in self.kinde.recorded.exchanges if each.status not in (401, 500)]
        return [fault for each in exchanges[-newest:] for fault in document().faults(each)]

    def stored(self) -> list[Any]:
        """Every credential here, with the application that it belongs to."""
        query = """
            SELECT o.code AS org, c.org_id, c.id AS credential_id, c.client_id, c.sealed, c.key_id,
                   c.state AS credential, a.state AS application, a.token_seconds
            FROM credentials c JOIN orgs o ON o.id = c.org_id
            LEFT JOIN applications a ON a.credential_id = c.id
        """
        database = Database.open(self.url, clock=SystemClock())
        try:
            with database.autocommit() as connection:
                return list(connection.execute(text(query)).mappings())
        finally:
            database.close()


@contextlib.contextmanager
def fleet(folder: Path, orgs: int, url: str = "", *, concurrency: int = 8) -> Iterator[Fleet]:
    """A provider with this many orgs, and an installation without any, at `url` or in a new file."""
    if not url:
        url = f"sqlite:///{folder}/worker.db"
        schema.upgrade(url)
    with serve_kinde() as kinde:
        kinde.api.add_api("Acme's API", AUDIENCE, SCOPES)
        killer = Killer(kinde.faulty.app)
        kinde.faulty.app = killer
        codes = [org.code for org in kinde.add_orgs(orgs)]
        made = Fleet(folder, kinde, url, codes, killer)
        (folder / "management__main").write_text(kinde.secret)
        KeyRing.load_or_generate(folder / "keyring")
        (folder / "worker.toml").write_text(
            f'secrets_dir = "{folder}"\n[database]\nurl = "{url}"\n[provisioning]\n'
            f'concurrency = {concurrency}\n[issuers.main]\nurl = "{kinde.url}"\naudience = "{AUDIENCE}"\n'
            f'max_requests_per_second = 10000\n[issuers.main.management]\nclient_id = "{MANAGER}"\n'
        )
        (folder / "template.toml").write_text(TEMPLATE)
        made.run("apply", str(folder / "template.toml"), "--allow-unknown-handlers").checked("apply")
        yield made
