"""Handlers, many of them misbehaving, for tests of runs in processes; copied into their own plug-in."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, Field

from worker import (
    BlockingContext,
    Context,
    HandBack,
    job,
)


class Params(BaseModel):
    """Where a handler leaves files for the test."""

    folder: str = ""
    count: int = 0


class Settings(BaseModel):
    """Properties over defaults."""

    model_version: str = "gpt-4"
    max_tokens: int = Field(1000, ge=1)


class Code(BaseModel):
    """The body of a handler; it may set `result`."""

    code: str


@job("code", params=Code)
def code(ctx: BlockingContext[Code, Any]) -> Any:
    names: dict[str, Any] = {"ctx": ctx}
    exec(ctx.params.code, names)
    return names.get("result")


@job("code_async", params=Code)
async def code_async(ctx: Context[Code, Any]) -> None:
    exec(ctx.params.code, {})


# Well-behaved


@job("ok", params=Params, settings=Settings, scopes={"read:kb"})
async def ok(ctx: Context[Params, Settings]) -> dict[str, Any]:
    print("printed")
    print("complained", file=sys.stderr)
    ctx.log.warning("logged\nin two lines")
    logging.getLogger("some.library").info("a library says")
    logging.getLogger("some.library").debug("not shown")
    ctx.progress(1, 2, "half way")
    await ctx.save({"done": 1})
    return {
        "org": [ctx.org.code, ctx.org.name],
        "run": [ctx.run.id, ctx.run.attempt, ctx.run.fencing_token, ctx.run.idempotency_key],
        "scheduled_for": ctx.run.scheduled_for.isoformat(),
        "settings": ctx.settings.model_dump(),
        "flag": ctx.flag("agent-v2"),
        "checkpoint": ctx.checkpoint,
        "token": (await ctx.token()).reveal(),
        "deadline": ctx.deadline.isoformat(),
    }


@job("ok_blocking", params=Params, settings=Settings)
def ok_blocking(ctx: BlockingContext[Params, Settings]) -> dict[str, Any]:
    ctx.progress(1)
    ctx.save({"done": 1})
    return {"org": ctx.org.code, "token": ctx.token().reveal(), "max_tokens": ctx.settings.max_tokens}


@job("surroundings")
async def surroundings(ctx: Context[Any, Any]) -> dict[str, Any]:
    Path("left-behind").write_text("x")
    Path("folder").mkdir()
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}").split(":")[0]
        except OSError:
            continue
    return {
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "descriptors": descriptors,
        "session": os.getsid(0) == os.getpid(),
        "limits": {
            name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
            for name in ("NOFILE", "CPU", "CORE", "DATA")
        },
        "stdin": sys.stdin.read(),
        "modules": sorted(name for name in sys.modules if name.startswith(("worker.", "sqlalchemy"))),
    }


@job("renew")
async def renew(ctx: Context[Any, Any]) -> list[str]:
    before = ctx.claims.properties["n"]
    token = await ctx.token()
    return [before, token.reveal(), ctx.claims.properties["n"]]


# Handlers that are asked to stop


@job("patient", params=Params)
async def patient(ctx: Context[Params, Any]) -> Any:
    Path(ctx.params.folder, "up").touch()
    await ctx.cancelled.wait()
    reason = ctx.cancelled.reason
    await ctx.save({"reason": reason})
    return HandBack() if reason == "drain" else {"ended for": reason}


@job("patient_blocking", params=Params)
def patient_blocking(ctx: BlockingContext[Params, Any]) -> Any:
    Path(ctx.params.folder, "up").touch()
    ctx.cancelled.wait()
    return ctx.cancelled.reason


@job("cleaning", params=Params)
async def cleaning(ctx: Context[Params, Any]) -> None:
    Path(ctx.params.folder, "up").touch()
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        await ctx.save("cleaned")
        raise


@job("cleaning_blocking", params=Params)
def cleaning_blocking(ctx: BlockingContext[Params, Any]) -> None:
    Path(ctx.params.folder, "up").touch()
    try:
        time.sleep(600)
    finally:
        ctx.save("cleaned")


@job("stubborn", params=Params)
async def stubborn(ctx: Context[Params, Any]) -> None:
    Path(ctx.params.folder, "up").touch()
    while True:
        try:
            await asyncio.sleep(600)
        except BaseException:
            continue


@job("deaf", params=Params)
def deaf(ctx: BlockingContext[Params, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(ctx.params.folder, "up").touch()
    while True:
        pass


@job("holds_gil", params=Params)
def holds_gil(ctx: BlockingContext[Params, Any]) -> None:
    Path(ctx.params.folder, "up").touch()
    re.match(r"(a+)+$", "a" * 50 + "b")


@job("sleeps_in_c", params=Params)
def sleeps_in_c(ctx: BlockingContext[Params, Any]) -> None:
    Path(ctx.params.folder, "up").touch()
    ctypes.PyDLL(None).sleep(600)


# Families of processes


@job("family", params=Params)
async def family(ctx: Context[Params, Any]) -> None:
    """A child, a grandchild in a session of its own, and an orphan, each of which writes while it lives."""
    beat = "import sys,time\nwhile True:\n open(sys.argv[1], 'a').write('x'); time.sleep(0.02)"
    folder = Path(ctx.params.folder)
    for name, detached in (("child", False), ("session", True)):
        subprocess.Popen([sys.executable, "-c", beat, str(folder / name)], start_new_session=detached)
    orphan = "import subprocess,sys\nsubprocess.Popen([sys.executable, '-c', *sys.argv[1:]])"
    subprocess.run([sys.executable, "-c", orphan, beat, str(folder / "orphan")], check=True)
    await ctx.save({"step": 1})
    while True:
        with open(folder / "leader", "a") as file:
            file.write("x")
        if ctx.params.count and all((folder / name).exists() for name in ("child", "session", "orphan")):
            return
        await asyncio.sleep(0.02)


@job("drops_locks", params=Params)
async def drops_locks(ctx: Context[Params, Any]) -> None:
    """Release every lock that the process can reach, close the descriptors of lock files, and stay."""
    seen = []
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            fcntl.lockf(descriptor, fcntl.LOCK_UN)
            unlock = struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, unlock)
        except OSError:  # that of the listing, or not lockable
            continue
        if target.endswith("lock"):
            seen.append(Path(target).name)
            os.close(descriptor)
    await ctx.save({"dropped": seen})
    await asyncio.sleep(600)


@job("forks_a_holder", params=Params)
async def forks_a_holder(ctx: Context[Params, Any]) -> None:
    """Fork a process into a session of its own that outlives worker and zygote when both are killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    await ctx.save({"holder": child})
    await asyncio.sleep(600)


