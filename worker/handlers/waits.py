"""`ctx.sleep` and `ctx.wait_for`: wait without a process.

A wait that is not over parks the attempt: its process ends, and the next attempt comes when the time has
passed or somebody has answered. Steps and waits before it then return what they returned.
"""

from __future__ import annotations

import asyncio
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from types import CoroutineType
from typing import Any, NoReturn

from worker.handlers.calls import OpenWait, Port
from worker.handlers.json_text import NotStorable, check_size, to_json_text
from worker.handlers.results import Duration, as_timedelta
from worker.handlers.steps import Occurrences, StepError, StepJournal, check_name
from worker.model.runs.outcome import Parked
from worker.model.runs.run import step_label
from worker.model.runs.waits import BATCH as BATCH
from worker.model.runs.waits import BUDGET as BUDGET
from worker.model.runs.waits import CHILDREN as CHILDREN
from worker.model.runs.waits import LIMIT as LIMIT
from worker.model.runs.waits import MAX_ASKED, MAX_WAITS, NewWait, Option, WaitKind, WaitState, check_options

SLEEP = "sleep"
# Turns of the loop before an attempt parks: tasks that start together then wait together.
TURNS = 10
# Seconds between two looks at a handler that is busy, though one of its tasks waits.
LOOK_AGAIN = 0.05
# Seconds after which a handler is parked that waits for something unknown, which may be one of its tasks.
PATIENCE = 30.0
# Characters of the names of the waits that a run is parked for.
DETAIL_LIMIT = 500
# Modules of asyncio in which a task waits for other tasks of its handler.
_BETWEEN_TASKS = frozenset({"asyncio.taskgroups", "asyncio.locks", "asyncio.queues"})
# The future that `asyncio.gather` returns.
_GATHERED: type = getattr(asyncio.tasks, "_GatheringFuture", asyncio.Task)
_OF_TASKS = frozenset({"wait", "_wait", "gather", "wait_for", "_wait_for_one", "shield"})

OnPark = Callable[[Parked], None]
# What must be stored before an attempt parks; None for nothing.
Storing = Callable[[], asyncio.Future[None] | None]


class WaitTimeout(Exception):
    """No answer came in time. `ctx.wait_for` raises it, on each later attempt again."""


class Parking(BaseException):
    """Ends a handler that blocks, because it waits. Whatever the handler does with it, the attempt parks."""


