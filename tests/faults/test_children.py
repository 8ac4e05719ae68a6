"""Trees of runs while parents, children, zygotes, workers and PostgreSQL are killed at random.

What each run must return follows from its name; which runs there must be follows from those at the top.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import psycopg
import pytest

from tests.fakes.postgres import Server
from tests.fakes.site import application
from tests.faults.checker import Fault, falling_tokens, holes, two_owners, unfinished
from tests.faults.cluster import Cluster, instants
from tests.faults.conftest import MakeCluster
from tests.faults.fault_jobs import LEAVES
from tests.faults.storm import Storm, seed

ORGS = ("org_one", "org_two")
WAYS = ("gather", "as_ended", "map_runs")
# Runs of an org at the same time; both of its trees have more that could run.
AT_ONCE = 5
TREES = 2
LEAVES_EACH = 6
STARTING = "SELECT id, attempt, worker_id FROM live_runs WHERE state = 'running' AND handler <> 'fault.leaf'"


@dataclass(frozen=True)
class Amount:
    """Kills of each kind of process; `parent` is the process of a run that starts others."""

    worker: int
    zygote: int
    child: int
    parent: int
    server: int = 0

    def faults(self) -> list[str]:
        kinds = ("worker", "zygote", "child", "parent", "server")
        return [kind for kind in kinds for _ in range(getattr(self, kind))]


FULL = Amount(worker=60, zygote=60, child=100, parent=60, server=20)
FULL_ON_FILE = Amount(worker=80, zygote=70, child=90, parent=60)
SHORT = Amount(worker=1, zygote=1, child=2, parent=2, server=1)
SHORT_ON_FILE = Amount(worker=1, zygote=1, child=2, parent=2)


@dataclass
class Grove:
    """Keeps trees going in two orgs; its answers are None while the database is away."""

    cluster: Cluster
    tops: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def prepare(self) -> None:
        cluster = self.cluster
        cluster.add_orgs(*(application(org) for org in ORGS))
        params = {"leaves": LEAVES_EACH}
        text = "".join(
            f'[[org]]\ncode = "{org}"\nissuer = "main"\nmax_concurrent_runs = {AT_ONCE}\n'
            + cluster.define(org, "tree", "fault.tree", params=params, overlap="allow")
            for org in ORGS
        )
        cluster.apply(text)

    def tend(self) -> None:
        """Start a tree in an org that has fewer than `TREES` of them."""
        left = self.asked("SELECT id FROM live_runs WHERE origin <> 'child'")
        if left is None:
            return
        unfinished = {str(row["id"]) for row in left}
        for org in ORGS:
            if len(unfinished.intersection(self.tops[org])) < TREES:
                done = self.cluster.cli("definitions", "run", org, "tree", "-o", "id")
                self.tops[org].append(done.out.strip())

    def asked(self, query: str) -> list[dict[str, Any]] | None:
        try:
            return self.cluster.query(query)
        except psycopg.OperationalError:
            # The session of before PostgreSQL was killed.
            self.cluster.disconnect()
            return None

    def parent(self) -> tuple[str, psutil.Process] | None:
        """A worker, and the process of a run of its that starts others."""
        pids = {(line["run"], line["attempt"]): line["pid"] for line in self.cluster.lines("begin")}
        for row in self.asked(STARTING) or ():
            pid = pids.get((str(row["id"]), row["attempt"]))
            if pid is not None and psutil.pid_exists(pid):
                return str(row["worker_id"]), psutil.Process(pid)
        return None

    def has_ended(self) -> bool:
        return self.asked("SELECT id FROM live_runs LIMIT 1") == []


def strike(
    grove: Grove,
    workers: list[subprocess.Popen[bytes]],
    faults: Sequence[str],
    again: Callable[[int], None],
    server: Server | None,
) -> None:
    """All faults in random order; `again` replaces a killed worker by its number."""
    cluster, drawn = grove.cluster, random.Random(seed())
    storm = Storm(cluster, workers, drawn.randrange(1_000_000))
    order = list(faults)
    drawn.shuffle(order)
    for fault in order:
        grove.tend()
        match fault:
            case "server":
                assert server is not None
                server.stop(signal.SIGQUIT)
                at = datetime.now(UTC)
                server.start()
                cluster.disconnect()
                cluster.faults.append(Fault("outage", "database", "", at, datetime.now(UTC)))
            case "parent":
                worker, process = cluster.wait_for(grove.parent, "a run that starts others", 60.0)
                at = datetime.now(UTC)
                if kill(process):
                    cluster.faults.append(Fault("kill", "child", worker, at))
            case _:
                storm.befall("kill", fault, again)  # type: ignore[arg-type]
        time.sleep(drawn.uniform(0.1, 0.6))


def kill(process: psutil.Process) -> bool:
    """Whether it was still there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.mark.timeout(2400)
