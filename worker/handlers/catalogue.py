"""Entry points of group `worker.jobs` -> what each offers, or why it does not load.

The worker imports no plug-in. For each distribution a child process loads its entry
points and prints what they offer; if one hangs or takes the process with it, another
child goes on with the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Any

from worker.handlers.installed import FOLDERS, Distribution, distributions, environment
from worker.handlers.json_text import clean
from worker.handlers.schema import check_schema

DESCRIBE = (sys.executable, "-P", "-m", "worker.handlers.describe")
# Children at a time; one that hangs must not keep the others waiting.
SIDE_BY_SIDE = 8
ERROR_LIMIT = 1_000
_LINE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HandlerEntry:
    """A handler that a distribution offers, or fails to: then `error` says why.

    `entry_point` is `module:attribute`; `timeout` and `memory` are texts such as
    `2h` and `512MiB`, None where the author left the default.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    isolation: str = "child"
    scopes: tuple[str, ...] = ()
    params_schema: Mapping[str, Any] | None = None
    settings_schema: Mapping[str, Any] | None = None
    timeout: str | None = None
    max_attempts: int | None = None
    memory: str | None = None
    max_concurrent: int | None = None
    error: str | None = None


def installed() -> dict[str, str]:
    """The distributions installed here that offer handlers, with their versions."""
    return {found.name: found.version for found in distributions()}


async def read_catalogue(
    names: Collection[str] | None = None,
    *,
    timeout: float = 30.0,
    pass_environment: Sequence[str] = (),
    command: Sequence[str] = DESCRIBE,
) -> AsyncIterator[HandlerEntry]:
    """Every handler of the distributions installed here, or of those named, as soon as it is known.

    Each entry point has `timeout` seconds to load. Broken ones are among them. `command`
    starts `worker.handlers.describe`, confined if the caller wants it to be.
    """
    everyone = distributions()
    offered = Counter(point.name for found in everyone for point in found.points)
    chosen = everyone if names is None else distributions(names)
    queue: asyncio.Queue[HandlerEntry | None] = asyncio.Queue()
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def read(distribution: Distribution) -> None:
        async with places:
            env = environment(pass_environment)
            await _read_distribution(distribution, offered, timeout, command, env, queue)

    async def read_all() -> None:
        try:
            await asyncio.gather(*(read(distribution) for distribution in chosen))
        finally:
            queue.put_nowait(None)

    reading = asyncio.create_task(read_all())
    try:
        while (entry := await queue.get()) is not None:
            yield entry
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read_distribution(
    distribution: Distribution,
    offered: Mapping[str, int],
    timeout: float,
    command: Sequence[str],
    env: Mapping[str, str],
    queue: asyncio.Queue[HandlerEntry | None],
) -> None:
    left = []
    for point in distribution.points:
        if offered[point.name] > 1:
            error = "another installed distribution offers a handler of the same name"
            queue.put_nowait(_entry(distribution, point, {"error": error}))
        else:
            left.append(point)
    while left:
        left = left[await _read_some(distribution, left, timeout, command, env, queue) :]


async def _read_some(
    distribution: Distribution,
    points: Sequence[EntryPoint],
    timeout: float,
    command: Sequence[str],
    env: Mapping[str, str],
    queue: asyncio.Queue[HandlerEntry | None],
) -> int:
    """Read as many entry points as one child manages; the last may be the one that ended it."""
    with tempfile.TemporaryDirectory(prefix=FOLDERS, ignore_cleanup_errors=True) as folder:
        child = await asyncio.create_subprocess_exec(
            *command,
            *(distribution.name, str(timeout), *(point.name for point in points)),
            env={**env, "HOME": folder, "TMPDIR": folder},
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
            # A group of its own to be killed by, in the session by which the worker knows its own.
            process_group=0,
        )
        try:
            for done, point in enumerate(points, start=1):
                told = await _next_line(child, timeout)
                queue.put_nowait(_entry(distribution, point, told))
                if "fatal" in told:
                    return done
            return len(points)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


async def _next_line(child: asyncio.subprocess.Process, timeout: float) -> Mapping[str, Any]:
    reader = child.stdout
    if reader is None:
        raise RuntimeError("the child was started without a pipe")
    try:
        async with asyncio.timeout(timeout):
            line = await reader.readline()
    except TimeoutError:
        return {"fatal": f"its import took longer than {timeout:g} s"}
    except ValueError:
        return {"fatal": "what it offers is longer than 4 MiB"}
    if not line:
        code = await child.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"fatal": f"its import ended the process: {how}"}
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        told = None
    return told if isinstance(told, dict) else {"fatal": "its import wrote into the catalogue's pipe"}


def _entry(distribution: Distribution, point: EntryPoint, told: Mapping[str, Any]) -> HandlerEntry:
    entry = HandlerEntry(
        name=point.name,
        distribution=distribution.name,
        version=distribution.version,
        entry_point=point.value,
    )
    error = told.get("fatal") or told.get("error")
    try:
        return replace(entry, **_offer(told)) if error is None else _broken(entry, str(error))
    except ValueError as refused:
        return _broken(entry, str(refused))


def _broken(entry: HandlerEntry, error: str) -> HandlerEntry:
    return replace(entry, error=clean(error, ERROR_LIMIT))


def _offer(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a child says that its handler offers; it ran the plug-in's code, so it may say anything.

    Raises:
        ValueError: it is not what `describe` prints, or a schema is too large or too deep.
    """
    if told.keys() != _OFFERED.keys():
        raise ValueError("its import wrote into the catalogue's pipe")
    for name, kinds in _OFFERED.items():
        value = told[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name} is a {type(value).__name__}")
    for name in ("params_schema", "settings_schema"):
        if told[name] is not None:
            check_schema(told[name], name)
    if told["isolation"] not in ("child", "inline") or not all(
        isinstance(scope, str) for scope in told["scopes"]
    ):
        raise ValueError("its isolation or scopes are not those of a handler")
    return {**told, "scopes": tuple(told["scopes"])}


_TEXT, _COUNT, _SCHEMA = (str, type(None)), (int, type(None)), (dict, type(None))
_OFFERED: Mapping[str, tuple[type, ...]] = {
    "isolation": (str,),
    "scopes": (list,),
    "params_schema": _SCHEMA,
    "settings_schema": _SCHEMA,
    "timeout": _TEXT,
    "max_attempts": _COUNT,
    "memory": _TEXT,
    "max_concurrent": _COUNT,
}
