"""A pool whose runs Temporal places on hosts: a real dev server, worker and host.

What becomes of a run that no host takes, that is cancelled or that Temporal cannot place is tested in
tests/unit/engine/test_placing.py, an engine that dies in tests/faults/test_hosts.py.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from temporalio.client import Client

from tests.fakes.handlers import read_journal
from tests.fakes.hosts import Hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until
from tests.fakes.temporal import DevServer

pytestmark = pytest.mark.feature("hosts")

SPREAD = """
from worker import job

@job("spread.over", children={"acme.note"})
async def over(ctx) -> list[str]:
    params = {"journal": ctx.params["journal"]}
    started = [ctx.start("acme.note", params, key=f"{n}") for n in range(ctx.params["children"])]
    return [each["org"] async for each in ctx.gather(started)]
"""
EXECUTION = 'lease = "15s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 2'


class TemporalPool:
    """A site whose pool `gpu` is placed by Temporal, with one org."""

    def __init__(self, shared_site: Callable[..., Site], temporal: DevServer) -> None:
        self.temporal = temporal
        self.port = port = free_port()
        self.site = shared_site(
            EXECUTION,
            extra=f"""\
[attempts]
listen = "127.0.0.1:{port}"
[pools.gpu]
placer = "temporal"
[temporal]
address = "{temporal.address}"
place_timeout = "60s"
""",
        )
        plugin = {"modules": {"spread": SPREAD}, "entry_points": {"spread.over": "spread:over"}}
        make_plugin(self.site.plugins, "spread-jobs", **plugin)
        self.hosts = Hosts(self.site, port)
        self.site.add_orgs(application("org_acme"))
        self.host: Any = None

    def be_up(self) -> None:
        """Start the worker and a host, and wait for the host's handlers."""
        self.site.start_worker()
        self.site.wait_for_handlers("acme.steps")
        self.start_host("h1")
        wait_until(self._offers, "the host's handlers")

    def start_host(self, name: str) -> None:
        self.host = self.hosts.start(name, pool="gpu", execution='drain = "1s"')

    def begin(self, name: str, handler: str = "acme.note", **params: Any) -> str:
        """Make a run of this handler in the pool."""
        given = params | {"journal": str(self.journal(name))}
        self.site.apply(definition("org_acme", name, handler, pool="gpu", params=given))
        return str(json.loads(self.site.cli("definitions", "run", "org_acme", name, "-o", "json").out)["id"])

    def journal(self, name: str) -> Path:
        return self.site.out / name

    def begin_with_host_stopped(self, name: str) -> str:
        """The same while the host is stopped, up to where the run is on its way to it."""
        self.host.send_signal(signal.SIGSTOP)
        run = self.begin(name)
        wait_until(lambda: (self.live(run) or {}).get("state") == "running", "the run to be placed")
        return run

    def live(self, run_id: str) -> dict[str, Any] | None:
        rows = self.site.query("SELECT * FROM live_runs WHERE id = ?", run_id)
        return rows[0] if rows else None

    def _offers(self) -> bool:
        rows = self.site.query("SELECT handlers FROM workers WHERE host_id IS NOT NULL AND ended_at IS NULL")
        # Its plug-ins are read one after the other.
        return any({"acme.note", "acme.steps", "http.request"} <= set(row["handlers"]) for row in rows)


@pytest.fixture(scope="module")
def pool(
    shared_site: Callable[..., Site], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TemporalPool]:
    """The installation of all tests, whose runs have names of their own."""
    temporal = DevServer(tmp_path_factory.mktemp("temporal"))
    temporal.start()
    made = TemporalPool(shared_site, temporal)
    made.be_up()
    yield made
    made.hosts.close()
    temporal.stop()


async def ticket_in(temporal: DevServer) -> str | None:
    """The ticket of the only open activity, as a reader of Temporal finds it; None if there is none yet."""
    client = await Client.connect(temporal.address)
    found = [each async for each in client.list_activities("ExecutionStatus = 'Running'")]
    if not found:
        return None
    described = await client.get_activity_handle(found[0].activity_id).describe(include_input=True)
    [ticket] = await described.input() or ()
    return str(ticket)


def test_a_stolen_ticket_is_of_no_use(pool: TemporalPool) -> None:
    site = pool.site

    def call(name: str, body: dict[str, Any], token: str, incarnation: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "OrgWorker-Incarnation": incarnation}
        url = f"http://127.0.0.1:{pool.port}/attempts/v1/{name}"
        return httpx.post(url, json=body, headers=headers if token else {}, timeout=30)

    def registered(name: str, of: str) -> tuple[str, str]:
        added = json.loads(site.cli("hosts", "add", name, "--pool", of, "-o", "json").out)
        body = {"host": name, "pid": 1, "version": "1", "slots": {}}
        return added["token"], call("register", body, added["token"]).json()["worker"]

    elsewhere, beside = registered("elsewhere", "default"), registered("beside", "gpu")
    run = pool.begin_with_host_stopped("stolen")
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
    pool.host.send_signal(signal.SIGCONT)
    site.wait_for_state("stolen", "succeeded", timeout=60)
    # It was valid, and is not any more.
    assert call("take", {"ticket": ticket}, *beside).json()["attempts"] == []
    assert len(read_journal(pool.journal("stolen"))) == 1


def test_children_are_placed_on_hosts_by_the_pool_of_their_tree(pool: TemporalPool) -> None:
    site = pool.site
    run = pool.begin("spread", "spread.over", children=5)

    ended = site.wait_for_state("spread", "succeeded", attempt=2, timeout=90)

    assert ended["result"] == ["org_acme"] * 5
    assert len(read_journal(pool.journal("spread"), "note")) == 5
    rows = site.query(
        "SELECT DISTINCT w.host_id IS NOT NULL AS on_host, r.pool FROM attempts a "
        "JOIN runs r ON r.id = a.run_id JOIN workers w ON w.id = a.worker_id "
        "WHERE r.origin = 'child' OR r.id = ?",
        run,
    )
    assert [(bool(row["on_host"]), row["pool"]) for row in rows] == [(True, "gpu")]


def test_a_host_that_stops_drains_and_another_goes_on(pool: TemporalPool) -> None:
    site, journal = pool.site, pool.journal("drained")
    run = pool.begin("drained", "acme.steps", steps=300)
    wait_until(lambda: read_journal(journal, "step"), "the run on the host")

    pool.host.send_signal(signal.SIGTERM)

    assert pool.host.wait(timeout=30) == 0
    assert [row["outcome"] for row in site.attempts(run)] == ["handed_back"]
    pool.start_host("h2")
    site.wait_for_state("drained", "running", attempt=2, timeout=60)
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt")
    assert read_journal(journal, "start")[1]["first"] > 0
    site.cli("runs", "cancel", run)
    site.wait_for_state("drained", "cancelled", attempt=2, timeout=30)


def test_temporal_stores_no_token_param_result_or_error(pool: TemporalPool, provider: Any) -> None:
    """Neither of the runs before."""
    site, handlers = pool.site, ("leak", "leak_result", "note")
    for name in handlers:
        pool.begin(name, f"acme.{name}", canary="canary-of-params")

    for name in handlers:
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
        *("canary-of-params", "secret-of-org_acme", "org_acme", str(site.out), "acme.leak", "RuntimeError"),
    ]
    assert [text for text in hidden if text.encode() in stored] == []
