"""Sent: a call of a running attempt as its host sends it: with the run and, if needed, the handler.

What a call may contain is declared in `handlers/calls.py`; here is only what the attempt API adds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.execution.hosts.wire import FENCE, Fence, Label, reading, rows_of
from worker.execution.runners.child.frames import Message
from worker.handlers.calls import CALLS, Call, message_of, read
from worker.handlers.json_text import check_json_text
from worker.handlers.parts import CallPart, TextCheck


@dataclass(frozen=True, slots=True)
class Sent(Fence):
    """A call of one of a host's runs. `handler` is empty if the call does not need it."""

    handler: str
    call: Call[Any]


@dataclass(frozen=True)
class SentCall(CallPart[Sent]):
    """A call under its name in the attempt API."""

    name: str

    def write(self, value: Sent) -> Message:
        handler = {"handler": value.handler} if value.call.way.with_handler else {}
        return FENCE.write(value) | handler | message_of(value.call)

    def read(self, value: Any, check: TextCheck) -> Sent:
        fence, call = FENCE.read(value, check), read(self.name, value, check)
        handler = Label().read(value["handler"], check) if call.way.with_handler else ""
        return Sent(*fence.key, handler, call)

    def json_paths(self) -> Iterator[tuple[str, ...]]:
        return CALLS[self.name].row.json_paths()


SENT = {name: SentCall(name) for name in CALLS}


def calls_of(name: str, message: Mapping[str, Any]) -> list[Sent]:
    """The calls of a message: several if they are sent at once. Raises Malformed."""
    part, batch = SENT[name], CALLS[name].way.batch
    if batch:
        return rows_of(message, batch, part)
    with reading(name):
        return [part.read(message, check_json_text)]


def sent_message(sent: Sent) -> Message:
    return SENT[sent.call.way.name].write(sent)
