"""Measures the broker: what a request by it costs, what a run's start costs, its memory, and slow readers.

    .venv/bin/python -m bench.egress [calls] [starts] [memory] [slow] [--json]

`calls` sends requests of `ctx.http` by the broker and directly, in turns of a few, to a server in a process
of its own that gives each answer in one write; processor time is that of run and broker together. `starts`
is `bench.runs starts` with and without a broker, in turns. `memory` is the unique set size of the broker,
which the kernel shows to root only: at rest, and with connections that each wait for the rest of an answer, a
run for each. `slow` has streams of as many orgs that never read an answer without end, read a KiB of it each
second, or send a byte of a body each second; the calls are those of another org. Exit 1 if a bound of
`BOUNDS` is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import certifi
import psutil

from bench.runs import Starts, load
from tests.fakes.answering import AnsweringWorker
from tests.fakes.certificates import make_certificate
from tests.fakes.plugins import make_plugin
from tests.fakes.running import token, work
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal, Work
from worker.features.egress.handle import AUTHORITIES, BrokerHandle
from worker.handlers.calls import Save
from worker.handlers.frames import END, HEAD, data_frames, frame, json_frame
from worker.ids import RunId
from worker.model.egress import Egress
from worker.model.runs.outcome import Succeeded

# The most of each figure; the units are in its name.
BOUNDS = {
    "calls_slower_ms": 1.0,
    "calls_cpu_more_ms": 0.4,
    "starts_ratio": 1.05,
    "memory_rest_mb": 20.0,
    "memory_connection_kb": 60.0,
    "slow_p99_more_ms": 20.0,
}
HANDLERS = """\
import time
from worker import job


def block(times, cpu):
    return {"times": times, "cpu": time.process_time() - cpu}


@job("bench.noop")
async def noop(ctx):
    return None


@job("bench.calls")
async def calls(ctx):
    for _ in range(ctx.params["blocks"]):
        times, cpu = [], time.process_time()
        for _ in range(ctx.params["each"]):
            began = time.perf_counter()
            (await ctx.http.get(ctx.params["url"])).raise_for_status()
            times.append(time.perf_counter() - began)
        await ctx.save(block(times, cpu))


@job("bench.blocking_calls")
def blocking_calls(ctx):
    for _ in range(ctx.params["blocks"]):
        times, cpu = [], time.process_time()
        for _ in range(ctx.params["each"]):
            began = time.perf_counter()
            ctx.http.get(ctx.params["url"]).raise_for_status()
            times.append(time.perf_counter() - began)
        ctx.save(block(times, cpu))
"""
CALLS = {"async": "calls", "blocking": "blocking_calls"}
ENTRY_POINTS = {f"bench.{name}": f"bench_jobs:{name}" for name in ("noop", *CALLS.values())}
CONFINED = {"landlocked": True, "filtered": True}
BODY = b'{"items":[' + b",".join(b'{"id":%d,"name":"thing"}' % number for number in range(30)) + b"]}"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
CHUNK = bytes(64 * 1024)
# As long as tokens of most issuers.
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ." + "eyJpc3MiOiJodHRwczovL2FjbWUu" * 30
# Requests of a run in its turn, and turns that are not counted.
EACH = 10
WARM_UP = 5
# Looks at the slow streams in a second.
TICKS = 20


class Server(asyncio.Protocol):
    """Answers each request in one write; `/endless` has a body without end, `/held` one that stops, and
    the body of a request to `/taken` is read for ever."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._head = self._path = b""

    def data_received(self, data: bytes) -> None:
        if self._path == b"/taken":
            return
        self._head += data
        if b"\r\n\r\n" not in self._head:
            return
        self._path, self._head = self._head.split(b" ", 2)[1], b""
        match self._path:
            case b"/endless":
                self._transport.write(ENDLESS)
                self.resume_writing()
            case b"/held":
                self._transport.write(ENDLESS + b"x")
            case b"/":
                self._transport.write(ANSWER)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        # Not here: asyncio ends a connection twice that is lost in this call.
        asyncio.get_running_loop().call_soon(self._fill)

    def _fill(self) -> None:
        self._full = False
        while not self._full and not self._transport.is_closing():
            self._transport.write(CHUNK)


