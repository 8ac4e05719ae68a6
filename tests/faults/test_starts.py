"""A product starts runs in its own transactions, which it leaves open, or while anything is killed at random.

What the product's own table says it has committed is the truth: each of its rows has exactly one run, and
each run a row.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from tests.fakes.postgres import Server
from tests.fakes.site import NEVER
from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.storm import seed
from worker.ids import new_id
from worker.store.start_functions import PRODUCT

NAMES = ("one", "two", "three")
# A process of the product: it places orders, each with its run, and rolls some of them back; an order whose
# answer it did not get it places again, with the same key.
SHOP = """
import random, sys, time
import psycopg
url, name, first, last, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
drawn = random.Random(seed)
PLACE = '''
    INSERT INTO shop_orders (key, name, run)
    SELECT %(key)s, %(definition)s, orgworker_start('org_acme', %(definition)s, NULL, %(key)s)
    ON CONFLICT (key) DO NOTHING
'''
connection, number = None, first
while number < last:
    key, definition, keeps = f"{name} {number}", ("one", "two", "three")[number % 3], drawn.random() < 0.6
    try:
        if connection is None or connection.closed:
            connection = psycopg.connect(url, connect_timeout=2)
        connection.execute(PLACE, {"key": key, "definition": definition})
        if drawn.random() < 0.05:
            time.sleep(0.05)
        connection.commit() if keeps else connection.rollback()
        number += 1
    except psycopg.OperationalError:
        connection = None
        time.sleep(0.1)
    print(number, flush=True)
"""


INLINE = 'inline = ["fault-jobs"]\nmax_inline = 200'


def file_of(cluster: Cluster, schedules: Mapping[str, str], **keys: Any) -> str:
    """An org with room for any number of runs, and its definitions, for `apply`."""
    given = {"overlap": "allow", "isolation": "inline", "spread": "off", **keys}
    org = '[[org]]\ncode = "org_acme"\nname = "Acme"\nissuer = "main"\nmax_concurrent_runs = 1000\n'
    each = (cluster.define("org_acme", name, "fault.note", when, **given) for name, when in schedules.items())
    return org + "".join(each)


def url_of_a_login(cluster: Cluster, server: Server) -> str:
    """Of a new login of a product that may start runs of `org_acme`, and has a table for its orders."""
    login = f"shop_{new_id()[-12:]}"
    server.execute(f"CREATE ROLE {login} LOGIN IN ROLE {PRODUCT}")
    server.execute("CREATE TABLE shop_orders (key text PRIMARY KEY, name text, run uuid)")
    server.execute(f"GRANT ALL ON shop_orders TO {login}")
    cluster.cli("product", "allow", login, "org_acme")
    return server.url().replace("postgres@", f"{login}@")


@dataclass(frozen=True)
class Amount:
    """Transactions of all processes of the product, and kills of each."""

    transactions: int
    product: int
    worker: int
    server: int


FULL = Amount(10_000, product=30, worker=15, server=8)
SHORT = Amount(600, product=3, worker=2, server=1)
SHOPS = 3


class Shop:
    """The product's processes; one that is killed goes on where its output ended."""

    def __init__(self, folder: Path, url: str, amount: int, seed: int) -> None:
        self._folder, self._url, self._each, self._seed = folder, url, amount // SHOPS, seed
        self._script = folder / "shop.py"
        self._script.write_text(SHOP)
        self._starts = 0
        self.processes = {number: self._begin(number) for number in range(SHOPS)}

    def _begin(self, number: int) -> subprocess.Popen[bytes]:
        self._starts += 1
        given = (f"shop{number}", self.done(number), self._each, self._seed + self._starts)
        command = [sys.executable, str(self._script), self._url, *map(str, given)]
        with self._output(number).open("ab") as output:
            return subprocess.Popen(command, stdout=output)

    def _output(self, number: int) -> Path:
        return self._folder / f"shop{number}.out"

    def done(self, number: int) -> int:
        """The transactions that this process has ended."""
        path = self._output(number)
        lines = path.read_text().split() if path.exists() else []
        return int(lines[-1]) if lines else 0

    def kill(self, number: int) -> None:
        """SIGKILL, and start it again."""
        self.processes[number].kill()
        self.processes[number].wait()
        self.processes[number] = self._begin(number)

    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes.values())

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.mark.timeout(900)
def test_runs_are_what_the_product_has_committed(
    cluster_at: MakeCluster, own_postgres: Server, tmp_path: Path, full: bool
) -> None:
    amount, drawn = FULL if full else SHORT, random.Random(seed())
    cluster = cluster_at(own_postgres.url(), poll=0.2, execution=INLINE)
    cluster.start(file_of(cluster, {name: NEVER for name in NAMES}))
    url = url_of_a_login(cluster, own_postgres)
    workers = [cluster.up(), cluster.up()]
    shop = Shop(tmp_path, url, amount.transactions, 1)

    faults = [*["product"] * amount.product, *["worker"] * amount.worker, *["server"] * amount.server]
    drawn.shuffle(faults)
    try:
        for fault in faults:
            time.sleep(drawn.uniform(0.2, 1.2))
            number = drawn.randrange(2)
            match fault:
                case "product":
                    shop.kill(drawn.randrange(SHOPS))
                case "worker":
                    workers[number].kill()
                    workers[number].wait()
                    workers[number] = cluster.start_worker()
                case "server":
                    own_postgres.stop(signal.SIGQUIT)
                    own_postgres.start()
        cluster.wait_for(shop.has_ended, "the end of the product's transactions", 500.0)
    finally:
        shop.close()
    cluster.wait_for(lambda: _all_ended(cluster), "the end of all runs", 200.0)

    committed = {
        (row["key"], row["name"]): str(row["run"]) for row in cluster.query("SELECT * FROM shop_orders")
    }
    made = cluster.query(
        "SELECT s.key, d.name, r.id, r.state FROM runs r JOIN starts s ON s.id = r.id "
        "JOIN definitions d ON d.id = r.definition_id WHERE s.state = 'made'"
    )
    assert {(row["key"], row["name"]): str(row["id"]) for row in made} == committed
    assert cluster.query("SELECT count(*) AS n FROM runs") == [{"n": len(committed)}]
    assert {row["state"] for row in made} == {"succeeded"}
    # Some were rolled back, and some committed.
    assert amount.transactions * 0.3 < len(committed) < amount.transactions * 0.9


