"""Streams of runs: each carries one request at a time to the broker, and its answer back."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import httpcore

from worker.addresses import NotPublic
from worker.connections import IdleConnections, PooledConnection
from worker.features.egress.attempts import MAX_STREAMS, ServedAttempt, TokenMissing, Totals
from worker.features.egress.injection import (
    Decoder,
    Headers,
    InjectedValue,
    Mask,
    NoDecoder,
    decoder_of,
    inject,
)
from worker.features.egress.network import Pools
from worker.features.egress.pacing import Slot
from worker.features.egress.requests import NO_LEASE, RequestRefused, RunRequest, read_request, shown
from worker.guard.urls import Origin
from worker.handlers.frames import (
    ANSWER,
    DATA,
    END,
    FAILED,
    HEAD,
    SENDING,
    BrokenFrame,
    Frame,
    Frames,
    data_frames,
    frame,
    json_frame,
)
from worker.model.egress import denial

# Bytes of a body that may wait to be sent, before its stream is read no further.
UNSENT = 128 * 1024
# The same for all streams of an attempt together.
UNSENT_OF_ATTEMPT = 1024 * 1024
# Seconds that a request with leave to send may wait for the next part of its body: others may wait for leave.
LONGEST_PART = 60.0
# Bytes of an answer that are collected in one turn of the loop, and that wait while the run does not read.
TOGETHER = 32 * 1024
# Times that a request connects for which leave to send has ended meanwhile.
TRIES = 5
# Of an answer, which the broker frames again.
_OF_CONNECTION = frozenset([b"connection", b"keep-alive", b"transfer-encoding", b"trailer", b"upgrade"])
_OF_BODY = frozenset(
    [
        *(b"content-length", b"content-encoding", b"content-md5", b"etag"),
        *(b"digest", b"content-digest", b"repr-digest"),
    ]
)
# Not in the headers of a request whose answer is masked: a range may have only a part of a value.
_NOT_MASKED = frozenset([b"accept-encoding", b"range", b"if-range"])


class Broker(Protocol):
    """What streams need of the broker."""

    pools: Pools

    def may_send(self) -> bool:
        """Whether the worker's lease holds."""

    async def admit(self, attempt: ServedAttempt, origin: Origin) -> Slot:
        """Wait for the limits of an origin. Raises RequestRefused."""

    def answered(self, attempt: ServedAttempt, request: RunRequest, status: int, headers: Headers) -> None:
        """Take what an answer says of the limits of its service."""

    def denied(self, attempt: ServedAttempt, origin: str, reason: str) -> None:
        """Report a request that is not sent."""

    def sent(
        self, attempt: ServedAttempt, request: RunRequest, began: int, status: int | None, error: str
    ) -> None:
        """Report a request for its trace; `began` in nanoseconds since 1970."""


class RunStream(asyncio.Protocol):
    """One stream of a run."""

    _transport: asyncio.Transport

    def __init__(self, broker: Broker, attempt: ServedAttempt) -> None:
        self._broker = broker
        self._attempt = attempt
        self._frames = Frames()
        self._task: asyncio.Task[None] | None = None
        self._body: deque[bytes] = deque()
        self._size = 0
        self._body_ended = True
        self._unsent = bytearray()
        self._is_full = False
        # Waits for a frame of the body, or until the run has read.
        self._waiter: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._task is not None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._attempt.stopped or len(self._attempt.streams) >= MAX_STREAMS:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(TOGETHER)
        self._attempt.streams[self] = None

    def data_received(self, data: bytes) -> None:
        try:
            for found in self._frames.feed(data):
                self._take(found)
        except BrokenFrame:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._attempt.streams.pop(self, None)
        self._drop_body()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._wake()

    def close(self) -> None:
        """Close it now, with the connection of its request."""
        self._attempt.streams.pop(self, None)
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()

    def _take(self, found: Frame) -> None:
        if found.kind == HEAD and self._task is None:
            self._body_ended = False
            self._task = asyncio.create_task(self._serve(found))
        elif found.kind == DATA and not self._body_ended:
            self._body.append(found.body)
            self._size += len(found.body)
            self._attempt.unsent += len(found.body)
            if self._size > UNSENT or self._attempt.unsent > UNSENT_OF_ATTEMPT:
                self._transport.pause_reading()
        elif found.kind == END and not self._body_ended:
            self._body_ended = True
        else:
            raise BrokenFrame("a frame out of its order")
        self._wake()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body of the request, as it arrives."""
        while True:
            while self._body:
                part = self._body.popleft()
                self._size -= len(part)
                self._attempt.unsent -= len(part)
                if self._size <= UNSENT // 2:
                    self._transport.resume_reading()
                yield part
            if self._body_ended:
                return
            await self._woken()

    def _drop_body(self) -> None:
        self._body.clear()
        self._attempt.unsent -= self._size
        self._size = 0

    def write_now(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    async def write(self, data: bytes) -> None:
        """Send data to the run, together with what follows at once; waits while it does not read."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += data
        if len(self._unsent) > TOGETHER:
            self._flush()
        while self._is_full:
            await self._woken()

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _flush(self) -> None:
        # Each write wakes the run, which costs both more than the rest of it.
        if self._unsent:
            data, self._unsent = self._unsent, bytearray()
            self._transport.write(data)

    # A request

    async def _serve(self, head: Frame) -> None:
        failure: Mapping[str, Any] | None = None
        try:
            await _Exchange(self._broker, self._attempt, self).run(head)
        except (RequestRefused, NotPublic, TokenMissing, BrokenFrame, httpcore.TimeoutException) as error:
            failure = failure_of(error)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            failure = failure_of(error)
        except (zlib.error, ValueError) as error:
            failure = {"error": "RemoteProtocolError", "message": f"the answer cannot be read: {error}"}
        except Exception as error:  # the run must not wait for an answer that never comes
            failure = {"error": "ReadError", "message": f"the request has failed: {type(error).__name__}"}
        finally:
            # Its frames, and so its exception, have values in them.
            self._task = None
        # Only now: the run may send the next head at once.
        self.write_now(frame(END) if failure is None else json_frame(FAILED, failure))
        if not self._body_ended:
            # No one wants the rest of the body.
            self._attempt.streams.pop(self, None)
            self._transport.close()
        self._drop_body()


