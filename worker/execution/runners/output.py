"""`logging` in a run's process: each record one marked line on stderr, so that a crash keeps it.

The mark tells a record from what is printed. Whoever prints the mark only makes a
log line of its own run.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from worker.clock import Clock
from worker.handlers.json_text import clean

MARK = b"\x1e"
# A longer line would be cut into several, and a record is to stay one. Bytes.
LINE_LIMIT = 16 * 1024
LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})


class _StderrHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        # Not sys.stderr: the handler may replace that.
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
    # It logs each URL with its query.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def marked(level: str, text: str) -> bytes:
    """A log record as a line; also one of several lines stays one record."""
    line = _line(level, text)
    while len(line) > LINE_LIMIT:
        text = text[: len(text) * LINE_LIMIT // len(line) - 8]
        line = _line(level, text + "…")
    return line


def unmarked(line: bytes) -> tuple[str, str] | None:
    """Level and text of a marked line; None where it is an ordinary one."""
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


CAP = 256 * 1024
# What a line costs besides its text, so that many empty ones are not free.
LINE_COST = 16
_LEVELS = {"stdout": "info", "stderr": "error"}
# Where an overlong line may be cut: none of these stands within a token or a secret.
_SEAMS = b" \t,;\"'<>(){}[]"
_SEAM_REACH = 4 * 1024

Sink = Callable[[str, str, str, datetime], None]


@dataclass(frozen=True, slots=True)
class _Block:
    """Whole lines of one source, as they came at one time."""

    source: str
    data: bytes
    at: datetime


class RunOutput:
    """The log of one attempt: passes its first half on at once, and its last half at the end.

    `sink` gets level, source (stdout, stderr or log), text and instant. What a
    handler prints without end costs a count of line ends and no more.
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
        """What was read from one of the two pipes."""
        whole, newline, rest = (self._partial[source] + data).rpartition(b"\n")
        lines = whole + newline
        while len(rest) > LINE_LIMIT:
            piece = _cut(rest)
            lines, rest = lines + piece + b"\n", rest[len(piece) :]
        self._partial[source] = rest
        if lines:
            self._take(_Block(source, lines, self._clock.now()))

    def close(self) -> None:
        """The run has ended: pass on what is left, and how much was dropped before it."""
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
        # Whole blocks only: to look for line ends in each of a flood would cost the worker.
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
        """Drop the oldest kept lines, as many as the tail is too long by."""
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
        while len(line) > LINE_LIMIT:
            piece = _cut(line)
            self._pass_on(source, piece, at)
            line = line[len(piece) :]
        level, text = unmarked(line) or (None, line.decode("utf-8", "replace").rstrip("\r"))
        text = clean(text, LINE_LIMIT)
        if level is None:
            self._sink(_LEVELS[source], source, text, at)
        else:
            self._sink(level, "log", text, at)


def _cost(block: _Block) -> int:
    return len(block.data) + LINE_COST * block.data.count(b"\n")


def _cut(line: bytes) -> bytes:
    seam = max(line.rfind(bytes([mark]), LINE_LIMIT - _SEAM_REACH, LINE_LIMIT) for mark in _SEAMS)
    return line[: seam + 1] if seam >= 0 else line[:LINE_LIMIT]
