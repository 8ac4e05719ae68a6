"""Pages that a zygote shares with the processes that it forks: what makes a run copy few of them.

A page is copied when one side writes to it. Such copies are half of the cost of a run. Few of them are for
data: most hold reference counts, and counters and caches of the interpreter.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from worker.clock import SystemClock
from worker.engine.runners.child import main as child
from worker.engine.runners.child.main import WorkerChannel
from worker.engine.runners.child.messages import frame, outcome_message, work_message, work_of
from worker.engine.runners.contract import Work
from worker.guard.claims import Claims, Flag
from worker.ids import RunId
from worker.secret import AccessToken

# Runs of each kind of handler that are rehearsed; the interpreter adapts code after a few calls.
REHEARSALS = 4
_JOBS = "worker.engine.runners.child.rehearsal_jobs"
_MADV_COLLAPSE = 25
_HUGE_PAGE = 2 * 1024 * 1024
# Objects that become immortal in one slice, which takes about a millisecond.
_SLICE = 2_000


def share_pages() -> Iterator[None]:
    """Advance it to its end once everything is imported and rehearsed, when many forks are to be expected.

    It takes a tenth of a second, and many times that on a busy machine, so it comes in slices: between
    them the zygote must still freeze and kill. The caller ends by `os._exit`: the interpreter cannot free
    what it leaves.
    """
    gc.collect()
    gc.freeze()
    yield
    yield from _make_immortal()
    yield from _collapse()


def rehearse() -> None:
    """Do what each run does, so that it finds its code adapted and its tables filled. Leaves no thread."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    for _ in range(REHEARSALS):
        for name in ("asynchronous", "blocking"):
            find_spec("a_module_that_is_nowhere")
            _rehearse(f"{_JOBS}:{name}")
            del sys.modules[_JOBS]
            signal.signal(signal.SIGTERM, on_sigterm)


def _rehearse(entry_point: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(frame(work_message(_work(entry_point), 60.0)))
        channel = WorkerChannel(theirs)
        work = work_of(channel.receive())
        outcome = child.call_handler(work, channel, close=True)
        channel.send_end(outcome_message(outcome))
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()
    channel.disown()


def _work(entry_point: str) -> Work:
    now = SystemClock().now()
    later = now + timedelta(hours=1)
    return Work(
        run_id=RunId("00000000-0000-7000-8000-000000000000"),
        attempt=1,
        fencing_token=1,
        idempotency_key="rehearsal",
        scheduled_for=now,
        org_code="rehearsal",
        org_name="rehearsal",
        handler="rehearsal",
        entry_point=entry_point,
        params={"number": 1},
        claims=Claims(
            org_code="rehearsal",
            client_id="rehearsal",
            scopes=frozenset({"rehearsal"}),
            properties={"text": "rehearsal"},
            flags={"rehearsal": Flag("boolean", True)},
            issued_at=now,
            expires_at=later,
        ),
        token=AccessToken("rehearsal", later),
        api_origins=("https://rehearsal.invalid",),
        timeout_at=later,
    )


def _make_immortal() -> Iterator[None]:
    """Have the interpreter not count references to what exists now (PEP 683), which is never freed anyway.

    It sets the count that None has. Without immortal objects (Python 3.11), or with another layout of
    objects, it does nothing.
    """
    count = ctypes.c_uint32.from_address
    if sysconfig.get_config_var("Py_GIL_DISABLED") or sys.byteorder != "little" or sys.maxsize < 2**32:
        return
    immortal = count(id(None)).value
    more = [None] * 1000
    if count(id(None)).value != immortal:
        return
    del more
    todo: list[Any] = gc.get_objects()
    for kind in _classes():
        if count(id(kind)).value == immortal:  # a static one, which the collector does not know
            todo += [kind.__mro__, *gc.get_referents(kind.__dict__)]
    while todo:
        yield
        fresh = []
        for found in todo[-_SLICE:]:
            counted = count(id(found))
            if counted.value != immortal:
                counted.value = immortal
                fresh.append(found)
        del todo[-_SLICE:]
        todo += gc.get_referents(*fresh)
        for found in fresh:
            if type(found) is types.CodeType:  # the collector does not know these either
                todo += (found.co_consts, found.co_names, found.co_name, found.co_qualname)
                todo += (found.co_filename, found.co_linetable, found.co_exceptiontable)


def _classes() -> Iterator[type]:
    found, todo = {object}, [object]
    while todo:
        kind = todo.pop()
        yield kind
        for below in type.__subclasses__(kind):
            if below not in found:
                found.add(below)
                todo.append(below)


def _collapse() -> Iterator[None]:
    """Put memory into huge pages as far as the kernel can, since fork copies the entry of each page."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    for fields in lines:
        if fields[1] == "rw-p" and (len(fields) < 6 or fields[5] == "[heap]"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            for place in range(-(-start // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
                libc.madvise(place, _HUGE_PAGE, _MADV_COLLAPSE)
                yield
