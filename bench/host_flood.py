"""Measures how long a worker's loop stands still, and what memory it takes, when a host's token is misused.

    .venv/bin/python -m bench.host_flood [ATTACK ...] [--database postgresql|sqlite]

A process of its own sends the attack's calls. This one is a worker without loops of its own, and looks a
thousand times a second how long its loop has not turned: `stall_ms` by the clock, and `busy_ms` by its own
processor time, which other processes on the machine do not change. `memory_mib` is what its peak grew by,
`processes_mib` the peak of the processes that it started.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx

from bench.filling import HANDLER, filled
from bench.hosts import ADDRESS, listener_of, with_hosts
from worker.features.hosts.attempt_api import AttemptApi
from worker.features.hosts.wire import PREFIX
from worker.telemetry import logs
from worker.telemetry.masking import masker
from worker.tokens.sealing import KeyRing
from worker.wiring.start import SWITCH

MIB = 1024 * 1024
NOW = "2030-01-01T00:00:00Z"
# A call and its body; those of one list are sent at once.
Calls = list[tuple[str, bytes]]
Fence = tuple[str, int]


def of_lists(size: int) -> str:
    """JSON text of about this size that costs a parser the most."""
    return "[" + "[]," * (size // 3 - 2) + "[]]"


def encoded(**message: Any) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def large_bodies(fences: list[Fence]) -> Iterator[Calls]:
    """16 MiB of empty lists, also as results and steps."""
    run, fence = fences[0]
    yield [("finish", b'{"ends":' + of_lists(16 * MIB - 1000).encode() + b"}")]
    outcome = {"kind": "Succeeded", "result": of_lists(MIB - 1000)}
    yield [
        (
            "finish",
            encoded(ends=[{"run": run, "fencing_token": fence, "outcome": outcome, "sealed": "x"}] * 15),
        )
    ]
    step: dict[str, Any] = {
        **{"name": "s", "key": None, "occurrence": 1, "result_json": of_lists(MIB // 4), "spends": []},
        **{"started_at": NOW, "ended_at": NOW},
    }
    steps = [{**step, "seq": n + 1} for n in range(60)]
    row = {"run": run, "fencing_token": fence, "handler": HANDLER}
    yield [("store", encoded(steps=[{**row, "step": step} for step in steps]))]


def checkpoints(fences: list[Fence]) -> Iterator[Calls]:
    """Checkpoints of 1 MB, of lists and of words, four at a time."""
    for data in (of_lists(MIB - 100), json.dumps("abcDEF123_" * 100_000)):
        yield [
            ("save", encoded(run=run, fencing_token=fence, handler=HANDLER, data=data))
            for run, fence in fences[:4]
        ]


def log(fences: list[Fence]) -> Iterator[Calls]:
    """36 MB of log for one run."""
    run, fence = fences[0]
    text = "abcDEF123 " * 1600
    line = {"run": run, "fencing_token": fence, "at": NOW, "level": "info", "source": "log", "text": text}
    for call in range(40):
        rows = [{**line, "seq": 60 * call + n} for n in range(60)]
        yield [("logs", encoded(lines=rows))]


def handlers(fences: list[Fence]) -> Iterator[Calls]:
    """10,000 handlers, and some with large schemas."""
    entry = {"distribution": "evil", "version": "1", "entry_point": "a:b"}
    yield [("handlers", encoded(entries=[{**entry, "name": f"evil.h{n}"} for n in range(10_000)]))]
    schema = {"x": json.loads(of_lists(MIB // 4 - 1000))}
    large = [{**entry, "name": f"evil.l{n}", "params_schema": schema} for n in range(3)]
    yield [("handlers", encoded(entries=large))]


def incarnations(fences: list[Fence]) -> Iterator[Calls]:
    """98 incarnations."""
    given = encoded(host="h", pid=1, version="1", slots={"child": 100_000})
    for _ in range(14):
        yield [("register", given)] * 7


def small_calls(fences: list[Fence]) -> Iterator[Calls]:
    """400 small calls at a time."""
    run, fence = fences[0]
    row = {"run": run, "fencing_token": fence, "progress": {"done": 1, "total": 2, "note": "x" * 400}}
    for _ in range(10):
        yield [("progress", encoded(rows=[row]))] * 400


def medium_calls(fences: list[Fence]) -> Iterator[Calls]:
    """100 calls of 30 KB at a time, each with a checkpoint of lists."""
    run, fence = fences[0]
    given = encoded(run=run, fencing_token=fence, handler=HANDLER, data=of_lists(30_000))
    for _ in range(3):
        yield [("save", given)] * 100


ATTACKS: dict[str, Callable[[list[Fence]], Iterator[Calls]]] = {
    attack.__name__: attack
    for attack in (large_bodies, checkpoints, log, handlers, incarnations, small_calls, medium_calls)
}


async def watch(found: dict[str, float]) -> None:
    while True:
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(0.001)
        stall, busy = time.perf_counter() - began - 0.001, time.process_time() - cpu
        found["stall_ms"] = max(found["stall_ms"], round(1000 * stall, 1))
        found["busy_ms"] = max(found["busy_ms"], round(1000 * busy, 1))


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kib) / 1024


def with_secrets(count: int = 200) -> None:
    """Texts are compared with these, as in a worker that holds tokens."""
    for _ in range(count):
        masker.register(secrets.token_urlsafe(40))


async def measure(name: str, database: Any, caller: tuple[str, str]) -> Any:
    found = {"stall_ms": 0.0, "busy_ms": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        listener = listener_of(database, KeyRing.generate(Path(folder) / "keyring"))
        async with listener.serving():
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.host_flood", name, "--client"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ,
            )
            to_client, of_client = cast(Any, client.stdin), cast(Any, client.stdout)
            to_client.write(json.dumps(caller).encode() + b"\n")
            await of_client.readline()  # it is ready
            before = reset_peak()
            watching = asyncio.create_task(watch(found))
            to_client.write(b"go\n")
            answered = json.loads(await of_client.readline())
            watching.cancel()
            found["memory_mib"] = round(peak() - before, 1)
            await client.wait()
        await cast(AttemptApi, listener.attempts.api).close()
    found["processes_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)
    return {"attack": name, **found, **answered}


async def attack(name: str, token: str, worker: str) -> None:
    headers = {"Authorization": f"Bearer {token}", "OrgWorker-Incarnation": worker}
    limits = httpx.Limits(max_connections=500)
    async with httpx.AsyncClient(
        base_url=f"http://{ADDRESS}{PREFIX}/", headers=headers, timeout=120, limits=limits
    ) as client:
        owned = (await client.post("renew", content=b"{}")).json()["owned"]
        calls = list(ATTACKS[name]([(run, fence) for run, fence, _ in owned]))
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.perf_counter()
        statuses: Counter[str] = Counter()
        for at_once in calls:
            answers = await asyncio.gather(*(client.post(call, content=body) for call, body in at_once))
            statuses.update(str(answer.status_code) for answer in answers)
    seconds = round(time.perf_counter() - began, 2)
    print(json.dumps({"statuses": statuses, "seconds": seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", choices=[*ATTACKS, []], metavar="ATTACK")
    parser.add_argument("--database", default="postgresql")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        asyncio.run(attack(given.attacks[0], *json.loads(sys.stdin.readline())))
        return
    if len(given.attacks) != 1:
        # A process each: what one leaves behind would be counted for the next.
        for name in given.attacks or ATTACKS:
            command = (sys.executable, "-P", "-m", "bench.host_flood", name, "--database", given.database)
            subprocess.run(command, check=True)
        return
    logs.configure("json", level="error")
    with_secrets()
    # As a worker does.
    gc.freeze()
    gc.set_threshold(20_000, 100, 50)
    sys.setswitchinterval(SWITCH)
    with filled(given.database) as database:
        [caller] = with_hosts(database, 1, 20)
        print(json.dumps(asyncio.run(measure(given.attacks[0], database, caller))), flush=True)


if __name__ == "__main__":
    main()
