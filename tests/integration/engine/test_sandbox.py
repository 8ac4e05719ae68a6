"""What a run may and may not do in the sandbox, on this kernel; and that the rest of Python works there."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.kernel import require_landlock
from tests.fakes.plugins import make_plugin
from tests.fakes.running import child_pool, until, work
from worker.clock import SystemClock
from worker.engine.runners.child import landlock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner, Sandbox, SandboxRules
from worker.engine.runners.contract import StopSignal
from worker.handlers.catalogue import read_catalogue
from worker.model.runs.outcome import Failed, Outcome, Succeeded
from worker.process.confinement import Confinement
from worker.process.guarded_files import FileWatch
from worker.settings import load
from worker.telemetry.events import Emitted

MODULE = "sandbox_jobs"
SOURCE = """
from worker import job

@job("code")
def code(ctx):
    given = {}
    exec(ctx.params["code"], given)
    return given.get("result")
"""


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A handler that runs what the test wants it to."""
    require_landlock()
    folder = make_plugin(tmp_path_factory.mktemp("code"), modules={MODULE: SOURCE}, entry_points={})
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that exists beside what handlers may use."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "secret").write_text("a secret")
    for name in ("readable", "writable"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    return folder


@pytest.fixture(scope="module")
async def confined(plugin: Path, data: Path) -> AsyncIterator[ChildPool]:
    """A runner in whose sandbox two folders of the test are."""
    rules = Planner([]).rules([str(data / "readable")], [str(data / "writable")])
    async with child_pool(attached=True, sandbox=rules, spares=1) as runner:
        yield runner


async def run(children: ChildPool, code: str, **fields: Any) -> Outcome:
    given = work("code", entry_point=f"{MODULE}:code", params={"code": code}, **fields)
    return await children.run(given, AnsweringWorker(), StopSignal())


async def result_of(children: ChildPool, code: str, **fields: Any) -> Any:
    outcome = await run(children, code, **fields)
    assert isinstance(outcome, Succeeded), outcome
    return None if outcome.result is None else json.loads(outcome.result)


ATTEMPTS = {
    "read": "open('{data}/secret').read()",
    "write": "open('{data}/secret', 'w')",
    "create": "open('{data}/new', 'w')",
    "truncate": "import os; os.truncate('{data}/secret', 0)",
    "list": "import os; os.listdir('{data}')",
    "write what may be read": "open('{data}/readable/file', 'w')",
    "remove what may be read": "import os; os.remove('{data}/readable/file')",
    "shell": "import subprocess; subprocess.run(['cat', '{data}/secret'], check=True, stderr=-3)",
    "link": "import os; os.symlink('{data}/secret', 'x'); open('x').read()",
    "hard link": "import os; os.link('{data}/secret', 'x')",
    "move": "import os; os.rename('{data}/secret', 'x')",
    "other process": "open('/proc/{pid}/environ').read()",
    "other command line": "open('/proc/{pid}/cmdline').read()",
    "parent": "import os; open(f'/proc/{{os.getppid()}}/status').read()",
    "processes": "import os; os.listdir('/proc')",
    "signal": "import os; os.kill({pid}, 0)",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_denied_in_the_sandbox(attempt: str, confined: ChildPool, data: Path) -> None:
    code = ATTEMPTS[attempt].format(data=data, pid=os.getpid())

    outcome = await run(confined, code)

    assert isinstance(outcome, Failed)
    assert outcome.error.type in ("PermissionError", "subprocess.CalledProcessError", "OSError")
    assert (data / "secret").read_text() == "a secret"


@pytest.fixture(scope="module")
async def unconfined(plugin: Path) -> AsyncIterator[ChildPool]:
    """A runner without a sandbox, for the controls."""
    async with child_pool(attached=True) as runner:
        yield runner


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_the_control_without_a_sandbox(attempt: str, unconfined: ChildPool, tmp_path: Path) -> None:
    (tmp_path / "readable").mkdir()
    for name in ("secret", "readable/file"):
        (tmp_path / name).write_text("a secret")

    outcome = await run(unconfined, ATTEMPTS[attempt].format(data=tmp_path, pid=os.getpid()))

    assert isinstance(outcome, Succeeded), outcome


async def test_abstract_sockets_of_others_are_out_of_reach(
    confined: ChildPool, unconfined: ChildPool
) -> None:
    name = f"orgworker-test-{os.getpid()}"
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()

        assert isinstance(await run(confined, connect), Failed)
        assert isinstance(await run(unconfined, connect), Succeeded)


async def test_what_the_operator_allows(confined: ChildPool, data: Path) -> None:
    assert await result_of(confined, f"result = open('{data}/readable/file').read()") == "readable"

    await result_of(
        confined,
        f"import os; open('{data}/writable/new', 'w').write('x'); os.remove('{data}/writable/file')",
    )

    assert [path.name for path in (data / "writable").iterdir()] == ["new"]


async def test_a_denied_path_is_named_with_the_setting(confined: ChildPool, data: Path) -> None:
    plain = await run(confined, ATTEMPTS["read"].format(data=data))
    wrapped = await run(
        confined,
        f"try: open('{data}/new', 'w')\nexcept OSError as error: raise ValueError('no report') from error",
    )
    program = await run(confined, f"import subprocess; subprocess.run(['{data}/program'])")

    hint = f"; the sandbox denies '{data}/secret': add it to [execution] read_paths or write_paths"
    assert isinstance(plain, Failed) and plain.error.message.endswith(hint)
    assert isinstance(wrapped, Failed)
    assert wrapped.error.message == f"no report{hint.replace('secret', 'new')}"
    # It is not there: that has nothing to do with the sandbox.
    assert isinstance(program, Failed) and "sandbox" not in program.error.message


async def test_no_hint_where_the_files_own_permissions_deny(confined: ChildPool, data: Path) -> None:
    (data / "readable" / "closed").touch(mode=0o000)
    # Root may read every file.
    as_nobody = "import os; os.getuid() or os.setuid(65534)"

    outcome = await run(confined, f"{as_nobody}; open('{data}/readable/closed')")

    assert isinstance(outcome, Failed) and "sandbox" not in outcome.error.message


async def test_multiprocessing_needs_dev_shm_and_says_so(confined: ChildPool) -> None:
    outcome = await run(confined, "import multiprocessing; multiprocessing.Lock()")

    assert isinstance(outcome, Failed)
    assert outcome.error.message.endswith("multiprocessing needs /dev/shm in [execution] write_paths")


async def test_its_own_folder_is_its_home_and_for_temporary_files(confined: ChildPool) -> None:
    code = """
import os, subprocess, tempfile
home, made = os.path.expanduser("~"), tempfile.mkdtemp()
open(home + "/x", "w").write("x"); os.rename(home + "/x", made + "/y")
open("script", "w").write("#!/bin/sh\\necho $HOME $TMPDIR"); os.chmod("script", 0o700)
said = subprocess.run(["./script"], capture_output=True, text=True, check=True).stdout.split()
result = [os.getcwd(), home, os.path.dirname(made), *said, oct(os.stat(".").st_mode)]
"""
    *folders, mode = await result_of(confined, code)

    assert len(set(folders)) == 1
    assert mode == "0o40700"


@pytest.fixture(scope="module")
async def unfiltered(plugin: Path, data: Path) -> AsyncIterator[ChildPool]:
    """A runner with the same sandbox, but without the filter of system calls, for the controls."""
    rules = Planner([]).rules([str(data / "readable")], [str(data / "writable")])
    async with child_pool(attached=True, sandbox=replace(rules, filtered=False)) as runner:
        yield runner


# Calls by which a run reaches others, or memory that outlives it. Each cleans up after itself.
CALLS = {
    "watch a folder": "done = libc.inotify_add_watch(libc.inotify_init(), b'{data}', 0x100)",
    # FAN_REPORT_FID, without which only root may use it; FAN_CREATE.
    "watch a folder with fanotify": "done = libc.fanotify_mark(libc.fanotify_init(0x200, 0), 1, "
    "ctypes.c_uint64(0x100), -100, b'{data}')",
    "shared memory": "done = libc.shmget(0, 4096, 0o1600); done < 0 or libc.shmctl(done, 0, None)",
    "message queue": "done = libc.msgget(0, 0o1600); done < 0 or libc.msgctl(done, 0, None)",
    "semaphores": "done = libc.semget(0, 1, 0o1600); done < 0 or libc.semctl(done, 0, 0)",
    "by a program": "import os, subprocess; made = subprocess.run(['ipcmk', '-Q'], capture_output=True); "
    "done = made.returncode and -1; done and ctypes.set_errno(errno.EACCES * (b'denied' in made.stderr)); "
    "done or subprocess.run(['ipcrm', '-q', made.stdout.split()[-1]], check=True)",
}
TRY_CALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
{call}
result = "worked" if done >= 0 else errno.errorcode[ctypes.get_errno()]
"""


@pytest.mark.parametrize("call", CALLS)
async def test_calls_that_reach_other_runs_are_denied(
    call: str, confined: ChildPool, unfiltered: ChildPool, data: Path
) -> None:
    code = TRY_CALL.format(call=CALLS[call].format(data=data))

    assert await result_of(confined, code) == "EACCES"
    # The control: Landlock alone does not deny them.
    assert await result_of(unfiltered, code) == "worked"


# shmget, as a 32-bit program calls it.
OLD_INTERFACES = r"""
import ctypes, mmap, struct
registers = struct.pack("<BIBIBI", 0xB8, 395, 0xB9, 4096, 0xBA, 0o1600)
memory = mmap.mmap(-1, 4096, prot=7)
memory.write(b"\x53\x31\xdb" + registers + b"\xcd\x80\x5b\xc3")
done = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
if done >= 0:
    ctypes.CDLL(None).shmctl(done, 0, None)
result = done
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instructions of this architecture")
async def test_the_32_bit_interface_is_filtered_too(confined: ChildPool, unfiltered: ChildPool) -> None:
    assert await result_of(confined, OLD_INTERFACES) == -errno.EACCES
    # The control; -ENOSYS on a kernel without that interface.
    assert await result_of(unfiltered, OLD_INTERFACES) >= 0


async def test_a_handler_can_open_files_to_others_until_the_worker_looks(
    confined: ChildPool, tmp_path: Path, emitted: list[Emitted]
) -> None:
    """Nothing denies `chmod`. So the first part is the control: what is left without the look."""
    files = [tmp_path / name for name in ("keyring", "worker.db", "worker.db-wal", "worker.toml")]
    for file in files:
        file.touch(0o600)
    (tmp_path / "worker.toml").write_text(f'[database]\nurl = "sqlite:///{tmp_path}/worker.db"\n')
    watch = FileWatch(load(str(tmp_path / "worker.toml"), environ={}), SystemClock())
    paths = [str(file) for file in files]
    await result_of(confined, f"import os; [os.chmod(path, 0o644) for path in {paths}]")
    assert [oct(file.stat().st_mode) for file in files] == ["0o100644"] * 4

    watch.look()

    assert [oct(file.stat().st_mode) for file in files] == ["0o100600"] * 4
    told = {event.fields["path"] for event in emitted if event.event.name == "files.opened"}
    assert told == set(paths)


WATCHES = """
import ctypes, os, pathlib, struct
libc = ctypes.CDLL(None, use_errno=True)
notices = libc.inotify_init()
def watch(path):
    if libc.inotify_add_watch(notices, os.fsencode(path), 0x100) < 0:
        raise PermissionError(ctypes.get_errno(), "watch")
def seen():
    return os.read(notices, 4096)[16:].partition(bytes(1))[0].decode()
runs = os.path.dirname(os.getcwd())
watch(runs)
pathlib.Path("{data}/writable/watches").touch()
other = os.path.join(runs, seen())
watch(other)
pathlib.Path("{data}/writable/watches-it").touch()
result = seen()
"""


async def test_names_of_another_runs_files_are_not_seen(
    confined: ChildPool, unfiltered: ChildPool, data: Path
) -> None:
    code = WATCHES.format(data=data)
    denied = await run(confined, code)
    assert isinstance(denied, Failed) and denied.error.type == "PermissionError"

    # The control: even the random name of another run's folder is seen, and then what is in it.
    watching = asyncio.create_task(result_of(unfiltered, code))
    await until((data / "writable" / "watches").exists)
    victim = f"""
import pathlib, time
while not pathlib.Path("{data}/writable/watches-it").exists():
    time.sleep(0.01)
pathlib.Path("customer-42.csv").touch()
"""
    await result_of(unfiltered, victim)
    assert await watching == "customer-42.csv"


WORKS = {
    "passwd": "import os, pwd; pwd.getpwuid(os.getuid())",
    "time zones": "import zoneinfo; zoneinfo.ZoneInfo('Europe/Berlin')",
    "local time": "import time; time.localtime()",
    "names": "import socket; socket.getaddrinfo('localhost', 'http')",
    "certificates": "import ssl; assert ssl.create_default_context().cert_store_stats()['x509_ca']",
    "wheels": "import cryptography.hazmat.bindings._rust, pydantic_core, sqlite3, ctypes, ssl",
    "random": "import os; open('/dev/urandom', 'rb').read(4); open('/dev/null', 'r+b').write(b'x')",
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "own status": "open('/proc/self/status').read(); open('/proc/thread-self/stat').read()",
    "memory of the machine": "open('/proc/meminfo').read(); open('/proc/cpuinfo').read()",
    "cgroup": "import os; os.listdir('/sys/fs/cgroup'); open('/proc/self/cgroup').read()",
    "shell": "import subprocess; subprocess.run('cat <(echo x) > /dev/null', shell=True, check=True, "
    "executable='/bin/bash')",
    "interpreter": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import ssl, worker'], "
    "check=True)",
    "program in another language": "import subprocess, sys; subprocess.run([sys.prefix + '/bin/ruff', "
    "'--version'], check=True)",
    "signals in the family": "import subprocess; p = subprocess.Popen(['sleep', '60']); p.kill(); p.wait()",
    "fork": "import os; pid = os.fork() or os._exit(7); assert os.waitpid(pid, 0)[1] == 7 << 8",
    "unix sockets in the family": "import socket; a = socket.socket(socket.AF_UNIX); a.bind('\\0own'); "
    "a.listen(); socket.socket(socket.AF_UNIX).connect('\\0own')",
}


@pytest.mark.parametrize("what", WORKS)
async def test_works_in_the_sandbox(what: str, confined: ChildPool) -> None:
    await result_of(confined, WORKS[what])


async def test_a_tls_connection_by_name(confined: ChildPool) -> None:
    """A name is resolved, and a handshake comes as far as a server that speaks no TLS lets it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket, ssl
from threading import Thread
try:
    with socket.create_connection(("localhost", {server.getsockname()[1]}), timeout=5) as plain:
        plain.shutdown(socket.SHUT_WR)
        ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")
except (ssl.SSLError, ConnectionError, BrokenPipeError, TimeoutError) as error:
    result = "connected"
"""

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b"no TLS\r\n")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert await result_of(confined, code) == "connected"
        thread.join()


async def test_a_memory_cap_holds_in_the_sandbox(confined: ChildPool) -> None:
    outcome = await run(confined, "x = bytearray(900 * 1024 * 1024)", memory=256 * 1024 * 1024)

    assert isinstance(outcome, Failed)
    assert outcome.reason == "out_of_memory"


async def test_what_a_run_starts_cannot_read_its_own_proc_self(confined: ChildPool) -> None:
    """As docs/limits.md says: links in it can be read, and what is behind the descriptors of pipes."""
    code = """
import subprocess
def ok(command):
    return subprocess.run(command, shell=True, stdout=-3, stderr=-3).returncode == 0
result = [ok("cat /proc/self/status"), ok("readlink /proc/self/exe"), ok("echo x | cat /dev/stdin")]
"""
    assert await result_of(confined, code) == [False, True, True]


async def test_a_replaced_file_of_the_system_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolv.conf that a change of the network has replaced is another inode."""
    file = tmp_path / "resolv.conf"
    file.write_text("old")
    sandbox = Sandbox(SandboxRules(read=(str(file),), execute=("/usr",)))
    file.with_name("new").write_text("new")
    file.with_name("new").rename(file)
    # The rules that were prepared before are still there, as where no run has started for long.
    monkeypatch.setattr("worker.engine.runners.child.sandbox.CHECK_EVERY", 0.0)

    assert read_under(sandbox, file, tmp_path) == "new"


def read_under(sandbox: Sandbox, file: Path, folder: Path) -> str:
    own = folder / "own"
    own.mkdir()
    ruleset = sandbox.ruleset(str(own))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ruleset.restrict()
            os.write(writer, file.read_bytes())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as text:
        return text.read()


async def test_the_catalogues_children_are_confined(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "reads": f"open('{data}/secret').read()",
        "signals": f"import os; os.kill({os.getpid()}, 0)",
        "works": "import os, tempfile; tempfile.mkdtemp(); assert os.environ['HOME'] == os.getcwd()",
    }
    job = "\nfrom worker import job\n@job('{0}')\ndef f(ctx): ...\n"
    make_plugin(
        tmp_path,
        dist="acme-odd",
        modules={f"odd_{name}": source + job.format(name) for name, source in sources.items()},
        entry_points={name: f"odd_{name}:f" for name in sources},
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def errors(rules: SandboxRules | None) -> dict[str, str | None]:
        command = Confinement("", landlock.abi(), rules).describe
        reading = read_catalogue(["acme-odd"], command=command)
        return {entry.name: entry.error async for found in reading for entry in found}

    confined = await errors(Planner([]).rules([], []))
    assert confined["works"] is None
    assert confined["reads"] is not None and "[execution] read_paths" in confined["reads"]
    assert confined["signals"] is not None and "PermissionError" in confined["signals"]
    assert await errors(None) == dict.fromkeys(sources)


async def test_the_own_folder_of_another_run_is_denied(plugin: Path, data: Path) -> None:
    rules = replace(Planner([]).rules([], []), write=())
    async with child_pool(sandbox=rules) as runner:
        own = Path(await result_of(runner, "import os; result = os.getcwd()"))
        other = own.with_name("99")
        other.mkdir()
        (other / "file").write_text("of another run")
        outcome = await run(runner, f"open('{other}/file').read()")

    assert isinstance(outcome, Failed)
    assert outcome.error.type == "PermissionError"
