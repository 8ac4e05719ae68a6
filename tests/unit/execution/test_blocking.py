"""OneThread: whenever it is interrupted, whoever waits for the call hears of its end."""

from __future__ import annotations

import gc
import sys
import threading
import time
from typing import Any

import pytest

from worker.execution.runners.child.main import Interrupted
from worker.execution.runners.thread import OneThread


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a thread died of without anybody's being told."""
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    return seen


@pytest.mark.parametrize("fails", [True, False])
def test_an_interrupt_at_any_step_is_the_end_of_the_call_and_of_nothing_else(uncaught, fails):
    def call() -> str:
        began.set()
        if fails:
            raise KeyError("missing")
        return "done"

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    gc.disable()  # what is raised in a callback of the collector is printed and forgotten
    try:
        for _ in range(1000):
            began, thread = threading.Event(), OneThread()
            ended = thread.submit(call)
            began.wait(10)
            thread.interrupt()
            thread.interrupt()

            assert isinstance(ended.exception(timeout=10), KeyError | Interrupted | None)
    finally:
        sys.setswitchinterval(before)
        gc.enable()
    assert uncaught == []


def test_what_computes_is_interrupted_and_after_its_end_nothing_happens(uncaught):
    started = threading.Event()

    def compute() -> None:
        started.set()
        while True:
            time.monotonic()

    thread = OneThread()
    ended = thread.submit(compute)
    started.wait(10)

    thread.interrupt()

    assert isinstance(ended.exception(timeout=10), Interrupted)
    thread.interrupt()
    assert uncaught == []


def test_a_call_that_fails_says_how():
    def fail() -> None:
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        OneThread().submit(fail).result(timeout=10)
