"""Connections: how long each may keep the server waiting, and how many there may be, in all and per address.

uvicorn has no deadline for headers and bodies, and at its limit it answers 503 to everyone,
health checks included. Here the connection that has waited longest makes room for a new one,
so idle and slow clients never keep anybody out.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Literal

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from worker.telemetry.events import emit
from worker.web.clients import Addresses, counted_as
from worker.web.responses import HEADERS, error_answer

# Connections of one listener. MOST_REQUESTS in app.py is lower: the difference keeps health reachable
# while so many requests are being served.
MOST_CONNECTIONS = 600

# Errors alone: anyone could fill the log with uvicorn's warnings of invalid requests.
_log = logging.getLogger("uvicorn.error.requests")
_log.setLevel(logging.ERROR)

# What a connection waits for: the head of a request, the rest of its body, or the next request.
Phase = Literal["headers", "body", "idle"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a client may take.

    `headers` runs from the first byte of a request (of the first request: from the
    connection) to the end of its head, `body` from there to the end of its body, `idle`
    from a response to the next request. None runs while a response is made or sent.
    """

    headers: float = 5.0
    body: float = 10.0
    idle: float = 75.0


class _Group:
    """The connections under one limit; `waiting` holds those that wait for their client, longest first."""

    __slots__ = ("count", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: dict[Connection, None] = {}


class Connections:
    """The open connections of one listener, at most `most`.

    At most `per_address` of them are of one address (0: no limit), or of one /64 network
    in IPv6; trusted proxies are exempt, since many clients come through one.
    """

    def __init__(
        self, per_address: int = 0, addresses: Addresses | None = None, *, most: int = MOST_CONNECTIONS
    ) -> None:
        self._per_address = per_address
        self._addresses = addresses or Addresses()
        self._most = most
        self._all = _Group()
        self._by_address: dict[str, _Group] = {}
        self._groups: dict[Connection, tuple[str, _Group | None]] = {}

    def __len__(self) -> int:
        return self._all.count

    def add(self, connection: Connection, address: str) -> bool:
        """Count a new connection; False if there is no room, since all others are being served."""
        own = None
        key = counted_as(address)
        if self._per_address and not self._addresses.trusts(address):
            own = self._by_address.get(key) or _Group()
            if own.count >= self._per_address and not _make_room(own, "address"):
                return False
        if self._all.count >= self._most and not _make_room(self._all, "crowded"):
            return False
        self._groups[connection] = (key, own)
        self._all.count += 1
        if own is not None:
            own.count += 1
            self._by_address[key] = own
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed; one that is not counted is ignored."""
        found = self._groups.pop(connection, None)
        if found is None:
            return
        key, own = found
        self._all.count -= 1
        self._all.waiting.pop(connection, None)
        if own is not None:
            own.count -= 1
            own.waiting.pop(connection, None)
            if not own.count:
                del self._by_address[key]

    def waits(self, connection: Connection, waiting: bool) -> None:
        """Record that a connection waits for its client from now on, or is being served."""
        found = self._groups.get(connection)
        for group in (self._all, found[1]) if found is not None else ():
            if group is not None:
                group.waiting.pop(connection, None)
                if waiting:
                    group.waiting[connection] = None

    def close(self) -> None:
        """Close all of them at once."""
        for connection in list(self._groups):
            connection.drop("stopped")


def _make_room(group: _Group, reason: str) -> bool:
    """Close the connection of the group that has waited longest, if one waits at all."""
    longest = next(iter(group.waiting), None)
    if longest is None:
        return False
    longest.drop(reason)
    return True


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
        deadlines: Deadlines,
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
        # uvicorn raises where a response has begun already: an invalid body after an early 401.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.drop("invalid")

    def drop(self, reason: str) -> None:
        """Close the connection now, whatever has not been sent."""
        self._forget()
        if not self.transport.is_closing():
            emit("web.connection_closed", reason=reason)
        self.transport.abort()

    def _forget(self) -> None:
        self._time(None, None)
        self._open.remove(self)

    def _look(self) -> None:
        """Set the timer for what the connection waits for now; one that is set for it already goes on."""
        # uvicorn's own timer is not set where a body ends after its response.
        self._unset_keepalive_if_required()
        phase = None if self.transport.is_closing() else self._phase()
        # A client that does not take its response may make room too; the kernel bounds how long that lasts.
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
            # What came has not been taken by the application yet: it is late, not the client.
            self._time(phase, self.cycle)
            return
        if phase != "idle":
            self._answer_408(phase)
        self.drop(phase)

    def _answer_408(self, phase: Phase) -> None:
        """Say why, unless a response has begun or nothing was asked."""
        asked = phase == "body" or bool(self.conn.trailing_data[0])
        if not asked or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        seconds: float = getattr(self._deadlines, phase)
        answer = error_answer(
            408,
            "timeout",
            f"the {phase} of the request did not arrive within {seconds:g} s",
            "send the request without pauses",
        )
        given = {**HEADERS, "connection": "close"}
        headers = [*answer.raw_headers, *((name.encode(), value.encode()) for name, value in given.items())]
        body = bytes(answer.body)
        for event in (
            h11.Response(status_code=408, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if phase == "body":
            # The application must not answer as well: it sees a disconnected client.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