async def serve(certificate: str) -> None:
    """Serve plain and TLS on loopback until the process ends; prints both ports."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(Server, "127.0.0.1", 0, ssl=tls, backlog=4096) for tls in (None, context)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()


@contextmanager
def served(certificate: Path) -> Iterator[dict[str, str]]:
    """The URLs of a server in a process of its own."""
    command = [sys.executable, "-m", "bench.egress", "--serve", str(certificate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            plain, encrypted = cast(IO[str], process.stdout).readline().split()
            yield {"plain": f"http://127.0.0.1:{plain}", "TLS": f"https://127.0.0.1:{encrypted}"}
        finally:
            process.kill()


@asynccontextmanager
async def pool(broker: BrokerHandle | None, spares: int = 0) -> AsyncIterator[ChildPool]:
    children = ChildPool(
        SystemClock(),
        sandbox=Planner([]).rules([], []),
        share_after=0,
        spares=spares,
        pass_environment=AUTHORITIES,
        broker=broker,
    )
    children.start()
    children.attach()
    try:
        yield children
    finally:
        await children.close()


def given(handler: str, origin: str, *, sealed: bool, **fields: Any) -> Work:
    egress = Egress((("api",),)) if sealed else Egress()
    entry_point = f"bench_jobs:{handler}"
    common = {"api_origins": (origin,), "token": token(TOKEN), "egress": egress}
    return work(handler, entry_point=entry_point, **common, **fields)


def cpu_of(pid: int | None) -> float:
    """Processor seconds of a process."""
    nanoseconds = [int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(nanoseconds) / 1e9


@dataclass
class Caller:
    """A run that sends requests, a block whenever it is its turn."""

    children: ChildPool
    broker: BrokerHandle | None
    times: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def start(self, handler: str, origin: str, blocks: int) -> None:
        self._turn = asyncio.Event()
        self._blocks: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        params = {"url": f"{origin}/", "blocks": blocks, "each": EACH}
        asked = given(handler, origin, sealed=self.broker is not None, params=params)
        services = AnsweringWorker(answers={Save: self._saved})
        self._run = asyncio.create_task(self.children.run(asked, services, StopSignal()))

    async def first(self) -> None:
        """The block that opens the connection."""
        await self._block()

    async def connect(self, origin: str, calls: int) -> None:
        """Start a run that sends `calls` requests once `call` is called, and a block before."""
        self.start("calls", origin, 1 + calls // EACH)
        await self.first()

    async def call(self, calls: int) -> None:
        """Requests one after another; then the run ends."""
        for _ in range(calls // EACH):
            await self.turn(counted=True)
        await self.finish()

    async def turn(self, *, counted: bool) -> None:
        """One block. Its processor time is that of the run and the broker, for a request."""
        before = 0.0 if self.broker is None else cpu_of(self.broker.pid)
        self._turn.set()
        block = await self._block()
        after = 0.0 if self.broker is None else cpu_of(self.broker.pid)
        if counted:
            self.times += block["times"]
            self.cpu.append((block["cpu"] + after - before) / EACH)

    async def finish(self) -> None:
        self._turn.set()
        outcome = await self._run
        if not isinstance(outcome, Succeeded):
            raise RuntimeError(outcome)

    async def _block(self) -> dict[str, Any]:
        waits = asyncio.ensure_future(self._blocks.get())
        await asyncio.wait({waits, self._run}, return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            raise RuntimeError(self._run.result())
        return waits.result()

    async def _saved(self, call: Save) -> None:
        self._blocks.put_nowait(json.loads(call.data))
        await self._turn.wait()
        self._turn.clear()


async def measure_calls(urls: dict[str, str], count: int) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    turns = count // EACH
    broker = BrokerHandle(SystemClock(), CONFINED)
    async with pool(None) as without, pool(broker) as with_broker:
        for network, origin in urls.items():
            for way, handler in CALLS.items():
                callers = {"direct": Caller(without, None), "brokered": Caller(with_broker, broker)}
                for caller in callers.values():
                    caller.start(handler, origin, 1 + WARM_UP + turns)
                    await caller.first()
                for turn in range(WARM_UP + turns):
                    for name in sorted(callers, reverse=bool(turn % 2)):
                        await callers[name].turn(counted=turn >= WARM_UP)
                for caller in callers.values():
                    await caller.finish()
                found[f"{network}, {way}"] = compared(callers["direct"], callers["brokered"])
    most = {name: max(each[name] for each in found.values()) for name in ("slower_ms", "cpu_more_ms")}
    return {**found, **{f"calls_{name}": value for name, value in most.items()}}


def compared(direct: Caller, brokered: Caller) -> dict[str, float]:
    medians = [statistics.median(each.times) * 1000 for each in (direct, brokered)]
    # The median of turns leaves out those in which a garbage collection or another process was.
    used = [statistics.median(each.cpu) * 1000 for each in (direct, brokered)]
    return {
        "direct_p50_ms": medians[0],
        "brokered_p50_ms": medians[1],
        "slower_ms": medians[1] - medians[0],
        "direct_cpu_ms": used[0],
        "brokered_cpu_ms": used[1],
        "cpu_more_ms": used[1] - used[0],
    }


async def measure_starts(count: int) -> dict[str, Any]:
    """The ratio of the time until a handler is called, with a broker to without."""
    found: dict[str, Any] = {}
    for spares in (0, 1):
        broker = BrokerHandle(SystemClock(), CONFINED)
        async with pool(None, spares) as without, pool(broker, spares) as with_broker:
            kinds = {"without": without, "with": with_broker}
            works = {name: given("noop", "https://api.invalid", sealed=name == "with") for name in kinds}
            for number in range(count + WARM_UP):
                if number in (0, WARM_UP):
                    measured = {name: Starts() for name in kinds}
                for name in sorted(kinds, reverse=bool(number % 2)):
                    await measured[name].add(kinds[name], 0.02, works[name])
            called = {name: statistics.median(each.called) * 1000 for name, each in measured.items()}
            found["with a spare" if spares else "without a spare"] = {
                "with_ms": called["with"],
                "without_ms": called["without"],
                "ratios": measured["with"].ratio_to(measured["without"]),
                "ratio": measured["with"].ratios_to(measured["without"])["called"],
            }
    return {**found, "starts_ratio": max(each["ratio"] for each in found.values())}


class Stream:
    """A request of a run of its own org, sent by the broker; the run is only its socket."""

    def __init__(self, broker: BrokerHandle, origin: str, path: str, number: int) -> None:
        fields = {"org_code": f"org_{number}", "run_id": RunId(f"00000000-0000-7000-8000-{number:012}")}
        self._attempt = broker.serve(given("calls", origin, sealed=True, **fields), AnsweringWorker())
        self.socket = self._attempt.connect()
        host, _, port = origin.partition("://")[2].partition(":")
        head: dict[str, Any] = {
            "method": "POST" if path == "/taken" else "GET",
            "scheme": origin.partition(":")[0],
            "host": host,
            "port": int(port),
            "target": path,
            "headers": [],
            "timeout": {},
            "public": False,
            "fresh": False,
        }
        data = json_frame(HEAD, head)
        self.socket.sendall(data + (b"".join(data_frames(b"x")) if path == "/taken" else frame(END)))
        self.socket.setblocking(False)

    def close(self) -> None:
        self._attempt.drop()
        self.socket.close()


def uss(broker: BrokerHandle) -> float:
    return float(psutil.Process(broker.pid).memory_full_info().uss)


async def measure_memory(urls: dict[str, str], count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for network, origin in urls.items():
        broker = BrokerHandle(SystemClock(), CONFINED)
        async with pool(broker):
            await asyncio.sleep(1)
            found["started_mb"] = uss(broker) / 1e6
            first = Stream(broker, origin, "/held", 0)
            await asyncio.sleep(0.5)
            first.close()
            await asyncio.sleep(0.5)
            rest = uss(broker)
            streams = [Stream(broker, origin, "/held", number) for number in range(1, count + 1)]
            await settled(broker)
            for each in streams:
                each.socket.recv(65536)  # raises if it has no answer
            many = uss(broker)
            for each in streams:
                each.close()
            await settled(broker)
            found[network] = {
                "rest_mb": rest / 1e6,
                "connection_kb": (many - rest) / count / 1e3,
                "closed_mb": uss(broker) / 1e6,
            }
    for name in ("rest_mb", "connection_kb"):
        found[f"memory_{name}"] = max(found[network][name] for network in urls)
    return found


async def settled(broker: BrokerHandle) -> None:
    """Wait until the broker has done what it has to do."""
    quiet = 0
    while quiet < 7:
        before = cpu_of(broker.pid)
        await asyncio.sleep(0.2)
        quiet = quiet + 1 if cpu_of(broker.pid) - before < 0.02 else 0


async def measure_slow(urls: dict[str, str], count: int, calls: int) -> dict[str, Any]:
    origin, rounds = urls["TLS"], 2
    broker = BrokerHandle(SystemClock(), CONFINED)
    found: dict[str, Any] = {}
    async with pool(broker) as children:
        callers = {name: Caller(children, broker) for name in ("alone", "while they open", "beside them")}
        for _ in range(rounds):
            await callers["alone"].connect(origin, calls)
            await callers["alone"].call(calls)
            rest = uss(broker)
            # Connections begin in turn: one that is behind theirs waits for as long as theirs take.
            await callers["while they open"].connect(origin, calls)
            opening = asyncio.create_task(callers["while they open"].call(calls))
            paths = ["/taken" if number % 3 == 0 else "/endless" for number in range(count)]
            streams = []
            for number, path in enumerate(paths):
                streams.append(Stream(broker, origin, path, number))
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await opening
            await settled(broker)
            trickling = asyncio.create_task(trickle(streams, paths))
            await asyncio.sleep(3)
            await callers["beside them"].connect(origin, calls)
            await callers["beside them"].call(calls)
            found["stream_kb"] = (uss(broker) - rest) / count / 1e3
            trickling.cancel()
            for each in streams:
                each.close()
            await asyncio.sleep(2)
    for name, caller in callers.items():
        cuts = statistics.quantiles(caller.times, n=100)
        found[name] = {"p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}
    found["slow_p99_more_ms"] = found["beside them"]["p99_ms"] - found["alone"]["p99_ms"]
    return found


async def trickle(streams: list[Stream], paths: list[str]) -> None:
    """Have a third of the streams read, and a third send, once a second; the others do nothing."""
    one = b"".join(data_frames(b"x"))
    while True:
        for tick in range(TICKS):
            began = time.monotonic()
            for number in range(tick, len(streams), TICKS):
                with suppress(BlockingIOError):
                    if paths[number] == "/taken":
                        streams[number].socket.send(one)
                    elif number % 3 == 1:
                        streams[number].socket.recv(1024)
            await asyncio.sleep(max(0.0, 1 / TICKS - (time.monotonic() - began)))


def report(found: dict[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(
                f"{key} {each if isinstance(each, str) else round(each, 3)}" for key, each in value.items()
            )
            yield f"  {name}: {shown}"
        else:
            bound = f" (at most {BOUNDS[name]})" if name in BOUNDS else ""
            yield f"  {name} {value:.3f}{bound}"


async def measure(options: argparse.Namespace, urls: dict[str, str]) -> dict[str, dict[str, Any]]:
    ways = {
        "calls": lambda: measure_calls(urls, options.calls),
        "starts": lambda: measure_starts(options.starts),
        "memory": lambda: measure_memory(urls, options.connections),
        "slow": lambda: measure_slow(urls, options.streams, options.calls),
    }
    return {what: await ways[what]() for what in options.what}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["calls", "starts", "memory", "slow"])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.serve:
        asyncio.run(serve(options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="orgworker-bench-") as name:
        folder = Path(name)
        certificate = make_certificate(folder / "server.pem")
        # As many authorities as there are usually.
        authorities = folder / "authorities.pem"
        authorities.write_text(Path(certifi.where()).read_text() + public_part(certificate))
        os.environ["SSL_CERT_FILE"] = str(authorities)
        make_plugin(folder, modules={"bench_jobs": HANDLERS}, entry_points=ENTRY_POINTS)
        sys.path.append(name)
        with served(certificate) as urls:
            found = asyncio.run(measure(options, urls))
    if options.json:
        print(json.dumps(found | {"load": os.getloadavg()[0]}))
    else:
        for what, figures in found.items():
            print(what, *report(figures), sep="\n")
        print(load())
    figures = {name: value for each in found.values() for name, value in each.items()}
    sys.exit(any(name in figures and figures[name] > most for name, most in BOUNDS.items()))


def public_part(certificate: Path) -> str:
    text = certificate.read_text()
    return text[text.index("-----BEGIN CERTIFICATE-----") :]


if __name__ == "__main__":
    main()