def failure_of(error: Exception) -> dict[str, Any]:
    """An error as a FAILED frame says it; see `handlers.brokered`."""
    match error:
        case RequestRefused():
            return {"error": error.kind, "message": str(error), "retry_after": error.retry_after}
        case NotPublic():
            return {"error": "address", "message": str(error)}
        case TokenMissing():
            more = {"code": error.code, "retry_after": error.retry_after}
            return {"error": "no_token", "message": str(error), **more}
    name, message = type(error).__name__, str(error)
    if isinstance(error, httpcore.ProtocolError):
        message = "the exchange does not keep to HTTP/1.1"  # theirs quotes what was sent or received
    # Errors of httpcore and httpx have the same names.
    return {"error": name, "message": message or name}


@dataclass(frozen=True, slots=True)
class _Sending:
    """A request with its values in `headers`; `masked` if its answer is."""

    request: RunRequest
    headers: Headers
    masked: bool
    authorized: bool


class _Exchange:
    """One request of an attempt and its answer."""

    def __init__(self, broker: Broker, attempt: ServedAttempt, run: RunStream) -> None:
        self._broker = broker
        self._attempt = attempt
        self._run = run

    async def run(self, head: Frame) -> None:
        """Send the request and pass on its answer. Raises what `RunStream` knows."""
        request, attempt, broker = read_request(head.fields()), self._attempt, self._broker
        try:
            attempt.check(request)
        except RequestRefused:
            attempt.of(request.origin).denied += 1
            broker.denied(attempt, shown(request.origin), denial(attempt.gate.deniers(request.origin)))
            raise
        values, tokens = await attempt.values(request)
        adds, masked = attempt.adds_token(request.origin), attempt.is_masked(request.origin)
        headers, authorized = prepared(request, values, tokens, adds=adds, masked=masked)
        sending = _Sending(request, headers, masked, authorized)
        totals, began, status, failed = attempt.of(request.origin), time.time_ns(), None, ""
        try:
            status = await self._sent(sending, totals)
        except NotPublic as error:
            totals.denied += 1
            failed = "NotPublic"
            broker.denied(attempt, shown(request.origin), str(error))
            raise
        except BaseException as error:
            failed = type(error).__name__
            raise
        finally:
            if attempt.traced:
                broker.sent(attempt, request, began, status, failed)

    async def _sent(self, sending: _Sending, totals: Totals) -> int:
        request, headers, attempt = sending.request, sending.headers, self._attempt
        url, body = request.url(), self._counted(totals)
        pool_of = partial(self._broker.pools.of, attempt.org, checked=attempt.checks_address(request))
        names = {name.lower() for name, _ in headers}
        if b"content-length" not in names and (first := await anext(body, None)) is not None:
            headers.append((b"Transfer-Encoding", b"chunked"))
            body = _with(first, body)
        sent = httpcore.Request(
            request.method, url, headers=headers, content=body, extensions={"timeout": dict(request.timeout)}
        )
        connection, slot = await self._ready(pool_of(), sent, request.origin, totals)
        try:
            if attempt.stopped or not self._broker.may_send():
                raise RequestRefused("ConnectError", NO_LEASE)
            self._run.write_now(frame(SENDING))
            totals.requests += 1
            totals.bytes_out += sum(len(name) + len(value) + 4 for name, value in headers)
            totals.bytes_out += len(request.target)
            response = await connection.handle_async_request(sent)
            try:
                await self._passed(sending, response, totals)
            finally:
                await response.aclose()
        except BaseException:
            await connection.aclose()
            raise
        finally:
            slot.release()
        # The one of before may be forgotten: its org may have had no idle connection for a moment.
        await pool_of().keep(url, connection)
        return response.status

    async def _ready(
        self, pool: IdleConnections, sent: httpcore.Request, origin: Origin, totals: Totals
    ) -> tuple[PooledConnection, Slot]:
        """An open connection, and leave to send now.

        Leave ends within a second, and with a pause that the service asks for. If it ends while connecting,
        other leave is needed: a service would get the requests of many such connections at once.
        """
        connection: PooledConnection | None = None
        slot: Slot | None = None
        try:
            for _ in range(TRIES):
                slot = await self._broker.admit(self._attempt, origin)
                totals.waited += slot.waited
                if connection is not None and not connection.is_usable():
                    await connection.aclose()
                    connection = None
                connection = connection or await pool.take(sent.url)
                await connection.open(sent)
                if slot.may_send():
                    return connection, slot
                slot.release()
            raise RequestRefused("ConnectTimeout", "connecting takes longer than a limit lets a request wait")
        except BaseException:
            if slot is not None:
                slot.release()
            if connection is not None:
                await connection.aclose()
            raise

    async def _passed(self, sending: _Sending, response: httpcore.Response, totals: Totals) -> None:
        """Pass on an answer, with the values of its origin masked."""
        request = sending.request
        totals.answered(response.status)
        totals.bytes_in += sum(len(name) + len(value) + 4 for name, value in response.headers)
        self._broker.answered(self._attempt, request, response.status, response.headers)
        headers = [(name, value) for name, value in response.headers if name.lower() not in _OF_CONNECTION]
        decoder: Decoder = NoDecoder()
        forms = partial(self._attempt.masks, request.origin)
        mask = Mask(forms) if sending.masked else None
        if mask is not None:
            encoding = b",".join(value for name, value in headers if name.lower() == b"content-encoding")
            if (found := decoder_of(encoding)) is None:
                raise RequestRefused("RemoteProtocolError", "an encoding that cannot be masked")
            decoder = found
            if request.method != "HEAD":
                headers = [(name, value) for name, value in headers if name.lower() not in _OF_BODY]
            headers = forms().headers(headers)
        shown_headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        answer = {"status": response.status, "headers": shown_headers, "authorized": sending.authorized}
        await self._run.write(json_frame(ANSWER, answer))
        async for part in cast(AsyncIterator[bytes], response.stream):
            totals.bytes_in += len(part)
            for decoded in decoder.feed(part):
                for data in data_frames(decoded if mask is None else mask.feed(decoded)):
                    await self._run.write(data)
        if mask is not None:
            await self._run.write(b"".join(data_frames(mask.end())))

    async def _counted(self, totals: Totals) -> AsyncIterator[bytes]:
        parts = self._run.parts()
        while True:
            try:
                async with asyncio.timeout(LONGEST_PART):
                    part = await anext(parts, None)
            except TimeoutError:
                raise httpcore.WriteTimeout("the run sends no more of the body") from None
            if part is None:
                return
            totals.bytes_out += len(part)
            yield part


def prepared(
    request: RunRequest, values: list[InjectedValue], tokens: list[InjectedValue], *, adds: bool, masked: bool
) -> tuple[Headers, bool]:
    """The headers to send, and whether the org's token was added; `masked` if the answer will be.

    If it `adds` one, that is the first of the tokens.
    """
    headers = inject(request.headers, [*values, *tokens])
    authorized = adds and not any(name.lower() == b"authorization" for name, _ in headers)
    if authorized:
        headers.append((b"Authorization", b"Bearer " + tokens[0].text))
    if masked:
        headers = [(name, value) for name, value in headers if name.lower() not in _NOT_MASKED]
        headers.append((b"Accept-Encoding", b"identity"))
    return headers, authorized


async def _with(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part
