"""Whether Enter was pressed, on a terminal of this process."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading


class Keyboard:
    """Standard input, if it is a terminal; else it only waits.

    In the background a read would stop the process, so nothing is read there.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def of_terminal(cls) -> Keyboard:
        try:
            return cls(sys.stdin.fileno() if sys.stdin.isatty() else None)
        except (AttributeError, ValueError, OSError):  # none, closed or replaced
            return cls(None)

    @property
    def is_there(self) -> bool:
        return self._descriptor is not None

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Wait until Enter is pressed, at most `seconds`; returns whether it was."""
        if self._descriptor is None or not self._is_in_front():
            stop.wait(seconds)
            return False
        try:
            ready, _, _ = select.select([self._descriptor], [], [], seconds)
            # Several lines at once count as one.
            typed = os.read(self._descriptor, 4096) if ready else None
        except OSError:  # the terminal is gone
            typed = b""
        if typed == b"":
            self._descriptor = None
        return bool(typed)

    def _is_in_front(self) -> bool:
        with contextlib.suppress(OSError):
            return self._descriptor is not None and os.tcgetpgrp(self._descriptor) == os.getpgrp()
        return False
