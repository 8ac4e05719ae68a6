"""What a relay reports; by default to the standard log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

# Called with the name of an event and its fields.
Report = Callable[..., object]


def log(event: str, /, **fields: Any) -> None:
    """Log an event under the package's name: what somebody has to look at as a warning."""
    level = logging.INFO if event in ("relay.started", "relay.stopped", "relay.back") else logging.WARNING
    shown = " ".join(f"{name}={value}" for name, value in fields.items())
    logging.getLogger(__package__).log(level, "%s %s", event, shown)
