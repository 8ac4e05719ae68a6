"""Pipes between simulated processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.simulation.loop import SeededLoop, SimulatedProcess


class Pipe:
    """One direction of a socket between two processes: messages arrive late, and in order.

    The latest arrives after `longest` seconds.
    """

    def __init__(self, loop: SeededLoop, to: SimulatedProcess, longest: float = float("inf")) -> None:
        self._loop = loop
        self._longest = longest
        self._to = to
        self._sent: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def send(self, receive: Callable[..., object], *args: Any) -> None:
        self._sent.append((receive, args))
        self._loop.call_later(min(self._loop.delay(), self._longest), self._arrive, context=self._to.context)

    def _arrive(self) -> None:
        receive, args = self._sent.popleft()
        receive(*args)
