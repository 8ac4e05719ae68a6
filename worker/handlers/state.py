"""State: what a definition remembers between its runs, a JSON object of at most 64 KiB.

Each attempt loads it, and what the handler changed is committed with the run's success.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from worker.handlers.json_text import NotStorable, check_json_text, to_json_text

LIMIT = 64 * 1024


class State:
    """The state of one attempt: the handler's own copy, and how it was loaded."""

    __slots__ = ("_loaded", "value")

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        # Without a limit: numbers that the database has normalised can be longer.
        self._loaded = to_json_text(loaded, "state", limit=sys.maxsize)
        self.value: dict[str, Any] = json.loads(self._loaded)

    def changed(self) -> str | None:
        """The JSON text to commit, or None if nothing changed; raises NotStorable."""
        text = to_json_text(self.value, "state", limit=sys.maxsize)
        if text == self._loaded:
            return None
        check_state_text(text)
        return text


def to_state_text(value: Mapping[str, Any]) -> str:
    """A state as JSON text; raises NotStorable."""
    text = to_json_text(value, "state", limit=LIMIT)
    check_object(text)
    return text


def check_state_text(text: str) -> None:
    """Raise NotStorable for text that `to_state_text` would not write: a run's process may send anything."""
    check_json_text(text, "state", limit=LIMIT)
    check_object(text)


def check_object(text: str) -> None:
    """Raise NotStorable for JSON text that is not an object."""
    if not text.lstrip().startswith("{"):
        raise NotStorable("the state is not a JSON object")
