"""Brokers that are killed and leases that end: what was sent, judged by the service that got it."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, org_entry, wait_until
from tests.fakes.traffic import Traffic, traffic
from worker.engine.runners.child import linux

pytestmark = [pytest.mark.feature("egress"), pytest.mark.timeout(300)]
RUNS = 20
KILLS = 50
LEASE = 6.0
# Seconds within which an attempt's connections close once it is frozen.
CLOSED_WITHIN = 0.1
SOURCE = """
import asyncio, json, os
from pathlib import Path

import httpx

from worker import Context, job

def write(ctx, **fields):
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps({"run": ctx.run.id, "attempt": ctx.run.attempt} | fields) + "\\n")

@job("acme.numbers", egress=["api"], max_attempts=1)
async def numbers(ctx: Context):
    "Send numbers, no number twice, until a file exists."
    answered, failed = [], []
    while not Path(ctx.params["until"]).exists():
        number = len(answered) + len(failed)
        try:
            await ctx.http.post(f"{ctx.params['url']}/{ctx.run.id}/{number}", content=b"x" * 3000)
        except httpx.ReadError:
            failed.append(number)
        else:
            answered.append(number)
    return {"answered": len(answered), "failed": failed}

async def number_on(ctx, name, url):
    "As above, whatever fails: it goes on with the next number."
    number = 0
    while not Path(ctx.params["until"]).exists():
        number += 1
        try:
            await ctx.http.get(f"{url}/{name}/{ctx.run.id}/{ctx.run.attempt}/{number}")
        except httpx.TransportError as error:
            write(ctx, name=name, error=type(error).__name__)
            await asyncio.sleep(0.01)

async def stream(ctx):
    "Read an answer that never ends, and say how it ended."
    try:
        url = f"{ctx.params['url']}/stream/{ctx.run.id}/{ctx.run.attempt}"
        async with ctx.http.stream("GET", url) as answer:
            async for _ in answer.aiter_raw():
                pass
    except httpx.TransportError as error:
        write(ctx, name="stream", error=type(error).__name__)

@job("acme.traffic", egress=["api"])
async def all_at_once(ctx: Context):
    "A stream, requests one after another, and many that queue for a limit."
    write(ctx, name="start", pid=os.getpid())
    streaming = asyncio.create_task(stream(ctx))
    await asyncio.gather(
        number_on(ctx, "busy", ctx.params["url"]),
        *(number_on(ctx, f"queued{n}", ctx.params["limited"]) for n in range(10)),
    )
    streaming.cancel()
