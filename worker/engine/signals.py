"""Signals: what the loops of one incarnation tell each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress


class Signal:
    """Something that happens now and then. To call it is to report it."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], object]] = []

    def calls(self, *listeners: Callable[[], object]) -> None:
        """Call these too from now on, in this order; another signal can be one of them."""
        self._listeners += listeners

    def __call__(self) -> None:
        for listener in self._listeners:
            listener()


class Signals:
    """The signals of one incarnation. A loop may be given one before its listeners exist."""

    def __init__(self) -> None:
        # Runs wait that this worker, its hosts, or this host could take.
        self.runs_due = Signal()
        # This process has inserted or woken runs, of which other processes do not know yet.
        self.fired = Signal()
        # Another process has done so.
        self.notified = Signal()
        # The slots of attempts whose ends are written are free.
        self.slots_free = Signal()
        self.handlers_changed = Signal()
        # A renewal of the lease was answered.
        self.lease_answered = Signal()
        # All handlers that are installed here are read and stored.
        self.catalogue_read = Signal()
        # The source can be given runs, for the first time or again.
        self.ready = Signal()
        self.draining = Signal()


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, at most `seconds` on the monotonic clock."""
    if not event.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
