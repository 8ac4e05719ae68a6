"""Measures how long one run's messages keep the worker's loop from everything else.

    .venv/bin/python -m bench.flood [NAME …]

Each handler floods the channel of its own process, or sends JSON that is slow to parse. Shown is the longest
turn of the loop: the processor time of its thread, and by the wall, which includes other processes.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.fakes.plugins import make_plugin
from tests.fakes.running import RecordingServices, work
from worker.clock import SystemClock
from worker.execution.runners.child.pool import ChildPool
from worker.execution.runners.contract import StopSignal

MODULE = "flood_jobs"
JOBS = """
import json, os, struct, time
from worker import BlockingContext, job
from worker.execution.runners.child import main
from worker.execution.runners.child.frames import run_frame

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

def of(item, count):
    return "[" + ",".join([item] * count) + "]"

@job("flood")
def flood(ctx: BlockingContext):
    return eval(ctx.params["code"])
"""
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
    "unknown [[],…]": """send(raw('{"op":"save","n":1,"x":' + of('[]', 80_000) + ',"data":"1"}'))""",
    "empty lines": "[os.write(1, b'\\n' * 65_536) for _ in range(50)]",
}


class Services(RecordingServices):
    """Does not parse what it is given."""

    async def save(self, data_json: str) -> None:
        await asyncio.sleep(0)


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

    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    given = work("flood", entry_point=f"{MODULE}:flood", params={"code": code})
    outcome = await pool.run(given, Services(), StopSignal())
    took = time.perf_counter() - began
    going = False
    await watching
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