"""
HANDLERS = {"acme.numbers": "acme_traffic:numbers", "acme.traffic": "acme_traffic:all_at_once"}


def prepared(site: Site) -> None:
    make_plugin(site.plugins, dist="acme-traffic", modules={"acme_traffic": SOURCE}, entry_points=HANDLERS)
    site.add_orgs(application("org_acme"))


def broker(worker: subprocess.Popen[bytes]) -> psutil.Process:
    """The broker of a worker, once it is up."""

    def found() -> psutil.Process | None:
        for child in psutil.Process(worker.pid).children():
            if child.name() == linux.ProcessName.BROKER and child.status() != psutil.STATUS_ZOMBIE:
                return child
        return None

    process = wait_until(found, "the broker", timeout=15)
    assert process is not None
    return process


def test_brokers_that_are_killed_lose_no_run_and_send_nothing_twice(site: Site) -> None:
    done = site.out / "done"
    chance = random.Random(32)
    with traffic() as api:
        prepared(site)
        params = {"url": api.url, "until": str(done)}
        names = [f"numbers{number}" for number in range(RUNS)]
        site.apply(
            org_entry("org_acme", max_concurrent_runs=RUNS)
            + "".join(
                definition("org_acme", name, "acme.numbers", params=params, api_origins=[api.url])
                for name in names
            )
        )
        worker = site.start_worker()
        site.wait_for_handlers(*HANDLERS)
        for name in names:
            site.cli("definitions", "run", "org_acme", name)
        wait_until(lambda: len({path.split("/")[1] for path in api.paths()}) == RUNS, "all runs to send")

        killed = set()
        for _ in range(KILLS):
            process = broker(worker)
            at = len(api.seen)
            wait_until(lambda at=at: len(api.seen) > at + 5, "requests by this broker", timeout=20)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            killed.add(process.pid)
            wait_until(lambda process=process: not process.is_running(), "its end", timeout=10)
        done.touch()
        ended = [site.wait_for_end("org_acme", name) for name in names]

        assert len(killed) == KILLS
        assert site.log_text().count('"broker.died"') == KILLS
        assert {(run["state"], run["attempt"]) for run in ended} == {("succeeded", 1)}
        assert max(Counter(api.paths()).values()) == 1
        reached = Counter(path.split("/")[1] for path in api.paths())
        for run in ended:
            result = run["result"]
            # Of those that failed some had arrived; all others were answered.
            arrived = reached[str(run["id"])] - result["answered"]
            assert 0 <= arrived <= len(result["failed"]) <= KILLS
        assert any(run["result"]["failed"] for run in ended)
        shown = site.cli("runs", "show", str(ended[0]["id"]), "-o", "json").json()
        assert [row["origin"] for row in shown["egress"]] == [api.url]


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def begin(site: Site, api: Traffic, limited: Traffic) -> subprocess.Popen[bytes]:
    """A worker with a run that streams, sends requests and has others queue; until the file `done` exists."""
    prepared(site)
    params = {
        "url": api.url,
        "limited": limited.url,
        "until": str(site.out / "done"),
        "journal": str(site.out / "journal"),
    }
    limit = f'[[limit]]\norigin = "{limited.url}"\nper = "org"\nrate = "2/s"\nburst = 1\nmax_wait = "1h"\n'
    origins = [api.url, limited.url]
    site.apply(definition("org_acme", "traffic", "acme.traffic", params=params, api_origins=origins) + limit)
    worker = site.start_worker()
    site.wait_for_handlers(*HANDLERS)
    site.cli("definitions", "run", "org_acme", "traffic")
    wait_until(lambda: api.open_streams and len(api.seen) > 20 and limited.seen, "traffic")
    return worker


def frozen_at(process: psutil.Process, within: float) -> float:
    """When a process of a run is stopped, by the monotonic clock."""
    status = Path(f"/proc/{process.pid}/stat")
    until = time.monotonic() + within
    while time.monotonic() < until:
        if status.read_text().rpartition(")")[2].split()[0] == "T":
            return time.monotonic()
        time.sleep(0.002)
    raise AssertionError(f"process {process.pid} was not frozen within {within:g} s")


def run_process(site: Site) -> psutil.Process:
    [start, *_] = [line for line in read_journal(site.out / "journal") if line["name"] == "start"]
    return psutil.Process(start["pid"])


# On SQLite no other worker takes over, so nothing freezes.
on_server = pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)


@on_server
@pytest.mark.parametrize("also", ["the worker", "the worker and its broker"])
def test_nothing_leaves_a_frozen_run_and_it_goes_on_after_the_thaw(site_on_either: Site, also: str) -> None:
    site = site_on_either
    site.configure(execution=f'lease = "{LEASE:g}s"\nrenew = "300ms"')
    with traffic() as api, traffic() as limited:
        worker = begin(site, api, limited)
        both = also != "the worker"
        victims = [psutil.Process(worker.pid), *([broker(worker)] if both else [])]
        run = run_process(site)

        with stopped(*victims):
            stopped_at = time.monotonic()
            froze = frozen_at(run, LEASE)
            # The lease holds for as long again as there is left.
            time.sleep(0.1 * LEASE)
            before_thaw = time.monotonic()
        wait_until(lambda: api.seen[-1].at > before_thaw + 0.5, "requests after the thaw")
        wait_until(lambda: limited.seen[-1].at > before_thaw + 0.5, "limited requests after the thaw")
        wait_until(lambda: api.streams, "the end of the stream")
        (site.out / "done").touch()
        ended = site.wait_for_end("org_acme", "traffic")

        assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
        sent = [each.at for each in (*api.seen, *limited.seen)]
        assert not [at for at in sent if froze + CLOSED_WITHIN < at < before_thaw]
        [closed] = api.streams.values()
        if both:
            # No process was awake that could have sent or closed anything.
            assert not [at for at in sent if stopped_at + CLOSED_WITHIN < at < before_thaw]
        else:
            assert [at for at in sent if stopped_at + CLOSED_WITHIN < at < froze]
            assert closed < froze + CLOSED_WITHIN
        errors = {line["name"]: line.get("error") for line in read_journal(site.out / "journal")}
        assert errors["stream"] == "ReadError"


@on_server
def test_a_broker_that_wakes_up_after_its_lease_sends_nothing(site_on_either: Site) -> None:
    """Another worker has the run by then; the first one's broker wakes up before its worker does."""
    site = site_on_either
    lease = 4.0
    with traffic() as api, traffic() as limited:
        first = begin(site, api, limited)
        run = str(site.runs("org_acme", "traffic")[0]["id"])
        worker, its_broker = psutil.Process(first.pid), broker(first)
        worker.suspend()
        its_broker.suspend()
        stopped_at = time.monotonic()
        second = site.start_worker()
        wait_until(
            lambda: [path for path in api.paths() if path.split("/")[3:4] == ["2"]], "the second attempt"
        )
        assert time.monotonic() > stopped_at + lease

        woke_at = time.monotonic()
        its_broker.resume()
        time.sleep(1.0)
        worker.resume()
        wait_until(lambda: f"/stream/{run}/1" in api.streams, "the end of the first attempt's stream")
        closed = api.streams[f"/stream/{run}/1"]
        time.sleep(1.0)
        (site.out / "done").touch()
        ended = site.wait_for_end("org_acme", "traffic")

        assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
        late = [
            each.path
            for each in (*api.seen, *limited.seen)
            if each.at > stopped_at + CLOSED_WITHIN and each.path.split("/")[3] == "1"
        ]
        assert late == []
        assert closed < woke_at + CLOSED_WITHIN
        for process in (first, second):
            assert site.stop_worker(process) == 0


