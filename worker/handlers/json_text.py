"""A handler's result, checkpoint or state as JSON text that every database accepts."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, NoReturn

LIMIT = 1024 * 1024
# Characters of any other text before it is masked; only then is it cut to its final size.
UNMASKED_LIMIT = 64 * 1024
# Parsers, encoders and databases recurse.
DEEPEST = 200
# An escaped NUL whose backslash is not itself escaped.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


_SURROGATE = "the {} contains a lone surrogate, which is not valid text"
_TOO_DEEP = f"the {{}} nests more than {DEEPEST} levels, or contains itself"


class NotStorable(ValueError):
    """A value that is not JSON, too large or too deep, or contains a NUL or a lone surrogate.

    The message says why, without the value.
    """


def to_json_text(value: Any, what: str, limit: int = LIMIT) -> str:
    """The value as compact JSON text of at most `limit` bytes; dumps pydantic models; raises NotStorable."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_dumped)
        text.encode()
    except UnicodeEncodeError:
        raise NotStorable(_SURROGATE.format(what)) from None
    except RecursionError:
        raise NotStorable(_TOO_DEEP.format(what)) from None
    except (TypeError, ValueError) as error:
        raise NotStorable(f"the {what} is not JSON: {_reason(error)}") from None
    check_size(text, what, limit)
    _check_nul(text, what)
    if text.count("[") + text.count("{") > DEEPEST:
        _value(text, what)
    return text


class CheckedText(str):
    """JSON text that passed `check_json_text` in another process, which spares this one the work."""

    __slots__ = ()


class CheckedObject(dict[str, Any]):
    """The same for an object, such as a JSON Schema."""

    __slots__ = ()


def check_json_text(text: str, what: str, limit: int = LIMIT) -> None:
    """Raise NotStorable for text that `to_json_text` would not write: a run's process may send anything."""
    if isinstance(text, CheckedText):
        return
    check_size(text, what, limit)
    _check_nul(text, what)
    value = _value(text, what)
    try:
        # A surrogate may be escaped.
        (json.dumps(value, ensure_ascii=False) if "\\u" in text else text).encode()
    except UnicodeEncodeError:
        raise NotStorable(_SURROGATE.format(what)) from None


def check_size(text: str, what: str, limit: int) -> None:
    """Raise NotStorable for text of more than `limit` bytes."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limit:
        unit, name = (1024 * 1024, "MiB") if limit >= 1024 * 1024 else (1024, "KiB")
        most = limit // unit
        raise NotStorable(f"the {what} is {size / unit:.1f} {name} of JSON; the maximum is {most} {name}")


def _check_nul(text: str, what: str) -> None:
    if "\\u0000" in text and _NUL.search(text):
        raise NotStorable(f"the {what} contains a NUL character, which databases cannot store")


def _value(text: str, what: str) -> Any:
    """The parsed text; raises NotStorable if it is not JSON or nests too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise NotStorable(_TOO_DEEP.format(what)) from None
    except ValueError:
        raise NotStorable(f"the {what} is not JSON") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth_of(text) > DEEPEST:
        raise NotStorable(_TOO_DEEP.format(what))
    return value


def _depth_of(text: str) -> int:
    """The levels of JSON text, several times faster than those of its value."""
    brackets = _TEXTS.sub(b"", text.encode("utf-8", "surrogatepass")).translate(_STEPS, _OTHERS)
    return max(accumulate(memoryview(brackets).cast("b")), default=0)


_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
# One level down, or back up, as a signed byte.
_STEPS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} cannot be written as JSON")


def clean(text: str, limit: int) -> str:
    """Text that every database accepts: no NUL, no lone surrogate, at most `limit` characters."""
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
    # The encoder's messages name a type, except that for floats they show the value.
    return "NaN and infinity cannot be written as JSON" if "float values" in text else text