def test_trees_on_postgresql_have_each_child_and_result_once(
    cluster_at: MakeCluster, own_postgres: Server, full: bool
) -> None:
    cluster = cluster_at(own_postgres.url())
    workers = [cluster.start_worker() for _ in range(3)]
    cluster.wait_for(lambda: all(map(cluster.offers, workers)), "three workers", 60.0)
    grove = Grove(cluster)
    grove.prepare()

    def again(number: int) -> None:
        workers[number] = cluster.start_worker()
        cluster.wait_for(lambda: cluster.row_of(workers[number]), "a worker in the place of the killed one")

    strike(grove, workers, (FULL if full else SHORT).faults(), again, own_postgres)

    cluster.wait_for(grove.has_ended, "the end of all trees", 180.0)
    assert_kept(grove)


@pytest.mark.timeout(2400)
def test_trees_on_sqlite_have_each_child_and_result_once(on_file: Cluster, full: bool) -> None:
    cluster = on_file
    workers = [cluster.up()]
    grove = Grove(cluster)
    grove.prepare()

    def again(number: int) -> None:
        workers[number] = cluster.up()

    strike(grove, workers, (FULL_ON_FILE if full else SHORT_ON_FILE).faults(), again, None)

    cluster.wait_for(grove.has_ended, "the end of all trees", 180.0)
    assert_kept(grove)


def test_a_tree_of_four_levels_ends_in_an_org_with_one_slot(on_either: Cluster) -> None:
    cluster = on_either
    cluster.up()
    cluster.add_orgs(application("org_one"))
    limit = '[[org]]\ncode = "org_one"\nissuer = "main"\nmax_concurrent_runs = 1\n'
    cluster.apply(limit + cluster.define("org_one", "deep", "fault.deep", params={"below": 4}))

    cluster.run_now("deep", "org_one")
    cluster.wait_for(cluster.all_ended, "the end of the tree", 60.0)

    runs = instants(cluster.runs())
    assert [(run["state"], run["result"]) for run in runs] == [("succeeded", 4 - depth) for depth in range(5)]
    assert at_once(instants(cluster.query("SELECT * FROM attempts"))) == 1


GRACE = 2.0


@pytest.mark.timeout(600)
def test_a_cancelled_parent_ends_with_all_its_running_children(
    cluster_at: MakeCluster, migrated_postgres_url: str, full: bool
) -> None:
    """Their handlers hear of it, and are interrupted after half their grace."""
    count, workers = (1000, 4) if full else (100, 2)
    inline = f'inline = ["fault-jobs"]\nmax_inline = {count}'
    cluster = cluster_at(migrated_postgres_url, execution=inline)
    for _ in range(workers):
        cluster.up()
    cluster.add_orgs(application("org_one"))
    limit = f'[[org]]\ncode = "org_one"\nissuer = "main"\nmax_concurrent_runs = {count}\n'
    keys = {"params": {"children": count}, "cancel_grace": f"{GRACE:g}s"}
    cluster.apply(limit + cluster.define("org_one", "wide", "fault.wide", **keys))
    parent = str(cluster.run_now("wide", "org_one")["id"])
    running = "SELECT count(*) AS n FROM live_runs WHERE state = 'running' AND handler = 'fault.idle'"
    cluster.wait_for(lambda: cluster.query(running) == [{"n": count}], f"{count} running children", 120.0)

    before = datetime.now(UTC)
    cluster.cli("runs", "cancel", parent)
    asked = datetime.now(UTC)
    cluster.wait_for(cluster.all_ended, "the end of all", 60.0)

    runs = instants(cluster.runs())
    last = max(run["finished_at"] for run in runs)
    seconds = (last - asked).total_seconds()
    print(f"{count} running children had ended {seconds:.2f} s after their parent was cancelled")
    assert {(run["state"], run["reason"]) for run in runs if run["id"] != parent} == {("cancelled", "parent")}
    assert len(runs) == count + 1
    assert last >= before + timedelta(seconds=GRACE / 2)
    assert seconds <= GRACE / 2 + 2.0


