"""What a simulation begins with: a migrated database with orgs and hosts, made once for all seeds."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import quote

from sqlalchemy.engine import make_url

from tests.fakes.clock import ManualClock
from tests.fakes.postgres import Server
from tests.simulation.database import EPOCH, SEARCH_PATH
from tests.simulation.world import ORGS, Dialect, app_of
from worker import ids
from worker.features.hosts.operations import add_host
from worker.operations.orgs import import_orgs
from worker.store.database import Database
from worker.store.schema import upgrade
from worker.tokens.sealing import KeyRing

HOSTS = ("h1", "h2")
POOL = "private"
# No time of a session is real, and a deadlock is found by the simulation. A statement is planned once.
SESSION = (
    *("-c idle_in_transaction_session_timeout=0", "-c statement_timeout=0", "-c lock_timeout=0"),
    *("-c deadlock_timeout=1h", "-c plan_cache_mode=force_generic_plan"),
)


@dataclass(frozen=True)
class Template:
    """`url` is that of a database which each simulation copies; `tokens` are those of the hosts."""

    folder: Path
    dialect: Dialect
    url: str
    tokens: Mapping[str, str]
    server: Server | None = None

    @contextmanager
    def copied(self, folder: Path) -> Iterator[str]:
        """The URL of a copy, in a folder that has the key ring."""
        shutil.copy(self.folder / "keyring", folder / "keyring")
        if self.server is None:
            file = folder / "orgworker.db"
            shutil.copy(self.folder / "orgworker.db", file)
            yield f"sqlite:///{file}"
            return
        name = f"simulation_{folder.name.replace('-', '_')}"
        self.server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{make_url(self.url).database}"')
        self.server.execute(f'ALTER DATABASE "{name}" SET search_path = {SEARCH_PATH}')
        try:
            yield f"{self.server.url(name)}?options={quote(' '.join(SESSION))}"
        finally:
            self.server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def made(folder: Path, dialect: Dialect) -> Iterator[Template]:
    """The template, and the server that it needs while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "sqlite":
        yield _filled(folder, dialect, f"sqlite:///{folder / 'orgworker.db'}", None)
        return
    server = Server(folder / "server")
    server.start()
    try:
        server.execute('CREATE DATABASE "simulated"')
        yield _filled(folder, dialect, server.url("simulated"), server)
    finally:
        # A session of a simulation that was killed may stand still.
        server.stop(signal.SIGQUIT)


def _filled(folder: Path, dialect: Dialect, url: str, server: Server | None) -> Template:
    clock = ManualClock(EPOCH)
    # The ids of orgs decide which version of a rollout they have.
    ids.draw_from(lambda: int(EPOCH.timestamp()) * 1_000_000_000, Random("template").randbytes)
    ring = KeyRing.generate(folder / "keyring")
    database = Database.open(url, clock=clock)
    try:
        upgrade(url)
        lines = [
            json.dumps(
                {
                    "code": app.org_code,
                    "name": app.org_code,
                    "issuer": "main",
                    "client_id": app.client_id,
                    "client_secret": app.secret,
                }
            )
            for app in map(app_of, range(ORGS))
        ]
        import_orgs(database, ring, lines, actor="simulation")
        tokens = {name: add_host(database, name, POOL, actor="simulation")["token"] for name in HOSTS}
    finally:
        database.close()
        ids.draw_from()
    return Template(folder, dialect, url, tokens, server)