class AnyWaits(ABC):
    """What both forms share. `parked` is the outcome once the attempt parks."""

    # What a step raises after that.
    _ends: type[BaseException]

    def __init__(self, journal: StepJournal, port: Port, on_park: OnPark) -> None:
        self._port = port
        self.parked: Parked | None = None
        self._journal = journal
        self._on_park = on_park
        self._occurrences = Occurrences()
        self._pending: dict[tuple[str, int], NewWait] = {}

    def sleep(self, duration: Duration, name: str = SLEEP) -> Coroutine[Any, Any, None]:
        """As `Context.sleep`. The occurrence is taken now."""
        check_name("sleep", name)
        return self._slept(self._new("ctx.sleep", name, "sleep", as_timedelta(duration).total_seconds()))

    def wait_for(
        self,
        name: str,
        timeout: Duration | None,
        ask: Any,
        alert: bool,
        options: Sequence[Option] | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """As `Context.wait_for`. The occurrence is taken now."""
        what = f"wait_for {check_name('wait_for', name)}"
        if name == SLEEP or name.startswith((BUDGET, LIMIT, CHILDREN, BATCH)):
            raise StepError(f"{what}: this name is reserved; use another one")
        seconds = None if timeout is None else as_timedelta(timeout).total_seconds()
        try:
            asked = None if ask is None else to_json_text(ask, f"ask of {what}", MAX_ASKED)
        except NotStorable as error:
            raise StepError(f"{error}; ask for less, and store the rest elsewhere") from None
        bound = () if options is None else _options(options, what, asked)
        return self._answered(self._new(what, name, "answer", seconds, asked, alert, bound))

    def _new(
        self,
        what: str,
        name: str,
        kind: WaitKind,
        seconds: float | None,
        ask: str | None = None,
        alert: bool = False,
        options: tuple[Option, ...] = (),
    ) -> NewWait:
        self._journal.refuse_inside(what)
        occurrence = self._occurrences.take(what.partition(" ")[0], name)
        return NewWait(name, occurrence, kind, seconds, ask, alert, options)

    async def _slept(self, wait: NewWait) -> None:
        await self.park(wait)

    async def _answered(self, wait: NewWait) -> Any:
        return answer_of(wait, await self.park(wait))

    @abstractmethod
    async def park(self, wait: NewWait) -> WaitState:
        """How a wait stands once it is over; until then the attempt parks, and this never returns."""

    def _known(self, wait: NewWait, state: WaitState) -> bool:
        """Whether the wait is over; raises StepError."""
        if state.state == "too_many":
            raise StepError(f"wait {wait.name}: the run has {MAX_WAITS:,} waits, the limit; split the work")
        if state.kind != wait.kind:
            raise StepError(
                f"wait {wait.name}: an earlier attempt used this name for a {state.kind}; use another one"
            )
        return state.state != "pending"

    def _park(self) -> None:
        """Decide that the attempt parks: from now on no step begins."""
        waits = list(self._pending.values())
        kinds = {wait.kind for wait in waits}
        # In the order of what matters most to people.
        reason = next((kind for kind in ("answer", "budget", "children", "batch") if kind in kinds), "asleep")
        # A budget's wait is named after its meter, and how often the run waited for it says nothing.
        names = [
            wait.name.removeprefix(BUDGET)
            if wait.kind == "budget"
            else step_label(wait.name, None, wait.occurrence)
            for wait in waits
            if wait.name != SLEEP and wait.kind not in ("children", "batch")
        ]
        # The requests of a run are many; what they are sent to says more.
        names += dict.fromkeys(wait.request.api for wait in waits if wait.request is not None)
        detail = ", ".join(names)[:DETAIL_LIMIT] or None
        self.parked = Parked(reason, detail)
        self._journal.close(self._ends)
        self._on_park(self.parked)


class AsyncWaits(AnyWaits):
    """The waits of an async handler, which runs in `task`.

    The attempt parks when no step is in flight and the handler can only go on by one of its waits: its own
    task waits for one, or for other tasks. What `storing` gives is stored before.
    """

    _ends = asyncio.CancelledError

    def __init__(
        self,
        journal: StepJournal,
        port: Port,
        on_park: OnPark,
        task: asyncio.Task[Any] | None,
        storing: Storing = lambda: None,
    ) -> None:
        super().__init__(journal, port, on_park)
        self._task = task
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = 0
        self._looking = False
        # What the handler's task was last seen to wait for, and since when.
        self._seen: tuple[object, float] = (None, 0.0)
        self._never: set[asyncio.Future[None]] = set()
        self._storing = storing
        journal.on_idle(self._consider_soon)

    async def park(self, wait: NewWait) -> WaitState:
        if self.parked is not None:
            raise asyncio.CancelledError("the attempt is parked")
        self._loop = asyncio.get_running_loop()
        self._opening += 1
        try:
            state = await self._port.ask(OpenWait(wait))
        finally:
            self._opening -= 1
            self._consider()
        if self._known(wait, state):
            return state
        key, never = (wait.name, wait.occurrence), self._loop.create_future()
        self._pending[key] = wait
        self._never.add(never)
        self._consider()
        try:
            await never
        finally:
            # The handler no longer waits for it, or is cancelled.
            self._never.discard(never)
            if self.parked is None:
                self._pending.pop(key, None)
        raise AssertionError("a wait that is not over returned")

    def _consider_soon(self) -> None:
        if self._pending and self._loop is not None:
            self._loop.call_soon_threadsafe(self._consider)

    def _consider(self) -> None:
        if self._pending and not self._looking and self.parked is None and self._loop is not None:
            self._looking = True
            self._loop.call_soon(self._look, TURNS)

    def _look(self, turns: int) -> None:
        self._looking = False
        if not self._pending or self.parked is not None or self._loop is None:
            return
        if self._journal.in_flight or self._opening:
            return  # considered again when it has ended
        self._looking = True
        if turns > 0:
            self._loop.call_soon(self._look, turns - 1)
        elif self._task is not None and not self._waits_for_tasks(self._task, self._loop.time()):
            # It does something else meanwhile, such as a request, and may then need no wait any more.
            self._loop.call_later(LOOK_AGAIN, self._look, 0)
        elif (storing := self._storing()) is not None:
            # Considered again once it has ended.
            storing.add_done_callback(lambda _: self._consider())
            self._looking = False
        else:
            self._park()
            if self._task is not None:
                # Neither `except Exception` nor a group of tasks keeps it.
                self._task.cancel("the attempt is parked")

    def _waits_for_tasks(self, task: asyncio.Task[Any], now: float) -> bool:
        """Whether a task waits for one of our waits, or for other tasks; or for one thing for very long."""
        waiter = getattr(task, "_fut_waiter", None)
        if waiter is None:
            return False
        if waiter in self._never or isinstance(waiter, (asyncio.Task, _GATHERED)):
            return True
        if self._seen[0] is not waiter:
            self._seen = (waiter, now)
        elif now - self._seen[1] > PATIENCE:
            return True
        inner: Any = task.get_coro()
        while isinstance(inner, CoroutineType) and isinstance(inner.cr_await, CoroutineType):
            inner = inner.cr_await
        frame = getattr(inner, "cr_frame", None)
        if frame is None:
            return False
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        return module in _BETWEEN_TASKS or (module == "asyncio.tasks" and name in _OF_TASKS)


class BlockingWaits(AnyWaits):
    """The waits of a handler that blocks: a wait that is not over ends the attempt by raising `Parking`."""

    _ends = Parking

    def __init__(self, journal: StepJournal, port: Port, on_park: OnPark) -> None:
        super().__init__(journal, port, on_park)
        self._parking = threading.Lock()
        self._idle = threading.Event()
        journal.on_idle(self._idle.set)

    async def park(self, wait: NewWait) -> WaitState:
        """As `AnyWaits.park`, but it blocks, and raises Parking where that one never returns."""
        state = await self._port.ask(OpenWait(wait))
        if self._known(wait, state):
            self.refuse()
            return state
        self._pending[wait.name, wait.occurrence] = wait
        while self._journal.in_flight:
            # Steps of other threads end first.
            self._idle.clear()
            if self._journal.in_flight:
                self._idle.wait(1.0)
        with self._parking:
            if self.parked is None:
                self._park()
        self._end()

    def refuse(self) -> None:
        """Raise Parking if the attempt is parked."""
        if self.parked is not None:
            self._end()

    def _end(self) -> NoReturn:
        raise Parking("the attempt is parked: let this exception pass")


def _options(options: Sequence[Option], what: str, asked: str | None) -> tuple[Option, ...]:
    """The answers that a wait is limited to, as plain JSON values. Raises StepError."""
    field = f"options of {what}"
    try:
        text = to_json_text(check_options(options), field, MAX_ASKED)
        check_size(text + (asked or ""), f"ask and options of {what}", MAX_ASKED)
    except NotStorable as error:
        raise StepError(f"{error}; offer less") from None
    except ValueError as error:
        raise StepError(f"{field}: {error}") from None
    return tuple(json.loads(text))


def answer_of(wait: NewWait, state: WaitState) -> Any:
    """The data of an answer. Raises WaitTimeout."""
    if state.state == "over":
        raise WaitTimeout(f"{wait.name} was not answered in time")
    return None if state.answer_json is None else json.loads(state.answer_json)


def no_runner(parked: Parked) -> None:
    """Of a context without a runner that has to know."""
