"""Calls that cost money are made once: only one in flight when its process dies is made again."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.fakes.site import application
from tests.faults.chat import ChatServer
from tests.faults.checker import Fault
from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.proxy import Proxy
from tests.faults.storm import Amount, Storm, seed
from tests.faults.watches import cutter

# 300 faults on each database, and in the gate a few.
FULL = Amount({"worker": 60, "zygote": 60, "child": 100}, {"worker": 30, "zygote": 20, "child": 30})
SHORT = Amount({"worker": 1, "zygote": 1, "child": 2}, {"worker": 1, "zygote": 0, "child": 0})
ORGS = ("org_0", "org_1", "org_2", "org_3")
STEPS = 50
# Calls that one attempt has in flight at most: `ctx.map` makes four at a time.
IN_FLIGHT = 4


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with ChatServer() as made:
        yield made


def begin(cluster: Cluster, chat: ChatServer) -> None:
    """A run at a time for each of four orgs, again and again."""
    cluster.add_orgs(*map(application, ORGS))
    keys = {"overlap": "skip", "misfire": "skip", "spread": "off", "params": {"chat": chat.url}}
    cluster.apply("\n".join(cluster.define(org, "paid", "fault.paid", "every 1s", **keys) for org in ORGS))
    cluster.wait_for(lambda: len(cluster.lines("answered")) > 10, "the first answers", 60.0)


def end(cluster: Cluster) -> None:
    for org in ORGS:
        cluster.cli("definitions", "pause", org, "paid")
    cluster.wait_for(cluster.all_ended, "the end of all runs", 120.0)


def assert_paid_once(cluster: Cluster, chat: ChatServer) -> None:
    """Judge by what the server was asked, what the handlers were given, and what is stored."""
    runs = {str(run["id"]): run for run in cluster.runs()}
    stored = defaultdict(dict)
    tokens = Counter[str]()
    for row in cluster.query("SELECT run_id, seq, name, occurrence, attempt, handler, result FROM steps"):
        result = json.loads(row["result"]) if isinstance(row["result"], str) else row["result"]
        assert result["run"] == str(row["run_id"]), "a result of another run"
        assert result["number"] not in stored[result["run"]], "a step is stored twice"
        stored[result["run"]][result["number"]] = (row["attempt"], result["id"])
        tokens[result["run"]] += result["tokens"]
    spent = Counter[str]()
    for row in cluster.query("SELECT run_id, amount FROM spends WHERE meter = 'llm_tokens'"):
        spent[str(row["run_id"])] += row["amount"]
    assert spent == tokens, "what was spent is not what the stored steps spent"
    [days] = cluster.query("SELECT sum(used) AS total FROM meter_days WHERE meter = 'llm_tokens'")
    assert days["total"] == tokens.total()
    assert runs
    objections = []
    lost = Counter[tuple[str, int]]()
    for run, row in runs.items():
        assert row["state"] == "succeeded", row
        assert sorted(stored[run]) == list(range(1, STEPS + 1)), "a stored result is lost"
        assert row["result"]["answers"] == [stored[run][number][1] for number in range(1, STEPS + 1)]
        for number in range(1, STEPS + 1):
            calls, (attempt, answer) = chat.calls[run, number], stored[run][number]
            attempts = [call.attempt for call in calls]
            if len(set(attempts)) < len(attempts) or max(attempts) > attempt:
                objections.append(f"step {number} of run {run} was called in attempts {attempts}: {attempt}")
            if [call.answer for call in calls if call.attempt == attempt] != [answer]:
                objections.append(f"step {number} of run {run} has the answer of another call")
            if len({call.key for call in calls}) != 1:
                objections.append(f"step {number} of run {run} has calls with several keys")
            lost.update((run, each) for each in attempts if each != attempt)
    for line in cluster.lines("answered"):
        if line["answer"] != stored[line["run"]][line["number"]][1]:
            objections.append(f"attempt {line['attempt']} of run {line['run']} was given another answer")
    objections += [
        f"{count} calls of attempt {of} were not stored" for of, count in lost.items() if count > IN_FLIGHT
    ]
    print(
        f"{len(runs)} runs, {sum(map(len, chat.calls.values()))} calls, {sum(lost.values())} of them repeated"
    )
    assert objections == []
    cluster.assert_kept()


@pytest.mark.timeout(3000)
def test_kills_stops_and_cut_commits_on_postgresql(
    cluster_at: MakeCluster, migrated_postgres_url: str, proxy: Proxy, chat: ChatServer, full: bool
) -> None:
    cluster = cluster_at(migrated_postgres_url)
    cluster.behind(proxy.port)
    amount = FULL if full else SHORT
    workers = [cluster.start_worker() for _ in range(2)]
    cluster.wait_for(lambda: all(map(cluster.offers, workers)), "two workers", 60.0)
    begin(cluster, chat)
    storm = Storm(cluster, workers, seed())

    def again(number: int) -> None:
        workers[number] = cluster.start_worker()
        cluster.wait_for(lambda: cluster.row_of(workers[number]), "a worker in the place of the killed one")

    cut = proxy.watch = cutter("INSERT INTO steps", 30 if full else 3)
    proxy.become("reset")
    proxy.become("pass")
    storm.strike(amount.faults(), again)
    cluster.wait_for(lambda: cut.left == 0, "lost answers to commits of steps", 120.0)

    end(cluster)
    assert len(cluster.faults) == len(amount.faults())
    # The end of an attempt waits for its steps, whose answers were lost at these moments.
    cluster.faults += [Fault("outage", "database", "", at, at) for at in cut.found_at]
    assert_paid_once(cluster, chat)


@pytest.mark.timeout(3000)
def test_kills_and_stops_on_sqlite(on_file: Cluster, chat: ChatServer, full: bool) -> None:
    cluster = on_file
    amount = FULL if full else replace(SHORT, stops={"worker": 0, "zygote": 0, "child": 1})
    workers = [cluster.up()]
    begin(cluster, chat)
    storm = Storm(cluster, workers, seed())

    def again(number: int) -> None:
        workers[number] = cluster.up()

    storm.strike(amount.faults(), again)

    end(cluster)
    assert len(cluster.faults) == len(amount.faults())
    assert_paid_once(cluster, chat)
