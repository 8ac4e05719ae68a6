"""An installation with several workers that are killed and stopped, and the history it leaves behind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

import psutil

from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.site import FINAL, NEVER, Site, application, definition
from tests.faults.checker import Fault, History, judge
from worker.demo.provider import Provider
from worker.engine.runners.child import linux

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("fault_jobs.py")
HANDLERS = (
    *("steps", "effects", "acts", "polite", "deaf", "spin", "spin_async", "sleep_in_c", "note", "leak"),
    *("paid", "leaf", "node", "tree", "deep", "wide"),
)
# Offered only where the settings allow inline handlers.
INLINE = ("idle",)
RECOVERABLE: dict[str, Any] = {
    "max_attempts": 100,
    "max_recoveries": 100,
    "retry_backoff": "100ms",
    "retry_backoff_max": "500ms",
}
Target = Literal["worker", "zygote", "child"]


@dataclass(frozen=True)
class Load:
    """A definition that is due again and again, in an org of its own with room for any number of runs."""

    handler: str
    period: float
    params: dict[str, Any] = field(default_factory=dict)
    pool: str | None = None


class Cluster(Site):
    """A site whose workers are many; keeps what befell them. `launcher` starts the next ones."""

    def __init__(
        self,
        folder: Path,
        database_url: str,
        provider: Provider,
        *,
        lease: float = 3.0,
        renew: float = 0.5,
        poll: float = 0.5,
        execution: str = "",
    ) -> None:
        super().__init__(folder, database_url, provider)
        self.lease, self.renew, self.poll = lease, renew, poll
        self.launcher = "worker"
        self.journal = self.out / "journal"
        self.faults: list[Fault] = []
        self.periods: dict[str, float] = {}
        self.placing: dict[str, timedelta] = {}
        self.loads: Sequence[Load] = ()
        self.logs: dict[subprocess.Popen[bytes], Path] = {}
        self.on_file = not database_url.startswith("postgresql")
        self.environment["PYTHONPATH"] = f"{self.plugins}:{ROOT}"
        self.execution = f"max_children = 500\n{execution}"
        self.write_settings()
        make_plugin(
            self.plugins,
            dist="fault-jobs",
            modules={"fault_jobs": SOURCE.read_text()},
            entry_points={f"fault.{name}": f"fault_jobs:{name}" for name in HANDLERS + INLINE},
        )
        self.migrate()

    def behind(self, port: int, query: str = "") -> None:
        """Let commands and workers from now on reach PostgreSQL through a proxy on that port.

        `query` are libpq's parameters.
        """
        direct = self.database_url
        netloc = f"postgres@127.0.0.1:{port}"
        self.database_url = urlsplit(direct)._replace(netloc=netloc, query=query).geturl()
        self.write_settings()
        self.database_url = direct

    def write_settings(self) -> None:
        """Write worker.toml for the workers that start from now on."""
        times = {"lease": self.lease, "renew": self.renew, "poll": self.poll}
        lines = [f'{name} = "{round(seconds * 1000)}ms"' for name, seconds in times.items()]
        self.configure(execution="\n".join([*lines, self.execution]))

    def command(self, *arguments: str) -> list[str]:
        """As a site's, with another module than `worker` where a launcher is set."""
        return [sys.executable, "-m", self.launcher, "--config", str(self.settings), *arguments]

    def define(self, org: str, name: str, handler: str, schedule: str = NEVER, **keys: Any) -> str:
        """A definition that survives any number of faults, its handler given the journal."""
        params = {"journal": str(self.journal)} | keys.pop("params", {})
        return definition(org, name, handler, schedule, params=params, **(RECOVERABLE | keys))

    def start(self, *definitions: str, org: str = "org_acme") -> None:
        """Register an org and its definitions."""
        self.add_orgs(application(org))
        self.apply("\n".join(definitions), "--allow-unknown-handlers")

    def run_now(self, name: str, org: str = "org_acme") -> dict[str, Any]:
        self.cli("definitions", "run", org, name)
        return self.runs(definition=name)[-1]

    def start_worker(self, *arguments: Any, **keys: Any) -> subprocess.Popen[bytes]:
        """As a site's, with a log of its own."""
        self.log = self.folder / f"worker{len(self.logs)}.log"
        worker = super().start_worker(*arguments, **keys)
        self.logs[worker] = self.log
        return worker

    def log_text(self) -> str:
        """The logs of all workers, one behind the other."""
        return "".join(path.read_text(errors="replace") for path in self.logs.values())

    def up(self) -> subprocess.Popen[bytes]:
        """A worker that has started and offers every handler."""
        worker = self.start_worker()
        self._wait(lambda: self.offers(worker), "a worker that offers its handlers", 60.0)
        return worker

    def offers(self, worker: subprocess.Popen[bytes]) -> bool:
        assert worker.poll() is None, f"the worker has ended: {self.log_text()[-2000:]}"
        row = self.row_of(worker)
        return row is not None and {f"fault.{name}" for name in HANDLERS} <= set(row["handlers"])

    def rows_of(self, worker: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
        """The incarnations of a process in `workers`, the newest first."""
        return self.query("SELECT * FROM workers WHERE pid = ? ORDER BY started_at DESC", worker.pid)

    def row_of(self, worker: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """Its newest incarnation, if it has begun."""
        rows = self.rows_of(worker)
        return rows[0] if rows else None

    def id_of(self, worker: subprocess.Popen[bytes]) -> str:
        row = self.row_of(worker)
        assert row is not None
        return str(row["id"])

    def wait_for(self, probe: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
        """As `wait_until`, and an error shows the newest runs and the log."""
        return self._wait(probe, what, timeout)

    def saved(self, run: str, attempt: int) -> int:
        """The last step that an attempt has saved."""
        return max((e["step"] for e in self.lines("saved", run) if e["attempt"] == attempt), default=0)

    def lines(self, who: str | None = None, run: object = None) -> list[dict[str, Any]]:
        """What handlers wrote, in order; of one run if asked."""
        return [line for line in read_journal(self.journal, who) if run in (None, line["run"])]

    def processes(self, worker: subprocess.Popen[bytes], target: Target) -> list[psutil.Process]:
        """The living processes of that kind below a worker."""
        try:
            if target == "worker":
                return [psutil.Process(worker.pid)]
            zygotes = [
                child
                for child in psutil.Process(worker.pid).children()
                if child.name() == linux.ProcessName.ZYGOTE and child.status() != psutil.STATUS_ZOMBIE
            ]
            if target == "zygote":
                return zygotes
            return [child for zygote in zygotes for child in zygote.children()]
        except psutil.NoSuchProcess:
            return []

    def kill(self, worker: subprocess.Popen[bytes], target: Target, process: psutil.Process) -> None:
        """SIGKILL, written down."""
        identity, at = self.id_of(worker), datetime.now(UTC)
        process.kill()
        self.faults.append(Fault("kill", target, identity, at))
        if target == "worker":
            worker.wait()

    @contextmanager
    def stopped(
        self, worker: subprocess.Popen[bytes], target: Target, process: psutil.Process
    ) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end, written down."""
        identity, at = self.id_of(worker), datetime.now(UTC)
        process.suspend()
        try:
            yield
        finally:
            process.resume()
            self.faults.append(Fault("stop", target, identity, at, datetime.now(UTC)))

    def drain(self, worker: subprocess.Popen[bytes], timeout: float = 30.0) -> None:
        """SIGTERM, and exit code 0."""
        assert self.stop_worker(worker, timeout) == 0, self.log_text()[-3000:]

    def all_ended(self) -> bool:
        return all(run["state"] in FINAL for run in self.runs())

    def assert_kept(self) -> None:
        """Fail with the checker's objections, and beside them what befell whom."""
        history = self.history()
        objections = judge(history)
        if not objections:
            return
        befell = [(fault.at, fault.until, fault.kind, fault.target, fault.worker) for fault in self.faults]
        lives = [(row["started_at"], row["ended_at"], row["id"], row["pid"]) for row in history.workers]
        told = [*objections, "", "faults:", *map(str, sorted(befell)), "workers:", *map(str, sorted(lives))]
        told += self._of_runs(objections, history)
        raise AssertionError("\n".join([*told, "log:", self.log_text()[-200_000:]]))

    def _of_runs(self, objections: Sequence[str], history: History) -> Iterator[str]:
        """What is known of the first runs that are objected to: attempts, first and last acts, log lines."""
        log = self.log_text().splitlines()
        named = (re.match(r"run ([0-9a-f-]{36})", objection) for objection in objections)
        for run in list(dict.fromkeys(found[1] for found in named if found))[:5]:
            yield f"run {run}:"
            for row in (row for row in history.attempts if row["run_id"] == run):
                acts = [e["at"] for e in history.journal if (e["run"], e["attempt"]) == (run, row["attempt"])]
                yield (
                    f"  attempt {row['attempt']} {row['outcome']} of {row['worker_id']} "
                    f"{row['started_at']} to {row['ended_at']}, acted {acts[:1]} to {acts[-1:]}"
                )
            yield from (f"  {line}" for line in log if run in line)

    def history(self) -> History:
        """All that the checker may know."""
        named = "JOIN definitions d ON d.id = s.definition_id"
        return History(
            runs=instants(self.runs()),
            attempts=instants(self.query("SELECT * FROM attempts")),
            skips=instants(self.query(f"SELECT s.*, d.name AS definition FROM skips s {named}")),
            workers=instants(self.query(WORKERS)),
            checkpoints=instants(self.query("SELECT * FROM checkpoints")),
            journal=[line | {"at": datetime.fromtimestamp(line["at"], UTC)} for line in self.lines()],
            lease=timedelta(seconds=self.lease),
            by_lease=not self.on_file,
            poll=timedelta(seconds=self.poll),
            faults=tuple(self.faults),
            periods=self.periods,
            placing=self.placing,
        )


WORKERS = "SELECT w.*, h.pool FROM workers w LEFT JOIN hosts h ON h.id = w.host_id"
INSTANTS = {"scheduled_for", "available_at", "skipped_from", "skipped_until"}


def instants(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of either database with aware instants, and ids as text."""
    return [{name: _value(name, value) for name, value in row.items()} for row in rows]


def _value(name: str, value: Any) -> Any:
    if isinstance(value, str) and (name in INSTANTS or name.endswith("_at") or name == "lease_until"):
        return datetime.fromisoformat(value)
    return str(value) if isinstance(value, UUID) else value


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
