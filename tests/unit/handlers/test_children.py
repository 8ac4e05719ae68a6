"""`ctx.start` and what reads its children: wrong use, what is stored when, and what a run may hold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from tests.fakes.clock import ManualClock
from worker import BlockingContext, ChildFailed, Context, StepError, job
from worker.errors import Unavailable
from worker.handlers.calls import StartChildren
from worker.handlers.children import Child, ChildCalls, ChildResults
from worker.handlers.job import Job
from worker.handlers.step_calls import StepCalls, Tries
from worker.handlers.steps import StepJournal
from worker.model.runs.children import ChildPage, ChildrenWait, EndedRow, FamilyCap, spans_of, within
from worker.model.runs.waits import NewWait
from worker.testing.orgworker import Finished, Orgworker


@job("acme.page")
async def page(ctx: Context[Any, Any]) -> Any:
    if ctx.params.get("fails"):
        raise ValueError("no such page")
    return {"page": ctx.params.get("page"), "size": "x" * ctx.params.get("size", 0)}


def run(body: Any, *, children: Sequence[Job] = (page,), **given: Any) -> Finished:
    declared = job("acme.sync", children={"acme.page"})(body)
    return Orgworker().run(declared, children=children, definition={"max_attempts": 1}, **given)


def test_a_handler_that_is_not_declared_is_not_started() -> None:
    async def body(ctx: Context[Any, Any]) -> None:
        ctx.start("acme.other")

    done = run(body)

    assert done.error is not None
    assert 'needs @job(..., children={"acme.other"})' in done.error["message"]
    assert done.children == ()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": "y" * 70_000}, "the maximum is 64 KiB"),
        ([1], "a mapping or a model"),
        ({"x": object}, "not JSON"),
    ],
)
def test_params_are_a_small_mapping(params: Any, message: str) -> None:
    async def body(ctx: Context[Any, Any]) -> None:
        ctx.start("acme.page", params)

    done = run(body)

    assert done.error is not None and message in done.error["message"]


def test_a_child_is_not_started_inside_a_step() -> None:
    """A later attempt would not call the step, and so not start it."""

    async def body(ctx: Context[Any, Any]) -> None:
        await ctx.step("a", lambda: str(ctx.start("acme.page")))

    done = run(body)

    assert done.error is not None and "is used inside step a" in done.error["message"]


def test_what_was_started_is_stored_though_the_handler_fails() -> None:
    async def body(ctx: Context[Any, Any]) -> None:
        ctx.start("acme.page", {"page": 1}, key="one")
        raise ValueError("later")

    done = run(body)

    assert (done.state, [(child.key, child.params) for child in done.children]) == (
        "failed",
        [("one", {"page": 1})],
    )


def test_the_same_start_in_a_later_attempt_is_the_same_child() -> None:
    async def body(ctx: Context[Any, Any]) -> Any:
        first = ctx.start("acme.page", {"page": ctx.run.attempt}, key="k")
        await ctx.sleep("1h")
        return [each async for each in ctx.gather([first, ctx.start("acme.page")])]

    done = run(body)

    assert [(child.key, child.occurrence) for child in done.children] == [("k", 1), (None, 1)]
    assert done.result[0]["page"] == 1


def test_a_failed_child_fails_its_parent_for_good_and_can_be_taken_as_a_value() -> None:
    async def raises(ctx: Context[Any, Any]) -> Any:
        return [each async for each in ctx.gather([ctx.start("acme.page", {"fails": True}, key="k")])]

    async def returns(ctx: Context[Any, Any]) -> Any:
        children = [ctx.start("acme.page", {"fails": fails}, key=str(fails)) for fails in (True, False)]
        found = [each async for each in ctx.gather(children, on_failure="return")]
        return [isinstance(each, ChildFailed) for each in found]

    done = run(raises)
    assert done.error is not None and done.state == "failed"
    assert done.error["message"] == "the child acme.page[k] is failed: ValueError: no such page"
    assert run(returns).result == [True, False]


def test_a_result_of_a_child_has_a_limit() -> None:
    def body(ctx: BlockingContext[Any, Any]) -> Any:
        return [str(each) for each in ctx.map_runs("acme.page", [{"size": 70_000}], on_failure="return")]

    done = run(body)

    assert "result_invalid" in done.result[0] and "the maximum is 64 KiB" in done.result[0]


def test_children_of_two_tasks_need_keys() -> None:
    async def body(ctx: Context[Any, Any]) -> None:
        import asyncio

        async def one() -> None:
            ctx.start("acme.page")

        await asyncio.gather(one(), one())

    done = run(body)

    assert done.error is not None and done.error["type"] == f"{StepError.__module__}.StepError"
    assert "is used by two tasks: pass key=" in done.error["message"]


def test_a_child_whose_handler_declares_more_is_refused() -> None:
    @job("acme.page", scopes={"write:kb"})
    async def more(ctx: Context[Any, Any]) -> None: ...

    async def body(ctx: Context[Any, Any]) -> Any:
        [found] = [each async for each in ctx.gather([ctx.start("acme.page")], on_failure="return")]
        return [found.state, found.reason]

    done = run(body, children=[more])

    assert done.result == ["refused", "child_exceeds"]
    assert done.children[0].error is not None
    assert "declares the scope write:kb" in done.children[0].error["message"]


def test_spans_are_rows_of_places() -> None:
    assert spans_of([]) == ()
    assert spans_of([7, 1, 2, 3, 9, 8]) == ((1, 3), (7, 9))
    assert within(((1, 3), (7, 9)), range(20)) == {1, 2, 3, 7, 8, 9}


@pytest.mark.parametrize(
    ("parent", "child", "more"),
    [
        ((), (), None),
        ((), (("api",),), None),
        ((("api",),), (), "egress beyond api"),
        ((("api", "https://a.example"),), (("https://a.example",),), None),
        ((("api",),), (("api", "https://a.example"),), "egress beyond api"),
        ((("api",), ("api", "public")), (("open",), ("api",)), None),
        (((),), (("api",),), "egress beyond none"),
    ],
)
def test_a_list_of_the_parent_caps_those_of_the_child(parent: Any, child: Any, more: str | None) -> None:
    assert FamilyCap("a", egress=parent).excess(FamilyCap("b", egress=child)) == more


class Stored:
    """The children of a run as they are stored: `reads` has the rows of each read, `parked` what waited."""

    def __init__(self, *reads: list[EndedRow]) -> None:
        self._reads = list(reads)
        self.children = [Child("acme.page", str(place), 1, _place=place) for place in (1, 2, 3)]
        self.parked: list[ChildrenWait] = []
        self.port = self
        self.results = ChildResults(cast(ChildCalls, self), self._park)

    async def store(self) -> None: ...

    def take(self, what: str, name: str, children: list[Child]) -> tuple[list[Child], NewWait]:
        return children, NewWait(name, 1, "children")

    async def ask(self, call: object) -> ChildPage:
        return ChildPage(tuple(self._reads.pop(0)))

    async def _park(self, wait: NewWait) -> None:
        assert wait.children is not None
        self.parked.append(wait.children)


def ended(place: int, *, state: str | None = "succeeded", seen: int | None = None) -> EndedRow:
    return EndedRow(place, state, result_json=str(place), seen=seen)


@pytest.mark.anyio
async def test_a_child_that_a_person_starts_again_is_waited_for_again() -> None:
    """`runs retry PARENT --children` may come between the wait of a parent and its read."""
    stored = Stored(
        [ended(1), ended(2, state=None), ended(3, state=None)],
        [ended(2), ended(3, state=None)],
        [ended(3, state="failed")],
    )

    found = [each async for each in stored.results.gather(stored.children, "return")]

    assert (found[:2], found[2].state) == ([1, 2], "failed")
    assert [wait.spans for wait in stored.parked] == [((1, 3),), ((2, 3),), ((3, 3),)]


@pytest.mark.anyio
async def test_each_child_is_taken_once_though_a_person_starts_one_again() -> None:
    """What it was in this attempt stays, and the others are not forgotten for it."""
    stored = Stored(
        [ended(1, state="failed", seen=1), ended(2, seen=2)],
        [ended(1, seen=3)],
        [],
        [ended(3, seen=4)],
    )

    found = [each async for each in stored.results.as_ended(stored.children)]

    assert [(each.child.key, each.state) for each in found] == [
        ("1", "failed"),
        ("2", "succeeded"),
        ("3", "succeeded"),
    ]
    assert len(stored.parked) == 1


@pytest.mark.anyio
async def test_the_result_of_a_step_is_stored_although_children_cannot_be_started() -> None:
    """As of a run that is being cancelled, whose steps were made and paid."""
    asked: list[str] = []

    class Worker:
        async def ask(self, call: Any) -> Any:
            asked.append(call.way.name)
            if isinstance(call, StartChildren):
                raise Unavailable("the run is being cancelled")

    declared, journal = frozenset({"acme.page"}), StepJournal(replays=False)
    calls = ChildCalls(cast(Any, Worker()), journal, declared, keep=False, lock=asyncio.Lock())
    steps = StepCalls(journal, calls.port, ManualClock())
    calls.start("acme.page", {}, None)

    with pytest.raises(Unavailable):
        await steps.step("pay", lambda: 1, (), {}, None, Tries.of(0, 1, None))

    assert asked == ["store", "start_children"]
