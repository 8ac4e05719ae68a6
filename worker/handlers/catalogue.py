"""Reads what the entry points of group `worker.jobs` declare, or why they do not load.

The worker imports no plug-in. A child process for each distribution loads its entry points
and prints what they declare; if one hangs or ends the process, another child reads the rest.
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
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from worker.handlers.installed import FOLDERS, Distribution, distributions, environment
from worker.handlers.json_text import clean
from worker.handlers.schema import check_schema

DESCRIBE = (sys.executable, "-P", "-m", "worker.handlers.describe")
# Concurrent children, so that one that hangs does not delay the others.
CONCURRENT_CHILDREN = 8
ERROR_LIMIT = 1_000
_LINE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HandlerEntry:
    """A handler of a distribution; `error` says why it does not load.

    `entry_point` is `module:attribute`; `timeout` and `memory` are text such as `2h` and
    `512MiB`, or None for the default.
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
    state: bool = False
    error: str | None = None


def installed() -> dict[str, str]:
    """The installed distributions with handlers, and their versions."""
    return {found.name: found.version for found in distributions()}


async def read_catalogue(
    names: Collection[str] | None = None,
    *,
    timeout: float = 30.0,
    pass_environment: Sequence[str] = (),
    command: Sequence[str] = DESCRIBE,
) -> AsyncIterator[HandlerEntry]:
    """Yield every handler of the installed distributions, or of those named, as soon as it is known.

    Each entry point has `timeout` seconds to load; one that fails is yielded with its error. `command`
    starts `worker.handlers.describe`, in a sandbox if the caller wants one.
    """
    everyone = distributions()
    counts = Counter(point.name for found in everyone for point in found.points)
    reader = _Reader(timeout, environment(pass_environment), command)
    slots = asyncio.Semaphore(CONCURRENT_CHILDREN)

    async def read(distribution: Distribution) -> None:
        async with slots:
            left = []
            for point in distribution.points:
                if counts[point.name] > 1:
                    reader.put(distribution, point, {"error": _DUPLICATE})
                else:
                    left.append(point)
            while left:
                left = left[await reader.read(distribution, left) :]

    async def read_all() -> None:
        try:
            chosen = everyone if names is None else distributions(names)
            await asyncio.gather(*(read(distribution) for distribution in chosen))
        finally:
            reader.entries.put_nowait(None)

    reading = asyncio.create_task(read_all())
    try:
        while (entry := await reader.entries.get()) is not None:
            yield entry
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class _Reader:
    """Starts the children and queues what they print."""

    def __init__(self, timeout: float, env: Mapping[str, str], command: Sequence[str]) -> None:
        self._timeout = timeout
        self._env = env
        self._command = command
        self.entries: asyncio.Queue[HandlerEntry | None] = asyncio.Queue()

    def put(self, distribution: Distribution, point: EntryPoint, described: Mapping[str, Any]) -> None:
        error = described.get("fatal") or described.get("error")
        declared: dict[str, Any] = {}
        if error is None:
            try:
                declared = _declared(described)
            except ValueError as invalid:
                error = invalid
        if error is not None:
            declared = {"error": clean(str(error), ERROR_LIMIT)}
        identity = (point.name, distribution.name, distribution.version, point.value)
        self.entries.put_nowait(HandlerEntry(*identity, **declared))

    async def read(self, distribution: Distribution, points: Sequence[EntryPoint]) -> int:
        """Read entry points with one child; returns how many, including the one that ended it."""
        with tempfile.TemporaryDirectory(prefix=FOLDERS, ignore_cleanup_errors=True) as folder:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                *(distribution.name, str(self._timeout), *(point.name for point in points)),
                env={**self._env, "HOME": folder, "TMPDIR": folder},
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_LIMIT,
                # A process group to kill as a whole, in the session by which the worker finds its children.
                process_group=0,
            )
            try:
                for done, point in enumerate(points, start=1):
                    described = await self._next_line(child)
                    self.put(distribution, point, described)
                    if "fatal" in described:
                        return done
                return len(points)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()

    async def _next_line(self, child: asyncio.subprocess.Process) -> Mapping[str, Any]:
        if child.stdout is None:
            raise RuntimeError("the child was started without a pipe")
        try:
            async with asyncio.timeout(self._timeout):
                line = await child.stdout.readline()
        except TimeoutError:
            return {"fatal": f"its import took longer than {self._timeout:g} s"}
        except ValueError:
            return {"fatal": "its declaration is longer than 4 MiB"}
        if not line:
            code = await child.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return {"fatal": f"its import ended the process: {how}"}
        try:
            described = json.loads(line)
        except (ValueError, RecursionError):
            described = None
        return described if isinstance(described, dict) else {"fatal": _FORGED}


def _declared(described: Mapping[str, Any]) -> dict[str, Any]:
    """Validate what a child printed; raises ValueError. Plug-in code may have printed anything."""
    if described.keys() != _FIELDS.keys():
        raise ValueError(_FORGED)
    for name, kinds in _FIELDS.items():
        value = described[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{name} is a {type(value).__name__}")
        if kinds is _SCHEMA and value is not None:
            check_schema(value, name)
    scopes = described["scopes"]
    if described["isolation"] not in ("child", "inline") or not all(isinstance(it, str) for it in scopes):
        raise ValueError("its isolation or scopes are invalid")
    return {**described, "scopes": tuple(scopes)}


_DUPLICATE = "another installed distribution has a handler of the same name"
_FORGED = "its import wrote into the catalogue's pipe"
_TEXT, _COUNT, _SCHEMA = (str, type(None)), (int, type(None)), (dict, type(None))
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "isolation": (str,),
    "scopes": (list,),
    "params_schema": _SCHEMA,
    "settings_schema": _SCHEMA,
    "timeout": _TEXT,
    "max_attempts": _COUNT,
    "memory": _TEXT,
    "max_concurrent": _COUNT,
    "state": (bool,),
}
