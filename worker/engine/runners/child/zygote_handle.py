"""Processes that a worker execs and speaks with over a socket: the zygote, and the broker."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from worker.engine.runners.child import linux
from worker.engine.runners.child.messages import Setup
from worker.handlers.installed import environment
from worker.telemetry.events import emit

Message = Mapping[str, Any]
# Bytes of a datagram that is read, and of the buffer for those that are sent; the kernel may allow less.
_DATAGRAM = 256 * 1024
_BUFFER = 1024 * 1024
_STEP = 0.002


class HelperProcess:
    """A process of this package, alive or not, and its control socket, which has JSON datagrams.

    Its command gets the socket's descriptor and `arguments`. `send` is thread-safe.
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        variables: Iterable[str],
        passed: Sequence[int] = (),
        *,
        own_session: bool = False,
    ) -> None:
        """`variables` of the environment and the descriptors `passed` are those that it inherits.

        With an `own_session` it and what it forks are distinguished from other children. Raises OSError.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        for end in (self._control, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        with theirs, ExitStack() as unless_started:
            unless_started.callback(self._control.close)
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), *arguments],
                env=environment(variables),
                pass_fds=[theirs.fileno(), *passed],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=own_session,
            )
            unless_started.callback(self._process.kill)
            self.pid = self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
            unless_started.pop_all()
        self._sending = threading.Lock()
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def end(self) -> str:
        """How it has ended, in words; empty while it lives."""
        code = self._process.poll()
        return "" if code is None else linux.exit_words(code)

    def first_message(self, seconds: float) -> dict[str, Any] | None:
        """Wait for its first message, before it is attached; None if it ends or is silent."""
        ready, _, _ = select.select([self._control], [], [], seconds)
        data = self._control.recv(_DATAGRAM) if ready else b""
        if ready and not data:  # it has closed the socket, and so is about to end
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return json.loads(data) if data else None

    def kill(self) -> None:
        self._process.kill()

    def attach(self, on_message: Callable[[Any], None], on_death: Callable[[], None]) -> None:
        """Listen on the running loop; `on_death` is called once, when the process is gone."""
        self._loop = loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(self._pidfd)
            self._receive(on_message)  # its last messages
            loop.remove_reader(self._control)
            on_death()

        loop.add_reader(self._control, self._receive, on_message)
        loop.add_reader(self._pidfd, died)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, in order and without waiting; closes the descriptors once they are sent."""
        with self._sending:
            self._unsent.append((json.dumps(message).encode(), descriptors))
            if not self._flush() and self._loop is not None:
                self._loop.call_soon_threadsafe(self._send_later)

    def close(self) -> None:
        """Close the socket, at which the process ends."""
        if self._loop is not None:
            self._loop.remove_reader(self._control)
            self._loop.remove_reader(self._pidfd)
            self._loop.remove_writer(self._control)
        with self._sending:
            self._control.close()
            self._flush()

    async def gone(self, patience: float) -> None:
        """Wait until the process has ended, killing it after `patience` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        while self._process.poll() is None:
            if loop.time() >= until:
                self._process.kill()
            await asyncio.sleep(_STEP)
        os.close(self._pidfd)

    def _receive(self, on_message: Callable[[Message], None]) -> None:
        while True:
            try:
                data = self._control.recv(_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:  # closed; the pidfd reports the end of the process
                if self._loop is not None:
                    self._loop.remove_reader(self._control)
                return
            on_message(json.loads(data))

    def _flush(self) -> bool:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                socket.send_fds(self._control, [data], descriptors)
            except BlockingIOError:
                return False
            except OSError:  # it is dead, which its pidfd reports
                pass
            self._unsent.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _send_later(self) -> None:
        if self._loop is not None and self._control.fileno() >= 0:
            self._loop.add_writer(self._control, self._writable)

    def _writable(self) -> None:
        with self._sending:
            if self._flush() and self._loop is not None:
                self._loop.remove_writer(self._control)


class ZygoteHandle(HelperProcess):
    """One zygote process."""

    def __init__(self, setup: Setup) -> None:
        passed = [number for number in (setup.lock, setup.describing) if number is not None]
        arguments = [replace(setup, parent=os.getpid()).as_json()]
        command = (sys.executable, "-P", "-m", "worker.engine.runners.child.zygote")
        super().__init__(command, arguments, setup.environment, passed, own_session=True)
        born = linux.process_of(self.pid)
        self._started = 0.0 if born is None else born.started
        emit("zygote.started", pid=self.pid)

    async def gone(self, patience: float) -> None:
        """As `HelperProcess.gone`; kills what it leaves."""
        await super().gone(patience)
        await self._end_adopted()

    async def _end_adopted(self) -> None:
        """Kill what the dead zygote has left to this process, a subreaper: it is younger than the zygote."""
        while True:
            table = linux.processes()
            left = {process.pid for process in linux.adopted(table) if process.started >= self._started}
            if not left:
                return
            # Parents first: one must not report how its children end.
            linux.send([*left, *linux.descendants(table, left)], signal.SIGKILL)
            await asyncio.sleep(_STEP)
            for pid in left:
                linux.reap(pid)