def _all_ended(cluster: Cluster) -> bool:
    try:
        [left] = cluster.query(
            "SELECT (SELECT count(*) FROM starts WHERE state <> 'made') "
            "+ (SELECT count(*) FROM live_runs) AS n"
        )
    except psycopg.OperationalError:
        # The session of before PostgreSQL was killed.
        cluster.disconnect()
        return False
    return left["n"] == 0


# Seconds for which the product leaves its transaction open, and in which runs are watched before it does.
OPEN, SHORTLY = 75.0, 3.0
EACH_SECOND = {"often": "every 1s", "serial": "every 1s"}
START = "SELECT orgworker_start('org_acme', %s, NULL, %s)"
LATE = """
SELECT extract(epoch FROM a.started_at - r.scheduled_for)::float AS late
FROM attempts a JOIN runs r ON r.id = a.run_id
WHERE r.origin = ? AND r.scheduled_for >= ? AND r.scheduled_for < ? ORDER BY 1
"""
WAITS_FOR = "SELECT pid, query FROM pg_stat_activity WHERE ? = ANY(pg_blocking_pids(pid))"


class Counter:
    """The product's other transactions, one after another, each with a start of both definitions."""

    def __init__(self, cluster: Cluster, url: str, held: int) -> None:
        self._cluster, self._held, self._number = cluster, held, 0
        self._shop = psycopg.connect(url, autocommit=True, options="-c lock_timeout=5s")
        self.waits: list[dict[str, Any]] = []

    def work(self, seconds: float) -> tuple[datetime, datetime]:
        """Place orders for so long; returns when it began and ended, by the database's clock."""
        [began] = self._cluster.query("SELECT clock_timestamp() AS at")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name in EACH_SECOND:
                self._number += 1
                self._shop.execute(START, (name, f"{self._held} {self._number}"))
            self.waits += self._cluster.query(WAITS_FOR, self._held)
            time.sleep(0.1)
        [ended] = self._cluster.query("SELECT clock_timestamp() AS at")
        return began["at"], ended["at"]

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *raised: object) -> None:
        self._shop.close()


