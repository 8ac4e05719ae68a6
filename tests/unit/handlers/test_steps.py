"""The journal of steps: what identifies a step, what is replayed, what is in flight, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from typing import Any

import pytest

from worker.handlers import steps
from worker.handlers.steps import StepError, StepId, StepJournal, check_key, check_name, digest_of, open_step
from worker.model.runs.run import StepPage, StoredStep


def stored(seq: int, name: str = "ask", occurrence: int = 1, result: str = "1", **key: Any) -> StoredStep:
    return StoredStep(seq, name, key.get("key"), occurrence, len(result), result)


def test_each_key_of_a_name_counts_for_itself() -> None:
    journal = StepJournal(replays=False)

    taken = [journal.take("ask", "a"), journal.take("ask", "b"), journal.take("ask", "a")]

    assert [str(step) for step in taken] == ["ask[a]", "ask[b]", "ask[a]#2"]


def test_one_name_from_two_threads_is_refused() -> None:
    journal, errors = StepJournal(replays=False), list[Exception]()
    journal.take("ask")

    def ask() -> None:
        try:
            journal.take("ask")
        except StepError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()

    assert len(errors) == 1


def test_pages_are_added_until_the_last_one() -> None:
    journal = StepJournal(replays=True)

    journal.add(StepPage([stored(1), stored(2, occurrence=2, result='"two"')], more=True))
    assert (journal.complete, journal.last) == (False, 2)
    journal.add(StepPage([stored(5, "store", key="a")]))

    assert (journal.complete, journal.last) == (True, 5)
    assert journal.replayed(StepId("ask", None, 2)) == '"two"'
    assert journal.replayed(StepId("store", "a", 1)) == "1"
    assert journal.replayed(StepId("store", "b", 1)) is None
    with journal.open(journal.take("new")) as opened:
        assert journal.place(opened, 10) == 6


def test_of_two_results_under_one_id_the_first_is_replayed() -> None:
    journal = StepJournal(replays=True)

    journal.add(StepPage([stored(1, result="1"), stored(2, result="2")]))

    assert journal.replayed(StepId("ask", None, 1)) == "1"


async def test_only_the_tasks_inside_a_step_are_inside() -> None:
    journal = StepJournal(replays=False)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def child() -> str | None:
        await leave.wait()
        step = open_step()
        return None if step is None else str(step.id)

    async def body() -> asyncio.Task[str | None]:
        with journal.open(journal.take("ask")):
            task = asyncio.create_task(child())
            entered.set()
            await leave.wait()
            assert await task == "ask"
            leave.clear()
            return asyncio.create_task(child())

    task = asyncio.create_task(body())
    await entered.wait()
    assert (open_step(), journal.in_flight) == (None, 1)
    leave.set()
    left_behind = await task
    leave.set()
    # A task that outlives the step is no longer inside of it.
    assert await left_behind is None
    assert journal.in_flight == 0


def test_a_step_inside_a_step_is_refused() -> None:
    journal = StepJournal(replays=False)
    inner = journal.take("inner")

    with journal.open(journal.take("outer")):
        with pytest.raises(StepError, match="step inner is used inside step outer"), journal.open(inner):
            raise AssertionError("called")
        with pytest.raises(StepError, match="sleep is used inside step outer"):
            journal.refuse_inside("sleep")
    journal.refuse_inside("sleep")


def test_idle_is_reported_when_the_last_step_ends() -> None:
    journal, idle = StepJournal(replays=False), list[int]()
    journal.on_idle(lambda: idle.append(journal.in_flight))

    with journal.busy():
        with journal.open(journal.take("ask")):
            pass
        assert idle == []
    assert idle == [0]


def test_a_run_that_is_full_refuses_a_step_before_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_STEPS", 2)
    journal = StepJournal(replays=True)
    journal.add(StepPage([stored(1), stored(2, occurrence=2)]))

    full = pytest.raises(StepError, match="step more: the run has 2 steps, the limit")
    with full, journal.open(journal.take("more")):
        raise AssertionError("called")


def test_the_last_step_that_fits_may_be_one_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the map itself nor a result that is being stored takes a place of its own."""
    monkeypatch.setattr(steps, "MAX_STEPS", 3)
    journal = StepJournal(replays=False)

    with journal.busy(), journal.open(journal.take("a")) as first:
        journal.place(first, 1)
    with contextlib.suppress(ValueError), journal.open(journal.take("fails")):
        raise ValueError
    with journal.busy(), journal.open(journal.take("b")) as second:
        journal.place(second, 1)
    third = journal.open(journal.take("c"))
    with third, pytest.raises(StepError, match="has 3 steps, the limit"):
        contextvars.Context().run(lambda: journal.open(journal.take("d")).__enter__())


def test_results_have_a_total_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TOTAL_LIMIT", 100)
    journal = StepJournal(replays=False)
    with journal.open(journal.take("large")) as opened:
        journal.place(opened, 100)

    with pytest.raises(StepError, match="reach 64 MiB, the limit"), journal.open(journal.take("more")):
        raise AssertionError("called")


def test_a_try_begins_without_what_the_last_one_did() -> None:
    journal = StepJournal(replays=False)

    with journal.open(journal.take("ask")) as opened:
        opened.spends.append(("llm_tokens", 5))
        assert [next(opened.requests), next(opened.requests)] == [1, 2]
        opened.begin_try()
        assert (opened.spends, next(opened.requests)) == ([], 1)


@pytest.mark.parametrize("name", ["ask", "9", "a.b:c/d-e_f", "x" * 200])
def test_a_name_is_taken(name: str) -> None:
    assert check_name("step", name) == name


@pytest.mark.parametrize("name", ["", "_a", "a b", "ä", "x" * 201, "a\n", None, 1])
def test_another_name_is_refused(name: Any) -> None:
    with pytest.raises(StepError, match="^step: .* is not a name: use 1 to 200 letters"):
        check_name("step", name)


def test_a_key_is_text_or_an_integer() -> None:
    assert [check_key("step ask", key) for key in ("ä b", 7)] == ["ä b", "7"]
    for key in ("", "x" * 201, "a\0", "\ud800", 1.5, None):
        with pytest.raises(StepError, match="^step ask: key= is "):
            check_key("step ask", key)


def test_equal_items_have_equal_digests() -> None:
    assert digest_of("map m", {"a": 1, "b": [2.5]}) == digest_of("map m", {"b": [2.5], "a": 1})
    assert digest_of("map m", {"a": 1}) != digest_of("map m", {"a": 2})
    with pytest.raises(StepError, match="map m: the item is not JSON: .*; pass key="):
        digest_of("map m", object())
