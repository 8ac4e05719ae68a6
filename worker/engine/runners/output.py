"""The output of a run: log records become marked lines of stderr, which a crash keeps; output becomes a log.

A handler that prints the mark only adds a line to its own log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.clock import Clock
from worker.handlers.json_text import UNMASKED_LIMIT, clean

MARK = b"\x1e"
# Maximum bytes of a line of output as it is stored, and characters of a record, which stays one line.
LINE_LIMIT = 16 * 1024
LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})


class _StderrHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        # A lock of our own: the handler may replace sys.stderr.
        self._write_lock = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = marked(record.levelname.lower(), self.format(record))
            with self._write_lock:
                while line:
                    line = line[os.write(2, line) :]
        except Exception:
            self.handleError(record)


def log_to_stderr() -> None:
    """Send all records of at least INFO to this process's stderr."""
    root = logging.getLogger()
    root.handlers[:] = [_StderrHandler()]
    root.setLevel(logging.INFO)
    # httpx logs each URL with its query.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def marked(level: str, text: str) -> bytes:
    line = _line(level, text)
    while len(line) > UNMASKED_LIMIT:
        text = text[: len(text) * UNMASKED_LIMIT // len(line) - 8]
        line = _line(level, text + "…")
    return line


def unmarked(line: bytes) -> tuple[str, str] | None:
    """Level and text of a marked line, or None."""
    if not line.startswith(MARK):
        return None
    try:
        level, text = json.loads(line[len(MARK) :])
    except (ValueError, TypeError, RecursionError):
        return None
    known = isinstance(level, str) and level in LEVELS
    return (level, text) if known and isinstance(text, str) else None


def _line(level: str, text: str) -> bytes:
    return MARK + json.dumps([level if level in LEVELS else "info", text]).encode() + b"\n"


# Bytes of one attempt's log, and what a line costs besides its text.
CAP = 256 * 1024
LINE_COST = 16
_LEVELS = {"stdout": "info", "stderr": "error"}
_CUT = "…".encode()
# Where a long line is best cut: few secrets, and no tokens, have one of these.
_SEAMS = b" \t,;\"'<>(){}[]"
_SEAM_REACH = 4 * 1024

Sink = Callable[[str, str, str, datetime], None]


@dataclass(frozen=True, slots=True)
class _Block:
    source: str
    data: bytes
    at: datetime


class RunOutput:
    """The log of one attempt: passes on its first half at once, and its last half at the end.

    `sink` gets level, source (stdout, stderr or log), text and time.
    """

    def __init__(self, sink: Sink, clock: Clock, *, cap: int = CAP) -> None:
        self._sink = sink
        self._clock = clock
        self._head_left = cap // 2
        self._tail_cap = cap - cap // 2
        self._tail: deque[_Block] = deque()
        self._tail_size = 0
        self._dropped_lines = 0
        self._dropped_bytes = 0
        self._partial = {"stdout": b"", "stderr": b""}

    def feed(self, source: str, data: bytes) -> None:
        whole, newline, rest = (self._partial[source] + data).rpartition(b"\n")
        lines = whole + newline
        while len(rest) > UNMASKED_LIMIT:
            piece, rest = _parted(rest)
            lines += piece + b"\n"
        self._partial[source] = rest
        if lines:
            self._take(_Block(source, lines, self._clock.now()))

    def close(self) -> None:
        """Pass on the rest at the end of the run, and report how much was dropped."""
        for source, rest in self._partial.items():
            if rest:
                self._take(_Block(source, rest + b"\n", self._clock.now()))
        self._trim()
        if self._dropped_lines:
            text = f"{self._dropped_lines} lines ({self._dropped_bytes} bytes) of this log were dropped"
            self._sink("warning", "log", text, self._tail[0].at if self._tail else self._clock.now())
        for block in self._tail:
            for line in block.data[:-1].split(b"\n"):
                self._pass_on(block.source, line, block.at)
        self._tail.clear()

    def _take(self, block: _Block) -> None:
        if self._head_left > 0:
            block = self._into_head(block)
        if not block.data:
            return
        self._tail.append(block)
        self._tail_size += _cost(block)
        # Whole blocks only: looking for line ends in a flood would cost the worker time.
        while self._tail_size - _cost(self._tail[0]) >= self._tail_cap:
            self._drop(self._tail.popleft())

    def _into_head(self, block: _Block) -> _Block:
        start = 0
        while start < len(block.data):
            end = block.data.index(b"\n", start) + 1
            self._head_left -= end - start + LINE_COST
            if self._head_left < 0:
                break
            self._pass_on(block.source, block.data[start : end - 1], block.at)
            start = end
        return _Block(block.source, block.data[start:], block.at)

    def _trim(self) -> None:
        """Drop the oldest lines of a tail that is too long."""
        excess = self._tail_size - self._tail_cap
        if excess <= 0:
            return
        block = self._tail.popleft()
        end = 0
        while excess > 0 and end < len(block.data):
            start, end = end, block.data.index(b"\n", end) + 1
            excess -= end - start + LINE_COST
        self._drop(_Block(block.source, block.data[:end], block.at))
        if end < len(block.data):
            self._tail.appendleft(_Block(block.source, block.data[end:], block.at))

    def _drop(self, block: _Block) -> None:
        self._tail_size -= _cost(block)
        self._dropped_lines += block.data.count(b"\n")
        self._dropped_bytes += len(block.data)

    def _pass_on(self, source: str, line: bytes, at: datetime) -> None:
        while len(line) > UNMASKED_LIMIT:
            piece, line = _parted(line)
            self._pass_on(source, piece, at)
        # A flood may have thousands of empty lines, so each costs as little as possible.
        record = unmarked(line) if line.startswith(MARK) else None
        if record is not None:
            level, text = record
            self._sink(level, "log", clean(text, UNMASKED_LIMIT), at)
        else:
            text = line.decode("utf-8", "replace").rstrip("\r")
            self._sink(_LEVELS[source], source, clean(text, UNMASKED_LIMIT) if "\0" in text else text, at)


# Formats records, and reports on stderr those that cannot be formatted.
_FORMATTER = logging.Handler()


class RunLogger(logging.Logger):
    """`ctx.log`, outside logging's own hierarchy, because its records belong to one run. Thread-safe.

    It handles records itself: a handler for each run would cost more than the run.
    """

    # What `logging.Logger` sets: most runs log nothing, and its constructor takes longer than a handler.
    parent = None
    propagate = True
    disabled = False
    _output: RunOutput | None = None
    _closed = False

    def __init__(self, name: str, sink: Sink, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.level = logging.INFO
        self._sink = sink
        self._clock = clock
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        if name not in ("filters", "handlers", "_cache"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.filters, self.handlers = [], []
        self._cache: dict[int, bool] = {}
        return self.__dict__[name]

    def close(self) -> None:
        """Pass on what the run logged last; drop what it logs from now on."""
        self._closed = True
        if self._output is not None:
            self._output.close()

    def callHandlers(self, record: logging.LogRecord) -> None:
        try:
            line = marked(record.levelname.lower(), _FORMATTER.format(record))
            if asyncio._get_running_loop() is self._loop:
                self._feed(line)
            else:
                self._loop.call_soon_threadsafe(self._feed, line)
        except Exception:
            _FORMATTER.handleError(record)
        for handler in self.handlers:
            handler.handle(record)

    def _feed(self, line: bytes) -> None:
        if self._closed:
            return
        if self._output is None:
            self._output = RunOutput(self._sink, self._clock)
        self._output.feed("stderr", line)


def _cost(block: _Block) -> int:
    return len(block.data) + LINE_COST * block.data.count(b"\n")


def stored_lines(source: str, text: str) -> list[str]:
    """A masked line as it is stored: a record is cut to one line, other output becomes several."""
    if source == "log":
        return [clean(text, LINE_LIMIT)]
    lines, left = [], text.encode("utf-8", "replace")
    while len(left) > LINE_LIMIT:
        end = _seam(left, LINE_LIMIT)
        lines.append(left[:end].decode("utf-8", "replace"))
        left = left[end:]
    return [*lines, left.decode("utf-8", "replace")]


def _parted(line: bytes) -> tuple[bytes, bytes]:
    """A line before and after a cut; marks in both show it, also to the masker."""
    end = _seam(line, UNMASKED_LIMIT - len(_CUT))
    return line[:end] + _CUT, _CUT + line[end:]


def _seam(line: bytes, limit: int) -> int:
    """Where to cut a line of more than `limit` bytes."""
    seam = max(line.rfind(bytes([mark]), limit - _SEAM_REACH, limit) for mark in _SEAMS)
    if seam >= 0:
        return seam + 1
    end = limit
    while end > limit - 3 and line[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    return end
