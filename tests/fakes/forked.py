"""`python -m worker …` as a fork of a process that has imported it: a third of a new interpreter's CPU time.

Only its command line and its parent differ. The parent is a server, `python -m tests.fakes.forked SOCKET`:
one for all stages of `./dev test`, or one per test process. A client sends a request with three file
descriptors, and receives the process id and later the exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tests import speed
from tests.fakes.cli import Completed
from worker.guard import http

ROOT = Path(__file__).parents[2]
# Imported by a worker or a command only once it needs them.
LATER = ("alembic.command", "opentelemetry.sdk.trace", "psycopg", "sqlalchemy.dialects.postgresql.psycopg")
# With one of the first three a new interpreter starts with code that a fork would skip.
ONLY_NEW = (
    "COVERAGE_PROCESS_CONFIG",
    "COVERAGE_PROCESS_START",
    "ORGWORKER_SHIFTED_CLOCK",
    "ORGWORKER_TEST_PLAIN",
)


# Modules that `python -m` runs in a fork; `demo` starts its own processes, and is one that users start.
MODULES = ("worker", "worker.demo.provider", "uvicorn")
# `python` or `orgworker` for a shell: passes signals on; if it is killed itself, the server kills the fork.
SHIM = """\
#!{python} -IS
import json, os, signal, socket, sys
program = os.path.basename(sys.argv[0])
given = [word for word in sys.argv[1:] if word != "-P"]
if program == "orgworker":
    given = ["-m", "worker", *sys.argv[1:]]
