"""Workers that die and hosts that hang: runs of hosts go on or are taken over, and nothing is done twice.

Hosts that are killed are tested in tests/faults/test_hosts.py, one without any worker in test_host.py,
and workers that drain in tests/integration/hosts/test_attempt_api.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.hosts import Hosts, opened_hosts
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import Provider

LEASE = 4.0
# The workers themselves run nothing.
EXECUTION = f'lease = "{LEASE:g}s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 0\nmax_inline = 0'
SECRET = "canary-secret-of-the-issuer"


class Fleet:
    """Two workers on PostgreSQL with an attempt listener each, and hosts that know both."""

    def __init__(self, site: Site, hosts: Hosts, ports: tuple[int, int], journal: Path) -> None:
        self.site = site
        self.hosts = hosts
        self.ports = ports
        self.journal = journal
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_workers(self) -> None:
        for port in self.ports:
            self.site.environment["WORKER_ATTEMPTS__LISTEN"] = f"127.0.0.1:{port}"
            self.workers.append(self.site.start_worker())
        self.site.environment.pop("WORKER_ATTEMPTS__LISTEN")

    def begin(self, name: str, handler: str, **params: Any) -> dict[str, Any]:
        """Run a handler, and wait until it runs on a host."""
        given = {"journal": str(self.journal), **params}
        self.site.apply(definition("org_acme", name, handler, params=given))
        self.site.cli("definitions", "run", "org_acme", name)
        run = self.site.wait_for_state(name, "running", timeout=60)
        self.until(lambda: read_journal(self.journal), "the handler")
        return run

    def steps(self) -> list[int]:
        return [line["step"] for line in read_journal(self.journal, "step")]

    def until(self, probe: Any, what: str, timeout: float = 45.0) -> Any:
        try:
            return wait_until(probe, what, timeout=timeout)
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in self.site.folder.glob("host-*/host.log"))
            raise AssertionError(f"{error}\n{logs}\n{self.site.log_text()[-2000:]}") from None


@pytest.fixture
def fleet(tmp_path: Path, provider: Provider, migrated_postgres_url: str, journal: Path) -> Iterator[Fleet]:
    ports = (free_port(), free_port())
    with opened(Site(tmp_path, migrated_postgres_url, provider)) as site:
        site.configure(execution=EXECUTION)
        install_handlers(site.plugins)
        site.migrate()
        site.add_orgs(application("org_acme", client_secret=SECRET))
        with opened_hosts(site, *ports) as hosts:
            made = Fleet(site, hosts, ports, journal)
            made.start_workers()
            yield made
            for worker in made.workers:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGCONT)


def in_use(fleet: Fleet) -> subprocess.Popen[bytes]:
    """The worker that the first host asks, by the connections of their processes."""

    def found() -> subprocess.Popen[bytes] | None:
        for worker, port in zip(fleet.workers, fleet.ports, strict=True):
            connections = psutil.Process(worker.pid).net_connections("tcp")
            if any(each.status == "ESTABLISHED" and each.laddr[1] == port for each in connections):
                return worker
        return None

    worker = fleet.until(found, "a connection of the host")
    assert worker is not None
    return worker


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill -9", "SIGSTOP"])
def test_a_worker_that_goes_away_does_not_disturb_a_hosts_runs(fleet: Fleet, number: signal.Signals) -> None:
    fleet.hosts.start()
    run = fleet.begin("count", "acme.steps", steps=60, pause=0.1)
    fleet.until(lambda: len(fleet.steps()) > 5, "steps")

    in_use(fleet).send_signal(number)

    ended = fleet.site.wait_for_state("count", "succeeded", timeout=60)
    assert ended["id"] == run["id"]
    assert ended["result"] == {"first": 0, "attempt": 1}
    assert fleet.steps() == list(range(1, 61))
    assert [row["outcome"] for row in fleet.site.attempts(run["id"])] == ["succeeded"]


def test_a_host_that_hangs_for_longer_than_its_lease_has_no_effect_afterwards(fleet: Fleet) -> None:
    host = fleet.hosts.start("h1")
    run = fleet.begin("count", "acme.steps", steps=100, pause=0.1)
    fleet.until(lambda: len(fleet.steps()) > 5, "steps")
    fleet.hosts.start("h2")
    first = {line["pid"] for line in read_journal(fleet.journal)}
    [before] = {line["fencing_token"] for line in read_journal(fleet.journal, "step")}

    host.send_signal(signal.SIGSTOP)
    stopped_at = read_journal(fleet.journal)[-1]["at"]
    fleet.site.wait_for_state("count", "running", attempt=2, timeout=60)
    fleet.until(lambda: len(read_journal(fleet.journal, "start")) == 2, "the second attempt")
    host.send_signal(signal.SIGCONT)
    fleet.until(lambda: not any(map(psutil.pid_exists, first)), "the end of the first attempt", 15)
    fleet.until(lambda: len(fleet.hosts.events("host.started", "h1")) == 2, "its next incarnation", 15)

    ended = fleet.site.wait_for_state("count", "succeeded", attempt=2, timeout=60)
    assert [row["outcome"] for row in fleet.site.attempts(run["id"])] == ["lost", "succeeded"]
    assert ended["result"]["attempt"] == 2
    late = [line["at"] for line in read_journal(fleet.journal) if line["pid"] in first]
    assert max(late) <= stopped_at + LEASE + 1
    second = {line["fencing_token"] for line in read_journal(fleet.journal, "step")} - {before}
    assert min(second) > before


def test_a_host_that_is_removed_stops_and_another_one_goes_on(fleet: Fleet) -> None:
    host = fleet.hosts.start("h1")
    run = fleet.begin("count", "acme.steps", steps=60, pause=0.1)
    fleet.until(lambda: len(fleet.steps()) > 5, "steps")
    fleet.hosts.start("h2")
    pids = {line["pid"] for line in read_journal(fleet.journal)}

    fleet.site.cli("hosts", "remove", "h1")

    assert host.wait(30) == 78
    assert "the workers do not accept this host" in fleet.hosts.log("h1").read_text()
    assert not any(map(psutil.pid_exists, pids))
    fleet.site.wait_for_state("count", "succeeded", attempt=2, timeout=60)
    assert [row["outcome"] for row in fleet.site.attempts(run["id"])] == ["lost", "succeeded"]


def test_a_host_knows_nothing_of_the_database_and_its_keys(fleet: Fleet) -> None:
    """Memory, environment and files of its processes; the control finds the org's token in its memory."""
    host = fleet.hosts.start(environment={"ORGWORKER_CANARY": "canary-of-the-environment"})
    fleet.begin("hold", "acme.block")
    keyring = (fleet.site.secrets / "keyring").read_text().split()[-1]
    database = fleet.site.database_url
    password = re.search(r"//([^@/]+)@", database)
    secrets = {"database": database, "key ring": keyring, "issuer": SECRET}
    if password is not None and ":" in password[1]:
        secrets["password"] = password[1].partition(":")[2]

    process = psutil.Process(host.pid)
    memory = b"".join(map(memory_of, [process, *process.children(recursive=True)]))
    assert fleet.hosts.folder().joinpath("token").read_text().encode() in memory
    assert b"canary-of-the-environment" in memory
    for name, secret in secrets.items():
        assert secret.encode() not in memory, name
    environment = b"".join(
        Path(f"/proc/{each.pid}/environ").read_bytes() for each in [process, *process.children()]
    )
    files = b"".join(path.read_bytes() for path in fleet.hosts.folder().rglob("*") if path.is_file())
    for name, secret in secrets.items():
        assert secret.encode() not in environment + files, name
    connected = {each.raddr[1] for each in process.net_connections("tcp") if each.raddr}
    assert connected <= set(fleet.ports)


def memory_of(process: psutil.Process) -> bytes:
    """All that a process can write of its own memory."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{process.pid}/mem", "rb") as memory:
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            place, rights = line.split()[:2]
            if "rw" not in rights or "[vvar" in line:
                continue
            start, end = (int(text, 16) for text in place.split("-"))
            with suppress(OSError, ValueError):
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)
