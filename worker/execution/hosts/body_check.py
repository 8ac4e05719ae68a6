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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from worker.clock import to_text
from worker.execution.hosts import wire, wire_calls
from worker.execution.hosts.wire import Malformed
from worker.execution.runners.child import linux, messages
from worker.handlers.catalogue import HandlerEntry

# The frames of an answer. It ends with REFUSED or DONE, after an ENDING if the process ends as well.
REFUSED, CALL, ROW, TEXT, DONE, ENDING = range(6)
REQUEST, FRAME = struct.Struct("!HI"), struct.Struct("!BI")
# Texts from this length on are frames of their own.
LONG = 1024
# Bytes of a body besides its texts: 2000 ends or steps take less than a third.
MOST_STRUCTURE = 1024 * 1024
# Characters of what `sealed` has: claims and flags of a token of at most 16 KiB.
MOST_SEALED = 256 * 1024
# Bytes of data of this process, and from which peak on another one takes over.
MOST_MEMORY = 512 * 1024 * 1024
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
        if structure > MOST_STRUCTURE:
            break
    if structure + len(body) - end > MOST_STRUCTURE:
        raise BodyRefused(f"the body has more than {MOST_STRUCTURE} bytes besides its texts")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise BodyRefused("the body is not JSON") from None
    if not isinstance(message, dict):
        raise BodyRefused("the body is not a JSON object")
    return message


# What each call has of a message that may be large: its own keys, or the name of its rows with their reader.
Rows = Iterator[Message]


def _ends(message: Message) -> Rows:
    for end in wire.ends_of(message):
        if len(end.sealed) > MOST_SEALED:
            raise BodyRefused(f"sealed: it is longer than {MOST_SEALED} characters")
        yield wire.end_message(end)


def _steps(message: Message) -> Rows:
    for row in wire_calls.steps_of(message):
        step = messages.step_message(row.step)
        yield {"run": row.run_id, "fencing_token": row.fencing_token, "handler": row.handler, "step": step}


def _lines(message: Message) -> Rows:
    for line in wire_calls.lines_of(message):
        given = {name: getattr(line, name) for name in ("fencing_token", "seq", "level", "source", "text")}
        yield {"run": line.run_id, "at": to_text(line.at), **given}


def _values(message: Message) -> Rows:
    for row in wire_calls.progress_of(message):
        yield wire_calls.progress_message(*row)


def _owned(message: Message) -> Rows:
    for run in wire.owned_of(message):
        yield {"run": run.id, "fencing_token": run.fencing_token}


def _entries(message: Message) -> Rows:
    entries: Sequence[HandlerEntry] = wire.entries_of(message.get("entries", []))
    return map(wire.entry_message, entries)


# The name of a call's rows, and what reads and checks them.
ROWS: Mapping[str, tuple[str, Callable[[Message], Rows]]] = {
    "finish": ("ends", _ends),
    "store": ("steps", _steps),
    "logs": ("lines", _lines),
    "progress": ("rows", _values),
    "hand_back": ("runs", _owned),
    "handlers": ("entries", _entries),
}
# Texts that were checked as JSON, and objects that were checked as a JSON Schema.
JSON_TEXTS = {("outcome", "result"), ("outcome", "state"), ("step", "result_json"), ("data",)}
SCHEMAS = {("params_schema",), ("settings_schema",)}


def _save(message: Message) -> Message:
    data, number = wire_calls.checkpoint_of(message)
    run_id, fencing_token = wire.fence_of(message)
    handler = wire_calls.handler_of(message)
    return {"run": run_id, "fencing_token": fencing_token, "handler": handler, "data": data, "number": number}


def _wait(message: Message) -> Message:
    run_id, fencing_token = wire.fence_of(message)
    wait = wire_calls.wait_message(wire_calls.wait_of(message))
    return {"run": run_id, "fencing_token": fencing_token, **wait}


CALLS: Mapping[str, Callable[[Message], Message]] = {"save": _save, "wait": _wait, "choose": _wait}


def checked(name: str, body: bytes) -> Iterator[tuple[int, Message]]:
    """What a call has of its body. Raises BodyRefused, and Malformed and others as its readers."""
    message = parse(body)
    if name in ROWS:
        _, read = ROWS[name]
        if name == "handlers":
            yield CALL, {"complete": message.get("complete") is True}
        yield from ((ROW, row) for row in read(message))
    elif name in CALLS:
        yield CALL, CALLS[name](message)
    else:
        raise BodyRefused(f"no call {name} is larger than {wire.OWN_BYTES} bytes")


def in_frames(kind: int, message: Message) -> Iterator[tuple[int, bytes]]:
    """A message and its long texts, each after where it belongs: `[path, is JSON, is a schema]`."""
    texts: list[tuple[Path, bytes]] = []
    _take_out(message, (), texts)
    places = [(path, path in JSON_TEXTS, path in SCHEMAS) for path, _ in texts]
    yield (
        kind,
        json.dumps([message, places], ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
    )
    yield from ((TEXT, text) for _, text in texts)


def _take_out(message: Message, above: Path, texts: list[tuple[Path, bytes]]) -> None:
    for name, value in message.items():
        path = (*above, name)
        if path in SCHEMAS:
            if value is None:
                continue
            content = _json(value)
        elif isinstance(value, str) and (len(value) >= LONG or path in JSON_TEXTS):
            content = value.encode("utf-8", "replace")
        elif isinstance(value, dict):
            _take_out(value, path, texts)
            continue
        else:
            continue
        message[name] = None
        texts.append((path, content))


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
        yield from in_frames(kind, message)
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
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
