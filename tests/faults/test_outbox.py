"""Starts from an outbox: product, relays, API and workers are killed, and runs are what was committed.

`FAULTS=full` makes it 10,000 transactions for each database.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from tests.conftest import FULL
from tests.fakes.ports import free_port
from tests.faults.cluster import ROOT, Cluster
from tests.faults.outbox_product import ORGS, TABLE, connect, execute, outbox_of
from tests.faults.proxy import Proxy, Verdict
from tests.integration.client.conftest import KINDS, ProductDatabase, database_of
from tests.integration.client.conftest import maria as maria

# What is killed, and how often, for so many transactions.
KILLS, FULL_KILLS = 6, 60
TRANSACTIONS, FULL_TRANSACTIONS = 120, 10_000


class Processes:
    """The product, two relays, the API and two workers; each is started again after a kill."""

    def __init__(self, cluster: Cluster, product: ProductDatabase, transactions: int) -> None:
        self.cluster, self.product = cluster, product
        self.port = free_port()
        folder = cluster.folder
        added = cluster.cli("operators", "add", "shop", "--role", "starter", "-o", "json")
        token = json.loads(added.out)
        (folder / "relay_token").write_text(token["token"])
        (folder / "relay_token").chmod(0o600)
        (folder / "relay.toml").write_text(
            f'[relay]\napi = "http://127.0.0.1:{self.port}"\ntoken_file = "{folder / "relay_token"}"\n'
            f'outbox_url = "{product.url}"\n'
        )
        worker = [sys.executable, "-m", "worker"]
        product_of = [sys.executable, "-m", "tests.faults.outbox_product", product.kind, product.url]
        api = ["--set", f"web.listen=127.0.0.1:{self.port}", "--set", "web.calls_per_second=2000"]
        self.commands = {
            "product": [*product_of, str(transactions)],
            "relay 1": [*worker, "--config", str(folder / "relay.toml"), "relay"],
            "relay 2": [*worker, "--config", str(folder / "relay.toml"), "relay"],
            "api": [*worker, "--config", str(cluster.settings), *api, "serve"],
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.workers = [cluster.up(), cluster.up()] if not cluster.on_file else [cluster.up()]

    def begin(self, name: str) -> None:
        log = (self.cluster.folder / f"{name}.log").open("ab")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.running[name] = subprocess.Popen(
            self.commands[name], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        log.close()

    def kill(self, name: str) -> None:
        if name == "worker":
            number = random.randrange(len(self.workers))
            worker = self.workers[number]
            [process] = self.cluster.processes(worker, "worker")
            self.cluster.kill(worker, "worker", process)
            self.workers[number] = self.cluster.start_worker()
            return
        process = self.running[name]
        if process.poll() is None:
            process.kill()
            process.wait()
            self.begin(name)

    def api_is_up(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.port}/livez").status_code == 200
        return False

    def log(self, name: str) -> str:
        path: Path = self.cluster.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture(params=KINDS)
def product(request: pytest.FixtureRequest, tmp_path: Path) -> ProductDatabase:
    made = database_of(request.param, request, tmp_path)
    made.make()
    made.execute(TABLE)
    return made


@pytest.fixture
def processes(on_server: Cluster, product: ProductDatabase, full: bool) -> Iterator[Processes]:
    cluster = on_server
    for number in range(ORGS):
        cluster.start(
            cluster.define(f"org_{number}", "note", "fault.note", overlap="allow"), org=f"org_{number}"
        )
    made = Processes(cluster, product, FULL_TRANSACTIONS if full else TRANSACTIONS)
    yield made
    made.end()


@pytest.mark.timeout(3600)
def test_runs_are_what_was_committed(processes: Processes, full: bool) -> None:
    cluster, product = processes.cluster, processes.product
    began = time.monotonic()
    for name in processes.commands:
        processes.begin(name)
    names = ("product", "relay 1", "relay 2", "api", "worker")
    pause = 0.5 if not full else 3.0
    for number in range(FULL_KILLS if full else KILLS):
        time.sleep(random.uniform(0.2, 2 * pause))
        processes.kill(names[number % len(names)])

    def product_done() -> bool:
        code = processes.running["product"].poll()
        assert code in (None, 0), processes.log("product")[-2000:]
        return code == 0

    patience = 3000.0 if full else 150.0
    cluster.wait_for(product_done, "the product", patience)
    waiting = "SELECT COUNT(*) FROM orgworker_outbox WHERE state = 'waiting'"
    cluster.wait_for(lambda: product.execute(waiting)[0][0] == 0, "an empty outbox", patience)
    cluster.wait_for(cluster.all_ended if not full else lambda: not live(cluster), "the runs' ends", patience)

    orders = {f"order-{id_}": org for id_, org in product.execute("SELECT id, org FROM orders")}
    runs = cluster.query(
        "SELECT r.id, r.request_key, r.state, r.created_by, o.code FROM runs r JOIN orgs o ON o.id = r.org_id"
        " ORDER BY r.id"
    )
    print(
        f"{product.kind}: {len(orders)} orders, {len(runs)} runs, {len(cluster.faults)} workers killed, "
        f"{time.monotonic() - began:.0f} s"
    )
    # Runs are the commits, one a key, in the right org.
    assert len(runs) == len(orders) > (TRANSACTIONS // 2)
    assert {run["request_key"]: run["code"] for run in runs} == orders
    assert {(run["state"], run["created_by"]) for run in runs} == {("succeeded", "starter:shop")}
    # In the order of the commits, for each definition.
    for org in set(orders.values()):
        numbers = [int(run["request_key"].removeprefix("order-")) for run in runs if run["code"] == org]
        assert numbers == sorted(numbers)
    assert product.execute("SELECT COUNT(*) FROM orgworker_outbox WHERE state <> 'sent'") == [(0,)]
    # No log has the token.
    token = (cluster.folder / "relay_token").read_text()
    assert not [name for name in processes.commands if token in processes.log(name)]
    # A stop is orderly.
    for name in ("relay 1", "relay 2"):
        processes.running[name].send_signal(signal.SIGTERM)
        assert processes.running[name].wait(40) == 0, processes.log(name)[-2000:]


class Mute:
    """What a relay sends arrives, and each answer waits for `let_go`."""

    left: ClassVar[int] = 0

    def sees(self, data: bytes) -> Verdict:
        return "mute"


class Cut:
    """What a relay sends on a connection arrives, and only the first answer comes back."""

    left: ClassVar[int] = 0

    def __init__(self) -> None:
        self._requests = 0

    def sees(self, data: bytes) -> Verdict:
        self._requests += data.startswith(b"POST ")
        return "pass" if self._requests < 2 else "cut"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("product", KINDS if FULL else ["postgresql"], indirect=True)
def test_a_relay_stopped_beyond_its_lease(processes: Processes, full: bool) -> None:
    """It has sent the first starts, and marks late what the next relay has sent without an answer."""
    cluster, product = processes.cluster, processes.product
    outbox, connection = outbox_of(product.kind), connect(product.kind, product.url)
    for number in range(1, 41):
        org = f"org_{number % ORGS}"
        execute(connection, f"INSERT INTO orders VALUES ({number}, '{org}')")
        outbox.start(connection, org, "note", {"order": number}, key=f"order-{number}")
    connection.commit()
    connection.close()
    processes.begin("api")
    cluster.wait_for(processes.api_is_up, "the API", 60.0)

    def rows(where: str) -> dict[int, tuple[Any, ...]]:
        columns = "id, state, first_sent_at, run_id"
        return {row[0]: row for row in product.execute(f"SELECT {columns} FROM {outbox.table} WHERE {where}")}

    with Proxy(processes.port) as first, Proxy(processes.port) as second:
        first.watch, second.watch = Mute, Cut
        for name, proxy in (("relay 1", first), ("relay 2", second)):
            module = "worker" if full else "tests.faults.short_lease"
            toml = str(cluster.folder / "relay.toml")
            through = ["--set", f"relay.api=http://127.0.0.1:{proxy.port}"]
            processes.commands[name] = [sys.executable, "-m", module, "--config", toml, *through, "relay"]
        processes.begin("relay 1")
        cluster.wait_for(lambda: len(cluster.query("SELECT id FROM runs")) == ORGS, "the first starts", 60.0)
        processes.running["relay 1"].send_signal(signal.SIGSTOP)
        claimed = rows("claim IS NOT NULL")
        processes.begin("relay 2")
        cluster.wait_for(lambda: rows("error IS NOT NULL"), "the next relay", 150.0)
        processes.running["relay 2"].kill()
        left = rows("error IS NOT NULL")
        assert set(left) < set(claimed) and {row[1] for row in left.values()} == {"waiting"}

        first.let_go()
        first.watch = None
        processes.running["relay 1"].send_signal(signal.SIGCONT)
        cluster.wait_for(lambda: not rows("state = 'waiting'"), "an empty outbox", 150.0)
    cluster.wait_for(cluster.all_ended, "the runs' ends", 60.0)

    # One run a key, in order, and each row has its own.
    runs = cluster.query("SELECT id, request_key, org FROM run_view ORDER BY id")
    made = [int(run["request_key"].removeprefix("order-")) for run in runs]
    assert sorted(made) == list(range(1, 41))
    assert all(of == sorted(of) for org in range(ORGS) for of in ([n for n in made if n % ORGS == org],))
    assert {f"order-{id_}": row[3] for id_, row in rows("1 = 1").items()} == {
        run["request_key"]: str(run["id"]) for run in runs
    }
    # What the next relay has recorded is there: a start of a week ago would not be sent again.
    assert {id_: row[2] for id_, row in rows("1 = 1").items() if id_ in left} == {
        id_: row[2] for id_, row in left.items()
    }


def live(cluster: Cluster) -> list[dict[str, Any]]:
    return cluster.query("SELECT id FROM live_runs LIMIT 1")


def test_a_product_that_dies_before_its_commit_starts_nothing(product: ProductDatabase) -> None:
    """The control of the order above: what is inserted and not committed is in no outbox."""
    connection = connect(product.kind, product.url)
    outbox = outbox_of(product.kind)
    execute(connection, "INSERT INTO orders VALUES (1, 'org_0')")
    outbox.start(connection, "org_0", "note", key="order-1")
    connection.close()

    assert product.execute("SELECT COUNT(*) FROM orders") == [(0,)]
    assert product.execute("SELECT COUNT(*) FROM orgworker_outbox") == [(0,)]
