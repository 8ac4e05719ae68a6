"""Logs: events and the log records of libraries as masked lines on stderr, in JSON or for the console."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from worker.clock import to_text
from worker.ids import ALL_ORGS
from worker.telemetry.events import Emitted, Level, listen, listeners
from worker.telemetry.masking import masker

Style = Literal["json", "console"]

_events = logging.getLogger("worker.events")
_LEVELS: Mapping[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# Too verbose at INFO: httpx logs each URL with its query, alembic each migration step.
QUIET = ("httpx", "httpcore", "apscheduler", "alembic", "sqlalchemy", "uvicorn", "asyncio", "mcp")


def configure(style: Style | None = None, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Log events and warnings of libraries to `stream`, by default stderr; replaces an earlier call.

    The default style is `console` on a terminal and `json` elsewhere.
    """
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Line(_STYLES[style or ("console" if out.isatty() else "json")]))
    root = logging.getLogger()
    for earlier in [one for one in root.handlers if isinstance(one.formatter, _Line)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of what follows from an error that it has raised: a rollback on a connection that is lost.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    if _log not in listeners:
        listen(_log)


def _log(emitted: Emitted) -> None:
    level = _LEVELS[emitted.event.level]
    if _events.isEnabledFor(level):
        _events.log(level, emitted.event.name, extra={"fields": emitted.fields})


class _Line(logging.Formatter):
    """Formats a record as one masked line: time, level, event, then its fields or the library's message."""

    def __init__(self, write: Callable[[Mapping[str, Any]], str]) -> None:
        super().__init__()
        self._write = write

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] | None = getattr(record, "fields", None)
        event = record.msg
        if fields is None:
            event = "log"
            trace = self.formatException(record.exc_info) if record.exc_info else None
            fields = {"logger": record.name, "message": record.getMessage(), "trace": trace}
        at = to_text(datetime.fromtimestamp(record.created, UTC))
        shown = {name: value for name, value in fields.items() if value is not None}
        return masker.mask(
            self._write({"at": at, "level": record.levelname.lower(), "event": event, **shown}), ALL_ORGS
        )


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, default=str)


def _console(fields: Mapping[str, Any]) -> str:
    at, level, event, *_ = fields.values()
    words = (f"{name}={_word(value)}" for name, value in list(fields.items())[3:])
    return f"{at[11:23]} {level:<7} {event:<18} {' '.join(words)}".rstrip()


def _word(value: Any) -> str:
    """A value as one word; quotes text with spaces or control characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text and text.isprintable() and " " not in text else json.dumps(text)


_STYLES: Mapping[Style, Callable[[Mapping[str, Any]], str]] = {"json": _json, "console": _console}
