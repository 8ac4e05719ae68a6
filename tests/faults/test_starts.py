"""A product starts runs in its own transactions while it, the workers and PostgreSQL are killed at random.

What the product's own table says it has committed is the truth: each of its rows has exactly one run, and
each run a row.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.fakes.postgres import Server
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
    inline = 'inline = ["fault-jobs"]\nmax_inline = 200'
    cluster = cluster_at(own_postgres.url(), poll=0.2, execution=inline)
    keys = {"overlap": "allow", "isolation": "inline"}
    file = '[[org]]\ncode = "org_acme"\nname = "Acme"\nissuer = "main"\nmax_concurrent_runs = 1000\n'
    cluster.start(file + "".join(cluster.define("org_acme", name, "fault.note", **keys) for name in NAMES))
    login = f"shop_{new_id()[-12:]}"
    own_postgres.execute(f"CREATE ROLE {login} LOGIN IN ROLE {PRODUCT}")
    own_postgres.execute("CREATE TABLE shop_orders (key text PRIMARY KEY, name text, run uuid)")
    own_postgres.execute(f"GRANT ALL ON shop_orders TO {login}")
    cluster.cli("product", "allow", login, "org_acme")
    workers = [cluster.up(), cluster.up()]
    shop = Shop(tmp_path, own_postgres.url().replace("postgres@", f"{login}@"), amount.transactions, 1)

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
