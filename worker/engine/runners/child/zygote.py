"""The process that forks, freezes and kills runs; it holds no data of any org.

The worker execs it, and it stays single-threaded. Over its control socket it receives start, interrupt,
kill and lease, and sends ended, frozen and thawed, each a JSON datagram. When the worker is gone it kills
every run with all its descendants, then ends.
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
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from worker.engine.runners.child import linux, run_folders, seccomp
from worker.engine.runners.child import main as child
from worker.engine.runners.child.landlock import Ruleset
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.sandbox import CHECK_EVERY, Sandbox, describe_handlers
from worker.engine.runners.child.shared_pages import share_pages
from worker.handlers.describe import LAST_DESCRIPTOR, SHARED
from worker.handlers.http import tls_context
from worker.handlers.installed import preload


@dataclass(slots=True)
class Leader:
    """The first process of a run, or one that waits for its run. `why` is the reason if the zygote killed it.

    `memory` is the cap in bytes; `grouped` if it has a cgroup.
    """

    run: int
    pid: int
    memory: int | None
    grouped: bool
    why: str | None = None
    ended: dict[str, Any] | None = None


# Seconds between checks of memory.
MEMORY_TICK = 0.1
# Seconds between sweeps, and after which ends are reported anyway: the kernel may be unable to kill a
# process that is stuck in a device.
SWEEP_TICK = 0.005
SWEEP_PATIENCE = 2.0
DATAGRAM = 65_536
# Messages that are read before anything else is done.
AT_ONCE = 16
# Seconds within which a new process usually calls its handler.
AFTER_START = 0.01
# What nearly every handler needs, imported once; `tls_context` imports httpx.
WARM = ("pydantic.main", "pydantic.types", "worker.handlers.results", *SHARED)


class Zygote:
    """The parent of every run's leader, and of what runs leave behind."""

    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self._control = control
        self._setup = setup
        self._pid = os.getpid()
        self._sandbox = None if setup.sandbox is None else Sandbox(setup.sandbox)
        self._seal: child.Seal | None = None
        self._own_memory = linux.resident(os.getpid())
        self._memory_due_at = float("inf")
        self._groups = linux.RunGroups.find()
        self._relatives = linux.Relatives()
        self._memory_files = linux.MemoryFiles()
        # The living leaders by pid. They are subreapers, so every other child comes from a dead run.
        self._leaders: dict[int, Leader] = {}
        self._ending: list[Leader] = []  # reaped; their descendants may be alive
        self._ending_since = 0.0
        self._freeze_at = float("inf")
        self._frozen_at: float | None = None
        self._unsent: deque[bytes] = deque()
        self._prepare_at = float("inf")
        self._replacements = 0
        # Forks until pages are shared, and what is still to be done of that.
        self._share_after = setup.share_after
        self._sharing: Iterator[None] | None = None

    def serve(self) -> None:
        """Execute the worker's requests until it is gone."""
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        for descriptor in (self._control.fileno(), woken, os.pidfd_open(self._setup.parent)):
            poll.register(descriptor, select.POLLIN)
        alive = os.getppid() == self._setup.parent
        while alive:
            self._share()
            poll.modify(self._control.fileno(), select.POLLIN | (select.POLLOUT if self._unsent else 0))
            for descriptor, events in poll.poll(self._pause()):
                if descriptor == woken:
                    os.read(woken, DATAGRAM)
                elif descriptor == self._control.fileno():
                    alive = alive and (events == select.POLLOUT or self._receive_all())
                else:  # the worker's own pidfd
                    alive = False
            self._reap()
            self._sweep()
            self._watch_lease()
            self._watch_memory()
            self._watch_files()
            self._flush()
            self._prepare()

    def end_all(self) -> None:
        while left := self._everyone():
            linux.send(left, signal.SIGKILL)
            self._reap()
            time.sleep(0.002)

    def _share(self) -> None:
        """Share pages once enough processes were forked, a slice a call: a lease may expire meanwhile."""
        if self._share_after is not None and self._share_after <= 0:
            self._share_after, self._sharing = None, share_pages()
        if self._sharing is not None:
            try:
                next(self._sharing)
            except StopIteration:
                self._sharing = None
                self._own_memory = linux.resident(self._pid)

    def _prepare(self) -> None:
        """Prepare the rules of the next run, but not while a run starts, which would slow it down."""
        if self._sandbox is not None and time.monotonic() >= self._prepare_at:
            self._prepare_at = float("inf")
            self._sandbox.prepare()

    def _pause(self) -> float | None:
        if self._sharing is not None:
            return 0
        due = [self._memory_due_at, self._prepare_at]
        if self._sandbox is not None and self._setup.spares:
            due.append(self._sandbox.checked_at + CHECK_EVERY)
        if self._ending:
            due.append(time.monotonic() + SWEEP_TICK)
        if self._frozen_at is None:
            due.append(self._freeze_at)
        elif self._leaders:
            due.append(self._frozen_at + self._setup.max_freeze)
        seconds = min(due) - time.monotonic()
        return None if seconds == float("inf") else max(seconds, 0) * 1000

    def _receive_all(self) -> bool:
        """Act on what has arrived: the newest of several leases counts. False if the worker is gone."""
        for _ in range(AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, DATAGRAM, 4, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._obey(json.loads(data), descriptors)
        return True

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        match message["op"]:
            case "start":
                self._start(message, descriptors)
            case "cap":
                self._cap(message["run"], message["memory"])
            case "check":
                self._check(message["run"])
            case "interrupt":
                self._signal(message["run"], signal.SIGTERM)
            case "kill":
                self._kill(message["run"])
            case "lease":
                self._freeze_at = message["freeze_at"]
                self._thaw()

    def _start(self, message: dict[str, Any], descriptors: list[int]) -> None:
        run, group = message["run"], None
        if message["grouped"] and self._groups is not None:
            group = self._groups.make(run)
        channel, stdout, stderr, *doors = descriptors
        door, folder, sealed = next(iter(doors), None), message["folder"], message["sealed"]
        place = child.RunPlace(channel, stdout, stderr, folder, group, door, sealed)
        # It can have expired since the last look: while this process was loaded, or stood still.
        self._watch_lease()
        gate: Sequence[int] = ()
        try:
            if self._frozen_at is not None:
                gate = os.pipe()
            if place.sealed and self._seal is None:
                self._seal = child.Seal()
            ruleset = None if self._sandbox is None else self._sandbox.ruleset(place.folder)
            pid = os.fork()
        except OSError as error:
            end = {"op": "ended", "run": run, "status": 0, "memory": 0}
            self._send(end | {"why": "no_process", "detail": error.strerror})
            pid = None
        if pid == 0:
            if gate:
                _wait_at(*gate)
            seal = self._seal if place.sealed else None
            _run_child(place, zygote=self._pid, lock=self._setup.lock, ruleset=ruleset, seal=seal)
        if pid is not None and gate:
            linux.send([pid], signal.SIGSTOP)
            os.write(gate[1], b"!")
        for descriptor in (*descriptors, *gate):
            os.close(descriptor)
        if self._sandbox is not None:
            self._sandbox.used()
            self._prepare_at = time.monotonic() + AFTER_START
        if pid is None:
            return
        if self._share_after is not None:
            self._share_after -= 1
        self._leaders[pid] = Leader(run, pid, None, grouped=group is not None)

    def _cap(self, run: int, memory: int) -> None:
        for leader in self._leaders_of(run):
            leader.memory = memory
            self._memory_due_at = min(self._memory_due_at, time.monotonic() + MEMORY_TICK)

    def _check(self, run: int) -> None:
        """Kill a process that is stopped, by someone else than this zygote."""
        if self._frozen_at is not None:
            return
        for leader in self._leaders_of(run):
            if (found := linux.process_of(leader.pid)) and found.state == "T":
                leader.why = leader.why or "stopped"
                linux.send([leader.pid], signal.SIGKILL)

    def _kill(self, run: int) -> None:
        if self._frozen_at is not None:
            # Orphans would be thawed with the others before they are swept.
            table = self._relatives.table()
            roots = [leader.pid for leader in self._leaders_of(run)]
            strays = [pid for pid, session in self._strays(table).items() if session in roots]
            linux.send([*strays, *linux.descendants(table, [*roots, *strays])], signal.SIGKILL)
        self._signal(run, signal.SIGKILL)

    def _signal(self, run: int, number: signal.Signals) -> None:
        linux.send([leader.pid for leader in self._leaders_of(run)], number)

    def _leaders_of(self, run: int) -> list[Leader]:
        return [leader for leader in self._leaders.values() if leader.run == run]

    def _reap(self) -> None:
        """Reap all children that have ended; the leaders among them wait for `_sweep`."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (leader := self._leaders.pop(pid, None)) is not None:
                leader.ended = {"status": status, "memory": usage.ru_maxrss * 1024}
                if not self._ending:
                    self._ending_since = time.monotonic()
                self._ending.append(leader)

    def _orphans(self) -> set[int]:
        """What dead runs have left, alive or not yet reaped."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # no children, so skip the process table
            return set()
        table = self._relatives.table()
        adopted = self._strays(table).keys()
        found = adopted | linux.descendants(table, adopted)
        # Dead ones that are not yet reaped count: a run is over once none of its processes is left.
        return {pid for pid in found if table[pid].state != "X"}

    def _strays(self, table: Mapping[int, linux.Process]) -> dict[int, int]:
        """The processes that this zygote has adopted, each with its session.

        A handler can have them leave its run while that lasts: by CLONE_PARENT, or as no subreaper any more.
        Their session is that of the leader, or new: a process can leave a session, but not join one.
        """
        return {
            process.pid: process.session
            for process in table.values()
            if process.parent == self._pid and process.pid not in self._leaders
        }

    def _everyone(self) -> set[int]:
        table = self._relatives.table()
        return {pid for pid in linux.descendants(table, [self._pid]) if table[pid].state != "X"}

    def _sweep(self) -> None:
        """Kill what ended runs have left, and only then report their ends."""
        if not self._ending:
            return
        orphans = self._orphans()
        linux.send(orphans, signal.SIGKILL)
        if orphans and time.monotonic() < self._ending_since + SWEEP_PATIENCE:
            return
        ending, self._ending = self._ending, []
        for leader in ending:
            if self._groups is not None and leader.grouped:
                if leader.why is None and self._groups.ran_out(leader.run):
                    leader.why = "out_of_memory"
                self._groups.remove(leader.run)
            self._send({"op": "ended", "run": leader.run, "why": leader.why} | (leader.ended or {}))

    def _watch_lease(self) -> None:
        now = time.monotonic()
        if self._frozen_at is None and now >= self._freeze_at:
            self._frozen_at = now
            linux.stop_all(self._everyone)
            self._send({"op": "frozen", "at": now})
        elif self._frozen_at is not None and now >= self._frozen_at + self._setup.max_freeze:
            for leader in self._leaders.values():
                leader.why = leader.why or "frozen"
            linux.send(self._leaders, signal.SIGKILL)

    def _thaw(self) -> None:
        if self._frozen_at is None or time.monotonic() >= self._freeze_at:
            return
        frozen_at, self._frozen_at = self._frozen_at, None
        linux.send(self._everyone(), signal.SIGCONT)
        now = time.monotonic()
        self._send({"op": "thawed", "at": now, "seconds": now - frozen_at})

    def _watch_memory(self) -> None:
        if time.monotonic() < self._memory_due_at:
            return
        caps = {pid: leader.memory for pid, leader in self._leaders.items() if leader.memory is not None}
        self._memory_due_at = time.monotonic() + MEMORY_TICK if caps else float("inf")
        if not caps:
            return
        table = self._relatives.table()
        strays = self._strays(table)
        # It is not known whose these are, and the run that they have left does not need them.
        lost = [pid for pid, session in strays.items() if session not in self._leaders]
        linux.send([*lost, *linux.descendants(table, lost)], signal.SIGKILL)
        runs = {}
        for leader in caps:
            roots = [leader, *(pid for pid, session in strays.items() if session == leader)]
            runs[leader] = {*roots} | linux.descendants(table, roots)
        # In a cgroup the kernel counts them.
        uncounted = [runs[pid] for pid in caps if not self._leaders[pid].grouped]
        self._memory_files.look(set().union(*uncounted))
        for pid, cap in caps.items():
            files = self._memory_files.size(runs[pid])
            if linux.memory(runs[pid], own=self._own_memory, limit=cap, files=files) > cap:
                self._leaders[pid].why = self._leaders[pid].why or "out_of_memory"
                linux.send([pid], signal.SIGKILL)

    def _watch_files(self) -> None:
        """Report replaced system files: processes that wait for their runs may not read the new ones."""
        if self._sandbox is None or not self._setup.spares:
            return
        self._sandbox.check()
        if self._sandbox.replacements > self._replacements:
            self._replacements = self._sandbox.replacements
            self._send({"op": "replaced"})

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent.append(json.dumps(message).encode())

    def _flush(self) -> None:
        # A stopped worker must not block the zygote, which has to freeze the runs then.
        try:
            while self._unsent:
                self._control.send(self._unsent[0])
                self._unsent.popleft()
        except OSError:  # its buffer is full, or it is gone, which the next read reports
            return


def _wait_at(reader: int, writer: int) -> None:
    """In a process that is forked while all are frozen: go no further before it is frozen, too."""
    os.close(writer)
    if not os.read(reader, 1):  # the zygote is gone
        os._exit(os.EX_SOFTWARE)
    os.close(reader)


def _run_child(
    place: child.RunPlace, *, zygote: int, lock: int | None, ruleset: Ruleset | None, seal: child.Seal | None
) -> NoReturn:
    try:
        cap = child.isolate(place, zygote=zygote, lock=lock, ruleset=ruleset, seal=seal)
        child.main(place, cap)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(os.EX_SOFTWARE)


def fork_describing(descriptor: int, setup: Setup) -> int | None:
    """Fork a process that describes handlers, before any plug-in is preloaded; returns its pid.

    Its parent ends, so the worker adopts it: this zygote freezes and sweeps only runs. None if the kernel
    refuses; then the worker starts such a process.
    """
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                if (describing := os.fork()) == 0:
                    _describe(descriptor, setup)
                os.write(writer, str(describing).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    for number in (writer, descriptor):
        os.close(number)
    with open(reader) as file:
        return int(file.read() or 0) or None


def _describe(descriptor: int, setup: Setup) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream, source in enumerate((descriptor, nothing, nothing)):
        os.dup2(source, stream)
    os.closerange(3, LAST_DESCRIPTOR)
    del sys.argv[1:]
    describe_handlers(setup.sandbox)


def main() -> None:
    """`python -m worker.engine.runners.child.zygote DESCRIPTOR SETUP`, for the worker only."""
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = Setup.from_json(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the worker ends runs
    linux.name_process(linux.ProcessName.ZYGOTE)
    linux.hide_memory()  # a run that could write to it would control every later run
    if setup.sandbox is not None and setup.sandbox.filtered:
        # Here, so that no run pays for it.
        seccomp.restrict()
    gc.disable()  # what is imported stays; one collection takes 20 ms
    tls_context()
    for name in WARM:
        import_module(name)
    find_spec("a_module_that_is_nowhere")  # makes the finders list every folder of sys.path
    describing = None if setup.describing is None else fork_describing(setup.describing, setup)
    for name in set(os.environ) - set(setup.environment):
        del os.environ[name]
    linux.become_subreaper()
    failures = preload(setup.preload)
    child.open_streams()
    if setup.preload:
        gc.collect()
    gc.freeze()
    gc.enable()
    control.setblocking(False)
    with contextlib.suppress(BrokenPipeError):  # the worker is gone, which the next read reports
        ready = {"op": "ready", "describing": describing, "preload_failures": failures}
        control.send(json.dumps(ready).encode())
    zygote = Zygote(control, setup)
    zygote.serve()
    zygote.end_all()
    run_folders.remove(setup.folder)
    if setup.share_after is not None:
        os._exit(0)  # see `share_pages`


if __name__ == "__main__":
    main()