if given[:1] != ["-m"] or given[1] not in {modules!r} or "demo" in given:
    real = os.path.join(os.path.dirname({python!r}), program) if program == "orgworker" else {python!r}
    os.execv(real, [real, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect({server!r})
request = {{"module": given[1], "arguments": given[2:], "cwd": os.getcwd(), "env": dict(os.environ)}}
request |= {{"session": False, "nice": os.nice(0), "python": {python!r}, "program": program}}
text = json.dumps(request).encode()
socket.send_fds(connection, [len(text).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(text)
received = connection.makefile()
process = int(received.readline())
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(received.readline())
sys.exit(code if code >= 0 else 128 - code)
"""


def commands(folder: Path, python: str = sys.executable) -> Path:
    """Create a folder with a `python` and an `orgworker` that come before these in PATH.

    They may be those of a virtual environment that adds to the server's, see `environments`.
    """
    folder.mkdir()
    for name in ("python", "orgworker"):
        shim = folder / name
        shim.write_text(SHIM.format(python=python, server=str(server()), modules=MODULES))
        shim.chmod(0o755)
    return folder


class Process:
    """A started process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = connection.makefile("rb")
        self.pid = int(self._received.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code.

        Raises:
            subprocess.TimeoutExpired: it runs longer than that.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            self.returncode = int(self._received.readline() or -signal.SIGKILL)
            self._received.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_servers: dict[int, Path] = {}
# The exit code of a fork, once it has one.
_code: list[int] = []


def start(
    command: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    output: IO[bytes],
    errors: IO[bytes] | None = None,
    given: IO[bytes] | None = None,
    fork: bool = True,
) -> Process | subprocess.Popen[bytes]:
    """Start a command in its own session; as a fork if it is `python -m worker …`.

    `errors` defaults to `output`, standard input to nothing. Without `fork` it is a new interpreter.
    """
    words = [word for word in command if word != "-P"]
    if words[:3] != [sys.executable, "-m", "worker"] or not (fork and is_possible()):
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=given or subprocess.DEVNULL,
            stdout=output,
            stderr=errors or output,
            start_new_session=True,
        )
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server()))
    with open(os.devnull, "rb") as nothing:
        request = {"module": "worker", "arguments": words[3:], "cwd": str(cwd), "env": dict(env)}
        request |= {"session": True, "nice": os.nice(0)}
        streams = (given or nothing, output, errors or output)
        send(connection, request, [stream.fileno() for stream in streams])
    return Process(connection)


def run(
    command: list[str], *, cwd: Path, env: Mapping[str, str], stdin: str = "", timeout: float = 90
) -> Completed:
    """Run a command to its end.

    Raises:
        subprocess.TimeoutExpired: it was killed after that many seconds.
    """
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as given,
    ):
        given.write(stdin.encode())
        given.seek(0)
        started = start(command, cwd=cwd, env=env, output=output, errors=errors, given=given)
        try:
            code = started.wait(timeout)
        finally:
            started.kill()
        for stream in (output, errors):
            stream.seek(0)
        return Completed(code, output.read().decode(), errors.read().decode())


def is_possible() -> bool:
    """Whether a fork is equivalent to a new interpreter here."""
    return not any(name in os.environ for name in ONLY_NEW)


def server() -> Path:
    """The socket of the server; without one of `./dev test` the first call starts this process's own."""
    if "ORGWORKER_TEST_RUN" in os.environ:
        return listening(Path(os.environ["ORGWORKER_TEST_RUN"]) / "forks", lambda: True)
    if os.getpid() not in _servers:
        folder = tempfile.TemporaryDirectory(prefix="orgworker-forked-")
        path = Path(folder.name) / "socket"
        started = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.forked", str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

        def end() -> None:
            started.kill()
            started.wait()
            folder.cleanup()

        atexit.register(end)
        _servers[os.getpid()] = listening(path, lambda: started.poll() is None)
    return _servers[os.getpid()]


def listening(path: Path, alive: Callable[[], bool]) -> Path:
    """The socket, once a server listens there."""
    until = time.monotonic() + 60
    while not path.exists():
        if not alive() or time.monotonic() > until:
            raise RuntimeError("the server of forks did not start")
        time.sleep(0.02)
    return path


def send(connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    text = json.dumps(request).encode()
    socket.send_fds(connection, [len(text).to_bytes(4, "big")], descriptors)
    connection.sendall(text)


# ---- the server


def serve(path: Path) -> dict[str, Any] | None:
    """Fork for each request; returns in the fork, with its request, and with None at the end."""
    import_all()
    gc.collect()
    gc.freeze()
    waking, woken = socket.socketpair()
    for end in (waking, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(50)
    Path(f"{path}.new").rename(path)
    running: dict[int, socket.socket] = {}
    # Forks that end with their client, a `python` of a shell.
    tied: dict[socket.socket, int] = {}
    while True:
        ready, _, _ = select.select([listener, waking, 0, *tied], [], [])
        if 0 in ready:
            return None
        if waking in ready:
            waking.recv(4096)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with contextlib.suppress(OSError), running.pop(pid) as connection:
                        tied.pop(connection, None)
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        for connection in tied.keys() & set(ready):
            os.kill(tied.pop(connection), signal.SIGKILL)
        if listener in ready:
            connection, _ = listener.accept()
            length, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
            request = json.loads(read(connection, int.from_bytes(length, "big")))
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for place, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, place)
                    os.close(descriptor)
                for other in (connection, listener, waking, woken, *running.values()):
                    other.close()
                return request
            for descriptor in descriptors:
                os.close(descriptor)
            running[pid] = connection
            if not request["session"]:
                tied[connection] = pid
            with contextlib.suppress(OSError):
                connection.sendall(b"%d\n" % pid)


def read(connection: socket.socket, length: int) -> bytes:
    text = b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    return text


def fork_commands_of_demo(server: Path) -> None:
    """Have the demo in this process run its commands as forks too; its worker stays a new interpreter."""
    from worker.demo import installation

    _servers[os.getpid()] = server

    def run_fork(command: list[str], *, env: Mapping[str, str], **_: Any) -> SimpleNamespace:
        done = run(command, cwd=Path.cwd(), env=env)
        return SimpleNamespace(returncode=done.code, stderr=done.err)

    installation.subprocess = SimpleNamespace(**vars(subprocess) | {"run": run_fork})


# Commands whose process starts a zygote, which is also a new interpreter: 0.2 s of CPU time.
WITH_ZYGOTE = ("host", "run", "try")
ZYGOTE = "worker.engine.runners.child.zygote"


class Child:
    """A child of this process that `subprocess` did not start, with the part of `Popen` that workers use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def prepare_zygote() -> list[str] | None:
    """Fork a process that waits to be this worker's first zygote; a later one is a new interpreter.

    Returns the zygote's arguments in that process, once the worker starts it, and None in the worker.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        return become_zygote(theirs)
    theirs.close()
    waiting = [pid]

    def start_zygote(
        command: list[str], *, env: Mapping[str, str], pass_fds: list[int], **others: Any
    ) -> Any:
        if not waiting or ZYGOTE not in command:  # such as the broker
            return subprocess.Popen(command, env=env, pass_fds=pass_fds, **others)
        request = {"arguments": command[4:], "env": dict(env), "cwd": os.getcwd(), "descriptors": pass_fds}
        with ours:
            send(ours, request, pass_fds)
        return Child(waiting.pop())

    from worker.engine.runners.child import zygote_handle

    zygote_handle.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": start_zygote})  # type: ignore
    return None


def become_zygote(connection: socket.socket) -> list[str]:
    """Wait for the worker to start this zygote; ends with a worker that does not."""
    length, received, _, _ = socket.recv_fds(connection, 4, 3)
    if not length:
        os._exit(0)
    request = json.loads(read(connection, int.from_bytes(length, "big")))
    connection.close()
    os.setsid()
    with open(os.devnull, "r+b") as nothing:
        # Away from the numbers that they are to have.
        moved = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in (*received, nothing.fileno())]
    for number in received:
        os.close(number)
    for number, wanted in zip(moved, (*request["descriptors"], 0), strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.dup2(0, 1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    arguments: list[str] = request["arguments"]
    return arguments


def import_all() -> None:
    """Import every module of the worker except those with side effects."""
    import worker

    for module in pkgutil.walk_packages(worker.__path__, "worker."):
        if not module.name.endswith("__main__") and not module.name.startswith("worker.testing"):
            importlib.import_module(module.name)
    for name in LATER:
        importlib.import_module(name)
    speed.reuse_authorities()
    http._tls_context()


def leave() -> None:
    """End a fork without freeing what it shares with the server: copying that takes 0.1 s."""
    if _code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code[0])


def main() -> None:
    """The server; in a fork, the command."""
    atexit.register(leave)  # before any other callback, so that it is called last
    started_with = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    base = sys.path[1 + len(started_with) :]
    request = serve(Path(sys.argv[1]))
    if request is None:
        return
    os.nice(max(0, request["nice"] - os.nice(0)))
    if request["session"]:
        os.setsid()
    # New objects: those of the server are pipes.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    added = list(filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [*added, *base]
    if request.get("python", sys.executable) != sys.executable:
        sys.executable = request["python"]
        sys.prefix = str(Path(sys.executable).parents[1])
        [packages] = Path(sys.prefix).glob("lib/python3*/site-packages")
        site.addsitedir(str(packages))
    importlib.invalidate_caches()
    if any((Path(folder) / "sitecustomize.py").exists() for folder in added):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    if "demo" in request["arguments"]:
        fork_commands_of_demo(Path(sys.argv[1]))
    if any(name in WITH_ZYGOTE for name in request["arguments"]):
        arguments = prepare_zygote()
        if arguments is not None:
            request = {"module": ZYGOTE, "arguments": arguments}
    sys.argv[1:] = request["arguments"]
    if not hasattr(sys.modules.get(request["module"]), "__path__"):
        sys.modules.pop(request["module"], None)  # it is executed again, under another name
    try:
        if request.get("program") == "orgworker":
            sys.argv[0] = "orgworker"
            importlib.import_module("worker.app").main()
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int):
            _code.append(end.code)
        raise


if __name__ == "__main__":
    main()
