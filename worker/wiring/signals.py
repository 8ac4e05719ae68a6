"""Signals: SIGTERM and SIGINT reach whichever incarnation is running, also one that starts just then."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable


class Signals:
    """Counts the requests to stop, and passes each to the loops that are on at the moment."""

    def __init__(self) -> None:
        self.asked = 0
        self._stop: Callable[[], None] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def pass_to(self, stop: Callable[[], None]) -> None:
        """From now on call `stop`, and at once as often as it was asked for before."""
        self._stop = stop
        for _ in range(self.asked):
            stop()

    def _ask(self) -> None:
        self.asked += 1
        if self._stop is not None:
            self._stop()
