"""A fleet that is rotated while a real worker runs its definitions, by commands that are killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text

from tests.fakes.plugins import make_plugin
from tests.fakes.provisioning import MOMENTS, SCOPES, Fleet, fleet
from worker.clock import SystemClock, from_text
from worker.store.database import Database

HANDLERS = """
import asyncio
from worker import job

@job("rotating.hold", isolation="inline")
async def hold(ctx):
    \"\"\"Hold the token that the run began with.\"\"\"
    await asyncio.sleep(ctx.params["seconds"])
"""
DEFINITION = """
[[template]]
name = "{name}"
orgs = "all"
handler = "rotating.hold"
schedule = "every {every}s"
spread = "{every}s"
overlap = "allow"
scopes = ["{scope}"]
params = {{ seconds = {seconds} }}
"""
# Seconds: how long the old credential stays usable, and how long a run may be without a token.
OVERLAP = 2
LONGEST_WITHOUT = 1.0


class Deletions(dict[str, Any]):
    """The applications of a provider by client id, which keeps when each was deleted."""

    def __init__(self, known: Any) -> None:
        super().__init__(known)
        self.deleted: dict[str, datetime] = {}

    def __delitem__(self, client_id: str) -> None:
        super().__delitem__(client_id)
        self.deleted[client_id] = datetime.now(UTC)


@dataclass
class Rotating:
    """The orgs with their old clients: credentials from before `made_at` are rotated.

    Runs after `since` are judged.
    """

    fleet: Fleet
    old: dict[str, str]
    applications: Deletions
    made_at: float
    since: float = 0.0
    # When the worker was told to stop.
    stopped_at: float = math.inf

    def __post_init__(self) -> None:
        self.since = self.made_at

    def warm_up(self, *, timeout: float) -> None:
        """Wait until the worker has each token that it needs; only what follows is judged."""
        query = "SELECT count(DISTINCT definition_id) FROM runs WHERE state = 'succeeded'"
        database = Database.open(self.fleet.url, clock=SystemClock())
        try:
            until = time.monotonic() + timeout
            while True:
                with database.autocommit() as connection:
                    known = connection.execute(text(query)).scalar_one()
                if known == 2 * len(self.old):
                    break
                if time.monotonic() > until:
                    raise AssertionError(f"only {known} of {2 * len(self.old)} definitions have run")
                time.sleep(0.2)
        finally:
            database.close()
        self.since = time.time()

    def command(self) -> list[str]:
        # The command starts later by up to a second or two, which must not reach a new credential.
        age = int(time.time() - self.made_at)
        overlap = ("--overlap", f"{OVERLAP}s")
        return ["credentials", "rotate", "--older-than", f"{age}s", *overlap, "-o", "jsonl"]

    def kill_often(self, kills: int, seed: int, *, most: int, fork: bool = True) -> int:
        """Kill the command at random points until all is rotated; returns the number of kills."""
        numbers, done = random.Random(seed), 0
        while done < kills:
            request, moment = numbers.randint(1, most), numbers.choice(MOMENTS)
            delay = numbers.uniform(0, 0.05)
            calls = self.fleet.calls[0]
            if self.fleet.kill_at(request, moment, delay=delay, fork=fork, command=self.command()):
                done += 1
            elif self.fleet.calls[0] > calls:
                break
        return done

    def finish(self, *, timeout: float = 90, fork: bool = True) -> int:
        """Rotate until every org is over; returns the number of calls."""
        for call in range(1, 10):
            done = self.fleet.run(*self.command(), timeout=timeout, fork=fork)
            if done.code == 0:
                return call
            time.sleep(0.1)
        raise AssertionError(f"the rotation still fails: {done.out[-4000:]}")

    def wrongs(self) -> list[str]:
        """What is not as it must be at the provider and here, and runs that suffered."""
        wrong = []
        database = Database.open(self.fleet.url, clock=SystemClock())
        try:
            with database.autocommit() as connection:

                def read(query: str) -> list[Any]:
                    return list(connection.execute(text(query)).mappings())

                wrong += self._applications(read(_CREDENTIALS), read(_APPLICATIONS))
                runs = read("SELECT state, count(*) AS n FROM runs GROUP BY state")
                bad = [row for row in runs if row["state"] in ("failed", "refused", "cancelled", "skipped")]
                wrong += [f"{row['n']} runs are {row['state']}" for row in bad]
                wrong += self._attempts(self._later(read("SELECT * FROM attempts")))
        finally:
            database.close()
        return wrong

    def _applications(self, credentials: list[Any], applications: list[Any]) -> list[str]:
        wrong = []
        active = {row["code"]: row["client_id"] for row in credentials}
        if len(credentials) != len(self.old):
            wrong.append(f"{len(credentials)} active credentials of {len(self.old)} orgs")
        for org, old in self.old.items():
            made = [app for app in self.applications.values() if app.org_code == org]
            if [app.client_id for app in made] != [active.get(org)] or made[0].client_id == old:
                wrong.append(f"{org}: {[app.client_id for app in made]} at the provider, not {active[org]}")
            elif made[0].properties != {"plan": org} or set(made[0].scopes) != set(SCOPES):
                wrong.append(f"{org}: its new application has {made[0].properties} and {made[0].scopes}")
        states = {row["state"]: row["n"] for row in applications}
        if states != {"active": len(self.old), "deleted": len(self.old)}:
            wrong.append(f"applications here: {states}")
        return wrong

    def _attempts(self, attempts: list[Any]) -> list[str]:
        wrong = []
        for row in attempts:
            client = _claims(row["claims"]).get("client_id", "")
            deleted_at = self.applications.deleted.get(client)
            if deleted_at is not None and _instant(row["ended_at"]) > deleted_at:
                wrong.append(f"a run used the token of {client} after its application was deleted")
            if row["token_ready_at"] is None:
                # The drain at the end hands back what has only just begun.
                if row["outcome"] != "handed_back" or _instant(row["ended_at"]).timestamp() < self.stopped_at:
                    wrong.append(f"an attempt had no token: {row['outcome']}")
            elif self.without_token(row) > timedelta(seconds=LONGEST_WITHOUT):
                wrong.append(f"a run waited {self.without_token(row)} for its token")
        return wrong

    def _later(self, attempts: list[Any]) -> list[Any]:
        return [row for row in attempts if _instant(row["started_at"]).timestamp() >= self.since]

    def without_token(self, row: Any) -> timedelta:
        return _instant(row["token_ready_at"]) - _instant(row["started_at"])

    def counts(self) -> dict[str, Any]:
        """Numbers to report: runs, those under old and new clients, and the longest wait for a token."""
        database = Database.open(self.fleet.url, clock=SystemClock())
        try:
            with database.autocommit() as connection:
                rows = self._later(list(connection.execute(text("SELECT * FROM attempts")).mappings()))
        finally:
            database.close()
        clients = [_claims(row["claims"]).get("client_id", "") for row in rows]
        old = sum(client in self.applications.deleted for client in clients)
        waits = [self.without_token(row).total_seconds() for row in rows if row["token_ready_at"]]
        return {"attempts": len(rows), "with_old_tokens": old, "longest_wait": max(waits, default=0.0)}


_CREDENTIALS = (
    "SELECT o.code, c.client_id FROM credentials c JOIN orgs o ON o.id = c.org_id WHERE c.state = 'active'"
)
_APPLICATIONS = "SELECT state, count(*) AS n FROM applications GROUP BY state"


def _claims(stored: Any) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(stored) if isinstance(stored, str) else stored or {}
    return claims


def _instant(stored: Any) -> datetime:
    return from_text(stored) if isinstance(stored, str) else stored.astimezone(UTC)


@contextlib.contextmanager
def rotating(
    folder: Path, orgs: int, url: str = "", *, every: int, rate: int = 1000, fork: bool = True
) -> Iterator[Rotating]:
    """Orgs with verified applications, and a worker that runs two definitions of each all the time."""
    # Handlers may not read what the installation's folder has.
    plugins, home = folder / "plugins", folder / "site"
    home.mkdir()
    make_plugin(
        plugins,
        dist="rotating-jobs",
        modules={"rotating_jobs": HANDLERS},
        entry_points={"rotating.hold": "rotating_jobs:hold"},
    )
    with fleet(home, orgs, url) as made:
        settings = home / "worker.toml"
        settings.write_text(
            settings.read_text().replace(
                "max_requests_per_second = 10000", f"max_requests_per_second = {rate}"
            )
            + '[execution]\ninline = ["rotating-jobs"]\nmax_inline = 5000\n[web]\nlisten = ""\n'
        )
        templates = [
            DEFINITION.format(name=name, every=each, seconds=seconds, scope=scope)
            for name, each, seconds, scope in (
                ("short", every, every / 10, SCOPES[0]),
                ("long", 4 * every, 2 * every, SCOPES[1]),
            )
        ]
        (home / "template.toml").write_text("".join(templates))
        made.run("apply", str(home / "template.toml"), "--allow-unknown-handlers").checked("apply")
        made.finish(timeout=7200)
        provider = made.kinde.provider
        applications = Deletions(provider.applications)
        provider.applications = provider.management.applications = applications
        made.kinde.api.application_properties.add("plan")
        old = {}
        for app in list(applications.values()):
            if app.org_code:
                app.properties = {"plan": app.org_code}
                old[app.org_code] = app.client_id
        time.sleep(1.1)
        with worker(made, plugins, fork=fork):
            rotated = Rotating(made, old, applications, time.time())
            yield rotated
            rotated.stopped_at = time.time()


@contextlib.contextmanager
def worker(made: Fleet, plugins: Path, *, fork: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of the installation; drained at the end."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plugins), before)))
    try:
        with (plugins.parent / "worker.log").open("wb") as log:
            process = made.start("run", output=log, fork=fork)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
