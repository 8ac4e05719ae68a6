"""Threads beside the event loop, and the events that they wait for.

What must go on while the loop is blocked runs in a thread: the heartbeat, alerts and the overdue monitor.
A simulation runs them on its own loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class ThreadFlag(Protocol):
    """As `threading.Event`."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; returns whether it is."""


class RunningThread(Protocol):
    """A thread that was started."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""


class Threads(Protocol):
    """What makes threads and events."""

    def flag(self) -> ThreadFlag:
        """An event that is not set."""

    def start(self, name: str, work: Callable[[], None]) -> RunningThread:
        """Run `work` in a thread that does not keep the process alive."""


class SystemThreads:
    """The threads of the operating system."""

    def flag(self) -> ThreadFlag:
        return threading.Event()

    def start(self, name: str, work: Callable[[], None]) -> RunningThread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread


SYSTEM: Threads = SystemThreads()
