"""Reads what the entry points of group `worker.jobs` declare, or why they do not load.

The worker imports no plug-in. A child process forks for each distribution; the fork loads its entry points
and writes what they declare. If one hangs or ends its process, another child reads the rest. The first child
may be one that the zygote has forked, which costs a tenth of a new interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any, Self, TypeVar

from worker.handlers.installed import FOLDERS, Distribution, distributions, environment, normalised
from worker.handlers.job import HANDLER_NAME, MAX_SECRETS, SECRET_NAME, one_line
from worker.handlers.json_text import clean
from worker.handlers.schema import check_schema
from worker.model.definitions.pools import parse_pool
from worker.model.egress import check_wildcards, parse_audiences, parse_items
from worker.model.runs.children import MAX_CHILD_HANDLERS

T = TypeVar("T")

DESCRIBE = (sys.executable, "-P", "-m", "worker.handlers.describe")
# Concurrent forks, so that one that hangs does not delay the others.
CONCURRENT_FORKS = 8
# A host sends so many in one message, with two schemas of at most 256 KiB each.
MAX_AT_ONCE = 20
ERROR_LIMIT = 1_000
_LINE_LIMIT = 4 * 1024 * 1024
# The kernel passes 253 in one message.
_DESCRIPTORS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class HandlerEntry:
    """A handler of a distribution; `error` says why it does not load.

    `entry_point` is `module:attribute`; `timeout` and `memory` are text such as `2h` and
    `512MiB`, or None for the default. `egress` is None if it declares none.
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
    pool: str | None = None
    secrets: tuple[str, ...] = ()
    description: str | None = None
    egress: tuple[str, ...] | None = None
    audiences: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    error: str | None = None


async def read_catalogue(
    names: Collection[str] | None = None,
    *,
    timeout: float = 30.0,
    pass_environment: Sequence[str] = (),
    command: Sequence[str] = DESCRIBE,
    forked: socket.socket | None = None,
    everyone: Sequence[Distribution] | None = None,
) -> AsyncIterator[list[HandlerEntry]]:
    """Yield the handlers of the installed distributions, or of those named, as soon as they are known.

    Those known at the same time come together, at most `MAX_AT_ONCE`. Each entry point has `timeout` seconds
    to load; one that fails is yielded with its error. `command` starts `worker.handlers.describe`, in a
    sandbox if the caller wants one. If such a process waits at the other end of `forked`, it is used first;
    this closes the socket. `everyone` are the installed distributions, if the caller knows them.
    """
    everyone = distributions() if everyone is None else everyone
    counts = Counter(point.name for found in everyone for point in found.points)
    entries: asyncio.Queue[HandlerEntry | None] = asyncio.Queue()
    given: list[_Given] = []
    wanted = None if names is None else {normalised(name) for name in names}
    for distribution in everyone:
        if wanted is not None and normalised(distribution.name) not in wanted:
            continue
        for point in distribution.points:
            if counts[point.name] > 1:
                entries.put_nowait(_entry(distribution, point, {"error": _DUPLICATE}))
        points = [point for point in distribution.points if counts[point.name] == 1]
        if points:
            given.append((distribution, points))

    child = partial(_Child, entries.put_nowait, command, environment(pass_environment), timeout)

    async def read(first: _Child, index: int) -> None:
        left = await first.read(index)
        while left:
            async with child([(given[index][0], left)]) as another:
                left = await another.read(0)

    async def read_all() -> None:
        try:
            async with child(given, forked) as first:
                await asyncio.gather(*(read(first, index) for index in range(len(given))))
        finally:
            entries.put_nowait(None)

    reading = asyncio.create_task(read_all())
    try:
        found: list[HandlerEntry | None] = []
        while None not in found:
            found = [await entries.get()]
            while not entries.empty() and len(found) < MAX_AT_ONCE:
                found.append(entries.get_nowait())
            if known := [entry for entry in found if entry is not None]:
                yield known
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


_Given = tuple[Distribution, list[EntryPoint]]


