"""An event loop whose every choice comes from one seed: what runs next, and how long an answer takes.

Time is virtual: when nothing is ready it jumps to the next timer. A process of the simulated installation is
a value in the context of its callbacks, so it can be frozen (they are held) or killed (they are dropped), at
any boundary between two of them. A thread is a greenlet: where the real one would block, it parks.

None of the loops on the package index knows processes: their simulated node is one loop, so a kill unwinds
`finally` blocks that a SIGKILL does not run.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

# Seconds that a callback takes: a loop that waits for time to pass must not wait for ever.
STEP = 20e-6
# Threads of an executor that does not say how many it has.
THREADS = 32


class SimulatedProcess:
    """A process of the installation: a worker, a host, a zygote, a run. It ends its `children` with it."""

    def __init__(self, loop: SeededLoop, name: str, parent: SimulatedProcess | None = None) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.frozen = False
        # The thread that its loop waits for: until that has ended, nothing else of it runs.
        self.joins: Thread | None = None
        self.children: list[SimulatedProcess] = []
        self._held: list[asyncio.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        if parent is not None:
            parent.children.append(self)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, no `finally` either."""
        if self.alive:
            self.loop.note(self, "killed")
            self.end()

    def end(self) -> None:
        """It has ended, and its children with it."""
        self.alive = False
        for child in self.children:
            child.end()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.loop.note(self, "frozen")
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self.loop.note(self, "thawed")
        self.frozen = False
        self.release()

    def release(self) -> None:
        self.loop.take_back(self._held)
        self._held = []

    def holds(self, handle: asyncio.Handle) -> bool:
        """Keep a callback that must not run now; drop it if the process is dead."""
        if not self.alive:
            self._held.append(handle)  # what is collected would be unwound
            return True
        if self.frozen or (self.joins is not None and handle._context.get(THREAD) is not self.joins):
            self._held.append(handle)
            return True
        return False

    def __repr__(self) -> str:
        return self.name


PROCESS: contextvars.ContextVar[SimulatedProcess | None] = contextvars.ContextVar("PROCESS", default=None)
THREAD: contextvars.ContextVar[Thread] = contextvars.ContextVar("THREAD")


def process_now() -> SimulatedProcess | None:
    """The process whose code runs."""
    return PROCESS.get()


def outside() -> contextvars.Context:
    """The context of what belongs to no process: the operating system and the network."""
    context = contextvars.Context()
    context.run(PROCESS.set, None)
    return context


def within(context: contextvars.Context) -> contextvars.Context:
    """A context that code of the running process has made: it stays in that process."""
    if PROCESS not in context and (process := process_now()) is not None:
        context.run(PROCESS.set, process)
    return context


class _Numbered:
    """Its hash is its number: a set of such has the same order each time, whatever their addresses are."""

    _numbers = itertools.count(1)
    _number: int

    def __new__(cls, *args: Any, **options: Any) -> Any:
        made = super().__new__(cls)
        made._number = next(_Numbered._numbers)
        return made

    def __hash__(self) -> int:
        return self._number


class NumberedFuture(_Numbered, asyncio.Future[Any]):
    pass


class NumberedTask(_Numbered, asyncio.Task[Any]):
    pass


class Stuck(Exception):
    """Nothing can ever happen again."""


