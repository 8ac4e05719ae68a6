"""Loads entry points in processes of their own and prints what each declares.

`python -m worker.handlers.describe`, or a process that the zygote of a worker forks, has a socket as standard
input. It reads a line of JSON: `seconds` for an import, `at_once`, and `distributions`, each with a `folder`
and its entry `points`, values by name. With the line come their descriptors, in the same order. The process
imports what most handlers need, and forks for each distribution. A fork writes a line of JSON for each entry
point to its descriptor, in that order. Any of them may hang or end the process; the reader sees which.

This process sends `[INDEX]` when a fork starts and `[INDEX, EXIT CODE]` when it is gone, with all that it
started. A line INDEX kills a fork; the end of what it can read kills all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from worker.handlers.calling import hint
from worker.handlers.installed import GROUP
from worker.handlers.job import Job
from worker.model.definitions.pools import parse_pool
from worker.model.definitions.units import parse_duration, parse_memory

# What most handlers import, and what their models need once they are declared.
SHARED = (
    "httpx",
    "pydantic.fields",
    "pydantic.type_adapter",
    "worker.handlers.context",
    "worker.handlers.blocking_context",
)
# Above every descriptor, also where their number is not limited; close_range(2) takes no longer for it.
LAST_DESCRIPTOR = 2**31 - 1
# Descriptors that the kernel passes in one message (SCM_MAX_FD).
_MAX_DESCRIPTORS = 253


def offer_of(job: Job) -> dict[str, Any]:
    """A handler's declaration, as fields of its catalogue entry; raises ValueError if it is invalid."""
    if job.timeout is not None:
        parse_duration(job.timeout)
    if job.memory is not None:
        parse_memory(job.memory)
    if job.pool is not None:
        parse_pool(job.pool)
    plain = ("isolation", "timeout", "max_attempts", "memory", "max_concurrent", "state", "pool")
    schemas = {"params_schema": job.params_schema(), "settings_schema": job.settings_schema()}
    named = {"scopes": sorted(job.scopes), "secrets": sorted(job.secrets), "description": job.description}
    reached = {"egress": None if job.egress is None else list(job.egress), "audiences": list(job.audiences)}
    reached["children"] = sorted(job.children)
    return {**named, **schemas, **reached, **{name: getattr(job, name) for name in plain}}


def described(load: Any, name: str, target: str) -> dict[str, Any]:
    """An entry point's declaration, or `error` with what its import raised."""
    try:
        job = load()
        if not isinstance(job, Job):
            return {"error": f"{target} is not a function declared with @job"}
        if job.name != name:
            return {"error": f"the entry point is called {name}, but its handler {job.name}"}
        return offer_of(job)
    except SystemExit as end:
        return {"error": f"SystemExit: its import calls sys.exit({end.code!r})"}
    except BaseException as error:
        denied = hint(error)
        return {"error": f"{type(error).__name__}: {error}" + (f"; {denied}" if denied else "")}


class _Forks:
    """The forks that load plug-ins; this process itself loads none."""

    def __init__(
        self, given: Mapping[str, Any], report: Callable[[list[int]], None], confine: Callable[[], None]
    ) -> None:
        self._given = given
        self._report = report
        self._confine = confine
        self._waiting = list(enumerate(given["distributions"]))
        self._running: dict[int, int] = {}

    def start(self) -> bool:
        """Start what may run at once; returns whether anything runs."""
        while self._waiting and len(self._running) < self._given["at_once"]:
            index, entry = self._waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                self._load(**entry)
            with contextlib.suppress(OSError):  # the fork has done so itself
                os.setpgid(pid, pid)
            os.close(entry["descriptor"])
            self._running[index] = pid
            self._report([index])
        return bool(self._running)

    def reap(self) -> None:
        """Report the forks that have ended."""
        for index, pid in list(self._running.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.end(index)

    def end(self, index: int) -> None:
        """Kill a fork and what its imports started, and report its exit code."""
        pid = self._running.pop(index, None)
        if pid is None:
            return
        # Until it is waited for, its number is not given to another process.
        os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._report([index, code])

    def end_all(self) -> None:
        self._waiting.clear()
        for index in list(self._running):
            self.end(index)

    def _load(self, points: Mapping[str, str], folder: str, descriptor: int) -> None:
        """What a fork does; a plug-in's own output is discarded."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nothing, stream)
            os.closerange(3, descriptor)
            os.closerange(descriptor + 1, LAST_DESCRIPTOR)
            os.chdir(folder)
            os.environ.update(HOME=folder, TMPDIR=folder)
            self._confine()
            with os.fdopen(descriptor, "w", encoding="utf-8") as lines:
                for name, target in points.items():
                    # The reader may be gone, and an import may hang.
                    signal.alarm(int(self._given["seconds"]) + 5)
                    load = EntryPoint(name, target, GROUP).load
                    lines.write(json.dumps(described(load, name, target)) + "\n")
                    lines.flush()
            code = 0
        finally:
            os._exit(code)  # without waiting for threads that an import started


class _Reader:
    """The other end of standard input: reads lines, and sends what happens to the forks."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=0)
        self._read = b""
        self.descriptors: list[int] = []

    def lines(self) -> list[bytes]:
        """The next whole lines, perhaps none yet; raises EOFError at the end."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, 65_536, _MAX_DESCRIPTORS)
        if not data:
            raise EOFError
        self.descriptors += descriptors
        *lines, self._read = (self._read + data).split(b"\n")
        return lines

    def report(self, message: list[int]) -> None:
        # If it is gone, the next `lines` raises.
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def main(confine: Callable[[], None] = lambda: None) -> None:
    """Describe what is requested; each fork calls `confine` in its folder before it loads."""
    gc.disable()  # what is imported stays
    # httpx imports a command line of its own, with rich and pygments: half of the time of its import.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    for module in SHARED:
        import_module(module)
    reader = _Reader()
    with contextlib.suppress(EOFError):
        lines: list[bytes] = []
        while not lines:
            lines = reader.lines()
        request = json.loads(lines.pop(0))
        for entry, descriptor in zip(request["distributions"], reader.descriptors, strict=True):
            entry["descriptor"] = descriptor
        _serve(_Forks(request, reader.report, confine), reader, lines)


def _serve(forks: _Forks, reader: _Reader, lines: list[bytes]) -> None:
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        while forks.start():
            for line in lines:
                forks.end(int(line))
            readable, _, _ = select.select([0, ended], [], [])
            if ended in readable:
                os.read(ended, 4096)
            lines = reader.lines() if 0 in readable else []
            forks.reap()
    finally:
        forks.end_all()


if __name__ == "__main__":
    main()