@dataclass(eq=False, repr=False)
class _Child:
    """A process of `worker.handlers.describe`, which forks for each of these distributions.

    It is started, unless it waits at the other end of `forked`.
    """

    put: Callable[[HandlerEntry], None]
    command: Sequence[str]
    env: Mapping[str, str]
    timeout: float
    given: Sequence[_Given]
    forked: socket.socket | None = None

    def __post_init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._ending = False
        self._stack = contextlib.AsyncExitStack()
        self._streams: list[asyncio.StreamReader] = []
        loop = asyncio.get_running_loop()
        self._started: list[asyncio.Future[None]] = [loop.create_future() for _ in self.given]
        # The exit code of each fork; None if the process is gone, and was not started here.
        self._ended: list[asyncio.Future[int | None]] = [loop.create_future() for _ in self.given]

    async def __aenter__(self) -> Self:
        async with self._stack as stack:
            written = []
            forks = []
            for _, points in self.given:
                folder = tempfile.TemporaryDirectory(prefix=FOLDERS, ignore_cleanup_errors=True)
                written.append(await self._pipe(stack))
                forks.append(
                    {
                        "points": {point.name: point.value for point in points},
                        "folder": stack.enter_context(folder),
                    }
                )
            try:
                ours = self.forked or await self._start()
                _send(ours, written)
            finally:
                for descriptor in written:
                    os.close(descriptor)
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            stack.push_async_callback(self._end)
            work = {"seconds": self.timeout, "at_once": CONCURRENT_FORKS, "distributions": forks}
            self._tell(json.dumps(work))
            self._listening = asyncio.create_task(self._listen())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def read(self, index: int) -> list[EntryPoint]:
        """Read entry points; returns those after one that hung or ended its process."""
        distribution, points = self.given[index]
        await self._started[index]
        try:
            for done, point in enumerate(points):
                described = await self._next_line(index)
                if described is None:
                    return points[done:]
                self.put(_entry(distribution, point, described))
                if "fatal" in described:
                    return points[done + 1 :]
            return []
        finally:
            self._tell(str(index))
            await self._ended[index]

    async def _next_line(self, index: int) -> Mapping[str, Any] | None:
        """What the next entry point declares; None if its import has not ended the process."""
        try:
            async with asyncio.timeout(self.timeout):
                line = await self._streams[index].readline()
        except TimeoutError:
            return {"fatal": f"its import took longer than {self.timeout:g} s"}
        except ValueError:
            return {"fatal": "its declaration is longer than 4 MiB"}
        if not line:
            code = await self._ended[index]
            if code is None:
                return None
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return {"fatal": f"its import ended the process: {how}"}
        try:
            described = json.loads(line)
        except (ValueError, RecursionError):
            described = None
        return described if isinstance(described, dict) else {"fatal": _FORGED}

    async def _pipe(self, stack: contextlib.AsyncExitStack) -> int:
        """A pipe that a fork writes to, and of which this reads the other end."""
        reads, writes = os.pipe()
        stream = asyncio.StreamReader(limit=_LINE_LIMIT)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reads, "rb")
        )
        stack.callback(transport.close)
        self._streams.append(stream)
        return writes

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                env=self.env,
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                # A group of its own, in the session by which the worker finds its children.
                process_group=0,
            )
        return ours

    def _tell(self, line: str) -> None:
        if not (self._ending or self._writer.is_closing()):
            self._writer.write(f"{line}\n".encode())

    async def _listen(self) -> None:
        """Hear which forks have started and ended, until the process is gone."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                index, *code = json.loads(line)
                if code:
                    _set(self._ended[index], code[0])
                else:
                    _set(self._started[index], None)
        gone = None if self._process is None else await self._process.wait()
        for started, ended in zip(self._started, self._ended, strict=True):
            _set(started, None)
            _set(ended, gone)

    async def _end(self) -> None:
        """Its forks end with it, once it has nothing to read."""
        self._ending = True
        try:
            self._writer.write_eof()
            await self._listening
        finally:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()


def _set(future: asyncio.Future[T], result: T) -> None:
    """Set the result once; a reader that was cancelled has cancelled what it waited for."""
    if not future.done():
        future.set_result(result)


def _send(to: socket.socket, descriptors: Sequence[int]) -> None:
    """Send descriptors; each space goes before the line that follows them."""
    with contextlib.suppress(OSError):  # the process is gone, which the next read reports
        for place in range(0, len(descriptors), _DESCRIPTORS_AT_ONCE):
            socket.send_fds(to, [b" "], descriptors[place : place + _DESCRIPTORS_AT_ONCE])


def _entry(distribution: Distribution, point: EntryPoint, described: Mapping[str, Any]) -> HandlerEntry:
    error = described.get("fatal") or described.get("error")
    declared: dict[str, Any] = {}
    if error is None:
        try:
            declared = _declared(described)
        except ValueError as invalid:
            error = invalid
    if error is not None:
        declared = {"error": clean(str(error), ERROR_LIMIT)}
    return HandlerEntry(point.name, distribution.name, distribution.version, point.value, **declared)


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
    if described["pool"] is not None:
        parse_pool(described["pool"])
    check_secrets(described["secrets"])
    check_children(described["children"])
    lists = {name: tuple(described[name]) for name in ("secrets", "children")}
    checked = {**lists, "description": one_line(described["description"])}
    return {**described, "scopes": tuple(scopes), **checked, **checked_egress(described)}


def checked_egress(described: Mapping[str, Any]) -> dict[str, Any]:
    """What a handler declares of `egress` and `audiences`, where it is given. Raises ValueError."""
    egress, audiences = described.get("egress"), described.get("audiences")
    items = None if egress is None else parse_items(egress)
    check_wildcards(items or ())
    return {"egress": items, "audiences": parse_audiences(audiences or ())}


def check_secrets(names: Sequence[Any]) -> None:
    """Raise ValueError unless these are names of secrets that a handler may declare."""
    if len(names) > MAX_SECRETS:
        raise ValueError(f"secrets are more than {MAX_SECRETS}")
    if not all(isinstance(name, str) and SECRET_NAME.fullmatch(name) for name in names):
        raise ValueError("secrets has something that is not the name of a secret")


def check_children(names: Sequence[Any]) -> None:
    """Raise ValueError unless these are names of handlers that a handler may start."""
    if len(names) > MAX_CHILD_HANDLERS:
        raise ValueError(f"children are more than {MAX_CHILD_HANDLERS}")
    if not all(isinstance(name, str) and HANDLER_NAME.fullmatch(name) for name in names):
        raise ValueError("children has something that is not the name of a handler")


_DUPLICATE = "another installed distribution has a handler of the same name"
_FORGED = "its import wrote into the catalogue's pipe"
_TEXT = (str, type(None))
_COUNT = (int, type(None))
_SCHEMA = (dict, type(None))
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
    "pool": _TEXT,
    "secrets": (list,),
    "description": _TEXT,
    "egress": (list, type(None)),
    "audiences": (list,),
    "children": (list,),
}
