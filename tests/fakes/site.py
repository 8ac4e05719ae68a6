"""An installation under test, driven from outside: a folder, a database, a provider, a real worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import psycopg
from psycopg.rows import dict_row

from tests.fakes import forked
from tests.fakes.cli import Completed, as_process, run_command
from tests.fakes.log import faults_of
from worker.demo.provider import Application, Provider
from worker.engine.runners.child import linux
from worker.errors import Busy
from worker.store.engine import lock_sqlite_file

T = TypeVar("T")

AUDIENCE = "https://api.test.example"
FINAL = {"succeeded", "failed", "cancelled", "refused", "skipped"}
# A schedule that never fires during a test, even with a shifted clock.
NEVER = "at 2099-01-01T00:00:00Z"


def wait_until(probe: Callable[[], T], what: str, *, timeout: float = 45.0) -> T:
    """Poll until the probe returns something true, and return it.

    Raises:
        AssertionError: it did not within `timeout` seconds; with `what` and the last result.
    """
    began = time.monotonic()
    while True:
        last = probe()
        if last:
            return last
        waited = time.monotonic() - began
        if waited > timeout:
            raise AssertionError(f"waited {timeout:g} s for {what}; last: {last!r}")
        # Processor time is scarce: the longer it takes, the less often it looks.
        time.sleep(min(max(0.05, waited / 20), 0.25))


class Site:
    """One installation; `close` kills its workers."""

    # Whether its first worker is a fork; see `forked`.
    may_fork = True

    def __init__(self, folder: Path, database_url: str, provider: Provider) -> None:
        self.folder = folder
        self.database_url = database_url
        self.provider = provider
        self.plugins = folder / "plugins"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        self.environment: dict[str, str] = {}
        self.secrets = folder / "secrets"
        # Besides the run's own folder, a handler may write only here.
        self.out = folder / "out"
        self.out.mkdir(exist_ok=True)
        self.plugins.mkdir(exist_ok=True)
        self.secrets.mkdir(exist_ok=True)
        self._workers: list[subprocess.Popen[bytes]] = []
        self._connection: Any = None

    def configure(
        self, *, execution: str = "", issuer: str = "", web: str = 'listen = ""', extra: str = ""
    ) -> None:
        """Write worker.toml; each argument is TOML added to its table, `extra` to the end."""
        secrets_dir = self.secrets if self.database_url.startswith("postgresql") else ""
        self.settings.write_text(
            f"""\
