"""Threads beside the event loop, and the events that they wait for.

What must go on while the loop is blocked runs in a thread: the heartbeat, alerts and the overdue monitor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Threads:
    """Makes threads of the operating system; a simulation passes its own, which run on its loop."""

    def flag(self) -> threading.Event:
        """An event that is not set."""
        return threading.Event()

    def start(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Run `work` in a thread that does not keep the process alive."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread


SYSTEM = Threads()
