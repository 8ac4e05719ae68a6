"""Frames on the socket between a run's process and its worker: a length, then JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

# A result and a checkpoint are at most 1 MiB of JSON; as text within JSON they can grow sixfold.
LIMIT = 8 * 1024 * 1024
_LENGTH = struct.Struct("!I")

Message = dict[str, Any]


class BrokenFrame(Exception):
    """What arrives is not this protocol: too long, or no JSON object."""


def frame(message: Mapping[str, Any]) -> bytes:
    """One message, ready to be sent."""
    body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Puts what arrives in pieces together again."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now; raises BrokenFrame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LIMIT:
                raise BrokenFrame(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _parsed(body)


def _parsed(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BrokenFrame("a frame that is no JSON") from error
    if not isinstance(message, dict):
        raise BrokenFrame("a frame that is no object")
    return message
