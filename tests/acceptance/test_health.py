"""A real worker's HTTP port: alive, ready, draining, frozen."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance import freezing_worker
from tests.fakes.hook import Hook
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

ROOT = Path(__file__).parents[2]


class Port:
    """The HTTP port of a worker; an answer of status 0 is none."""

    def __init__(self) -> None:
        self.number = free_port()
        self.web = f'listen = "127.0.0.1:{self.number}"'

    def get(self, path: str) -> tuple[int, str]:
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.number}{path}", timeout=5)
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.text

    def wait_for(self, path: str, status: int) -> str:
        return wait_until(lambda: (got := self.get(path))[0] == status and got[1], f"{path} {status}")


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(0.1)
        yield manager


def words(manager: socket.socket, seconds: float) -> list[str]:
    """What the worker says to its manager for so long."""
    until, heard = time.monotonic() + seconds, []
    while time.monotonic() < until:
        try:
            heard += manager.recv(4096).decode().splitlines()
        except TimeoutError:
            continue
    return heard


def test_a_worker_is_ready_then_drains_and_one_bad_org_changes_nothing(
    site: Site, port: Port, tmp_path: Path
):
    site.configure(web=port.web, execution='drain = "3s"')
    site.add_orgs(application("org_bad"), secret="not-the-secret")
    site.add_orgs(application("org_good"))
    site.apply(
        definition("org_bad", "note", "acme.note")
        + definition("org_good", "block", "acme.block", params={"journal": str(tmp_path / "out" / "journal")})
    )
    worker = site.start_worker()
    port.wait_for("/readyz", 200)
    site.cli("definitions", "run", "org_bad", "note")
    site.cli("definitions", "run", "org_good", "block")
    site.wait_for_state("block", "running")
    wait_until(lambda: "org.parked" in site.log_text(), "the bad org to be parked")

    assert port.get("/livez")[0] == port.get("/readyz")[0] == 200
    used = 'orgworker_slots_used{isolation="child"} 1.0'
    wait_until(lambda: used in port.get("/metrics")[1], "the run of the bad org to give back its slot")
    metrics = port.get("/metrics")[1]
    families = text_string_to_metric_families(metrics)
    served = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert served <= set(re.findall(r"(?m)^\| `(\w+)`", (ROOT / "docs/reference/metrics.md").read_text()))
    assert "org_bad" not in metrics

    worker.terminate()
    assert '"draining"' in port.wait_for("/readyz", 503)
    assert port.get("/livez")[0] == 200
    assert worker.wait(timeout=20) == 0


def test_the_service_manager_hears_when_it_is_ready_how_it_is_and_that_it_drains(
    site: Site, port: Port, tmp_path: Path, notified: socket.socket
):
    site.configure(web=port.web, execution='drain = "3s"')
    site.add_orgs(application("org_acme"))
    site.apply(
        definition("org_acme", "block", "acme.block", params={"journal": str(tmp_path / "out" / "journal")})
    )
    site.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}

    def hear(word: str) -> list[str]:
        """What it says up to the message with that word, which is the last."""
        heard: list[str] = []

        def found() -> bool:
            heard.extend(words(notified, 0.1))
            return word in heard

        wait_until(found, f"the worker to say {word}; it said {heard}")
        return heard

    worker = site.start_worker()
    hear("READY=1")
    # Whoever waits for READY goes on to the next worker: this one has to take work by now.
    assert port.get("/readyz")[0] == 200
    site.cli("definitions", "run", "org_acme", "block")
    # A run whose handler was not called yet would be handed back at once, and nothing be left to wait for.
    wait_until((tmp_path / "out" / "journal").exists, "the handler to begin")

    worker.terminate()
    heard = hear("STOPPING=1")
    assert "EXTEND_TIMEOUT_USEC=13000000" in heard
    # A worker that drains is alive: its manager must not kill it for the loops that have ended.
    heard = words(notified, 1.0)
    assert heard.count("WATCHDOG=1") >= 2
    assert any(line.startswith("STATUS=draining; runs: 1 of") for line in heard)
    assert port.get("/livez")[0] == 200
    assert worker.wait(timeout=20) == 0
    assert "READY=1" not in words(notified, 0.2)


def test_a_frozen_scheduler_fails_the_check_starves_the_watchdog_and_raises_the_alarm(
    site: Site, port: Port, tmp_path: Path, notified: socket.socket, hook: Hook
):
    ping = f'"{hook.server.url}/ping"'
    site.configure(web=port.web, extra=hook.settings(overdue='"3s"', deadman_url=ping, deadman_every='"1s"'))
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "tick", "acme.note", schedule="every 1s"))
    freeze = tmp_path / "freeze"
    site.environment |= {
        freezing_worker.FILE: str(freeze),
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "600000",
    }
    site.start_worker(Path(freezing_worker.__file__))
    port.wait_for("/readyz", 200)
    heard = words(notified, 1.0)
    assert heard.count("WATCHDOG=1") >= 2
    assert [line for line in heard if line.startswith("STATUS=runs: ") and "; lease: " in line]
    wait_until(lambda: len(hook.pings) >= 2, "signs of life")
    # One a second: less than half a second late is what a busy machine may add to the first.
    assert hook.pings[-1] - hook.pings[0] >= len(hook.pings) - 1.5

    freeze.touch()

    assert '"scheduler"' in port.wait_for("/livez", 503)
    words(notified, 0.5)
    pings = len(hook.pings)
    heard = words(notified, 1.5)
    assert "WATCHDOG=1" not in heard
    assert all(line.startswith("STATUS=the loop scheduler stands still; runs: ") for line in heard)
    assert heard
    assert port.get("/readyz")[0] == 503
    alarm = hook.wait_for("overdue", "firing")
    assert (alarm["org"], alarm["definition"]) == ("org_acme", "tick")
    # Overdue after 3 s, and told within 3 s more; one for a machine that is busy.
    assert 3 <= alarm["seconds"] < 7
    assert len(hook.pings) == pings

    freeze.unlink()

    port.wait_for("/livez", 200)
    hook.wait_for("overdue", "resolved")
    wait_until(lambda: len(hook.pings) > pings, "a sign of life")
    assert "WATCHDOG=1" in words(notified, 1.0)
    assert hook.told("overdue") == [("overdue", "firing"), ("overdue", "resolved")]


def test_a_handler_that_blocks_the_whole_loop_silences_no_alarm(
    site: Site, port: Port, tmp_path: Path, notified: socket.socket, hook: Hook
):
    """Nothing of the loop answers then; the threads beside it say what is wrong, and name the handler."""
    ping = f'"{hook.server.url}/ping"'
    site.configure(
        web=port.web,
        execution='inline = ["acme-jobs"]',
        extra=hook.settings(overdue='"3s"', deadman_url=ping, deadman_every='"1s"'),
    )
    site.add_orgs(application("org_acme"))
    site.apply(
        definition("org_acme", "tick", "acme.note", schedule="every 1s")
        + definition("org_acme", "stuck", "acme.stuck_inline", params={"seconds": 12})
    )
    site.environment |= {
        freezing_worker.FILE: str(tmp_path / "never"),
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "600000",
    }
    site.start_worker(Path(freezing_worker.__file__))
    port.wait_for("/readyz", 200)
    site.cli("definitions", "run", "org_acme", "stuck")

    wait_until(lambda: '"loop.blocked"' in site.log_text(), "the blocked loop to be told")
    words(notified, 0.5)
    assert words(notified, 1.0) == []
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"http://127.0.0.1:{port.number}/livez", timeout=1)
    alarm = hook.wait_for("overdue", "firing")
    assert 3 <= alarm["seconds"] < 7
    [blocked] = [json.loads(line) for line in site.log_text().splitlines() if '"loop.blocked"' in line]
    assert blocked["handler"] == "acme.stuck_inline"
    assert "acme_jobs.py" in blocked["where"]
    hook.wait_for("overdue", "resolved")
