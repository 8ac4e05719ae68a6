"""A host runs handlers for a worker, over the attempt API, without the database and the key ring.

On SQLite; those on PostgreSQL are in test_host_faults.py and test_where_runs_execute.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.certificates import make_certificate
from tests.fakes.handlers import read_journal
from tests.fakes.hosts import Hosts, opened_hosts
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

EXECUTION = 'lease = "4s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 0\nmax_inline = 0'


@pytest.fixture
def hosts(site: Site) -> Iterator[Hosts]:
    port = free_port()
    site.configure(execution=EXECUTION, extra=f'[attempts]\nlisten = "127.0.0.1:{port}"')
    with opened_hosts(site, port) as made:
        yield made


def test_a_host_runs_what_the_worker_fires(hosts: Hosts, journal: Any) -> None:
    """Steps, a sleep and an answer, over three attempts."""
    site = hosts.site
    site.start_worker()
    site.wait_for_handlers("acme.approved")
    hosts.start()
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "sleep": "1s"}
    site.apply(definition("org_acme", "ask", "acme.approved", params=params))
    site.cli("definitions", "run", "org_acme", "ask")

    def asks() -> bool:
        return bool(site.runs(definition="ask")[0]["reason"] == "answer")

    wait_until(asks, "the run to ask", timeout=60)
    run = str(site.runs(definition="ask")[0]["id"])
    site.cli("runs", "answer", run, "approval", "--data", '{"yes": true}')

    ended = site.wait_for_state("ask", "succeeded", attempt=3, timeout=30)
    assert ended["result"] == {"answer": {"yes": True}, "published": "publish"}
    assert [entry["what"] for entry in read_journal(journal, "paid")] == ["draft", "publish"]
    attempts = site.attempts(run)
    assert [row["outcome"] for row in attempts] == ["parked", "parked", "succeeded"]
    [host] = json.loads(site.cli("hosts", "list", "-o", "json").out)
    assert (host["name"], host["state"]) == ("h1", "ready")
    for row in attempts:
        assert str(row["worker_id"]) == host["worker"]
        assert row["claims"]["org_code"] == "org_acme"
        assert row["started_at"] <= row["token_ready_at"] <= row["handler_started_at"] <= row["ended_at"]
        assert row["peak_memory"] is not None


def test_a_host_that_stops_hands_its_run_back(hosts: Hosts, journal: Any) -> None:
    """No attempt is lost, and the next host goes on with it."""
    site = hosts.site
    site.start_worker()
    host = hosts.start("h1", execution='drain = "1s"')
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "steps": 500}
    site.apply(definition("org_acme", "long", "acme.steps", params=params))
    site.cli("definitions", "run", "org_acme", "long")
    site.wait_for_state("long", "running", timeout=60)
    wait_until(lambda: read_journal(journal, "step"), "a checkpoint")

    host.send_signal(signal.SIGTERM)
    assert host.wait(timeout=30) == 0
    hosts.start("h2")
    running = site.wait_for_state("long", "running", attempt=2, timeout=60)
    assert [row["outcome"] for row in site.attempts(running["id"])] == ["handed_back"]
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt")
    assert read_journal(journal, "start")[1]["first"] > 0

    site.cli("runs", "cancel", str(running["id"]))
    site.wait_for_state("long", "cancelled", attempt=2, timeout=30)


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
