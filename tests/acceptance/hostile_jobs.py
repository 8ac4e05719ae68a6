"""Handlers that attack, copied into their own distribution: import only `worker` here.

`hostile.attacks` reads the targets from `targets.json` in the folder where handlers may write, and returns
the result of each attack: `worked`, or the error.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from worker import BlockingContext, job

SECRET = "SECRET_OF_ANOTHER_ORG"
Targets = dict[str, Any]


@job("hostile.victim")
def victim(ctx: BlockingContext[Any, Any]) -> None:
    """Another org's run: it has a file, and a process with a secret in its environment."""
    Path("file").write_text(SECRET)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, env=dict(os.environ) | {"PASSWORD": SECRET})
    here = {"pid": os.getpid(), "process": process.pid, "folder": os.getcwd()}
    out = Path(ctx.params["out"])
    (out / "victim.new").write_text(json.dumps(here))
    (out / "victim.new").rename(out / "victim.json")
    while not ctx.cancelled.is_set():
        time.sleep(0.05)


@job("hostile.attacks")
def attacks(ctx: BlockingContext[Any, Any]) -> dict[str, str]:
    """Try everything."""
    targets = json.loads(Path(ctx.params["out"], "targets.json").read_text())
    return {name: _tried(attempt) for name, attempt in _attempts(targets)}


def _tried(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "worked"


def _attempts(targets: Targets) -> Iterator[tuple[str, Callable[[], object]]]:
    yield from _files(targets)
    for who, pid in targets["processes"].items():
        yield from _process(who, pid)
    yield from _planted(targets)
    yield "list all processes", lambda: os.listdir("/proc")
    yield "connect to an abstract socket of another process", lambda: _connect(f"\0{targets['abstract']}")
    if "database" in targets:
        yield from _sqlite(targets["database"])
    else:
        yield "use the database's password", lambda: _count_credentials(targets["secrets"])
    # Last, since it ends it.
    yield "kill another run's process", lambda: os.kill(targets["processes"]["another run's process"], 9)


def _files(targets: Targets) -> Iterator[tuple[str, Callable[[], object]]]:
    keyring, folder = targets["keyring"], targets["victim"]
    yield "read the key ring", lambda: _read(keyring)
    yield "read the key ring by a program", lambda: subprocess.run(["cat", keyring], check=True, stdout=-3)
    yield "read the key ring by a link", lambda: (os.symlink(keyring, "symbolic"), _read("symbolic"))
    yield "read the key ring by a hard link", lambda: (os.link(keyring, "hard"), _read("hard"))
    yield "read the key ring from its folder", lambda: _from_folder(keyring)
    yield "read the configuration", lambda: _read(targets["configuration"])
    yield "read another run's file", lambda: _contains(f"{folder}/file", SECRET)
    yield "list another run's folder", lambda: os.listdir(folder)
    yield "list the folder of all runs", lambda: os.listdir(os.path.dirname(folder))
    yield (
        "watch another run's folder",
        lambda: _called("inotify_add_watch", _notices(), folder.encode(), 0x100),
    )
    yield "make memory that outlives the run", lambda: _called("shmget", 0, 4096, 0o1600, undo="shmctl")
    yield "write into another run's folder", lambda: Path(folder, "planted").write_text("x")
    yield "empty a file of the state by its path", lambda: os.truncate(targets["decoy"], 0)
    yield "remove a file of the state", lambda: os.remove(targets["decoy"])


def _process(who: str, pid: int) -> Iterator[tuple[str, Callable[[], object]]]:
    yield f"read the command line of {who}", lambda: _read(f"/proc/{pid}/cmdline")
    yield f"read the environment of {who}", lambda: _read(f"/proc/{pid}/environ")
    yield f"read the memory of {who}", lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    yield f"list the descriptors of {who}", lambda: os.listdir(f"/proc/{pid}/fd")
    yield f"reach the working folder of {who}", lambda: os.listdir(f"/proc/{pid}/cwd/")
    yield f"signal {who}", lambda: os.kill(pid, signal.SIGCONT)


def _planted(targets: Targets) -> Iterator[tuple[str, Callable[[], object]]]:
    here, plugins = targets["here"], targets["plugins"]
    yield "plant worker/__main__.py in the working folder", lambda: _plant(f"{here}/worker/__main__.py")
    yield "plant a configuration in the working folder", lambda: _plant(f"{here}/planted/worker.toml")
    yield "plant a module on sys.path", lambda: _plant(f"{plugins}/sitecustomize.py")
    yield "change a module that is there", lambda: open(f"{plugins}/hostile_jobs.py", "a").close()
    yield "change the configuration", lambda: open(targets["configuration"], "a").close()
    yield "change the key ring", lambda: open(targets["keyring"], "a").close()


def _sqlite(database: str) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "read the database file", lambda: _read(database)
    yield "ask the database for secrets", lambda: _ask(database, "SELECT count(*) FROM credentials")
    yield "write into the database", lambda: _ask(database, "UPDATE orgs SET name = 'planted'")
    yield "release the lock of the SQLite file", lambda: _release_and_take(database)
    yield "replace the lock of the SQLite file", lambda: _moved_and_back(f"{database}.lock")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


_libc = ctypes.CDLL(None, use_errno=True)


def _notices() -> int:
    """A descriptor for watches of folders."""
    return int(_libc.inotify_init())


def _called(name: str, *arguments: Any, undo: str = "") -> None:
    result = _libc[name](*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    if undo:
        _libc[undo](result, 0, None)


def _contains(path: str, text: str) -> None:
    if text not in Path(path).read_text():
        raise LookupError(f"{text} is not in it")


def _from_folder(path: str) -> None:
    home = os.getcwd()
    try:
        os.chdir(os.path.dirname(path))
        _read(os.path.basename(path))
    finally:
        os.chdir(home)


def _plant(path: str) -> None:
    """Write a file, and remove it again."""
    made = not os.path.exists(os.path.dirname(path))
    if made:
        os.mkdir(os.path.dirname(path))
    Path(path).write_text("# planted\n")
    os.remove(path)
    if made:
        os.rmdir(os.path.dirname(path))


def _connect(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(name)


def _release_and_take(database: str) -> None:
    """Release the locks that any descriptor of this process holds, then lock as a second worker would."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            fcntl.flock(int(name), fcntl.LOCK_UN)
    with open(f"{database}.lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _ask(database: str, statement: str) -> None:
    connection = sqlite3.connect(f"file:{database}", uri=True, timeout=5, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(statement)
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _moved_and_back(path: str) -> None:
    os.rename(path, f"{path}.moved")
    os.rename(f"{path}.moved", path)


def _count_credentials(secrets: str) -> None:
    import psycopg

    url = Path(secrets, "database__url").read_text().strip()
    with psycopg.connect(url) as connection:
        connection.execute("SELECT count(*) FROM credentials")
