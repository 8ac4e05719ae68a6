"""The network of `ctx.http` where there is a broker: it opens the connections, and has the token and secrets.

A run has one descriptor to it, its door. Each request passes a stream of its own over the door, so that a
broker that starts again, or a process that the handler forks, does no harm: nothing is shared but the door.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import httpx

from worker.errors import Unavailable
from worker.guard.urls import DEFAULT_PORTS
from worker.handlers.blocking import finish
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
from worker.handlers.given import Connect
from worker.handlers.public_http import AddressRefused
from worker.handlers.results import EgressDenied, PermanentError, RateLimited

# Idle streams of one client.
MAX_IDLE = 20
# Times that a request is passed again that no broker has sent, and seconds before that, at first and at
# most: a broker that has ended is started again within one.
AGAIN = 10
PAUSE = 0.02
LONGEST_PAUSE = 1.0
_RECEIVE = 65_536
# Errors of connections, by httpx's names, which httpcore has too.
NAMES = frozenset(
    [
        *("ConnectError", "ConnectTimeout", "PoolTimeout", "ReadError", "ReadTimeout", "WriteError"),
        *("WriteTimeout", "RemoteProtocolError", "LocalProtocolError", "UnsupportedProtocol"),
    ]
)


class BrokeredTransport(httpx.AsyncBaseTransport):
    """Sends requests by the broker; with `public` to public addresses and listed origins only."""

    def __init__(self, connect: Connect, *, public: bool = False) -> None:
        self._exchanges = _Exchanges(lambda: _AsyncStream(connect()), public=public)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = cast(httpx.AsyncByteStream, request.stream)
        with _errors_of(request):
            stream, answer = await self._exchanges.send(request, body.__aiter__)
        return _response(answer, _AsyncBody(self._exchanges, stream))

    async def aclose(self) -> None:
        self._exchanges.close()


class BlockingBrokeredTransport(httpx.BaseTransport):
    """The same for a handler that blocks."""

    def __init__(self, connect: Connect, *, public: bool = False) -> None:
        self._exchanges = _Exchanges(lambda: _BlockingStream(connect()), public=public)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = cast(httpx.SyncByteStream, request.stream)

        async def parts() -> AsyncIterator[bytes]:
            for part in body:
                yield part

        with _errors_of(request):
            stream, answer = finish(self._exchanges.send(request, parts))
        return _response(answer, _BlockingBody(self._exchanges, stream))

    def close(self) -> None:
        self._exchanges.close()


class _Gone(Exception):
    """The broker has closed a stream; `unsent` if it had sent nothing."""

    def __init__(self, *, unsent: bool) -> None:
        super().__init__("the broker has ended")
        self.unsent = unsent


class _Failed(Exception):
    """The broker says that a request has failed; becomes the exception that a handler expects."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields["message"])
        self.fields = fields


