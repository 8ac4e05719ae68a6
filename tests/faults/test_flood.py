"""5,000 idle, slow-header and slow-body connections: health is answered, and none outlives its deadline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.ports import free_port
from tests.fakes.site import Site, opened, wait_until
from worker.demo.provider import Provider
from worker.kit.web.connections import MAX_CONNECTIONS, ClientDeadlines

# Seconds by which a connection may be older: the server's and the client's loops share a machine.
SLACK = 1.5
ASK = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

FLOODS = {
    # name: the process, settings of [web], and how many addresses the clients come from
    "cap off, health on listen": ("run", "connections_per_address = 0", 1),
    "cap on, health on listen": ("serve", "connections_per_address = 100", 1),
    "cap on, many addresses": ("serve", "connections_per_address = 100", 200),
    "cap off, health apart": ("serve", "connections_per_address = 0\nhealth_listen = ADDRESS", 1),
    "cap on, health apart": ("run", "connections_per_address = 100\nhealth_listen = ADDRESS", 50),
}


@pytest.fixture
def site(tmp_path: Path, provider: Provider, migrated_sqlite_url: str) -> Iterator[Site]:
    with opened(Site(tmp_path, migrated_sqlite_url, provider)) as made:
        made.configure()
        made.migrate()
        yield made


def flood(site: Site, verb: str, web: str, sources: int, *, count: int, seconds: float, p99: float) -> None:
    """Start a worker or `serve`, flood `listen`, and probe health meanwhile; `p99` is a limit in seconds."""
    port, health_port = free_port(), free_port()
    site.configure(
        web=f'listen = "127.0.0.1:{port}"\n' + web.replace("ADDRESS", f'"127.0.0.1:{health_port}"')
    )
    asked_port = health_port if "health_listen" in web else port
    attack = {"port": port, "count": count, "sources": sources, "seconds": seconds, "again": count // 250}
    with site.log.open("ab") as log:
        serving = subprocess.Popen(site.command(verb), cwd=site.folder, stdout=log, stderr=log)
    try:
        wait_until(lambda: is_alive(asked_port), "health")
        with subprocess.Popen(
            [sys.executable, "-m", "tests.faults.flood", json.dumps(attack)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        ) as flooding:
            took = ask_until_ended(flooding, asked_port)
            done = json.loads(flooding.communicate()[0])
        counted = httpx.get(f"http://127.0.0.1:{asked_port}/metrics").text
    finally:
        serving.terminate()
        serving.wait(20)

    found = sorted(took)[len(took) * 99 // 100]
    said = (
        f"{verb}, {web!r}, {sources} addresses: {len(took)} probes, p99 {1000 * found:.0f} ms, flood: {done}"
    )
    print(said, flush=True)
    assert (done["failed"], done["opened"] >= count) == (0, True), said
    assert done["still_open"] <= MAX_CONNECTIONS
    deadlines = ClientDeadlines()
    for kind, limit in (
        ("idle", deadlines.headers),
        ("headers", deadlines.headers),
        ("body", deadlines.body),
    ):
        assert done["oldest"][kind] <= limit + SLACK, said
    assert found < p99, said
    assert ('reason="address"' in counted) == (sources == 1 and "address = 100" in web and count > 100)


def is_alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    except httpx.TransportError:
        return False


def ask_until_ended(flooding: subprocess.Popen[str], port: int) -> list[float]:
    """How long each /livez took, in seconds; every one must be answered 200."""
    took = []
    while flooding.poll() is None:
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as asking:
            asking.sendall(ASK)
            answer = asking.recv(4096)
        took.append(time.perf_counter() - began)
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
        time.sleep(0.01)
    return took


def test_a_flood_does_not_keep_health_from_being_answered(site: Site, full: bool):
    if full:
        for verb, web, sources in FLOODS.values():
            flood(site, verb, web, sources, count=5000, seconds=20, p99=0.1)
    else:
        # The gate runs beside other tests, which take the processor away for a while.
        flood(site, *FLOODS["cap on, health on listen"], count=300, seconds=11, p99=0.5)
