"""`serve`: a process that shows an installation and runs nothing of it."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

Process = subprocess.Popen[str]


@pytest.fixture
def port(site_on_either: Site) -> int:
    port = free_port()
    site_on_either.configure(web=f'listen = "127.0.0.1:{port}"')
    return port


@pytest.fixture
def served(site_on_either: Site, port: int) -> Iterator[Process]:
    with serving(site_on_either) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def serving(site: Site) -> Process:
    return subprocess.Popen(
        site.command("serve"), cwd=site.folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def status(port: int, path: str) -> int | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}").status_code
    except httpx.TransportError:
        return None


def test_it_shows_what_is_there_and_runs_nothing(site_on_either: Site, port: int, served: Process):
    site = site_on_either
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "tick", "acme.note", schedule="every 1s"))
    site.cli("definitions", "run", "org_acme", "tick")

    wait_until(lambda: status(port, "/readyz") == 200, "readiness")

    assert status(port, "/livez") == 200
    assert status(port, "/metrics") == 200
    assert status(port, "/api/v1/runs") == 401
    served.send_signal(signal.SIGTERM)
    assert served.wait(timeout=20) == 0
    assert [run["state"] for run in site.runs()] == ["waiting"]
    assert site.query("SELECT id FROM workers") == []


def test_a_port_that_is_taken_exits_75_though_it_is_the_default(site_on_either: Site, port: int):
    with socket.create_server(("127.0.0.1", port)):
        done = site_on_either.cli("serve", check=False)

    assert done.code == 75
    assert f"another process has 127.0.0.1:{port}" in done.err
    assert "fix: " in done.err


def test_with_nowhere_to_listen_it_exits_78(site_on_either: Site):
    site_on_either.configure(web='listen = ""')

    done = site_on_either.cli("serve", check=False)

    assert done.code == 78
    assert "web.listen=127.0.0.1:8470" in done.err