def assert_kept(grove: Grove) -> None:
    """Fail with all objections to what the trees left behind."""
    history = grove.cluster.history()
    codes = {str(row["id"]): row["code"] for row in grove.cluster.query("SELECT id, code FROM orgs")}
    runs = instants(
        grove.cluster.query(
            "SELECT r.id, r.org_id, r.handler, r.params, r.result, c.parent_id FROM runs r "
            "LEFT JOIN children c ON c.run_id = r.id ORDER BY r.id"
        )
    )
    attempts = history.attempts
    for run in runs:
        run["org"] = codes[run["org_id"]]
        run["name"] = (run["params"] or {}).get("name", run["id"])
    kinds = Counter(f"{fault.kind} {fault.target}" for fault in grove.cluster.faults)
    print(f"{len(grove.cluster.faults)} faults ({dict(kinds)}), {len(runs)} runs, {len(attempts)} attempts")
    objections = [
        *unfinished(history),
        *holes(history),
        *falling_tokens(history),
        *two_owners(history),
        *wrong_trees(grove.tops, runs),
        *wrong_results(runs),
        *other_orders(history.journal),
        *over_limits(runs, attempts),
    ]
    assert objections == []


def names_below(top: str) -> Iterator[str]:
    for way in WAYS:
        yield f"{top}/{way}"
        yield f"{top}/{way}-leaf"
        yield from (f"{top}/{way}/leaf{number}" for number in range(LEAVES_EACH))


def wrong_trees(tops: Mapping[str, Sequence[str]], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each name that a tree has is one run, below the run that its name says and in its org."""
    org_of = {top: org for org, listed in tops.items() for top in listed}
    found = Counter(run["name"] for run in runs if run["id"] not in org_of)
    wanted = {name for top in org_of for name in names_below(top)}
    yield from (f"{name} has {count} runs" for name, count in found.items() if count != 1)
    yield from (f"{name} was never started" for name in sorted(wanted - found.keys()))
    yield from (f"{name} is no child of any tree" for name in sorted(found.keys() - wanted))
    by_id = {run["id"]: run for run in runs}
    for run in runs:
        if run["id"] in org_of:
            if run["org"] != org_of[run["id"]]:
                yield f"run {run['id']} of {org_of[run['id']]} is in {run['org']}"
            continue
        above = run["name"].rpartition("/")[0]
        parent = by_id.get(run["parent_id"])
        if parent is None or parent["name"] != above:
            yield f"{run['params']['name']} is below {run['parent_id']}"
        elif parent["org"] != run["org"]:
            yield f"{run['params']['name']} of {parent['org']} is in {run['org']}"


def wrong_results(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each run has returned what its children returned, each once and in its place."""
    for run in runs:
        if run["result"] != (wanted := expected(run)):
            yield f"run {run['id']} returned {run['result']}, not {wanted}"


def expected(run: Mapping[str, Any]) -> dict[str, Any]:
    org, name = run["org"], run["name"]
    match run["handler"]:
        case "fault.leaf":
            return {"name": name, "org": org}
        case "fault.node":
            leaves = (f"{name}/leaf{number}" for number in range(LEAVES_EACH))
            return {"org": org, "leaves": [{"name": leaf, "org": org} for leaf in leaves]}
        case _:
            pairs = []
            for way in WAYS:
                node = {"org": org, "handler": "fault.node", "name": f"{name}/{way}"}
                pairs += [expected(node), {"name": f"{name}/{way}-leaf", "org": org}]
            return {"org": org, "children": pairs}


def other_orders(journal: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each attempt takes children that ended in the order of the attempts before it."""
    taken: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in journal:
        if line["who"] == "took":
            taken[line["run"]][line["attempt"]].append(line["key"])
    for run, orders in taken.items():
        longest = max(orders.values(), key=len)
        for attempt, order in orders.items():
            if order != longest[: len(order)]:
                yield f"run {run}: attempt {attempt} took {order}, another one {longest}"


def over_limits(runs: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """No more leaves, and no more runs of an org, run at any time than its limit; each limit was reached."""
    by_id = {run["id"]: run for run in runs}
    of_leaves = [one for one in attempts if by_id[one["run_id"]]["handler"] == "fault.leaf"]
    limits = [("leaves", LEAVES, of_leaves)]
    for org in ORGS:
        limits.append((f"runs of {org}", AT_ONCE, [a for a in attempts if by_id[a["run_id"]]["org"] == org]))
    for what, limit, some in limits:
        if (most := at_once(some)) != limit:
            yield f"{most} {what} ran at the same time, with a limit of {limit}"


def at_once(attempts: Sequence[Mapping[str, Any]]) -> int:
    """The most attempts that held a slot at the same time."""
    changes = [(one["ended_at"], -1) for one in attempts] + [(one["started_at"], 1) for one in attempts]
    running = most = 0
    # An end frees a slot for a start at the same instant.
    for _, change in sorted(changes, key=lambda each: (each[0], each[1])):
        running += change
        most = max(most, running)
    return most
