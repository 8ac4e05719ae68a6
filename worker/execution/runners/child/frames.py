"""Frames: messages as JSON with a length before each, between the worker and the process of a run.

A run's process is not trusted. In its frames long texts follow the JSON as they are, so that what the worker
parses is short, and JSON within JSON needs no second parser.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]

# Maximum bytes of a frame of the worker: a checkpoint of 1 MiB and the rest of a run's work.
MAX_FRAME = 8 * 1024 * 1024
# Maximum bytes of a run's frame: its JSON, and the texts after it, such as a result of 1 MiB.
JSON_LIMIT = 256 * 1024
TEXTS_LIMIT = 3 * 1024 * 1024
# Characters from which a text follows the JSON.
LONG = 1024
# Marks and texts in the JSON of a run's frame: a step has up to 1,000 spends.
MAX_TOKENS = 8192
_LENGTH = struct.Struct("!I")
_LENGTHS = struct.Struct("!II")
_TEXTS = "texts"
# Matches as many as `MAX_TOKENS` without building anything.
_TOO_MANY = re.compile(
    r'(?:[^"\[\]{},:]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:])){%d}' % MAX_TOKENS,  # noqa: UP031
    re.DOTALL,
)
# What readers of a message raise for one that is not as our own code sends it.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class BrokenMessage(Exception):
    """The other side sent what our own code does not send."""


def frame(message: Mapping[str, Any]) -> bytes:
    """A message of the worker."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Decodes the worker's messages from data that arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete now; raises BrokenMessage."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise BrokenMessage(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _object(body)


def run_frame(message: Mapping[str, Any]) -> bytes:
    """A message of a run's process."""
    texts: list[bytes] = []
    places: list[tuple[list[str], int]] = []

    def lifted(value: Mapping[str, Any], path: list[str]) -> Message:
        kept: Message = {}
        for name, part in value.items():
            if isinstance(part, dict):
                kept[name] = lifted(part, [*path, name])
            elif isinstance(part, str) and len(part) > LONG:
                texts.append(part.encode("utf-8", "replace"))
                places.append(([*path, name], len(texts[-1])))
            else:
                kept[name] = part
        return kept

    kept = lifted(message, [])
    body = _encode(kept | {_TEXTS: places} if places else kept)
    return b"".join((_LENGTHS.pack(len(body), sum(map(len, texts))), body, *texts))


class RunFrames:
    """Decodes the messages of a run's process, one at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def add(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[Message, int] | None:
        """The next message and its bytes, or None until it is complete. Raises BrokenMessage."""
        if len(self._buffer) < _LENGTHS.size:
            return None
        length, texts = _LENGTHS.unpack_from(self._buffer)
        if length > JSON_LIMIT or texts > TEXTS_LIMIT:
            raise BrokenMessage(f"a frame of {length} and {texts} bytes")
        start, size = _LENGTHS.size + length, _LENGTHS.size + length + texts
        if len(self._buffer) < size:
            return None
        body, rest = bytes(self._buffer[_LENGTHS.size : start]), bytes(self._buffer[start:size])
        del self._buffer[:size]
        message = _object(body, untrusted=True)
        try:
            _put_back(message, rest)
        except MALFORMED as error:
            raise BrokenMessage("a frame whose texts are not where it says") from error
        return message, size


def _put_back(message: Message, texts: bytes) -> None:
    """Put the texts after the JSON where they belong. Raises one of `MALFORMED`."""
    at = 0
    for path, length in message.pop(_TEXTS, ()):
        *parents, name = path
        place: Any = message
        for parent in parents:
            place = place[parent]
        if type(length) is not int or not 0 <= length <= len(texts) - at or not isinstance(place, dict):
            raise ValueError("not a text")
        place[name] = texts[at : at + length].decode()
        at += length
    if at != len(texts):
        raise ValueError("more texts than named")


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _object(body: bytes, *, untrusted: bool = False) -> Message:
    try:
        text = body.decode()
        if untrusted and _TOO_MANY.match(text) is not None:
            raise BrokenMessage(f"a frame with more than {MAX_TOKENS} parts")
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenMessage("a frame that is not JSON") from error
    if not isinstance(message, dict):
        raise BrokenMessage("a frame that is not a JSON object")
    return message
