"""Measures how long one run's messages keep the worker's loop from everything else.

    .venv/bin/python -m bench.flood [NAME …]

Each handler floods the channel of its own process, or sends JSON that is slow to parse, or text that is slow
to mask while the worker holds a secret with quotes and backslashes. Shown is the longest turn of the loop:
the processor time of its thread, and by the wall, which includes other threads and processes.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom
from types import SimpleNamespace
from typing import Any, cast

from tests.fakes.plugins import make_plugin
from tests.fakes.running import work
from tests.unit.engine.runs import admitted
from worker.clock import SystemClock
from worker.engine.attempt.answers import Running
from worker.engine.attempt.attempt import conclude
from worker.engine.attempt.inflight import InflightRun
from worker.engine.attempt.run_log import Progress, RunLogWriter
from worker.engine.attempt.tools import StoreActs, Tools
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.contract import StopSignal
from worker.model.runs.outcome import Trail
from worker.model.runs.run import LogLine, RunStep

MODULE = "flood_jobs"
JOBS = """
import json, os, struct, time
from datetime import datetime, timezone
from worker import BlockingContext, job
from worker.engine.runners.child import main
from worker.engine.runners.child.messages import run_frame
from worker.handlers.calls import StoreStep, message_of
from worker.model.runs.run import NewStep

def raw(text):
    return struct.pack("!II", len(text), 0) + text.encode()

def send(*frames):
    main._channel._own_channel().sendall(b"".join(frames))

def repeat(frame):
    until = time.time() + 3
    while time.time() < until:
        send(frame * 5000)

def save(text, count):
    for number in range(count):
        send(run_frame({"op": "save", "n": number, "data": text}))
    time.sleep(2)

def steps(text, count):
    now = datetime.now(timezone.utc)
    for number in range(1, count + 1):
        call = StoreStep(NewStep("s", None, number, number, text, now, now))
        send(run_frame({"op": call.path, "n": number, **message_of(call)}))
    time.sleep(5)

def fail(text):
    raise ValueError(text)

def of(item, count):
    return "[" + ",".join([item] * count) + "]"

@job("flood")
def flood(ctx: BlockingContext):
    return eval(ctx.params["code"])
"""
HELD = 'pa"ss\\wörd & more'
FLOODS = {
    "nothing": "time.sleep(1)",
    "progress": """repeat(raw('{"op":"progress","done":1,"total":null,"note":null}'))""",
    "requests": """repeat(raw('{"op":"budgets","n":1}'))""",
    "saves of [[],…]": "save(of('[]', 340_000), 4)",
    "saves of [[0],…]": "save(of('[0]', 250_000), 4)",
    "saves of text": "save(json.dumps('x' * 1_000_000), 30)",
    "saves of escapes": "save(json.dumps(chr(34) * 500_000), 30)",
    "result [[],…]": "[[] for _ in range(340_000)]",
    "result of objects": "[{'id': n, 'name': f'name {n}', 'tags': ['a', 'b']} for n in range(16_000)]",
    "result of escapes": "chr(34) * 500_000",
    "result of base64": "'QUFBQUFBQUFBQUFB ' * 60_000",
    "result of mixes": """chr(92).join(['"%22+&quot;'] * 50_000)""",
    "steps of escapes": "steps(json.dumps(chr(34) * 130_000), 20)",
    "steps of 8 KiB": "steps(json.dumps(chr(92) * 4_000), 2000)",
    "errors of escapes": "fail(chr(92) * 65_000)",
    "errors of secrets": f"fail({HELD!r} + chr(92) * 65_000)",
    "notes of escapes": "[ctx.progress(1, note=chr(92) * 65_000) for _ in range(300)]",
    "lines of escapes": "[os.write(1, chr(92).encode() * 65_535 + b'\\n') for _ in range(50)]",
    "short lines": "[os.write(1, (chr(92).encode() * 99 + b'\\n') * 655) for _ in range(50)]",
    "unknown [[],…]": """send(raw('{"op":"save","n":1,"x":' + of('[]', 80_000) + ',"data":"1"}'))""",
    "empty lines": "[os.write(1, b'\\n' * 65_536) for _ in range(50)]",
}


class Store:
    """Stores nothing."""

    async def save_checkpoint(self, *values: Any) -> bool:
        return True

    async def store_step(self, row: RunStep) -> bool:
        return True

    async def append_logs(self, rows: Sequence[LogLine]) -> None: ...
    async def write_progress(self, rows: Sequence[Progress]) -> None: ...


async def measure(pool: ChildPool, code: str) -> str:
    processor = wall = 0.0
    going = True

    async def watch() -> None:
        nonlocal processor, wall
        used, now = time.thread_time(), time.perf_counter()
        while going:
            await asyncio.sleep(0)
            used_before, before = used, now
            used, now = time.thread_time(), time.perf_counter()
            processor, wall = max(processor, used - used_before), max(wall, now - before)

    store = Store()
    run_log = RunLogWriter(store, SystemClock())
    tools = SimpleNamespace(
        run_log=run_log,
        store=store,
        steps=store,
        clock=SystemClock(),
        random=SystemRandom(),
        handlers={},
    )
    inflight, trail = InflightRun(admitted(), StopSignal()), Trail("flood")
    inflight.hold_secrets({"key": HELD})
    acts = StoreActs(cast(Tools, tools))
    services = Running(inflight, trail, acts, run_log, SystemClock())
    watching = asyncio.create_task(watch())
    writing = asyncio.create_task(run_log.run())
    began = time.perf_counter()
    given = work("flood", entry_point=f"{MODULE}:flood", params={"code": code})
    outcome = await pool.run(given, services, inflight.stop)
    await conclude(inflight, outcome, trail, cast(Tools, tools))
    await run_log.flush()
    took = time.perf_counter() - began
    going = False
    await watching
    writing.cancel()
    ended = getattr(outcome, "detail", None) or type(outcome).__name__.lower()
    return f"{processor * 1000:7.1f} ms {wall * 1000:7.1f} ms   {took:5.2f} s  {ended}"


async def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plugin = make_plugin(Path(folder), modules={MODULE: JOBS}, entry_points={"flood": f"{MODULE}:flood"})
        sys.path.append(str(plugin))
        pool = ChildPool(SystemClock(), spares=1)
        pool.start()
        pool.attach()
        print(f"{'':18} processor       wall       run")
        for name in names or FLOODS:
            print(f"{name:18} {await measure(pool, FLOODS[name])}")
        await pool.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
