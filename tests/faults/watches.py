"""Finds a kind of statement in what a PostgreSQL client sends: to lose its COMMIT's answer, or to hold it."""

from __future__ import annotations

import struct
import threading
from datetime import UTC, datetime
from typing import ClassVar

from tests.faults.proxy import Verdict


class StatementWatch:
    """One connection's client, read message by message (PostgreSQL's protocol, version 3).

    A statement is of the kind with `mark` in its text, prepared or not. `left` is how
    many more are to be found, over all connections, and `found_at` when the others were.
    """

    mark: ClassVar[bytes]
    left: ClassVar[int]
    at_commit: ClassVar[bool]
    found_at: ClassVar[list[datetime]]

    def __init__(self) -> None:
        self._data = b""
        self._started = False
        self._prepared: set[bytes] = set()
        self._of_the_kind = False

    def sees(self, data: bytes) -> Verdict:
        self._data += data
        verdict: Verdict = "pass"
        while (message := self._next()) is not None:
            kind, body = message
            if kind in (b"Q", b"P") and b"COMMIT" in body:
                if self._of_the_kind and self.at_commit and self._one_more():
                    verdict = "cut"
                self._of_the_kind = False
            elif kind == b"P":
                self._note(body)
            elif kind == b"B" and body.split(b"\0", 2)[1] in self._prepared:
                self._of_the_kind = True
                if not self.at_commit and self._one_more():
                    verdict = "hold"
        return verdict

    def _one_more(self) -> bool:
        found = type(self).left > 0
        type(self).left -= found
        if found:
            self.found_at.append(datetime.now(UTC))
        return found

    def _note(self, body: bytes) -> None:
        name, text, _ = body.split(b"\0", 2)
        if self.mark in text:
            self._prepared.add(name)
        else:
            self._prepared.discard(name)

    def _next(self) -> tuple[bytes, bytes] | None:
        # The first message has no letter: it asks for a version, and for TLS before that.
        head = 1 if self._started else 0
        if len(self._data) < head + 4:
            return None
        (length,) = struct.unpack_from("!I", self._data, head)
        if len(self._data) < head + length:
            return None
        kind, body = self._data[:head], self._data[head + 4 : head + length]
        self._data = self._data[head + length :]
        if not self._started:
            (version,) = struct.unpack_from("!I", body)
            self._started = version >> 16 == 3
        return kind, body


def cutter(mark: str, count: int) -> type[StatementWatch]:
    """Loses `count` answers to the COMMIT of a transaction with such a statement."""
    return _watch(mark, count, at_commit=True)


def holder(mark: str) -> type[StatementWatch]:
    """Holds the first such statement from now on until the proxy lets it go."""
    return _watch(mark, 1, at_commit=False)


def _watch(mark: str, count: int, *, at_commit: bool) -> type[StatementWatch]:
    keys = {"mark": mark.encode(), "left": count, "at_commit": at_commit, "found_at": []}
    return type("Watching", (StatementWatch,), keys)


def muter(mark: bytes) -> type[Muter]:
    """A watch for one test: once a client has sent the mark it hears nothing more, until `let_go`."""

    class Watch(Muter):
        sent = threading.Event()

    Watch.mark = mark
    return Watch


class Muter:
    """One connection's client; `sent` is set once any of them has sent the mark."""

    mark: ClassVar[bytes]
    sent: ClassVar[threading.Event]
    left: ClassVar[int] = 0

    def sees(self, data: bytes) -> Verdict:
        if self.mark not in data:
            return "pass"
        type(self).sent.set()
        return "mute"
