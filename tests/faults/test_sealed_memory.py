"""Sealed runs of real workers and hosts have their token and bound secret nowhere, in the middle of a run."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime, timedelta

import pytest

from tests.fakes.hosts import opened_hosts
from tests.fakes.memory import places_of
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import FINAL, application
from tests.fakes.traffic import Seen, traffic
from tests.faults.cluster import Cluster

pytestmark = pytest.mark.timeout(1800)
# Sealed runs of each worker and host; so many of them at once.
RUNS, SHORT_RUNS = 1000, 40
AT_ONCE = 4
KEY = "sk-canary/of+acme-0123456789-abcdefghij"
HOSTED = "eu"
SOURCE = """
import os
from worker import Context, job

@job("canary.sealed", egress=["api"], secrets={"bound"}, max_attempts=1)
async def sealed(ctx: Context):
    await look(ctx, ctx.secret("bound"))

@job("canary.open", egress=["open"], secrets={"clear"}, max_attempts=1)
async def unsealed(ctx: Context):
    await look(ctx, ctx.secret("clear"))

async def look(ctx, key):
    "A request whose answer has what was sent, and one in whose midst this process is looked into."
    url = ctx.params["url"]
    echo = await ctx.http.get(f"{url}/echo", headers={"X-Key": key})
    await ctx.http.get(f"{url}/look/{ctx.run.id}/{os.getpid()}", headers={"X-Key": key})
    return len(echo.text)
"""
HANDLERS = {"canary.sealed": "canary_jobs:sealed", "canary.open": "canary_jobs:unsealed"}
LOOK = re.compile(r"/look/([0-9a-f-]+)/(\d+)")


class Looking:
    """Looks into processes that send requests, for the token and the secret that came with them."""

    def __init__(self) -> None:
        # By run, where its process had one of them.
        self.found: dict[str, list[str]] = {}
        self.needles: tuple[bytes, ...] = ()

    def answer(self, seen: Seen) -> tuple[int, dict[str, str], bytes]:
        echo = json.dumps(seen.headers).encode()
        kind, _, token = seen.headers["authorization"].partition(" ")
        # What is sent has both.
        assert (kind, token.count("."), seen.headers["x-key"]) == ("Bearer", 2, KEY)
        signature = token.rpartition(".")[2].encode()
        self.needles = (signature, KEY.encode(), base64.b64encode(KEY.encode()))
        if (wanted := LOOK.fullmatch(seen.path)) is not None:
            self.found.setdefault(wanted[1], []).extend(places_of(int(wanted[2]), self.needles))
        return 200, {"Content-Type": "application/json", "X-Echo": token}, echo


@pytest.fixture
def runs(full: bool) -> int:
    return RUNS if full else SHORT_RUNS


def test_no_sealed_run_has_its_token_or_secret_anywhere(on_either: Cluster, runs: int) -> None:
    """On SQLite and on PostgreSQL, there with a host; an open run of each is the control."""
    cluster, looking, port = on_either, Looking(), free_port()
    pools = ["default"] if cluster.on_file else ["default", HOSTED]
    make_plugin(cluster.plugins, dist="canary", modules={"canary_jobs": SOURCE}, entry_points=HANDLERS)
    cluster.environment |= {"WORKER_EXECUTION__MAX_CHILDREN": str(AT_ONCE)}
    if not cluster.on_file:
        cluster.environment["WORKER_ATTEMPTS__LISTEN"] = f"127.0.0.1:{port}"
    cluster.add_orgs(application("org_acme"))
    with traffic(looking.answer) as service, opened_hosts(cluster, port) as hosts:
        cluster.cli("secrets", "add", "org_acme", "bound", "--for", service.url, stdin=f"{KEY}\n")
        cluster.cli("secrets", "add", "org_acme", "clear", stdin=f"{KEY}\n")
        processes = [cluster.up()]
        if HOSTED in pools:
            processes.append(hosts.start("h1", HOSTED, f"max_children = {AT_ONCE}"))
        keys = {"params": {"url": service.url}, "api_origins": [service.url], "overlap": "allow"}
        kinds = [(name, pool) for name in ("sealed", "open") for pool in pools]
        cluster.apply(
            "".join(
                cluster.define("org_acme", f"{name}-{pool}", f"canary.{name}", "* * * * *", pool=pool, **keys)
                for name, pool in kinds
            )
        )

        for name, pool in kinds:
            run_often(cluster, f"{name}-{pool}", runs if name == "sealed" else 1)
        for pool in pools:
            sealed = ended(cluster, f"sealed-{pool}", runs)
            [unsealed] = ended(cluster, f"open-{pool}", 1)
            assert {run: looking.found[run] for run in sealed if looking.found[run]} == {}
            assert any(place.startswith("memory") for place in looking.found[unsealed])

        # What all of them are forked from.
        zygotes = [cluster.zygote(process) for process in processes]
        assert [places_of(zygote.pid, looking.needles) for zygote in zygotes] == [[]] * len(zygotes)


def run_often(cluster: Cluster, name: str, times: int) -> None:
    """Let a definition run at each of the minutes before this one."""
    until = datetime.now(UTC).replace(second=0, microsecond=0)
    since = until - timedelta(minutes=times)
    span = ("--from", since.isoformat(), "--until", until.isoformat())
    cluster.cli("definitions", "backfill", "org_acme", name, *span, "--limit", str(times))


def ended(cluster: Cluster, name: str, times: int) -> list[str]:
    """The runs of its backfill, once all have succeeded."""
    runs = "SELECT id, state FROM run_view WHERE definition = ? AND origin = 'backfill'"
    over = f"{runs} AND state IN ({', '.join(map(repr, FINAL))})"
    cluster.wait_for(lambda: len(cluster.query(over, name)) == times, f"all runs of {name}", 1500)
    rows = cluster.query(runs, name)
    assert {row["state"] for row in rows} == {"succeeded"}
    return [str(row["id"]) for row in rows]
