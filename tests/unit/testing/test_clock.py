"""The clock of the tests stands still while a thread has work, also before the thread begins it."""

from __future__ import annotations

import queue
import threading

import pytest

from worker.testing.clock import LeapingLoop, SettableClock


@pytest.mark.parametrize(("has_a_call", "leaps"), [(False, True), (True, False)])
def test_a_thread_that_has_not_begun_its_call_is_waited_for(has_a_call: bool, leaps: bool):
    clock = SettableClock()
    loop = LeapingLoop(clock)
    # As a thread of AnyIO that has not been scheduled since it got a call: it seems to wait for one.
    stop: queue.Queue[None] = queue.Queue()
    worker = threading.Thread(target=stop.get, daemon=True)
    calls: queue.Queue[str] = queue.Queue()
    worker.queue = calls  # type: ignore[attr-defined]
    worker.start()
    try:
        if has_a_call:
            calls.put("call")
        before = clock.monotonic()

        loop._leaping.select(3600.0)

        assert (clock.monotonic() - before >= 3600.0) is leaps
    finally:
        stop.put(None)
        worker.join()
        loop.close()
