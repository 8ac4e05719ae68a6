"""A command hides its memory and environment before it reads a secret, and can still do its work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import copied

ROOT = Path(__file__).parents[3]
# As root every process may be read: the owner of the commands and who spies on them is nobody then.
NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
SPY = """
import sys
pid = sys.argv[1]
try:
    seen = open(f"/proc/{pid}/environ", "rb").read()
    start = open(f"/proc/{pid}/maps").read().split("-")[0]
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(int(start, 16))
        memory.read(16)
except PermissionError:
    print("denied")
else:
    print("read" if b"hunter2" in seen else "nothing yet")
"""
# Says for each file of settings and secrets that is opened while others may read the process.
WATCH = """
import ctypes, sys
libc, folder = ctypes.CDLL(None), sys.argv[1]
def look(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder) and libc.prctl(3, 0, 0, 0, 0):
        print("EXPOSED", arguments[0], flush=True)
sys.addaudithook(look)
sys.argv[:2] = ["orgworker"]
from worker.app import main
main()
"""


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cannot write what ./dev coverage measures, and would say so."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _reachable() -> Iterator[None]:
    """Copies of the packages for nobody, where the checkout lies in a folder that is closed to others."""
    if not NOBODY or all(path.stat().st_mode & 0o001 for path in ROOT.parents):
        yield
        return
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as changed:
        os.chmod(name, 0o755)
        for package in ("worker", "jobs", "migrations"):
            shutil.copytree(ROOT / package, Path(name, package))
        locked = (ROOT / "config/requirements/run.lock").read_text()
        for required in re.findall(r"^([\w.-]+)(?:\[.*\])?==", locked, re.MULTILINE):
            try:
                files = distribution(required).files or []
            except PackageNotFoundError:
                continue  # of another system
            for file in files:
                if ".." not in file.parts:
                    Path(name, file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(str(file.locate()), Path(name, file))
        changed.setenv("PYTHONPATH", name)
        changed.setattr(sys, "executable", os.path.realpath(sys.executable))
        yield


def worker() -> list[str]:
    return [sys.executable, "-P", "-m", "worker"]


@pytest.fixture
def folder(migrated_sqlite_file: Path) -> Iterator[Path]:
    """An installation of nobody, with a setting in a secret file and a password in the environment."""
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        (made / "secrets").mkdir()
        (made / "secrets" / "log__level").write_text("warning")
        (made / "worker.toml").write_text(
            f'secrets_dir = "{made}/secrets"\n[database]\nurl = "sqlite:///{made}/var/worker.db"\n'
            '[web]\nlisten = "127.0.0.1:0"\n'
        )
        (made / "var").mkdir()
        copied(migrated_sqlite_file, made / "var")
        for path in (made, *made.rglob("*")):
            if NOBODY:
                os.chown(path, NOBODY["user"], NOBODY["group"])
        yield made


def called(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*worker(), "--config", str(folder / "worker.toml"), *arguments]
    return subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, **NOBODY
    )


def spied(pid: int) -> str:
    command = [sys.executable, "-c", SPY, str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **NOBODY).stdout.strip()


def started(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"WORKER_ALERTS__WEBHOOK_SECRET": "hunter2-hunter2-hunter2"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **NOBODY,
    )


ADD = ("credentials", "add", "org_a", "--client-id", "one", "--secret-file", "-")


@pytest.mark.parametrize("arguments", [["serve"], ["run"], ADD], ids=["serve", "run", "credentials add"])
def test_no_other_process_of_the_user_reads_a_command(folder: Path, arguments: list[str]) -> None:
    process = started(folder, *worker(), "--config", str(folder / "worker.toml"), *arguments)
    try:
        until = time.monotonic() + 30
        while (seen := spied(process.pid)) != "denied" and time.monotonic() < until:
            assert process.poll() is None, process.stderr and process.stderr.read()
        assert seen == "denied"
    finally:
        process.kill()
        process.communicate()


def test_what_does_not_hide_is_read(folder: Path) -> None:
    """The control: a process of the same user, with the same environment."""
    process = started(folder, sys.executable, "-c", "import sys; sys.stdin.read()")
    try:
        until = time.monotonic() + 30
        while (seen := spied(process.pid)) == "nothing yet" and time.monotonic() < until:
            pass
        assert seen == "read"
    finally:
        process.kill()
        process.communicate()


COMMANDS = {
    "config": ["config", "show"],
    "doctor": ["doctor"],
    "keys": ["keys", "list"],
    "orgs": ["orgs", "list"],
    "check": ["check"],
    "serve": ["--set", "web.listen=", "serve"],
    # Ends at once, since there is no such database.
    "run": ["--set", "database.url=sqlite:////nowhere/worker.db", "run"],
    # `--help` is a value here, not a question.
    "help as a value": ["--set", "web.listen=", "audit", "list", "--org", "--help"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_memory_is_hidden_before_settings_and_secrets_are_read(folder: Path, name: str) -> None:
    arguments = ["--config", str(folder / "worker.toml"), *COMMANDS[name]]

    command = [sys.executable, "-P", "-c", WATCH, str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **NOBODY)

    assert "Traceback" not in done.stderr
    assert "EXPOSED" not in done.stdout


def test_a_hidden_command_reads_and_writes_what_it_is_given(folder: Path) -> None:
    """What belongs to a hidden process in /proc is root's: descriptors by name must open all the same."""
    given = ["--set", "issuers.main.url=https://acme.kinde.com"]
    command = shlex.join([*worker(), "--config", "worker.toml", *given, "orgs", "import"])

    for place in ("-", "/dev/stdin", "/proc/self/fd/0"):
        line = json.dumps({"code": f"org_{len(place)}", "name": "A", "issuer": "main"})
        # By a pipe of the user's own, which may be opened a second time.
        script = f"echo {shlex.quote(line)} | {command} {place}"
        done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, **NOBODY)
        assert done.returncode == 0, done.stderr
    listed = called(folder, *given, "orgs", "list", "-o", "id")
    assert len(listed.stdout.split()) == 3
    assert called(folder, *given, "doctor", "--bundle", "bundle.json").returncode == 0


# The path that a run's process is given, once the command has begun.
PATH_OF = """
import runpy, sys, worker.app
worker.app.main = lambda: print("\\n".join(sys.path))
runpy.run_module("worker", run_name="__main__", alter_sys=True)
"""


def test_a_worker_started_without_safe_path_drops_its_working_folder(folder: Path) -> None:
    """A handler that may write there would otherwise plant modules, and read the database in it."""

    def path(script: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    begun = "import os, sys; sys.path[0] = os.getcwd()\n"  # as `-m` leaves it
    assert str(folder) in path(begun + "print(sys.path[0])")
    assert str(folder) not in path(begun + PATH_OF)


def test_help_imports_neither_what_is_hidden_nor_the_database_library(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", *worker()[1:], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "worker.app.shell" in imported
    assert not {name for name in imported if name.startswith(("ctypes", "sqlalchemy", "worker.engine"))}
