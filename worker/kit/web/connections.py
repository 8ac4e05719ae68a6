"""Connections: deadlines for clients, and limits on the number of connections, in all and per address.

uvicorn has no deadline for headers and bodies, and at its limit it answers 503 even to health
checks. Here the connection that has waited longest for its client makes room for a new one,
so idle and slow clients cannot lock others out.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from worker.kit.web.clients import Addresses, counted_as
from worker.kit.web.responses import HEADERS, error_response
from worker.telemetry.events import emit

# Connections of one listener. MAX_REQUESTS in server.py is lower, which keeps health reachable.
MAX_CONNECTIONS = 600

# Without uvicorn's warnings about invalid requests, with which anyone could fill the log.
_log = logging.getLogger("uvicorn.error.requests")
_log.setLevel(logging.ERROR)

# What a connection waits for: a request's headers, the rest of its body, or the next request.
Phase = Literal["headers", "body", "idle"]


@dataclass(frozen=True, slots=True)
class ClientDeadlines:
    """Seconds that a client may take; no deadline runs while a response is prepared or sent.

    `headers` starts at the first byte of a request, for the first request at the start of
    the connection. `body` starts after the headers, `idle` after a response.
    """

    headers: float = 5.0
    body: float = 10.0
    idle: float = 75.0


@dataclass(eq=False, slots=True)
class _Group:
    """The connections under one limit; `waiting` are those waiting for their client, longest first."""

    key: str = ""
    members: set[Connection] = field(default_factory=set)
    waiting: dict[Connection, None] = field(default_factory=dict)

    def make_room(self, reason: str) -> bool:
        """Close the connection that has waited longest; False if none waits."""
        longest = next(iter(self.waiting), None)
        if longest is None:
            return False
        longest.drop(reason)
        return True


@dataclass(eq=False, repr=False)
class Connections:
    """The open connections of one listener, at most `most`.

    At most `per_address` come from one address (0: no limit), or from one IPv6 /64 network;
    trusted proxies are exempt.
    """

    per_address: int = 0
    addresses: Addresses = field(default_factory=Addresses)
    most: int = field(default=MAX_CONNECTIONS, kw_only=True)
    _all: _Group = field(default_factory=_Group, init=False)
    _by_address: dict[str, _Group] = field(default_factory=dict, init=False)
    _groups: dict[Connection, list[_Group]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, connection: Connection, address: str) -> bool:
        """Count a new connection; False if there is no room because all others are being served."""
        limits = [(self._all, self.most, "crowded")]
        if self.per_address and not self.addresses.trusts(address):
            key = counted_as(address)
            limits.insert(0, (self._by_address.get(key) or _Group(key), self.per_address, "address"))
        for group, most, reason in limits:
            if len(group.members) >= most and not group.make_room(reason):
                return False
        self._groups[connection] = [group for group, _, _ in limits]
        for group in self._groups[connection]:
            group.members.add(connection)
            if group.key:
                self._by_address[group.key] = group
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a closed connection; one that is not counted is ignored."""
        for group in self._groups.pop(connection, ()):
            group.members.discard(connection)
            group.waiting.pop(connection, None)
            if not group.members:
                self._by_address.pop(group.key, None)

    def waits(self, connection: Connection, waiting: bool) -> None:
        """Record whether a connection now waits for its client."""
        for group in self._groups.get(connection, ()):
            group.waiting.pop(connection, None)
            if waiting:
                group.waiting[connection] = None

    def close(self) -> None:
        """Close all connections at once."""
        for connection in list(self._groups):
            connection.drop("stopped")


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol under the deadlines and limits of its listener."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
        deadlines: ClientDeadlines,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = _log
        self._open = connections
        self._deadlines = deadlines
        self._timer: asyncio.TimerHandle | None = None
        # The phase that the timer is for, and the request before or in it.
        self._timed: tuple[Phase | None, object] = (None, None)
        self._waits = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._open.add(self, self.client[0] if self.client else ""):
            self._look()
        else:
            self.drop("crowded")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def send_400_response(self, msg: str) -> None:
        # uvicorn raises if a response has begun, as for an invalid body after an early 401.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.drop("invalid")

    def drop(self, reason: str) -> None:
        """Close the connection now and discard unsent data."""
        self._forget()
        if not self.transport.is_closing():
            emit("web.connection_closed", reason=reason)
        self.transport.abort()

    def _forget(self) -> None:
        self._time(None, None)
        self._open.remove(self)

    def _look(self) -> None:
        """Set the timer for what the connection waits for now, unless it runs already."""
        # uvicorn leaves its own timer on if a body ends after its response.
        self._unset_keepalive_if_required()
        phase = None if self.transport.is_closing() else self._phase()
        # A client that does not read its response may make room too; the kernel limits how long it lasts.
        waits = phase is not None or self.flow.write_paused or self.transport.is_closing()
        changed = (phase, self.cycle) != self._timed
        if changed:
            self._time(phase, self.cycle)
        if changed or waits != self._waits:
            self._waits = waits
            self._open.waits(self, waits)

    def _phase(self) -> Phase | None:
        match self.conn.their_state:
            case h11.IDLE:
                fresh = self.cycle is not None and not self.conn.trailing_data[0]
                return "idle" if fresh else "headers"
            case h11.SEND_BODY:
                return "body"
            case _:
                return None

    def _time(self, phase: Phase | None, cycle: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timed = (phase, cycle)
        self._timer = None
        if phase is not None:
            seconds: float = getattr(self._deadlines, phase)
            self._timer = self.loop.call_later(seconds, self._expire, phase)

    def _expire(self, phase: Phase) -> None:
        if phase == "body" and self.flow.read_paused:
            # The application has not read the received data yet, so it is late, not the client.
            self._time(phase, self.cycle)
            return
        if phase != "idle":
            self._respond_408(phase)
        self.drop(phase)

    def _respond_408(self, phase: Phase) -> None:
        """Answer 408, unless a response has begun or no data arrived."""
        asked = phase == "body" or bool(self.conn.trailing_data[0])
        if not asked or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        seconds: float = getattr(self._deadlines, phase)
        response = error_response(
            408,
            "timeout",
            f"the {phase} of the request did not arrive within {seconds:g} s",
            "send the request without pauses",
        )
        given = {**HEADERS, "connection": "close"}
        headers = [*response.raw_headers, *((name.encode(), value.encode()) for name, value in given.items())]
        body = bytes(response.body)
        for event in (
            h11.Response(status_code=408, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if phase == "body":
            # Tell the application that the client has disconnected, so that it does not answer too.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
