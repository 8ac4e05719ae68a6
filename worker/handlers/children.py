"""`ctx.start`, `ctx.gather`, `ctx.as_ended`, `ctx.map_runs`: start runs of the same org, and wait for them.

What is started is kept here and stored in batches, before the next call of the attempt and at its end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from worker.handlers.blocking import finish
from worker.handlers.calls import (
    A,
    Call,
    OneWayCall,
    Port,
    ReadChildren,
    ReadEnded,
    StartChildren,
    StoreStep,
)
from worker.handlers.json_text import NotStorable, to_json_text
from worker.handlers.steps import Occurrences, StepError, StepJournal, check_key
from worker.model.runs.children import (
    AT_ONCE,
    MAX_CHILD_PARAMS,
    MAX_CHILDREN,
    MAX_SPANS,
    MAX_WINDOW,
    ChildrenWait,
    EndedRow,
    NewChild,
    OnFailure,
    spans_of,
)
from worker.model.runs.run import step_label
from worker.model.runs.waits import CHILDREN, NewWait

T = TypeVar("T")
# Makes the key of a child from the item of `ctx.map_runs`.
KeyOfRun = Callable[[Any], str | int]

# Bytes that the children of one call may have, whose texts may double when they are quoted; bytes of params
# that may be unstored.
BATCH_BYTES = 80 * 1024
MAX_UNSTORED = 32 * 1024 * 1024
# Children whose results are read at once.
PAGE = 100
GATHER = f"{CHILDREN}gather"
AS_ENDED = f"{CHILDREN}as_ended"


@dataclass(slots=True, eq=False)
class Child:
    """A run that this one has started; `run_id` is known once it is stored."""

    handler: str
    """The name passed to `ctx.start`."""
    key: str | None
    """The key passed with it."""
    occurrence: int
    """Which use of that handler and key it is, from 1."""
    run_id: str | None = None
    """The id of its run, as `runs list` prints it."""
    _place: int = 0

    def __str__(self) -> str:
        return step_label(self.handler, self.key, self.occurrence)


class ChildFailed(Exception):
    """A child ended otherwise than with success. The run fails without a retry: its child stays as it is."""

    child: Child
    """What was started."""
    state: str
    """`failed`, `refused`, `cancelled` or `skipped`."""
    reason: str | None
    """Why, as `runs show` has it."""
    error: Mapping[str, str] | None
    """Its error: `type` and `message`."""

    def __init__(
        self, child: Child, state: str, reason: str | None, error: Mapping[str, str] | None = None
    ) -> None:
        why = f" ({reason})" if reason and reason != "error" else ""
        said = f": {error['type']}: {error['message']}" if error else ""
        super().__init__(f"the child {child} is {state}{why}{said}")
        self.child, self.state, self.reason, self.error = child, state, reason, error


@dataclass(frozen=True, slots=True)
class EndedChild:
    """A child that has ended."""

    child: Child
    """What was started."""
    state: str
    """`succeeded`, `failed`, `refused`, `cancelled` or `skipped`."""
    failure: ChildFailed | None
    """Why it did not succeed; None if it did."""
    result_json: str | None = None

    @property
    def result(self) -> Any:
        """What its handler returned. Raises ChildFailed."""
        if self.failure is not None:
            raise self.failure
        return None if self.result_json is None else json.loads(self.result_json)


@dataclass(eq=False, slots=True)
class ChildPort:
    """The port of a context whose handler may start children: what it has started is stored first.

    The result of a step goes ahead: it was made and paid, whatever becomes of the children.
    """

    port: Port
    children: ChildCalls

    async def ask(self, call: Call[A]) -> A:
        is_step = isinstance(call, StoreStep)
        if not is_step:
            await self.children.store()
        given = await self.port.ask(call)
        if is_step:
            await self.children.store()
        return given

    def tell(self, notice: OneWayCall) -> None:
        self.port.tell(notice)


class ChildCalls:
    """The children of an attempt. `waits` parks it; `lock` is held while children are stored."""

    def __init__(
        self,
        port: Port,
        journal: StepJournal,
        declared: frozenset[str],
        *,
        keep: bool,
        lock: AbstractAsyncContextManager[object],
    ) -> None:
        self.port = ChildPort(port, self)
        self._raw = port
        self._journal = journal
        self._declared = declared
        self._keep = keep
        self._lock = lock
        self._occurrences = Occurrences()
        self._waits = Occurrences()
        self._unstored: list[tuple[Child, NewChild]] = []
        self._bytes = self._count = self._maps = 0
        self._error: Exception | None = None

    @property
    def unstored(self) -> bool:
        return bool(self._unstored)

    def start(
        self, handler: str, params: Any, key: str | int | None, *, map_: int = 0, window: int = 0
    ) -> Child:
        """As `Context.start`. Raises TypeError, StepError."""
        what = "ctx.map_runs" if map_ else "ctx.start"
        if handler not in self._declared:
            raise TypeError(f'{what}({handler!r}) needs @job(..., children={{"{handler}"}})')
        self._journal.refuse_inside(what)
        text = _params_text(f"{what}({handler!r})", params)
        if self._count >= MAX_CHILDREN:
            raise StepError(
                f"{what}: the run has {MAX_CHILDREN:,} children, the limit; let them start others"
            )
        if self._bytes + len(text) > MAX_UNSTORED:
            most = MAX_UNSTORED // 1024 // 1024
            raise StepError(
                f"{what}: the params of children that are not stored yet reach {most} MiB; await a step, "
                "ctx.save or ctx.gather in between"
            )
        named = None if key is None else check_key(what, key)
        occurrence = self._occurrences.take("start", handler, named)
        child = Child(handler, named, occurrence)
        self._unstored.append((child, NewChild(handler, named, occurrence, text, map_, window)))
        self._bytes += len(text)
        self._count += 1
        return child

    def map_runs(
        self,
        handler: str,
        items: Iterable[Any],
        concurrency: int,
        key: KeyOfRun | None,
    ) -> list[Child]:
        """The children of `Context.map_runs`, of which at most `concurrency` are unfinished at a time."""
        if isinstance(concurrency, bool) or not isinstance(concurrency, int):
            raise TypeError("ctx.map_runs: concurrency= is a number of runs")
        if not 1 <= concurrency <= MAX_WINDOW:
            raise ValueError(f"ctx.map_runs: concurrency= is from 1 to {MAX_WINDOW:,}")
        self._maps += 1
        number = self._maps
        return [
            self.start(handler, item, None if key is None else key(item), map_=number, window=concurrency)
            for item in items
        ]

    async def store(self) -> None:
        """Store what was started; returns once it is durable.

        Raises:
            StepError: a limit is reached.
            Unavailable: the run is being cancelled.
        """
        if self._error is not None:
            raise self._error
        if not self._unstored:
            return
        with self._journal.busy():
            async with self._lock:
                while self._unstored:
                    await self._store(self._batch())

    def storing(self) -> asyncio.Future[None] | None:
        """A task that stores what is not stored yet, before the attempt parks; None if all is."""
        if not self._unstored:
            return None

        async def store() -> None:
            try:
                await self.store()
            except Exception as error:
                # Raised by the next call, or by that of a later attempt.
                self._error = error
                self._unstored.clear()

        return asyncio.ensure_future(store())

    def _batch(self) -> list[tuple[Child, NewChild]]:
        size = count = 0
        for _, new in self._unstored[:AT_ONCE]:
            size += len(new.params_json.encode()) + len(new.handler) + len((new.key or "").encode()) + 40
            if count and size > BATCH_BYTES:
                break
            count += 1
        return self._unstored[:count]

    async def _store(self, batch: Sequence[tuple[Child, NewChild]]) -> None:
        placed = await self._raw.ask(StartChildren(tuple(new for _, new in batch), self._keep))
        for (child, new), at in zip(batch, placed, strict=True):
            child._place, child.run_id = at.place, at.run_id
            self._bytes -= len(new.params_json)
        del self._unstored[: len(batch)]

    def take(self, what: str, name: str, children: Iterable[Child]) -> tuple[list[Child], NewWait]:
        """The children of a `gather` or `as_ended`, and its wait, whose occurrence is taken now."""
        listed = list(children)
        for child in listed:
            if not isinstance(child, Child):
                raise TypeError(f"{what}: pass what ctx.start returned, not a {type(child).__name__}")
        self._journal.refuse_inside(what)
        return listed, NewWait(name, self._waits.take(what, name), "children")


class ChildResults:
    """Reads children for `gather` and `as_ended`; `park` is that of the waits of the context."""

    def __init__(self, calls: ChildCalls, park: Callable[[NewWait], Any]) -> None:
        self._calls = calls
        self._park = park

    def gather(self, children: Iterable[Child], on_failure: OnFailure) -> AsyncGenerator[Any, None]:
        """As `Context.gather`."""
        if on_failure not in ("raise", "return"):
            raise ValueError('ctx.gather: on_failure= is "raise" or "return"')
        return self._gathered(*self._calls.take("ctx.gather", GATHER, children), on_failure)

    def as_ended(self, children: Iterable[Child]) -> AsyncGenerator[EndedChild, None]:
        """As `Context.as_ended`."""
        return self._as_ended(*self._calls.take("ctx.as_ended", AS_ENDED, children))

    async def _gathered(
        self, children: Sequence[Child], wait: NewWait, on_failure: OnFailure
    ) -> AsyncGenerator[Any, None]:
        await self._calls.store()
        await self._all(wait, {child._place for child in children})
        for begin in range(0, len(children), PAGE):
            part = children[begin : begin + PAGE]
            rows = await self._read({child._place for child in part})
            # A person may start them again after they have ended.
            while again := {row.place for row in rows.values() if row.state is None}:
                await self._all(wait, again)
                rows |= await self._read(again)
            for child in part:
                ended = _ended(child, rows[child._place])
                if ended.failure is not None and on_failure == "return":
                    yield ended.failure
                else:
                    yield ended.result

    async def _as_ended(self, children: Sequence[Child], wait: NewWait) -> AsyncGenerator[EndedChild, None]:
        await self._calls.store()
        by_place = {child._place: child for child in children}
        spans, after = spans_of(by_place.keys()), 0
        if len(spans) > MAX_SPANS:
            raise StepError(
                f"ctx.as_ended: others were started between more than {MAX_SPANS:,} of the children; start "
                "them one after the other"
            )
        while by_place:
            page = await self._calls.port.ask(ReadEnded(spans, after))
            for row in page.rows:
                after = row.seen or after
                # One that a person starts again ends a second time: this attempt keeps what it has seen.
                if row.state is not None and (child := by_place.pop(row.place, None)) is not None:
                    yield _ended(child, row)
            if by_place and not page.rows:
                await self._park(replace(wait, children=ChildrenWait(spans, any=True)))

    async def _all(self, wait: NewWait, places: Collection[int]) -> None:
        """Park until these children have ended."""
        spans = spans_of(places)
        for begin in range(0, len(spans), MAX_SPANS):
            await self._park(replace(wait, children=ChildrenWait(spans[begin : begin + MAX_SPANS])))

    async def _read(self, places: set[int]) -> dict[int, EndedRow]:
        rows: dict[int, EndedRow] = {}
        while left := sorted(places - rows.keys()):
            page = await self._calls.port.ask(ReadChildren(tuple(left)))
            if not page.rows:
                raise StepError(f"the child at place {left[0]} is gone")
            rows |= {row.place: row for row in page.rows}
        return rows


def each(results: AsyncIterator[T]) -> Iterator[T]:
    """The results for a handler that blocks: nothing suspends."""
    while True:
        try:
            yield finish(results.__anext__())  # type: ignore[arg-type]
        except StopAsyncIteration:
            return


def _ended(child: Child, row: EndedRow) -> EndedChild:
    state = cast(str, row.state)  # it has ended
    if state == "succeeded":
        return EndedChild(child, state, None, row.result_json)
    return EndedChild(child, state, ChildFailed(child, state, row.reason, row.error))


def _params_text(what: str, params: Any) -> str:
    try:
        text = to_json_text({} if params is None else params, f"params of {what}", MAX_CHILD_PARAMS)
    except NotStorable as error:
        raise StepError(f"{error}; pass less, and store the rest elsewhere") from None
    if not text.startswith("{"):
        raise TypeError(f"{what}: params are a mapping or a model, not a {type(params).__name__}")
    return text
