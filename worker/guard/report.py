"""What a guard reports: key sets that were fetched, and failures; by default to the standard log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

# Called with the name of an event and its fields.
Report = Callable[..., object]


def log(event: str, /, **fields: Any) -> None:
    """Log an event under the package's name: failures as warnings, others as information."""
    level = logging.WARNING if event.endswith(".failed") else logging.INFO
    shown = " ".join(f"{name}={value}" for name, value in fields.items())
    logging.getLogger(__package__).log(level, "%s %s", event, shown)
