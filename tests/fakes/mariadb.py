"""A MariaDB server for tests of the outbox, in a folder of its own, from Debian's mariadb-server-core."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pymysql

from tests.fakes.ports import free_port

START_TIMEOUT = 60.0
# Both are in sbin, which is not on every user's path.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
INSTALL = "apt-get install --no-install-recommends mariadb-server-core"


def binary() -> str | None:
    """The server's program, None if it is not installed."""
    return shutil.which("mariadbd", path=_PATH)


class Server:
    """A server on a free loopback port; `root` has no password."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        program = binary()
        if program is None:
            raise RuntimeError(f"there is no MariaDB here: {INSTALL}")
        data, log = self._folder / "data", self._folder / "log"
        # A server that begins as root wants to be told so.
        user = [f"--user={'root' if os.geteuid() == 0 else os.environ.get('USER', '')}"]
        data.mkdir(exist_ok=True)
        self.port = self.port or free_port()
        command = [program, "--no-defaults", f"--datadir={data}", f"--port={self.port}", *user]
        # Without its system tables, and so without grants.
        command += ["--skip-grant-tables", "--aria-log-dir-path=" + str(data)]
        command += ["--bind-address=127.0.0.1", f"--socket={self._folder / 's'}", f"--log-error={log}"]
        # Not the tests' zone and not UTC, to find statements that rely on the session's.
        command += ["--innodb-flush-log-at-trx-commit=2", "--default-time-zone=-05:00"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._await_start()

    def _await_start(self) -> None:
        until = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self.connect(None).close()
                return
            except pymysql.err.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def connect(self, database: str | None = "test", **more: Any) -> Any:
        """A new connection of PyMySQL."""
        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", database=database, **more)

    def make(self, name: str) -> None:
        """An empty database."""
        with self.connect(None) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