secrets_dir = "{secrets_dir}"
[database]
url = "{self.database_url}"
[issuers.main]
profile = "kinde"
url = "{self.provider.url}"
audience = "{AUDIENCE}"
max_requests_per_second = 100
{issuer}
[execution]
write_paths = ["{self.out}"]
{execution}
[web]
{web}
{extra}
"""
        )

    def cli(self, *arguments: str, stdin: str = "", check: bool = True) -> Completed:
        """Run one command in this process, in a tenth of the time of `process`.

        With `check` its failure fails the test, with what it printed.
        """
        with as_process(self.folder, self.process_environment()):
            done = run_command("--config", str(self.settings), *arguments, stdin=stdin)
        return done.checked(arguments) if check else done

    @contextlib.contextmanager
    def in_process(self) -> Iterator[None]:
        """Until its end `cli` runs commands in this process, also on a site where it starts others."""
        with patch.object(self, "cli", partial(Site.cli, self)):
            yield

    def process(self, *arguments: str, stdin: str = "", check: bool = True) -> Completed:
        """Run one command in its own process, as a user does."""
        done = forked.run(
            self.command(*arguments), cwd=self.folder, env=self.process_environment(), stdin=stdin
        )
        return done.checked(arguments) if check else done

    def migrate(self) -> None:
        if self.database_url.startswith("postgresql"):
            self.cli("keys", "generate")
        self.cli("db", "upgrade")

    def add_orgs(self, *applications: Application, secret: str | None = None, **entry: Any) -> None:
        """Register applications at the provider and their orgs here, `secret` in place of the right one."""
        lines = []
        for app in applications:
            self.provider.add(app)
            lines.append(
                {"code": app.org_code, "name": app.org_code, "issuer": "main", "client_id": app.client_id}
                | {"client_secret": secret or app.client_secret}
                | entry
            )
        self.cli("orgs", "import", "-", stdin="".join(f"{json.dumps(line)}\n" for line in lines))

    def apply(self, text: str, *options: str, check: bool = True) -> Completed:
        """Apply a definitions file."""
        self._wait_for_the_catalogue()
        path = self.folder / "definitions.toml"
        path.write_text(text)
        return self.cli("apply", str(path), *options, check=check)

    def start_worker(
        self, launcher: Path | None = None, *, before: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start `python -m worker run`, or a script in its place; its output is appended to `log`.

        `before` is a command that takes it as its last arguments.
        """
        command = self.command("run")
        if launcher is not None:
            command[1:3] = [str(launcher)]
        command = [*before, *command]
        self._wait_for_the_killed()
        with self.log.open("ab") as log:
            worker = forked.start(
                command, cwd=self.folder, env=self.process_environment(), output=log, fork=self.may_fork
            )
        self._workers.append(worker)
        return worker

    def _wait_for_the_catalogue(self) -> None:
        """Give the first worker some seconds to store its handlers; a command reads those that are not."""
        if len(self._workers) == 1:
            worker, until = self._workers[0], time.monotonic() + 10.0
            while worker.poll() is None and "handlers.loaded" not in self.log_text():
                if time.monotonic() > until:
                    return
                time.sleep(0.05)

    def _wait_for_the_killed(self) -> None:
        """Give what a killed worker has left time to end: a fork starts at once and needs its lock."""
        on_file = self.database_url.startswith("sqlite")
        until = time.monotonic() + 10.0
        while on_file and self._workers and all(worker.poll() is not None for worker in self._workers):
            try:
                lock_sqlite_file(self.database_url).release()
                return
            except Busy:
                if time.monotonic() > until:
                    return
                time.sleep(0.02)

    def stop_worker(self, worker: subprocess.Popen[bytes], timeout: float = 45.0) -> int:
        """Drain it by SIGTERM and return its exit code."""
        worker.send_signal(signal.SIGTERM)
        return worker.wait(timeout=timeout)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def query(self, statement: str, *parameters: object) -> list[dict[str, Any]]:
        """Read rows; parameters are `?` in order."""
        if self.database_url.startswith("postgresql"):
            return self._query_postgres(statement.replace("?", "%s"), parameters)
        if self._connection is None:
            self._connection = sqlite3.connect(
                self.database_url.removeprefix("sqlite:///"), timeout=10, isolation_level=None
            )
            self._connection.row_factory = sqlite3.Row
        rows = self._connection.execute(statement, parameters).fetchall()
        return [{name: from_column(name, row[name]) for name in row.keys()} for row in rows]  # noqa: SIM118

    def _query_postgres(self, statement: str, parameters: Sequence[object]) -> list[dict[str, Any]]:
        if self._connection is None:
            self._connection = psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row)
        return list(self._connection.execute(statement, parameters or None).fetchall())

    def runs(self, org: str | None = None, definition: str | None = None) -> list[dict[str, Any]]:
        """The rows of `run_view`, oldest first."""
        wanted = {"org": org, "definition": definition}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1 = 1"
        return self.query(f"SELECT * FROM run_view WHERE {where} ORDER BY id", *given.values())

    def attempts(self, run_id: object) -> list[dict[str, Any]]:
        return self.query("SELECT * FROM attempts WHERE run_id = ? ORDER BY attempt", run_id)

    def wait_for_handlers(self, *names: str, timeout: float = 45.0) -> None:
        """Wait until the newest worker offers all of them."""

        def offered() -> bool:
            rows = self.query("SELECT handlers FROM workers WHERE ended_at IS NULL ORDER BY started_at DESC")
            return bool(rows) and set(names) <= set(rows[0]["handlers"])

        self._wait(offered, f"a worker that offers {', '.join(names)}", timeout)

    def wait_for_end(
        self, org: str | None = None, definition: str | None = None, *, timeout: float = 45.0
    ) -> dict[str, Any]:
        """Wait until the first run of the definition has ended; returns it."""

        def ended() -> dict[str, Any] | None:
            found = self.runs(org, definition)
            return found[0] if found and found[0]["state"] in FINAL else None

        found = self._wait(ended, f"the end of {org}/{definition}", timeout)
        assert found is not None
        return found

    def wait_for_state(
        self, definition: str, state: str, *, attempt: int = 1, timeout: float = 45.0
    ) -> dict[str, Any]:
        """Wait until a run of the definition is in that state at that attempt; returns it."""

        def found() -> dict[str, Any] | None:
            for run in self.runs(definition=definition):
                if (run["state"], run["attempt"]) == (state, attempt):
                    return run
            return None

        run = self._wait(found, f"{definition} {state} at attempt {attempt}", timeout)
        assert run is not None
        return run

    def zygote(self, worker: subprocess.Popen[bytes]) -> psutil.Process:
        """The process that forks the runs of this worker."""

        def found() -> list[psutil.Process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(worker.pid).children()
                return [child for child in children if child.name() == linux.ProcessName.ZYGOTE]
            return []

        return self._wait(found, "the zygote", 10.0)[0]

    def disconnect(self) -> None:
        """Close the test's own connection: its database goes away, or its server has gone."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        self.disconnect()

    def _wait(self, probe: Callable[[], T], what: str, timeout: float) -> T:
        try:
            return wait_until(probe, what, timeout=timeout)
        except AssertionError as error:
            runs = [
                {name: run[name] for name in ("org", "definition", "state", "reason", "detail", "attempt")}
                for run in self.runs()[-8:]
            ]
            tail = "\n".join(self.log_text().splitlines()[-25:])
            raise AssertionError(f"{error}\nnewest runs: {runs}\nworker's log:\n{tail}") from None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "worker", "--config", str(self.settings), *arguments]

    def process_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        path = [str(self.plugins), *filter(None, [os.environ.get("PYTHONPATH")])]
        return kept | {"PYTHONPATH": os.pathsep.join(path)} | self.environment


JSON_COLUMNS = {"handlers", "progress", "result", "error", "claims", "flags", "params", "data", "capacity"}


def from_column(name: str, value: Any) -> Any:
    """A column of SQLite as in PostgreSQL: JSON text becomes its value."""
    return json.loads(value) if name in JSON_COLUMNS and isinstance(value, str) else value


def application(org_code: str, **changes: Any) -> Application:
    """An M2M application for an org with AUDIENCE and the scope `read:kb`."""
    values: dict[str, Any] = {
        "org_code": org_code,
        "client_id": f"m2m-{org_code}",
        "client_secret": f"secret-of-{org_code}",
        "scopes": ("read:kb",),
        "audiences": (AUDIENCE,),
    }
    return Application(**values | changes)


def definition(org: str, name: str, handler: str, schedule: str = NEVER, **keys: Any) -> str:
    """One [[definition]] of a file for `apply`; further keys as Python values."""
    lines = [f"{key} = {toml_value(value)}" for key, value in keys.items()]
    head = [f"org = {json.dumps(org)}", f"name = {json.dumps(name)}", f"handler = {json.dumps(handler)}"]
    return "\n".join(["[[definition]]", *head, f"schedule = {json.dumps(schedule)}", *lines, ""])


def org_entry(code: str, **keys: Any) -> str:
    """One [[org]] of a file for `apply`, of the issuer main; further keys as Python values."""
    values = {"code": code, "issuer": "main"} | keys
    return "".join(["[[org]]\n", *(f"{key} = {toml_value(value)}\n" for key, value in values.items())])


def one_definition(
    org: str = "org_acme",
    name: str = "digest",
    handler: str = "acme.plain",
    schedule: str = "0 3 1 1 *",
    **keys: Any,
) -> str:
    """A file with an org and its only definition."""
    return org_entry(org) + definition(org, name, handler, schedule, **keys)


def toml_value(value: Any) -> str:
    """A Python value in TOML's inline form."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value)


@contextlib.contextmanager
def opened(site: Site) -> Iterator[Site]:
    """Close it at the end, and check that its log is as documented."""
    try:
        yield site
    finally:
        site.close()
    assert faults_of(site.log_text()) == []
