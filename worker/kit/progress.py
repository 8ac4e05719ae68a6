"""Progress of a command that takes a while: one line on stderr, on a terminal only."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

WIDTH = 30
# Seconds between two drawings; the first one is drawn after as long, so that a fast command shows nothing.
EVERY = 0.1
_CLEAR = "\r\033[K"


class ProgressBar:
    """Draws how many of `total` are done, or only how many if that is unknown; also a context manager.

    Draws nothing if stderr is not a terminal that can rewrite a line.
    """

    def __init__(
        self, what: str, total: int | None = None, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._total = total
        self._monotonic = monotonic
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._started_at = self._drawn_at = monotonic()
        self._drawn = False

    def at(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """So many are done; `total` may be known only now, and `what` may be the next step's."""
        self._total = self._total if total is None else total
        now = self._monotonic()
        if what is not None and what != self._what:
            self._what, self._started_at = what, now
        if self._shown and now - self._drawn_at >= EVERY:
            self._drawn_at, self._drawn = now, True
            line = self._line(done, now - self._started_at)[: shutil.get_terminal_size().columns - 1]
            print(f"{_CLEAR}{line}", end="", file=sys.stderr, flush=True)

    def _line(self, done: int, seconds: float) -> str:
        if not self._total:
            return f"{self._what} {done}"
        share = min(done / self._total, 1.0)
        filled = round(share * WIDTH)
        left = "" if not 0 < share < 1 else f"  {_clock(seconds / share - seconds)} left"
        return f"{self._what} [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{self._total}{left}"

    def close(self) -> None:
        """Remove the line, so that the command's own output begins at the left."""
        if self._drawn:
            print(_CLEAR, end="", file=sys.stderr, flush=True)
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shown(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a line that counts those that have been taken."""
    with ProgressBar(what, total) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.at(done)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes}:{left:02d}"
