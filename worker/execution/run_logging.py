"""`logging` in a run's process: each record one marked line on stderr, so that a crash keeps it.

The mark tells a record from what is printed. Whoever prints the mark only makes a
log line of its own run.
"""

from __future__ import annotations

import json
import logging
import os
import threading

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
