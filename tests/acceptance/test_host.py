"""`python -m worker host` with real workers: what it needs to start, and what becomes of it and its runs.

What hosts run is tested in test_where_runs_execute.py, a drain that hands runs back in test_temporal.py,
hosts and workers that are killed or stopped in tests/faults/test_hosts.py, and workers that drain in
tests/integration/hosts/test_attempt_api.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes import forked
from tests.fakes.certificates import make_certificate
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.hosts import Hosts, opened_hosts
from tests.fakes.pages import ROOT, blocks
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.site import Site, application, definition, opened, wait_until
from tests.faults.proxy import Proxy
from worker.demo.provider import Provider
from worker.store import schema

pytestmark = pytest.mark.feature("hosts")

LEASE = 4.0
# The workers themselves run nothing.
EXECUTION = f'lease = "{LEASE:g}s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 0\nmax_inline = 0'
SECRET = "canary-secret-of-the-issuer"


class Fleet:
    """Two workers on PostgreSQL with an attempt listener each, and hosts that know both."""

    def __init__(self, site: Site, hosts: Hosts, ports: tuple[int, int]) -> None:
        self.site = site
        self.hosts = hosts
        self.ports = ports
        self.journal = site.out / "journal"
        for port in ports:
            site.environment["WORKER_ATTEMPTS__LISTEN"] = f"127.0.0.1:{port}"
            site.start_worker()
        site.environment.pop("WORKER_ATTEMPTS__LISTEN")

    def begin(self, name: str, handler: str, **params: Any) -> dict[str, Any]:
        """Run a handler, and wait until it runs on a host."""
        self.journal = self.site.out / name
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


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, provider: Provider, postgres_server: Server
) -> Iterator[Fleet]:
    ports = (free_port(), free_port())
    with ExitStack() as stack:
        migrated = postgres_server.template("migrated", schema.upgrade)
        url = stack.enter_context(postgres_server.new_database(migrated))
        site = stack.enter_context(opened(Site(tmp_path_factory.mktemp("fleet"), url, provider)))
        site.configure(execution=EXECUTION)
        install_handlers(site.plugins)
        site.migrate()
        site.add_orgs(application("org_acme", client_secret=SECRET))
        yield Fleet(site, stack.enter_context(opened_hosts(site, *ports)), ports)


def test_a_host_that_hangs_for_longer_than_its_lease_has_no_effect_afterwards_nor_one_that_is_removed(
    fleet: Fleet,
) -> None:
    """Each time another one goes on with the run."""
    host = fleet.hosts.start("h1")
    run = fleet.begin("count", "acme.steps", steps=160, pause=0.1)
    fleet.until(lambda: len(fleet.steps()) > 5, "steps")
    other = fleet.hosts.start("h2")
    first = {line["pid"] for line in read_journal(fleet.journal)}
    [before] = {line["fencing_token"] for line in read_journal(fleet.journal, "step")}

    host.send_signal(signal.SIGSTOP)
    stopped_at = read_journal(fleet.journal)[-1]["at"]
    fleet.site.wait_for_state("count", "running", attempt=2, timeout=60)
    fleet.until(lambda: len(read_journal(fleet.journal, "start")) == 2, "the second attempt")
    host.send_signal(signal.SIGCONT)
    fleet.until(lambda: not any(map(psutil.pid_exists, first)), "the end of the first attempt", 15)
    fleet.until(lambda: len(fleet.hosts.events("host.started", "h1")) == 2, "its next incarnation", 15)
    late = [line["at"] for line in read_journal(fleet.journal) if line["pid"] in first]
    assert max(late) <= stopped_at + LEASE + 1
    pids = {line["pid"] for line in read_journal(fleet.journal)} - first

    fleet.site.cli("hosts", "remove", "h2")
    assert other.wait(30) == 78
    assert "the workers do not accept this host" in fleet.hosts.log("h2").read_text()
    assert not any(map(psutil.pid_exists, pids))

    ended = fleet.site.wait_for_state("count", "succeeded", attempt=3, timeout=60)
    assert [row["outcome"] for row in fleet.site.attempts(run["id"])] == ["lost", "lost", "succeeded"]
    assert ended["result"]["attempt"] == 3
    later = {line["fencing_token"] for line in read_journal(fleet.journal, "step")} - {before}
    assert min(later) > before
    host.terminate()
    assert host.wait(30) == 0


def test_a_host_knows_nothing_of_the_database_and_its_keys(fleet: Fleet) -> None:
    """Memory, environment and files of its processes; the control finds the org's token in its memory."""
    host = fleet.hosts.start("h3", environment={"ORGWORKER_CANARY": "canary-of-the-environment"})
    fleet.begin("hold", "acme.block")
    keyring = (fleet.site.secrets / "keyring").read_text().split()[-1]
    database = fleet.site.database_url
    password = re.search(r"//([^@/]+)@", database)
    secrets = {"database": database, "key ring": keyring, "issuer": SECRET}
    if password is not None and ":" in password[1]:
        secrets["password"] = password[1].partition(":")[2]

    process = psutil.Process(host.pid)
    memory = b"".join(map(memory_of, [process, *process.children(recursive=True)]))
    assert fleet.hosts.folder("h3").joinpath("token").read_text().encode() in memory
    assert b"canary-of-the-environment" in memory
    for name, secret in secrets.items():
        assert secret.encode() not in memory, name
    environment = b"".join(
        Path(f"/proc/{each.pid}/environ").read_bytes() for each in [process, *process.children()]
    )
    files = b"".join(path.read_bytes() for path in fleet.hosts.folder("h3").rglob("*") if path.is_file())
    for name, secret in secrets.items():
        assert secret.encode() not in environment + files, name
    connected = {each.raddr[1] for each in process.net_connections("tcp") if each.raddr}
    assert connected <= set(fleet.ports)