@job("forks_fifty", params=Params)
def forks_fifty(ctx: BlockingContext[Params, Any]) -> str:
    for _ in range(50):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)
    return "forked"


@job("fork_returns")
def fork_returns(ctx: BlockingContext[Any, Any]) -> str:
    child = os.fork()
    if child == 0:
        return "from the copy"
    os.waitpid(child, 0)
    return "from the run"


@job("fork_returns_async")
async def fork_returns_async(ctx: Context[Any, Any]) -> str:
    child = os.fork()
    if child == 0:
        return "from the copy"
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    await asyncio.sleep(0.01)
    return f"from the run, {status}"


@job("fork_exits_async")
async def fork_exits_async(ctx: Context[Any, Any]) -> int:
    child = os.fork()
    if child == 0:
        sys.exit(5)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    return os.waitstatus_to_exitcode(status)


# Ways to end


@job("sys_exit_in_a_task")
async def sys_exit_in_a_task(ctx: Context[Any, Any]) -> None:
    async def end() -> None:
        sys.exit(4)

    await asyncio.gather(end(), asyncio.sleep(600))


@job("bad_message")
def bad_message(ctx: BlockingContext[Any, Any]) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    raise Odd


@job("segfault")
def segfault(ctx: BlockingContext[Any, Any]) -> None:
    print("about to crash")
    ctypes.string_at(0)


@job("recurses")
def recurses(ctx: BlockingContext[Any, Any]) -> None:
    recurses(ctx)


@job("recurses_deeper")
def recurses_deeper(ctx: BlockingContext[Any, Any]) -> None:
    class Deep:
        def __repr__(self) -> str:
            return repr(Deep())

    sys.setrecursionlimit(10**9)
    repr(Deep())


@job("closes_and_opens", params=Params)
def closes_and_opens(ctx: BlockingContext[Params, Any]) -> str:
    os.closerange(0, 4096)
    for number in range(20):
        os.open(f"{ctx.params.folder}/{number}", os.O_CREAT | os.O_RDWR)
    ctx.progress(1)
    return "unheard"


@job("changes_everything")
def changes_everything(ctx: BlockingContext[Any, Any]) -> str:
    os.chdir("/")
    os.environ.clear()
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    os.umask(0)
    return "changed"


@job("leaves_threads")
def leaves_threads(ctx: BlockingContext[Any, Any]) -> str:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    threading.Thread(target=time.sleep, args=(600,)).start()
    return "left"


@job("leaves_tasks")
async def leaves_tasks(ctx: Context[Any, Any]) -> str:
    async def stay() -> None:
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                continue

    global _staying
    _staying = asyncio.create_task(stay())
    await asyncio.sleep(0)
    return "left"


# Results


class Report(BaseModel):
    """A result that is a model."""

    at: int = 1


# Memory and output


@job("takes_memory", params=Params)
def takes_memory(ctx: BlockingContext[Params, Any]) -> str:
    taken = []
    for _ in range(ctx.params.count):
        taken.append(bytearray(os.urandom(1024)) * 10240)
    return f"{len(taken)} times 10 MiB"


@job("children_take_memory", params=Params)
def children_take_memory(ctx: BlockingContext[Params, Any]) -> None:
    take = "import os,time\ntaken = bytearray(os.urandom(1024)) * 102400\ntime.sleep(600)"
    for _ in range(ctx.params.count):
        subprocess.Popen([sys.executable, "-c", take], start_new_session=True)
    time.sleep(600)


@job("prints", params=Params)
def prints(ctx: BlockingContext[Params, Any]) -> str:
    line = "x" * 99
    print("first")
    for _ in range(ctx.params.count):
        print(line)
    print("last")
    return "printed"


@job("writes_raw")
def writes_raw(ctx: BlockingContext[Any, Any]) -> None:
    os.write(1, b"not \xff text, no line end")
    subprocess.run(["sh", "-c", "echo from a subprocess"], check=True)
    os.write(2, b"words ")
    os.write(2, b"in two writes\n\n")
    os._exit(7)


@job("hurries", params=Params)
async def hurries(ctx: Context[Params, Any]) -> str:
    for number in range(ctx.params.count):
        ctx.progress(number)
    await asyncio.sleep(0.3)
    return "done"


@job("connects", params=Params)
async def connects(ctx: Context[Params, Any]) -> None:
    raise httpx.ConnectError("connection refused")


@job("pools")
def pools(ctx: BlockingContext[Any, Any]) -> list[int]:
    results = []
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            results += pool.map(abs, [-1, -2])
    return results


IMPORTED_BY = os.getpid()


@job("preloaded")
def preloaded(ctx: BlockingContext[Any, Any]) -> bool:
    return os.getppid() == IMPORTED_BY
