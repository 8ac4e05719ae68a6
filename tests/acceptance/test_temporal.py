"""A pool whose runs Temporal places on hosts: a real dev server, worker and host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.hosts import Hosts
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition
from tests.fakes.temporal import DevServer

EXECUTION = 'lease = "4s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 2\ninline = ["acceptance-jobs"]'


class TemporalPool:
    """A site whose pool `gpu` is placed by Temporal."""

    def __init__(self, site: Site, temporal: DevServer) -> None:
        self.site = site
        self.temporal = temporal
        port = free_port()
        site.configure(
            execution=EXECUTION,
            extra=f"""\
[attempts]
listen = "127.0.0.1:{port}"
[pools.gpu]
placer = "temporal"
[temporal]
address = "{temporal.address}"
place_timeout = "3s"
""",
        )
        self.hosts = Hosts(site, port)

    def apply(self, name: str, handler: str, **keys: Any) -> None:
        self.site.apply(definition("org_acme", name, handler, pool="gpu", **keys))

    def run(self, name: str) -> str:
        return str(json.loads(self.site.cli("definitions", "run", "org_acme", name, "-o", "json").out)["id"])

    def placements(self) -> int:
        return int(self.site.query("SELECT count(*) AS n FROM placements")[0]["n"])


@pytest.fixture
def pool(site_on_either: Site, tmp_path: Path) -> Iterator[TemporalPool]:
    temporal = DevServer(tmp_path)
    temporal.start()
    made = TemporalPool(site_on_either, temporal)
    yield made
    made.hosts.close()
    temporal.stop()


def test_temporal_places_runs_on_a_host_of_the_pool(pool: TemporalPool, journal: Any) -> None:
    site = pool.site
    site.start_worker()
    site.wait_for_handlers("acme.steps")
    pool.hosts.start(pool="gpu")
    site.add_orgs(application("org_acme"))
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