def test_a_host_waits_for_the_first_worker_and_freezes_its_runs_without_one(fleet: Fleet) -> None:
    """Its health says so."""
    port = free_port()

    def lacking() -> list[str]:
        try:
            body: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/readyz").json()
        except httpx.TransportError:
            return ["an answer"]
        return list(body["lacking"])

    with Proxy(fleet.ports[0]) as way:
        way.become("refuse")
        listen = f'[web]\nhealth_listen = "127.0.0.1:{port}"'
        fleet.hosts.prepare("h4", ports=[way.port], extra=listen)
        host = fleet.hosts.launch("h4")
        fleet.until(lambda: fleet.hosts.events("control.lost", "h4"), "a first try")
        assert host.poll() is None
        assert lacking() != []
        way.become("pass")
        fleet.until(lambda: lacking() == [], "readiness")
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        assert "orgworker" in httpx.get(f"http://127.0.0.1:{port}/metrics").text

        fleet.begin("freezing", "acme.steps", steps=10_000, pause=0.02)
        earlier = len(fleet.hosts.events("children.frozen", "h4"))
        way.become("hang")
        cut = time.time()
        (frozen,) = fleet.until(lambda: fleet.hosts.events("children.frozen", "h4")[earlier:], "frozen runs")
        fleet.until(lambda: {"admission", "lease"} & set(lacking()), "that no worker answers")
        assert frozen["runs"] == 1
        assert read_journal(fleet.journal)[-1]["at"] <= cut + LEASE + 1
    host.kill()
    fleet.site.cli("runs", "cancel", str(fleet.site.runs(definition="freezing")[0]["id"]))


@pytest.mark.parametrize(
    ("token", "mode", "arguments", "message"),
    [
        ("wrong", 0o600, (), "error: the workers do not accept this host"),
        ("", 0o600, ("--pool", "us"), "error: --pool us: the token in .* is for the pool eu"),
        ("", 0o644, (), "host.token_file: others may read /.*/token"),
    ],
)
def test_a_token_that_is_not_accepted_exits_78(
    fleet: Fleet, token: str, mode: int, arguments: tuple[str, ...], message: str
) -> None:
    name = f"refused-{len(message)}"
    file = fleet.hosts.prepare(name, "eu") / "token"
    given = token or file.read_text()
    file.write_text(given)
    file.chmod(mode)

    assert fleet.hosts.launch(name, *arguments).wait(30) == 78
    said = fleet.hosts.log(name).read_text()
    assert re.search(message, said)
    assert token or given not in said


def test_the_command_of_the_page_starts_a_host(fleet: Fleet) -> None:
    """That of docs/operating/hosts.md, whose host has a token of the pool `eu-gpu`."""
    page = blocks((ROOT / "docs" / "operating" / "hosts.md").read_text(encoding="utf-8"))
    [command] = [block.text.split() for block in page if block.marks.get("by") == "test_host"]
    assert command[:7] == ["$", "python", "-m", "worker", "--config", "host.toml", "host"]
    fleet.hosts.prepare("page", "eu-gpu")

    host = fleet.hosts.launch("page", *command[7:])

    fleet.until(lambda: fleet.hosts.events("host.started", "page"), "the host")
    host.terminate()
    assert host.wait(30) == 0
    assert len(fleet.hosts.events("host.stopped", "page")) == 1


def test_doctor_on_a_host_says_what_it_lacks(fleet: Fleet) -> None:
    checks = ("token", "control", "sandbox", "network", "broker", "changeable_files", "trusted_code")
    folder = fleet.hosts.prepare("doctor", ports=fleet.ports[:1])

    def failed(mode: str) -> tuple[int, list[str]]:
        command = fleet.hosts.command("doctor", "doctor", "-o", "json")
        done = forked.run(command, cwd=folder, env=os.environ | {"WORKER_EXECUTION__SANDBOX": mode})
        assert tuple(row["check"] for row in done.json()) == checks
        return done.code, [row["check"] for row in done.json() if not row["ok"]]

    assert failed("auto") == (0, [])
    # The token belongs to the account of the host, so a handler could open it to others.
    assert failed("require") == (1, ["changeable_files"])
    (folder / "token").write_text("another")
    assert failed("auto") == (1, ["control"])


def test_hosts_and_workers_speak_tls(site: Site, tmp_path: Path) -> None:
    """A host does not send its token to a worker with another certificate."""
    port = free_port()
    ours, other = (make_certificate(tmp_path / name) for name in ("ours.pem", "other.pem"))
    attempts = f'[attempts]\nlisten = "127.0.0.1:{port}"\ncertificate = "{ours}"\nkey = "{ours}"'
    site.configure(execution=EXECUTION, extra=attempts)
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "note", "acme.note", params={"journal": str(site.out / "journal")}))
    site.start_worker()
    with (
        opened_hosts(site, port, ca_file=ours) as hosts,
        opened_hosts(site, port, ca_file=other) as strangers,
    ):
        strangers.start("h2")
        wait_until(lambda: strangers.events("control.lost", "h2"), "that the certificate is refused")
        hosts.start("h1")
        site.cli("definitions", "run", "org_acme", "note")

        assert site.wait_for_end("org_acme", "note", timeout=60)["state"] == "succeeded"
        listed = {
            row["name"]: row["state"] for row in json.loads(site.cli("hosts", "list", "-o", "json").out)
        }
        assert listed == {"h1": "ready", "h2": "absent"}
        [lost, *_] = strangers.events("control.lost", "h2")
        assert lost["error"] == "ConnectError"


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
