"""A handler's result or checkpoint -> JSON text that every database takes."""

from __future__ import annotations

import json
import re
from typing import Any

LIMIT = 1024 * 1024
# An escaped NUL whose backslash is not itself escaped.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class NotStorable(ValueError):
    """A value that no JSON column takes; the message says why, without the value."""


def to_json_text(value: Any, what: str) -> str:
    """The value as compact JSON text of at most 1 MiB; pydantic models are dumped. `what` names it.

    Raises:
        NotStorable: not JSON, NaN or infinite, a lone surrogate, a NUL, or too large.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_dumped)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise NotStorable(f"the {what} contains a lone surrogate, which is no text") from None
    except RecursionError:
        raise NotStorable(f"the {what} is nested too deeply, or contains itself") from None
    except (TypeError, ValueError) as error:
        raise NotStorable(f"the {what} is not JSON: {_reason(error)}") from None
    if size > LIMIT:
        raise NotStorable(f"the {what} is {size / LIMIT:.1f} MiB of JSON; at most 1 MiB is kept")
    if _NUL.search(text):
        raise NotStorable(f"the {what} contains a NUL character, which no database keeps")
    return text


def clean(text: str, limit: int) -> str:
    """Text for people that every database takes: no NUL, no lone surrogate, at most `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.replace("\0", "�").encode("utf-8", "replace").decode()


def _dumped(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
    return dump(mode="json")


def _reason(error: Exception) -> str:
    text = str(error)
    # The encoder's own messages name a type, but for floats they show the value.
    return "NaN and infinity have no form in JSON" if "float values" in text else text