BREAKS = """
import os, sys
if "worker.features.egress.broker" in sys.orig_argv and os.path.exists({flag!r}):
    os._exit(3)
"""


def test_a_worker_whose_broker_does_not_start_takes_no_runs_and_says_why(site: Site) -> None:
    """Once one starts, the same run succeeds with its only attempt."""
    flag, port = site.out / "broken", free_port()
    flag.touch()
    (site.out / "done").touch()
    site.configure(web=f'listen = "127.0.0.1:{port}"')

    def readiness() -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz")
        except httpx.TransportError:
            return None

    def broker_check() -> dict[str, object]:
        rows = json.loads(site.process("doctor", "-o", "json", check=False).out)
        return next(row for row in rows if row["check"] == "broker")

    with traffic() as api:
        prepared(site)
        (site.plugins / "sitecustomize.py").write_text(BREAKS.format(flag=str(flag)))
        params = {"url": api.url, "until": str(site.out / "done")}
        site.apply(
            org_entry("org_acme")
            + definition("org_acme", "numbers", "acme.numbers", params=params, api_origins=[api.url])
        )
        site.start_worker()
        wait_until(lambda: (found := readiness()) and "broker" in found.json()["lacking"], "the fault")
        found = readiness()
        assert found is not None
        assert (found.status_code, found.json()["broker"]) == (503, "exit code 3")
        assert not broker_check()["ok"]
        assert "exit code 3" in str(broker_check()["detail"])
        site.cli("definitions", "run", "org_acme", "numbers")
        time.sleep(1.0)
        assert [(run["state"], run["attempt"]) for run in site.runs("org_acme", "numbers")] == [
            ("waiting", 0)
        ]

        flag.unlink()
        ended = site.wait_for_end("org_acme", "numbers")
        assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
        wait_until(lambda: (found := readiness()) and found.status_code == 200, "a worker that is ready")
        assert broker_check()["ok"]
