"""Frames: a request to the broker and its answer, on a stream between a run and the broker.

A run opens a stream for each request in flight and uses it again. It sends HEAD, DATA and END; the broker
answers SENDING before the first byte leaves, then ANSWER, DATA and END, or FAILED at any time. A stream that
ends before SENDING has sent nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

HEAD, DATA, END, SENDING, ANSWER, FAILED = range(1, 7)
# Bytes of a head, which has the headers, and of a part of a body.
MAX_HEAD = 256 * 1024
MAX_DATA = 64 * 1024
_encode = json.JSONEncoder(separators=(",", ":")).encode
_START = struct.Struct("!BI")
_LIMITS = {HEAD: MAX_HEAD, ANSWER: MAX_HEAD, FAILED: MAX_HEAD, DATA: MAX_DATA, END: 0, SENDING: 0}


class BrokenFrame(Exception):
    """The other side sent what our own code does not send."""


class Frame(NamedTuple):
    kind: int
    body: bytes

    def fields(self) -> dict[str, Any]:
        """The JSON object of a head, an answer or a failure. Raises BrokenFrame."""
        try:
            fields = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise BrokenFrame("a frame that is not JSON") from error
        if not isinstance(fields, dict):
            raise BrokenFrame("a frame that is not a JSON object")
        return fields


def frame(kind: int, body: bytes = b"") -> bytes:
    """A frame. Raises ValueError if its body is too long."""
    if len(body) > _LIMITS[kind]:
        raise ValueError(f"a frame of {len(body)} bytes; at most {_LIMITS[kind]}")
    return _START.pack(kind, len(body)) + body


def json_frame(kind: int, fields: Mapping[str, Any]) -> bytes:
    """A frame with a JSON object. Raises ValueError if it is too long."""
    return frame(kind, _encode(fields).encode())


def data_frames(data: bytes) -> Iterator[bytes]:
    """A part of a body as frames of at most `MAX_DATA` bytes."""
    for start in range(0, len(data), MAX_DATA):
        yield frame(DATA, data[start : start + MAX_DATA])


class Frames:
    """Reads frames from data that arrives in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now. Raises BrokenFrame."""
        self._buffer += data
        while len(self._buffer) >= _START.size:
            kind, length = _START.unpack_from(self._buffer)
            if length > _LIMITS.get(kind, -1):
                raise BrokenFrame(f"a frame of kind {kind} with {length} bytes")
            end = _START.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_START.size : end])
            del self._buffer[:end]
            yield Frame(kind, body)
