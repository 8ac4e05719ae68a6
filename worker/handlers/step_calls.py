"""`ctx.step` and `ctx.map`: call a function once in a run and store its result, or return the stored one."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, TypeVar

from worker.clock import Clock
from worker.errors import WorkerError
from worker.handlers.blocking import DaemonThread, ThreadLock, finish
from worker.handlers.calls import MAX_METERS, MAX_USED, LoadSteps, Port, StoreStep
from worker.handlers.json_text import NotStorable, to_json_text
from worker.handlers.results import Duration, PermanentError, RateLimited, as_timedelta, limited_by
from worker.handlers.spending import Spending
from worker.handlers.step_tracing import StepTracing
from worker.handlers.steps import (
    RESULT_LIMIT,
    OpenStep,
    StepError,
    StepId,
    StepJournal,
    check_key,
    check_name,
    digest_of,
)
from worker.model.definitions.budgets import MAX_AMOUNT
from worker.model.prices import ModelUsage
from worker.model.runs.budgets import BudgetState
from worker.model.runs.run import NewStep

# Calls of one `ctx.map` at the same time: by default, and at most.
CONCURRENCY = 8
MAX_CONCURRENCY = 1_000
# Seconds before the first retry of a step; each further one takes twice as long, up to the longest.
BACKOFF = 1.0
LONGEST_BACKOFF = 3600.0
# A retry inside the step would not help.
_NOT_RETRIED = (StepError, PermanentError, RateLimited, WorkerError)

Call = Callable[[], Any]
KeyOf = Callable[[Any], str | int]
T = TypeVar("T")


class _Stopped(Exception):
    """A step of `ctx.map` may not begin now: nothing parks while other items are in flight."""

    def __init__(self, state: BudgetState) -> None:
        super().__init__()
        self.state = state


@dataclass(frozen=True, slots=True)
class Tries:
    """How often a step is tried, and how long; in seconds."""

    retries: int
    backoff: float
    timeout: float | None

    @classmethod
    def of(cls, retries: int, backoff: Duration, timeout: Duration | None) -> Tries:
        """From the arguments of a step. Raises TypeError, ValueError."""
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise TypeError("retries= is a number of calls after the first one, such as 2")
        seconds = None if timeout is None else as_timedelta(timeout).total_seconds()
        if seconds == 0:
            raise ValueError("timeout= is longer than 0 s")
        return cls(retries, as_timedelta(backoff).total_seconds(), seconds)

    def delays(self) -> Iterator[float]:
        """The pause before each retry: random, from half of the doubled backoff to all of it."""
        for number in range(self.retries):
            longest = min(self.backoff * 2.0 ** min(number, 60), LONGEST_BACKOFF)
            yield random.uniform(longest / 2, longest)  # noqa: S311


def _text_of(step: NewStep, stored: str | None) -> str:
    """The result as it is stored, without secrets."""
    return step.result_json if stored is None else stored


# A call of `ctx.map` and the place of its item.
_Placed = tuple[int, tuple[StepId, Call]]


class StepCalls:
    """The steps of an async handler."""

    _lock: ClassVar[type[AbstractAsyncContextManager[object]]] = asyncio.Lock

    def __init__(
        self,
        journal: StepJournal,
        port: Port,
        clock: Clock,
        gate: Spending | None = None,
        tracing: StepTracing | None = None,
    ) -> None:
        self.journal = journal
        self._port = port
        self._clock = clock
        self._gate = gate
        self._tracing = tracing
        self._loading = self._lock()

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        key: str | int | None,
        tries: Tries,
    ) -> Coroutine[Any, Any, Any]:
        """As `Context.step`. The occurrence is taken now, not when the step is awaited."""
        is_async = self._check(f"step {name}", function, tries.timeout)
        call = partial(function, *args, **kwargs)
        return self._run(self._id(name, key), call, tries, is_async)

    def map(
        self,
        name: str,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        concurrency: int,
        key: KeyOf | None,
        tries: Tries,
    ) -> Coroutine[Any, Any, list[Any]]:
        """As `Context.map`. The occurrences are taken now."""
        if not isinstance(concurrency, int) or not 1 <= concurrency <= MAX_CONCURRENCY:
            raise TypeError(f"concurrency= is a number of calls from 1 to {MAX_CONCURRENCY:,}")
        is_async = self._check(f"map {name}", function, tries.timeout)
        return self._map(self._items(name, function, items, key), concurrency, tries, is_async)

    def _id(self, name: str, key: str | int | None) -> StepId:
        self.journal.refuse_inside(f"step {check_name('step', name)}")
        return self.journal.take(name, None if key is None else check_key(f"step {name}", key))

    def _items(
        self, name: str, function: Callable[[Any], Any], items: Iterable[Any], key: KeyOf | None
    ) -> list[tuple[StepId, Call]]:
        """The step of each item, in order."""
        what = f"map {check_name('map', name)}"
        self.journal.refuse_inside(what)

        def id_of(item: Any) -> StepId:
            if key is None:
                return self.journal.take_item(name, digest_of(what, item))
            return self.journal.take(name, check_key(what, key(item)))

        return [(id_of(item), partial(function, item)) for item in items]

    def _new_step(self, opened: OpenStep, value: Any, started_at: datetime) -> NewStep:
        step = opened.id
        try:
            text = to_json_text(value, f"result of step {step}", RESULT_LIMIT)
        except NotStorable as error:
            raise StepError(f"{error}; return less, or store it elsewhere and return where") from None
        return NewStep(
            name=step.name,
            key=step.key,
            occurrence=step.occurrence,
            seq=self.journal.place(opened, len(text.encode())),
            result_json=text,
            started_at=started_at,
            ended_at=self._clock.now(),
            spends=_by_meter(step, opened.spends),
            used=_by_request(step, opened.used),
        )

    def _check(self, what: str, function: Any, timeout: float | None) -> bool:
        """Whether the function is async; raises TypeError."""
        is_async = _is_async(what, function)
        if timeout is not None and not is_async:
            raise TypeError(
                f"{what}: timeout= works for async functions only, since a thread cannot be stopped; "
                "set a timeout inside the function"
            )
        return is_async

    async def _map(
        self, calls: Sequence[tuple[StepId, Call]], concurrency: int, tries: Tries, is_async: bool
    ) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        left = list(enumerate(calls))
        while left:
            left, stopped = await self._some(left, results, concurrency, tries, is_async)
            if stopped is not None and self._gate is not None:
                await self._gate.stop(stopped)
        return results

    async def _some(
        self,
        calls: Sequence[_Placed],
        results: list[Any],
        concurrency: int,
        tries: Tries,
        is_async: bool,
    ) -> tuple[list[_Placed], BudgetState | None]:
        """Call until all are done, or the gate stops the run; returns those that are left, and why."""
        left = iter(calls)
        errors: list[BaseException] = []
        held: list[_Placed] = []
        stopped: list[BudgetState] = []

        async def work() -> None:
            for place, (step, call) in left:
                try:
                    results[place] = await self._run(step, call, tries, is_async, parks=False)
                except asyncio.CancelledError:
                    raise
                except _Stopped as found:
                    held.append((place, (step, call)))
                    stopped.append(found.state)
                except BaseException as error:
                    # Not to the task: SystemExit would end the loop. Calls in flight are paid: they finish.
                    errors.append(error)
                if errors or stopped:
                    return

        with self.journal.busy():
            workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(calls)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        if errors:
            raise errors[0]
        return [*sorted(held, key=itemgetter(0)), *left], stopped[0] if stopped else None

    async def _run(
        self, step: StepId, call: Call, tries: Tries, is_async: bool, *, parks: bool = True
    ) -> Any:
        text = await self._replayed(step)
        if text is not None and self._tracing is not None:
            self._tracing.replayed(step)
        while text is None:
            while self._gate is not None and (stopped := await self._gate.reached()) is not None:
                if not parks:
                    raise _Stopped(stopped)
                await self._gate.stop(stopped)
            limited = None
            with self.journal.open(step) as opened:
                started_at = self._clock.now()
                if self._tracing is not None:
                    self._tracing.begin(opened)
                try:
                    value = await self._tried(opened, call, tries, is_async)
                except BaseException as error:
                    if self._tracing is not None:
                        self._tracing.failed(opened, started_at, error)
                    limited = limited_by(error) if isinstance(error, Exception) else None
                    # Before its first request a step has done nothing: the run waits, and calls it again.
                    if limited is None or not parks or self._gate is None or opened.begun > 1:
                        raise
                else:
                    new = self._new_step(opened, value, started_at)
                    text = await self._stored(new)
                    if self._tracing is not None:
                        self._tracing.stored(opened, new)
            if limited is not None and self._gate is not None:
                await self._gate.wait_for(limited)
        return json.loads(text)

    async def _replayed(self, step: StepId) -> str | None:
        """The stored result; reads pages until one has it."""
        while (text := self.journal.replayed(step)) is None and not self.journal.complete:
            async with self._loading:
                if not self.journal.complete:
                    self.journal.add(await self._port.ask(LoadSteps(self.journal.last)))
        return text

    async def _tried(self, opened: OpenStep, call: Call, tries: Tries, is_async: bool) -> Any:
        for delay in itertools.chain(tries.delays(), (None,)):
            opened.begin_try()
            try:
                return await self._called(call, tries.timeout, is_async)
            except _NOT_RETRIED:
                raise
            except Exception as error:
                if delay is None or limited_by(error) is not None:
                    raise
            await self._pause(delay)

    async def _called(self, call: Call, timeout: float | None, is_async: bool) -> Any:
        async with asyncio.timeout(timeout):
            return await (call() if is_async else _in_thread(call))

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _stored(self, step: NewStep) -> str:
        storing = asyncio.ensure_future(self._port.ask(StoreStep(step)))
        try:
            return _text_of(step, await asyncio.shield(storing))
        except asyncio.CancelledError:
            if not storing.done():
                # The call was made and paid: a cancellation waits until its result is stored.
                await asyncio.wait({storing})
            if not storing.cancelled():
                storing.exception()  # retrieved, or asyncio would log it
            raise


class BlockingStepCalls(StepCalls):
    """The steps of a handler that blocks: `done` gives the result of each. `map` uses threads."""

    _lock = ThreadLock

    def _check(self, what: str, function: Any, timeout: float | None) -> bool:
        if super()._check(what, function, timeout):
            raise TypeError(f"{what}: the function is async; declare the handler as async def, too")
        return False

    async def _some(
        self,
        calls: Sequence[_Placed],
        results: list[Any],
        concurrency: int,
        tries: Tries,
        is_async: bool,
    ) -> tuple[list[_Placed], BudgetState | None]:
        left, name = iter(calls), calls[0][1][0].name
        taking = threading.Lock()
        errors: list[BaseException] = []
        held: list[_Placed] = []
        stopped: list[BudgetState] = []

        def work() -> None:
            while not errors and not stopped:
                with taking:
                    place, item = next(left, (0, None))
                if item is None:
                    return
                try:
                    results[place] = done(self._run(*item, tries, is_async, parks=False))
                except _Stopped as found:
                    held.append((place, item))
                    stopped.append(found.state)
                except BaseException as error:
                    errors.append(error)

        with self.journal.busy():
            threads = [
                threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True, name=name)
                for _ in range(min(concurrency, len(calls)))
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException as error:
                # The handler is interrupted: start no other call.
                errors.append(error)
                raise
        if errors:
            raise errors[0]
        return [*sorted(held, key=itemgetter(0)), *left], stopped[0] if stopped else None

    async def _called(self, call: Call, timeout: float | None, is_async: bool) -> Any:
        return call()

    async def _pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - it blocks

    async def _stored(self, step: NewStep) -> str:
        return _text_of(step, await self._port.ask(StoreStep(step)))


def done(call: Coroutine[Any, Any, T]) -> T:
    """The result of a step of a handler that blocks."""
    try:
        return finish(call)
    except RuntimeError as error:
        if isinstance(error.__cause__, StopIteration):  # of the function; no coroutine lets it pass
            raise error.__cause__ from None
        raise


def _by_meter(step: StepId, spends: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """The spends of a step, those of one meter added up as far as one spend may go. Raises StepError."""
    added: list[tuple[str, int]] = []
    places: dict[str, int] = {}
    for meter, amount in spends:
        place = places.get(meter)
        if place is not None and added[place][1] + amount <= MAX_AMOUNT:
            added[place] = (meter, added[place][1] + amount)
        else:
            places[meter] = len(added)
            added.append((meter, amount))
    if len(added) > MAX_METERS:
        raise StepError(f"step {step}: it has spends of more than {MAX_METERS:,} meters, the limit")
    return tuple(added)


def _by_request(step: StepId, used: Sequence[ModelUsage]) -> tuple[ModelUsage, ...]:
    """What the requests of a step used; those above the limit are added to others. Raises StepError."""
    kept = list(used[:MAX_USED])
    for more in used[MAX_USED:]:
        for place in reversed(range(MAX_USED)):
            if (kept[place].provider, kept[place].model) == (more.provider, more.model):
                kept[place] = kept[place].join(more)
                break
        else:
            raise StepError(f"step {step}: it has requests to more than {MAX_USED} models, the limit")
    if any(units > MAX_AMOUNT for each in kept for _, units in each.kinds):
        raise StepError(f"step {step}: one of its models used more than {MAX_AMOUNT:,} units, the limit")
    return tuple(kept)


def _is_async(what: str, function: Any) -> bool:
    if not callable(function):
        raise TypeError(
            f"{what}: pass a function and its arguments, as in ctx.step('ask', ask, prompt), "
            f"not a {type(function).__name__}"
        )
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _in_thread(call: Call) -> Any:
    """The result of a function that blocks; of an awaitable that it returns, as a lambda may, the result."""

    def settle() -> tuple[Any, BaseException | None]:
        # As a value: a future cannot have a StopIteration.
        try:
            return call(), None
        except BaseException as error:
            return None, error

    run = contextvars.copy_context().run
    value, error = await asyncio.get_running_loop().run_in_executor(DaemonThread(), run, settle)
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value