class _Stream(Protocol):
    async def send(self, data: bytes) -> None: ...
    async def frame(self) -> Frame: ...
    async def wait(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class _AsyncStream:
    """A stream on the running loop."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._ready: list[Frame] = []

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def frame(self) -> Frame:
        """The next frame. Raises EOFError at the end of the stream, OSError, and BrokenFrame."""
        while not self._ready:
            _fill(self._ready, self._frames, await self._loop.sock_recv(self._socket, _RECEIVE))
        return self._ready.pop(0)

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def close(self) -> None:
        self._socket.close()


class _BlockingStream:
    """The same for a handler that blocks."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._frames = Frames()
        self._ready: list[Frame] = []

    async def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    async def frame(self) -> Frame:
        while not self._ready:
            _fill(self._ready, self._frames, self._socket.recv(_RECEIVE))
        return self._ready.pop(0)

    async def wait(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - run by `finish`

    def close(self) -> None:
        self._socket.close()


def _fill(ready: list[Frame], frames: Frames, data: bytes) -> None:
    if not data:
        raise EOFError
    ready += frames.feed(data)


class _Exchanges:
    """Exchanges on streams, which are used again once an answer was read to its end; thread-safe."""

    def __init__(self, open_stream: Callable[[], _Stream], *, public: bool) -> None:
        self._open = open_stream
        self._public = public
        self._lock = threading.Lock()
        self._idle: list[_Stream] = []
        self._owner = os.getpid()

    async def send(
        self, request: httpx.Request, parts: Callable[[], AsyncIterator[bytes]]
    ) -> tuple[_Stream, Mapping[str, Any]]:
        """The stream whose answer has begun, and the answer's head."""
        # A body that is streamed is gone after it was sent.
        repeatable = isinstance(request.stream, httpx.ByteStream)
        for fresh in (False, True):
            stream, answer = await self._passed(request, parts, repeatable, fresh=fresh)
            # The broker had added the org's token. Another call may have renewed it already.
            if answer["status"] != httpx.codes.UNAUTHORIZED or not answer["authorized"] or not repeatable:
                break
            if not fresh:
                await self._discard(stream)
        return stream, answer

    def keep(self, stream: _Stream) -> None:
        """Take back a stream whose answer was read to its end."""
        with self._lock:
            if len(self._idle) < MAX_IDLE and self._owner == os.getpid():
                self._idle.append(stream)
                return
        stream.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    async def _discard(self, stream: _Stream) -> None:
        while (await _next(stream, sent=True)).kind == DATA:
            pass
        self.keep(stream)

    async def _passed(
        self,
        request: httpx.Request,
        parts: Callable[[], AsyncIterator[bytes]],
        repeatable: bool,
        *,
        fresh: bool,
    ) -> tuple[_Stream, Mapping[str, Any]]:
        """Pass a request to the broker, and again if one ended before it sent anything."""
        pause = PAUSE
        for left in reversed(range(AGAIN)):
            stream = self._take()
            try:
                return stream, await self._exchange(stream, request, parts, fresh=fresh)
            except _Gone as gone:
                stream.close()
                if not (gone.unsent and repeatable and left):
                    raise
                await stream.wait(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            except BaseException:
                stream.close()
                raise
        raise AssertionError("not reached")

    def _take(self) -> _Stream:
        with self._lock:
            if self._owner != os.getpid():  # a process that the handler forked shares no stream
                self._owner, self._idle = os.getpid(), []
            return self._idle.pop() if self._idle else self._open()

    async def _exchange(
        self,
        stream: _Stream,
        request: httpx.Request,
        parts: Callable[[], AsyncIterator[bytes]],
        *,
        fresh: bool,
    ) -> Mapping[str, Any]:
        head = _head(request, public=self._public, fresh=fresh)
        try:
            pending = json_frame(HEAD, head)
            async for part in parts():
                for data in data_frames(part):
                    await stream.send(pending)
                    pending = data
            await stream.send(pending + frame(END))
        except OSError:
            pass  # the broker may have said why
        sent = False
        while (answer := await _next(stream, sent=sent)).kind == SENDING:
            sent = True
        if answer.kind != ANSWER:
            raise BrokenFrame("not an answer")
        return answer.fields()


async def _next(stream: _Stream, *, sent: bool) -> Frame:
    """The next frame of an answer. Raises what the broker says has failed."""
    try:
        found = await stream.frame()
    except (EOFError, OSError) as error:
        raise _Gone(unsent=not sent) from error
    if found.kind == FAILED:
        raise _Failed(found.fields())
    return found


def _head(request: httpx.Request, *, public: bool, fresh: bool) -> dict[str, Any]:
    url = request.url
    return {
        "method": request.method,
        "scheme": url.scheme,
        "host": url.raw_host.decode("ascii"),
        "port": url.port or DEFAULT_PORTS.get(url.scheme, 0),
        "target": url.raw_path.decode("ascii"),
        "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw],
        "timeout": request.extensions.get("timeout", {}),
        "public": public,
        "fresh": fresh,
    }


@contextmanager
def _errors_of(request: httpx.Request) -> Iterator[None]:
    """Raise what a handler expects of an HTTP client."""
    try:
        yield
    except _Gone as gone:
        if gone.unsent:
            raise httpx.ConnectError(str(gone), request=request) from gone
        raise httpx.ReadError(str(gone), request=request) from gone
    except OSError as error:  # the door is closed: the attempt has ended
        raise httpx.ConnectError(f"the broker cannot be reached: {error}", request=request) from error
    except BrokenFrame as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from error
    except _Failed as failed:
        raise _error_of(failed.fields, request) from None


def _error_of(fields: Mapping[str, Any], request: httpx.Request) -> Exception:
    kind, message = fields["error"], fields["message"]
    match kind:
        case "denied":
            return EgressDenied(message)
        case "address":
            return AddressRefused(request.url, message)
        case "limited":
            return RateLimited(fields["retry_after"], message)
        case "no_token":
            error = Unavailable(message)
            error.code, error.retry_after = fields["code"], fields["retry_after"]
            return error
        case str() if kind in NAMES:
            found: type[httpx.TransportError] = getattr(httpx, kind)
            return found(message, request=request)
    return PermanentError(message)


def _response(answer: Mapping[str, Any], stream: Any) -> httpx.Response:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer["headers"]]
    return httpx.Response(answer["status"], headers=headers, stream=stream)


class _Body:
    """The body of an answer. Its stream is used again only if the body was read to its end."""

    def __init__(self, exchanges: _Exchanges, stream: _Stream) -> None:
        self._exchanges = exchanges
        self._stream = stream
        self._ended = False

    async def _parts(self) -> AsyncIterator[bytes]:
        try:
            while (found := await _next(self._stream, sent=True)).kind == DATA:
                yield found.body
        except _Gone as gone:
            raise httpx.ReadError(str(gone)) from gone
        except OSError as error:
            raise httpx.ReadError(str(error)) from error
        except _Failed as failed:
            kind = failed.fields["error"]
            found_kind = getattr(httpx, kind) if kind in NAMES else httpx.ReadError
            raise found_kind(failed.fields["message"]) from None
        self._ended = True

    def _close(self) -> None:
        if self._ended:
            self._ended = False  # a second call must not give it back again
            self._exchanges.keep(self._stream)
        else:
            with suppress(OSError):
                self._stream.close()


class _AsyncBody(_Body, httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._parts():
            yield part

    async def aclose(self) -> None:
        self._close()


class _BlockingBody(_Body, httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        parts = self._parts()
        while True:
            try:
                yield finish(parts.__anext__())  # type: ignore[arg-type]
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._close()
