"""A pool whose runs Temporal places on hosts: a real dev server, worker and host."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from temporalio.client import Client

from tests.fakes.handlers import read_journal
from tests.fakes.hosts import Hosts
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until
from tests.fakes.temporal import DevServer

EXECUTION = 'lease = "15s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 2'


class TemporalPool:
    """A site whose pool `gpu` is placed by Temporal."""

    def __init__(self, site: Site, temporal: DevServer, place_timeout: str = "3s") -> None:
        self.site = site
        self.temporal = temporal
        self.port = port = free_port()
        site.configure(
            execution=EXECUTION,
            extra=f"""\
[attempts]
listen = "127.0.0.1:{port}"
[pools.gpu]
placer = "temporal"
[temporal]
address = "{temporal.address}"
place_timeout = "{place_timeout}"
""",
        )
        self.hosts = Hosts(site, port)

    def apply(self, name: str, handler: str, **keys: Any) -> None:
        self.site.apply(definition("org_acme", name, handler, pool="gpu", **keys))

    def run(self, name: str) -> str:
        return str(json.loads(self.site.cli("definitions", "run", "org_acme", name, "-o", "json").out)["id"])

    def placements(self) -> int:
        return int(self.site.query("SELECT count(*) AS n FROM placements")[0]["n"])

    def live(self, run_id: str) -> dict[str, Any] | None:
        rows = self.site.query("SELECT * FROM live_runs WHERE id = ?", run_id)
        return rows[0] if rows else None

    def wait_for(self, run_id: str, state: str, reason: str | None = None) -> dict[str, Any]:
        """Wait until an unfinished run is in that state for that reason; returns its row."""

        def found() -> dict[str, Any] | None:
            row = self.live(run_id)
            return row if row is not None and (row["state"], row["reason"]) == (state, reason) else None

        row = wait_until(found, f"run {run_id} to be {state} ({reason})")
        assert row is not None
        return row

    def _offers(self) -> bool:
        rows = self.site.query("SELECT handlers FROM workers WHERE host_id IS NOT NULL")
        # Its plug-ins are read one after the other.
        return bool(rows) and {"acme.note", "acme.steps", "http.request"} <= set(rows[0]["handlers"])

    def serve(self, host: str = "h1", **options: str) -> subprocess.Popen[bytes]:
        """A worker, a host that offers its handlers, and an org."""
        self.worker = self.site.start_worker()
        self.site.wait_for_handlers("acme.steps")
        started = self.hosts.start(host, pool="gpu", **options)
        self.site.add_orgs(application("org_acme"))
        wait_until(self._offers, "the host's handlers")
        return started


@pytest.fixture
def pool(site_on_either: Site, tmp_path: Path) -> Iterator[TemporalPool]:
    temporal = DevServer(tmp_path)
    temporal.start()
    made = TemporalPool(site_on_either, temporal)
    yield made
    made.hosts.close()
    temporal.stop()


@pytest.fixture
def pool_on_file(site: Site, tmp_path: Path) -> Iterator[TemporalPool]:
    temporal = DevServer(tmp_path)
    temporal.start()
    made = TemporalPool(site, temporal)
    yield made
    made.hosts.close()
    temporal.stop()


@pytest.fixture
def patient_pool(site: Site, tmp_path: Path) -> Iterator[TemporalPool]:
    """Runs may be on their way for longer than the test takes."""
    temporal = DevServer(tmp_path)
    temporal.start()
    made = TemporalPool(site, temporal, place_timeout="60s")
    yield made
    made.hosts.close()
    temporal.stop()


def test_temporal_places_runs_on_a_host_of_the_pool(pool: TemporalPool, journal: Any) -> None:
    site = pool.site
    pool.serve()
    pool.apply("note", "acme.note", params={"journal": str(journal)})

    pool.run("note")

    ended = site.wait_for_state("note", "succeeded", timeout=60)
    [host] = json.loads(site.cli("hosts", "list", "-o", "json").out)
    [attempt] = site.attempts(ended["id"])
    assert (str(attempt["worker_id"]), attempt["outcome"], attempt["fencing_token"]) == (
        host["worker"],
        "succeeded",
        1,
    )
    assert len(read_journal(journal)) == 1
    assert pool.placements() == 0


def test_a_run_that_no_host_takes_waits_again_and_is_placed_again(
    pool_on_file: TemporalPool, journal: Any
) -> None:
    """Its host is stopped for less than its lease, but for longer than the place_timeout."""
    pool, site = pool_on_file, pool_on_file.site
    host = pool.serve()
    pool.apply("note", "acme.note", params={"journal": str(journal)})
    host.send_signal(signal.SIGSTOP)

    run = pool.run("note")
    pool.wait_for(run, "running")
    row = pool.wait_for(run, "waiting", "unplaced")
    host.send_signal(signal.SIGCONT)

    assert row["detail"] == "no host took it within 3 s"
    assert (row["attempt"], row["failures"], row["recoveries"]) == (0, 0, 0)
    ended = site.wait_for_state("note", "succeeded", timeout=60)
    [attempt] = site.attempts(ended["id"])
    assert (attempt["attempt"], attempt["outcome"]) == (1, "succeeded")
    assert attempt["fencing_token"] > 1
    assert len(read_journal(journal)) == 1


def test_cancelling_stops_a_run_before_and_after_a_host_took_it(
    pool_on_file: TemporalPool, journal: Any
) -> None:
    pool, site = pool_on_file, pool_on_file.site
    host = pool.serve()
    pool.apply("long", "acme.steps", params={"journal": str(journal), "steps": 500})
    running = pool.run("long")
    wait_until(lambda: read_journal(journal, "step"), "the run on the host")

    site.cli("runs", "cancel", running)

    site.wait_for_state("long", "cancelled", timeout=30)
    steps = len(read_journal(journal, "step"))
    pool.apply("untaken", "acme.note", params={"journal": str(journal)})
    host.send_signal(signal.SIGSTOP)
    placed = pool.run("untaken")
    pool.wait_for(placed, "running")
    site.cli("runs", "cancel", placed)
    site.wait_for_state("untaken", "cancelled", timeout=30)
    host.send_signal(signal.SIGCONT)
    assert len(read_journal(journal, "step")) <= steps + 1
    assert pool.placements() == 0


def test_without_temporal_runs_wait_and_other_pools_go_on(pool_on_file: TemporalPool, journal: Any) -> None:
    pool, site = pool_on_file, pool_on_file.site
    pool.serve()
    params = {"journal": str(journal)}
    pool.apply("long", "acme.steps", params={**params, "steps": 40})
    long = pool.run("long")
    wait_until(lambda: read_journal(journal, "step"), "the run on the host")
    pool.apply("placed", "acme.note", params=params)
    site.apply(definition("org_acme", "beside", "acme.note", params=params))

    pool.temporal.stop()
    placed = pool.run("placed")
    row = pool.wait_for(placed, "waiting", "unplaced")
    site.cli("definitions", "run", "org_acme", "beside")

    site.wait_for_state("beside", "succeeded", timeout=30)
    assert pool.temporal.address in row["detail"]
    # What runs on a host goes on without Temporal.
    ended = site.wait_for_state("long", "succeeded", timeout=60)
    assert [row["outcome"] for row in site.attempts(ended["id"])] == ["succeeded"]
    why = site.cli("runs", "why", placed).out
    assert "it could not be placed on a host of its pool" in why
    pool.temporal.start()
    ended = site.wait_for_state("placed", "succeeded", timeout=60)
    assert [row["attempt"] for row in site.attempts(ended["id"])] == [1]
    assert long != placed


def test_a_placing_worker_that_dies_leaves_no_run_behind(pool: TemporalPool, journal: Any) -> None:
    """What it had placed waits again without being counted; the next worker places it."""
    site = pool.site
    host = pool.serve()
    pool.apply("note", "acme.note", params={"journal": str(journal)})
    host.send_signal(signal.SIGSTOP)
    run = pool.run("note")
    pool.wait_for(run, "running")

    pool.worker.kill()
    pool.worker.wait()
    host.send_signal(signal.SIGCONT)
    site.start_worker()

    ended = site.wait_for_state("note", "succeeded", timeout=60)
    row = site.query("SELECT * FROM attempts WHERE run_id = ?", ended["id"])
    assert [(each["attempt"], each["outcome"]) for each in row] == [(1, "succeeded")]
    assert len(read_journal(journal)) == 1


def test_a_worker_that_stops_takes_back_what_no_host_has_taken(
    pool_on_file: TemporalPool, journal: Any
) -> None:
    pool, site = pool_on_file, pool_on_file.site
    host = pool.serve()
    pool.apply("note", "acme.note", params={"journal": str(journal)})
    host.send_signal(signal.SIGSTOP)
    run = pool.run("note")
    pool.wait_for(run, "running")

    assert site.stop_worker(pool.worker) == 0

    row = pool.live(run)
    assert row is not None
    assert (row["state"], row["reason"], row["attempt"]) == ("waiting", "unplaced", 0)
    host.send_signal(signal.SIGCONT)


def test_temporal_stores_no_token_param_result_or_error(
    pool_on_file: TemporalPool, provider: Any, journal: Any
) -> None:
    pool, site = pool_on_file, pool_on_file.site
    provider.issued.clear()
    pool.serve()
    params = {"journal": str(journal), "canary": "canary-of-params"}
    for name in ("leak", "leak_result", "note"):
        pool.apply(name, f"acme.{name}", params=params)
        pool.run(name)

    for name in ("leak", "leak_result", "note"):
        site.wait_for_end(definition=name, timeout=60)
    pool.temporal.stop(signal.SIGTERM)

    stored = pool.temporal.stored()
    [leaked] = site.runs(definition="leak")
    # The control: what may be there is found.
    assert str(leaked["id"]).encode() in stored
    assert provider.issued
    tokens = [str(token) for token in provider.issued]
    hidden = [
        *tokens,
        *(part for token in tokens for part in token.split(".")[1:]),
        *("canary-of-params", "secret-of-org_acme", "org_acme", str(journal), "acme.leak", "RuntimeError"),
    ]
    assert [text for text in hidden if text.encode() in stored] == []


def test_a_host_that_stops_drains_and_another_goes_on(pool_on_file: TemporalPool, journal: Any) -> None:
    pool, site = pool_on_file, pool_on_file.site
    host = pool.serve(execution='drain = "1s"')
    pool.apply("long", "acme.steps", params={"journal": str(journal), "steps": 300})
    run = pool.run("long")
    wait_until(lambda: read_journal(journal, "step"), "the run on the host")

    host.send_signal(signal.SIGTERM)

    assert host.wait(timeout=30) == 0
    assert [row["outcome"] for row in site.attempts(run)] == ["handed_back"]
    pool.hosts.start("h2", pool="gpu")
    site.wait_for_state("long", "running", attempt=2, timeout=60)
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt")
    assert read_journal(journal, "start")[1]["first"] > 0
    site.cli("runs", "cancel", run)
    site.wait_for_state("long", "cancelled", attempt=2, timeout=30)


async def ticket_in(temporal: DevServer) -> str | None:
    """The ticket of the only open activity, as a reader of Temporal finds it; None if there is none yet."""
    client = await Client.connect(temporal.address)
    found = [each async for each in client.list_activities("ExecutionStatus = 'Running'")]
    if not found:
        return None
    described = await client.get_activity_handle(found[0].activity_id).describe(include_input=True)
    [ticket] = await described.input() or ()
    return str(ticket)


def test_a_stolen_ticket_is_of_no_use(patient_pool: TemporalPool, journal: Any) -> None:
    pool, site = patient_pool, patient_pool.site
    host = pool.serve()
    pool.apply("note", "acme.note", params={"journal": str(journal)})

    def call(name: str, body: dict[str, Any], token: str, incarnation: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "OrgWorker-Incarnation": incarnation}
        url = f"http://127.0.0.1:{pool.port}/attempts/v1/{name}"
        return httpx.post(url, json=body, headers=headers if token else {}, timeout=30)

    def registered(name: str, of: str) -> tuple[str, str]:
        added = json.loads(site.cli("hosts", "add", name, "--pool", of, "-o", "json").out)
        body = {"host": name, "pid": 1, "version": "1", "slots": {}}
        return added["token"], call("register", body, added["token"]).json()["worker"]

    elsewhere, beside = registered("elsewhere", "default"), registered("beside", "gpu")
    host.send_signal(signal.SIGSTOP)
    run = pool.run("note")
    pool.wait_for(run, "running")
    ticket = wait_until(lambda: asyncio.run(ticket_in(pool.temporal)), "the ticket")
    assert ticket is not None
    changed = ticket[:-1] + ("A" if ticket[-1] != "A" else "B")

    assert call("take", {"ticket": ticket}, "").status_code == 401
    assert call("take", {"ticket": ticket}, *elsewhere).json()["attempts"] == []
    assert call("take", {"ticket": ticket}, elsewhere[0], beside[1]).status_code == 403
    assert call("take", {"ticket": changed}, *beside).json()["attempts"] == []
    assert call("take", {"ticket": "a.1.b"}, *beside).status_code == 422
    assert call("take", {"free": {"child": 1}}, *beside).status_code == 422
    row = pool.live(run)
    assert row is not None
    assert row["state"] == "running"
    host.send_signal(signal.SIGCONT)
    site.wait_for_state("note", "succeeded", timeout=60)
    # It was valid, and is not any more.
    assert call("take", {"ticket": ticket}, *beside).json()["attempts"] == []
    assert len(read_journal(journal)) == 1