class SeededLoop(asyncio.BaseEventLoop):
    """`choices` makes every decision. `trace` keeps what happened, as text, if asked."""

    def __init__(self, choices: Random, *, trace: list[str] | None = None) -> None:
        super().__init__()
        self.choices = choices
        self.trace = trace
        self.steps = 0
        # Scales how long answers take; a fault raises it for a while.
        self.slowness = 1.0
        self.failures: list[str] = []
        self._digest = hashlib.blake2b(digest_size=16)
        self._now = 0.0
        self._ready: list[asyncio.Handle] = []
        self._pools: dict[tuple[int, int], _Pool] = {}
        # Tasks of dead processes must not be collected: that would unwind them.
        self._tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self._now

    def note(self, process: SimulatedProcess | None, what: str) -> None:
        """Add to the trace, of which `digest` is the hash."""
        line = f"{self._now:.6f} {process.name if process is not None else '-'} {what}"
        self._digest.update(line.encode())
        if self.trace is not None:
            self.trace.append(line)

    def digest(self) -> str:
        """Two simulations with the same digest made the same choices and saw the same."""
        rest = f"{self.steps} {self.choices.getstate()[1][-1]} {self.choices.random()}"
        return hashlib.blake2b(self._digest.digest() + rest.encode(), digest_size=8).hexdigest()

    def delay(self) -> float:
        """How long a message is under way, in seconds: mostly some milliseconds, now and then far longer."""
        kind, size = self.choices.random(), self.choices.random()
        if kind < 0.9:
            return self.slowness * 0.003 * size
        return self.slowness * (0.05 if kind < 0.985 else 1.2) * size

    def take_back(self, handles: list[asyncio.Handle]) -> None:
        """Let held callbacks run."""
        self._ready += handles

    def call_soon(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(callback, *args, context=None if context is None else within(context))

    # What `asyncio.BaseEventLoop` leaves to its subclasses.

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._when <= self._now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        if not ready:
            self._pass_time()
            return
        place = int(self.choices.random() * len(ready))
        handle, ready[place] = ready[place], ready[-1]
        ready.pop()
        if handle._cancelled:
            return
        process = handle._context.get(PROCESS)
        if process is not None and process.holds(handle):
            return
        self.steps += 1
        self._now += STEP
        handle._run()

    def _pass_time(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not scheduled:
            raise Stuck("nothing is ready, and no timer is set")
        self._now = max(self._now, scheduled[0]._when)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:
        """Signals are sent by the simulation itself."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        """Call it when a simulated descriptor can be read; no other one is ever readable."""
        if (read_by := getattr(fd, "read_by", None)) is not None:
            read_by(lambda: callback(*args))

    def remove_reader(self, fd: Any) -> bool:
        if (read_by := getattr(fd, "read_by", None)) is not None:
            read_by(None)
        return True

    def remove_writer(self, fd: Any) -> bool:
        """A simulated descriptor takes all that is sent."""
        return False

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Run it in a greenlet, as many at once as the executor has threads."""
        future: asyncio.Future[T] = self.create_future()
        # One that is shared by simulated processes would be one for each.
        key = (id(process_now()), id(executor))
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = _Pool(getattr(executor, "_max_workers", THREADS), executor)

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as error:
                self.call_later(self.delay(), _settle, future.set_exception, future, error)
            else:
                self.call_later(self.delay(), _settle, future.set_result, future, result)
            finally:
                pool.ended(self)

        pool.add(self, work, contextvars.copy_context())
        return future

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(loop=self)

    def _make_task(self, loop: Any, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = NumberedTask(coro, loop=loop, **options)
        self._tasks.append(task)
        return task

    def _failed(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{process_now()}: {context['message']}: {error!r}")

    def _process_events(self, event_list: object) -> None:
        """There are none: nothing here has a socket."""

    def _write_to_self(self) -> None:
        """No other thread has to wake this one."""


def _settle(settle: Callable[[Any], None], future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        settle(value)


class _Pool:
    """The threads of an executor."""

    def __init__(self, size: int, executor: Any) -> None:
        self._free = size
        self._executor = executor  # its identity must stay its own
        self._waiting: deque[tuple[Callable[[], None], contextvars.Context]] = deque()

    def add(self, loop: SeededLoop, work: Callable[[], None], context: contextvars.Context) -> None:
        self._waiting.append((work, context))
        self._begin(loop)

    def ended(self, loop: SeededLoop) -> None:
        self._free += 1
        self._begin(loop)

    def _begin(self, loop: SeededLoop) -> None:
        if self._free and self._waiting:
            self._free -= 1
            work, context = self._waiting.popleft()
            Thread(loop, work, context)


class Thread:
    """A thread as a greenlet, in a context of its own; `join` and `Flag.wait` park it."""

    def __init__(self, loop: SeededLoop, work: Callable[[], None], context: contextvars.Context) -> None:
        self._loop = loop
        self._work = work
        self._hub: greenlet | None = None
        self.ended = False
        self._timer: asyncio.Handle | None = None
        self._greenlet = greenlet(self._main)
        self._context = context.copy()
        self._context.run(THREAD.set, self)
        self._greenlet.gr_context = self._context.copy()
        loop.call_soon(self._resume, context=self._context)

    @staticmethod
    def current() -> Thread | None:
        """The thread whose code runs; None on the loop."""
        owner = getattr(getcurrent(), "owner", None)
        return owner if isinstance(owner, Thread) else None

    def park(self, seconds: float | None) -> None:
        """Let others run until `seconds` have passed or `wake` is called."""
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._resume, context=self._context)
        hub = self._hub
        assert hub is not None
        hub.switch()

    def wake(self) -> None:
        """Let it go on; only while it is parked."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_soon(self._resume, context=self._context)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended. On the loop this blocks its process, but no other one."""
        until = None if timeout is None else self._loop.time() + timeout
        thread, process = Thread.current(), process_now()
        if thread is not None or process is None:
            while thread is not None and not self.ended and (until is None or self._loop.time() < until):
                thread.park(0.05)
            return
        process.joins = self
        try:
            with _between_tasks(self._loop):
                while not self.ended and process.alive and (until is None or self._loop.time() < until):
                    self._loop._run_once()
        finally:
            process.joins = None
            process.release()

    def _resume(self) -> None:
        self._timer = None
        self._hub = getcurrent()
        self._greenlet.switch()

    def _main(self) -> None:
        self._greenlet.owner = self
        try:
            self._work()
        except BaseException as error:
            self._loop.failures.append(f"{process_now()}: a thread raised {error!r}")
        self.ended = True


@contextmanager
def _between_tasks(loop: SeededLoop) -> Iterator[None]:
    """Let other tasks run although the current one has not returned."""
    task = asyncio.current_task(loop)
    if task is None:
        yield
        return
    asyncio.tasks._leave_task(loop, task)
    try:
        yield
    finally:
        asyncio.tasks._enter_task(loop, task)


class Flag:
    """As `threading.Event`."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Thread] = []

    def set(self) -> None:
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            thread.wake()

    def clear(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        if self._is_set:
            return True
        thread = Thread.current()
        assert thread is not None, "only a thread may wait"
        self._waiting.append(thread)
        thread.park(timeout)
        if thread in self._waiting:
            self._waiting.remove(thread)
        return self._is_set


class SimulatedThreads:
    """As `worker.threads.Threads`, on the running loop."""

    def flag(self) -> Flag:
        return Flag()

    def start(self, name: str, work: Callable[[], None]) -> Thread:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SeededLoop)
        return Thread(loop, work, contextvars.copy_context())
