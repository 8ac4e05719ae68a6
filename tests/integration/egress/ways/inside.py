"""Ways that begin in memory, or end in what the worker keeps of a run."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

from worker import Context

from .common import Places, tried, way

# In memory, without being in the code as they are.
CANARY = re.compile(b"(?:tok" + b"en|sec" + b"ret)-canary-[0-9a-f]{24}")

# Its own memory and that of others


@way
async def environment(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    return [dict(os.environ), Path("/proc/self/environ").read_text().split("\0")]


@way
async def own_memory(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    return [found.decode() for found in _in_memory("self")]


@way
async def memory_of_others(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """Worker, zygote, broker, spares and other runs."""
    found, denied = [], 0
    for pid in tried(lambda: os.listdir("/proc"), []) or [str(os.getppid()), "1"]:
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                found += [each.decode() for each in _in_memory(pid)]
            except OSError:
                denied += 1
    return [found, denied]


@way
async def core_dump(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        os.abort()
    os.waitpid(child, 0)  # noqa: ASYNC222 - it has aborted
    cores = [path for path in Path.cwd().iterdir() if path.name.startswith("core")]
    return [found.decode() for core in cores for found in CANARY.findall(core.read_bytes())]


def _in_memory(pid: str) -> list[bytes]:
    found: set[bytes] = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if " rw" in line and end - start < 2**28:
                memory.seek(start)
                found |= set(CANARY.findall(tried(lambda size=end - start: memory.read(size), b"")))
    return sorted(found)


# What the worker keeps


@way
async def result(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    return has.decode()


@way
async def error(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    raise ValueError(has.decode())


@way
async def log(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    ctx.log.warning(has.decode())
    print(has.decode())
    sys.stderr.write(has.decode())


@way
async def checkpoint(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    await ctx.save({"has": has.decode()})


@way
async def progress(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    ctx.progress(1, 2, has.decode())


@way
async def step(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    async def kept() -> str:
        return has.decode()

    await ctx.step("kept", kept)