@pytest.mark.timeout(900)
def test_a_transaction_left_open_for_a_minute_delays_nothing(
    cluster_at: MakeCluster, own_postgres: Server, full: bool
) -> None:
    """It has a start of each definition that fires, is started and is edited meanwhile; retention deletes."""
    ages = '[retention]\nfailed = "1s"\nstart_keys = "1s"'
    cluster = cluster_at(own_postgres.url(), poll=0.2, execution=f"{INLINE}\n{ages}")
    fails = cluster.define(
        "org_acme", "fails", "fault.note", params={"journal": "/nowhere/at/all"}, max_attempts=1
    )
    cluster.start(file_of(cluster, EACH_SECOND) + fails)
    url = url_of_a_login(cluster, own_postgres)
    workers = [cluster.up(), cluster.up()]
    runs_of = "SELECT id FROM runs WHERE id = ANY(?)"
    figures: dict[str, list[float]] = {}

    def late_of(what: str, window: tuple[datetime, datetime]) -> None:
        for origin in ("schedule", "manual"):
            # A run that waits for the transaction waits until its end.
            cluster.wait_for(lambda: not _unfinished_before(cluster, window[1]), f"runs {what}", 30.0)
            late = [float(row["late"]) for row in cluster.query(LATE, origin, *window)]
            assert len(late) > (window[1] - window[0]).total_seconds(), (what, origin)
            figures[f"{origin}, {what}"] = late

    with psycopg.connect(url) as product, Counter(cluster, url, product.info.backend_pid) as counter:
        late_of("before", counter.work(OPEN / 3 if full else SHORTLY))
        product.execute(START, ("often", "an old key"))
        old = [row[0] for row in product.execute(START, ("fails", "to be deleted")).fetchall()]
        product.commit()
        cluster.wait_for(lambda: cluster.query(runs_of, old), "a run that is deleted")
        product.execute(START, ("often", "an old key"))
        ids = [row[0] for name in EACH_SECOND for row in product.execute(START, (name, "open")).fetchall()]
        assert cluster.query(runs_of, old)

        late_of("meanwhile", counter.work(OPEN if full else SHORTLY))
        cluster.apply(file_of(cluster, EACH_SECOND, misfire="all"), "--allow-unknown-handlers")
        late_of("after an edit", counter.work(SHORTLY))
        if full:
            cluster.wait_for(lambda: not cluster.query(runs_of, old), "retention of runs", 70.0)
            old_key = "SELECT id FROM starts WHERE key = 'an old key'"
            cluster.wait_for(lambda: not cluster.query(old_key), "retention of keys", 70.0)
        assert product.info.transaction_status == TransactionStatus.INTRANS
        assert cluster.query(runs_of, ids) == []
        product.commit()
    cluster.wait_for(lambda: len(cluster.query(runs_of, ids)) == len(EACH_SECOND), "its own runs")

    for what, late in figures.items():
        print(f"{what}: {len(late)} runs, p50 {late[len(late) // 2]:.2f} s, max {late[-1]:.2f} s late")
    assert counter.waits == []
    assert not full or max(late[-1] for late in figures.values()) < OPEN / 5
    for worker in workers:
        cluster.drain(worker)


def test_a_transaction_that_locks_a_definition_delays_its_starts(
    cluster_at: MakeCluster, own_postgres: Server
) -> None:
    """The control: what the functions would do if they locked the rows that they read."""
    cluster = cluster_at(own_postgres.url(), poll=0.2, execution=INLINE)
    cluster.start(file_of(cluster, dict.fromkeys(EACH_SECOND, NEVER)))
    url = url_of_a_login(cluster, own_postgres)
    cluster.up()
    made = "SELECT key FROM starts WHERE state = 'made' ORDER BY key"
    with psycopg.connect(own_postgres.url()) as locking, psycopg.connect(url, autocommit=True) as shop:
        locking.execute("SELECT id FROM definitions WHERE name = 'often' FOR UPDATE")
        shop.execute(START, ("often", "kept waiting"))
        shop.execute(START, ("serial", "passes"))
        cluster.wait_for(lambda: cluster.query(made), "a start of another definition")
        time.sleep(1.0)
        assert cluster.query(made) == [{"key": "passes"}]
        locking.rollback()
        cluster.wait_for(lambda: len(cluster.query(made)) == 2, "the start that waited")


def _unfinished_before(cluster: Cluster, at: datetime) -> list[dict[str, Any]]:
    """What was to start by then and has not ended, the transaction's own starts apart."""
    return cluster.query(
        "SELECT id::text FROM live_runs WHERE scheduled_for < ? "
        "UNION ALL SELECT id::text FROM starts WHERE state <> 'made' AND created_at < ?",
        at,
        at,
    )
