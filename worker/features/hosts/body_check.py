"""The process that checks large bodies of hosts: it has no key and no token, and its memory is limited.

`checker.py` starts it and sends it the name of a call and its body. It answers with what the call's reader
takes of it, in pieces that are small but for their texts: `json.loads` holds the interpreter lock for as long
as it takes, in any thread, so a worker never parses a large body itself.
"""

from __future__ import annotations

import json
import re
import resource
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

from worker.engine.runners.child import linux
from worker.features.hosts import wire
from worker.features.hosts.sent import END, LINE, PROGRESS, SENT, End, calls_of, sent_message
from worker.features.hosts.wire import Malformed
from worker.handlers.calls import CALLS
from worker.handlers.parts import CallPart, TextCheck

# The frames of an answer. It ends with REFUSED or DONE, after an ENDING if the process ends as well.
REFUSED, CALL, ROW, TEXT, DONE, ENDING = range(6)
REQUEST = struct.Struct("!HI")
FRAME = struct.Struct("!BI")
# Texts from this length on are frames of their own.
LONG = 1024
# Bytes of a body besides its texts: 2000 ends or steps take less than a third.
MAX_STRUCTURE = 1024 * 1024
# Characters of what `sealed` has: claims and flags of a token of at most 16 KiB.
MAX_SEALED = 256 * 1024
# Bytes of data of this process, and from which peak on another one takes over.
MAX_MEMORY = 512 * 1024 * 1024
TOO_LARGE = 128 * 1024 * 1024

Message = dict[str, Any]
Path = tuple[str, ...]

# A text that is not closed reaches to the end, so that no part is looked at twice.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


class BodyRefused(Exception):
    """A body that is not a call; the message says why."""


def parse(body: bytes) -> Message:
    """The JSON object of a body. Raises BodyRefused, before anything is built, for one of too many values."""
    structure = end = 0
    for text in _TEXTS.finditer(body):
        # Each text counts as one byte more: it is an object, too.
        structure += text.start() - end + 1
        end = text.end()
        if structure > MAX_STRUCTURE:
            break
    if structure + len(body) - end > MAX_STRUCTURE:
        raise BodyRefused(f"the body has more than {MAX_STRUCTURE} bytes besides its texts")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise BodyRefused("the body is not JSON") from None
    if not isinstance(message, dict):
        raise BodyRefused("the body is not a JSON object")
    return message


class _Sealed(CallPart[End]):
    """An end, of which `sealed` is no longer than what a worker seals."""

    def read(self, value: Any, check: TextCheck) -> End:
        end = END.read(value, check)
        if len(end.sealed) > MAX_SEALED:
            raise BodyRefused(f"sealed: it is longer than {MAX_SEALED} characters")
        return end

    write, json_paths = END.write, END.json_paths


# The rows of a call, and what reads and checks each of them.
ROWS: Mapping[str, tuple[str, CallPart[Any]]] = {
    "finish": ("ends", _Sealed()),
    "logs": ("lines", LINE),
    "progress": ("rows", PROGRESS),
    "hand_back": ("runs", wire.FENCE),
    "handlers": ("entries", wire.ENTRY),
    **{name: (call.way.batch, SENT[name]) for name, call in CALLS.items() if call.way.batch},
}
# By call, texts that were checked as JSON, and objects that were checked as a JSON Schema.
JSON_TEXTS: Mapping[str, Collection[Path]] = {
    name: frozenset(part.json_paths())
    for name, part in (SENT | {name: part for name, (_, part) in ROWS.items()}).items()
}
SCHEMAS: Mapping[str, Collection[Path]] = {"handlers": {("params_schema",), ("settings_schema",)}}


def checked(name: str, body: bytes) -> Iterator[tuple[int, Message]]:
    """What a call has of its body. Raises BodyRefused, and Malformed and others as its readers."""
    message = parse(body)
    if name not in wire.BODY_BYTES:
        raise BodyRefused(f"no call {name} is larger than {wire.OWN_BYTES} bytes")
    if name not in ROWS:
        yield from ((CALL, sent_message(sent)) for sent in calls_of(name, message))
        return
    rows, part = ROWS[name]
    if name == "handlers":
        yield CALL, {"complete": message.get("complete") is True}
        found: list[Any] = wire.entries_of(message)
    else:
        found = wire.rows_of(message, rows, part)
    yield from ((ROW, part.write(row)) for row in found)


def in_frames(name: str, kind: int, message: Message) -> Iterator[tuple[int, bytes]]:
    """A message and its long texts, each after where it belongs: `[path, is JSON, is a schema]`."""
    json_texts, schemas = JSON_TEXTS.get(name, ()), SCHEMAS.get(name, ())
    places: list[tuple[Path, bool, bool]] = []
    texts: list[bytes] = []

    def take_out(part: Message, above: Path) -> None:
        for key, value in part.items():
            path = (*above, key)
            if path in schemas and value is not None:
                content = _json(value)
            elif isinstance(value, str) and (len(value) >= LONG or path in json_texts):
                content = value.encode("utf-8", "replace")
            elif isinstance(value, dict):
                take_out(value, path)
                continue
            else:
                continue
            part[key] = None
            places.append((path, path in json_texts, path in schemas))
            texts.append(content)

    take_out(message, ())
    yield kind, _json([message, places])
    yield from ((TEXT, text) for text in texts)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def answer(name: str, body: bytes) -> Iterator[tuple[int, bytes]]:
    """The frames of an answer, but for the last one of a body that is a call."""
    try:
        # All is checked before the first frame goes out.
        found = list(checked(name, body))
    except (BodyRefused, Malformed) as refused:
        yield REFUSED, str(getattr(refused, "message", refused)).encode("utf-8", "replace")
        return
    except MemoryError:
        yield REFUSED, b"the body takes too much memory"
        return
    for kind, message in found:
        yield from in_frames(name, kind, message)
    yield DONE, b""


def serve(given: BinaryIO, out: BinaryIO) -> None:
    """Answer requests until there are no more, or this process has become large."""
    while len(head := given.read(REQUEST.size)) == REQUEST.size:
        name_size, size = REQUEST.unpack(head)
        name, body = given.read(name_size).decode(), given.read(size)
        if len(body) < size:
            return
        ends = False
        for kind, content in answer(name, body):
            if kind in (REFUSED, DONE) and (ends := _peak() > TOO_LARGE):
                out.write(FRAME.pack(ENDING, 0))
            out.write(FRAME.pack(kind, len(content)) + content)
        out.flush()
        if ends:
            return


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    linux.name_process(linux.ProcessName.CHECK)
    linux.hide_memory()
    linux.die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
