"""Control: a host's requests to the attempt API of its workers, any of which may answer.

Two clients share one `Controls`: an async one for the loops, and a blocking one for the heartbeat's thread,
whose deadline leaves time for a second try before the runs freeze.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

from worker.clock import Clock
from worker.errors import AccessDenied, TokenError, Unavailable, WorkerError
from worker.features.hosts import wire
from worker.handlers.blocking import finish
from worker.handlers.steps import StepError
from worker.outbound import OutboundConnections
from worker.telemetry.connectivity import Connectivity
from worker.telemetry.events import emit

CONNECT_SECONDS = 3.0
CALL_SECONDS = 10.0
# Maximum bytes of an answer: one of `take` has the work of several runs.
ANSWER_LIMIT = 64 * 1024 * 1024
# Seconds that an idle connection is kept; the listener closes it later.
KEPT = 60.0

Message = dict[str, Any]
# Status, body, and the seconds of Retry-After.
Reply = tuple[int, bytes, float | None]


class ControlUnavailable(Unavailable):
    """No worker answered a host's request."""

    code = "control_unavailable"
    usual_fix = "check that a worker with [attempts] listen runs, and that [host] control names its address"


class ControlDenied(ControlUnavailable):
    """The workers do not accept the host's token or incarnation. Until it is renewed, nothing else helps."""

    code = "control_denied"
    usual_fix = "make another token with `python -m worker hosts add`, and put it into the host's token_file"


class Controls:
    """The workers' addresses and how to reach them: the token, the incarnation, and the address in use."""

    def __init__(
        self, urls: Sequence[str], token: str, clock: Clock, *, context: ssl.SSLContext | None = None
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.clock = clock
        self.context = context
        self._token = token
        self.incarnation = ""
        self._place = 0
        self._lock = threading.Lock()
        # Called, in any thread, with the address of a worker that does not answer.
        self.on_silence: Callable[[str], object] = lambda url: None
        self.connectivity = Connectivity(clock, on_lost=_report_lost, on_back=_report_back)

    def transport(self) -> httpx.AsyncBaseTransport:
        """How the loops reach the workers."""
        return OutboundConnections(self.context, kept=KEPT)

    def blocking_transport(self) -> httpx.BaseTransport:
        """How the heartbeat reaches them."""
        return httpx.HTTPTransport(verify=self.context or True, trust_env=False)

    def headers(self) -> dict[str, str]:
        named = {wire.INCARNATION: self.incarnation} if self.incarnation else {}
        # A compressed answer could exceed any limit while it is read.
        return {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "identity", **named}

    def in_order(self) -> list[str]:
        """The addresses, the one in use first."""
        return [*self.urls[self._place :], *self.urls[: self._place]]

    def leave(self, url: str, *, silent: bool = False) -> None:
        """Use the next address from now on, unless another caller has left this one already.

        A worker that is `silent` does not answer what is open there either.
        """
        with self._lock:
            if self.urls[self._place] == url:
                self._place = (self._place + 1) % len(self.urls)
        if silent:
            self.on_silence(url)


class AsyncControl:
    """Calls of the loops. One that waits at a worker which the heartbeat finds silent ends at once."""

    def __init__(self, controls: Controls, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._controls = controls
        self._transport = transport or controls.transport()
        # The calls that wait for an answer, and those of them whose worker is silent.
        self._open: dict[asyncio.Task[Any], str] = {}
        self._silent: set[asyncio.Task[Any]] = set()
        loop = asyncio.get_running_loop()

        def end_calls(url: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._end_calls, url)

        controls.on_silence = end_calls

    async def call(
        self,
        name: str,
        message: Mapping[str, Any] | bytes,
        *,
        seconds: float = CALL_SECONDS,
        repeat: bool = True,
    ) -> Message:
        """The answer of the first worker that gives one; each has `seconds`. Bytes are a message as JSON.

        Without `repeat` no worker gets the request after another one may have carried it out.

        Raises:
            ControlDenied: the token or the incarnation is not accepted.
            ControlUnavailable: no worker answers.
            WorkerError, StepError: as the worker that answers raised it.
        """
        content = encode(message) if isinstance(message, Mapping) else message

        async def send(url: str, left: int) -> Reply:
            return await self._open_call(url, name, content, seconds)

        return await _answered(self._controls, name, send, repeat=repeat)

    async def aclose(self) -> None:
        self._controls.on_silence = lambda url: None
        await self._transport.aclose()

    async def _open_call(self, url: str, name: str, content: bytes, seconds: float) -> Reply:
        """As `_send`; raises ReadTimeout if the worker turns out to be silent."""
        task = asyncio.current_task()
        if task is None:
            return await self._send(url, name, content, seconds)
        self._open[task] = url
        try:
            return await self._send(url, name, content, seconds)
        except asyncio.CancelledError:
            if task in self._silent and task.uncancel() == 0:
                raise httpx.ReadTimeout("the worker does not answer others either") from None
            raise
        finally:
            del self._open[task]
            self._silent.discard(task)

    def _end_calls(self, url: str) -> None:
        for task, place in self._open.items():
            if place == url and task not in self._silent:
                self._silent.add(task)
                task.cancel()

    async def _send(self, url: str, name: str, content: bytes, seconds: float) -> Reply:
        request = _request(self._controls, url, name, content, seconds)
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.RemoteProtocolError:
            # A kept connection that the other side has just closed.
            request = _request(self._controls, url, name, content, seconds)
            response = await self._transport.handle_async_request(request)
        try:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise httpx.ReadError("the answer is encoded")
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > ANSWER_LIMIT:
                    raise httpx.ReadError("the answer is too large")
            return response.status_code, bytes(body), _retry_after(response)
        finally:
            await response.aclose()


class BlockingControl:
    """Calls of the heartbeat, over a connection of its own; all tries together take `deadline` seconds."""

    def __init__(
        self, controls: Controls, deadline: float, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._controls = controls
        self.deadline = deadline
        self._transport = transport or controls.blocking_transport()

    def call(self, name: str, message: Mapping[str, Any]) -> Message:
        """As `AsyncControl.call`."""
        content, monotonic = encode(message), self._controls.clock.monotonic
        ends_at = monotonic() + self.deadline

        async def send(url: str, left: int) -> Reply:
            seconds = max((ends_at - monotonic()) / left, 0.01)
            response = self._transport.handle_request(_request(self._controls, url, name, content, seconds))
            body = response.read()
            response.close()
            return response.status_code, body, _retry_after(response)

        return finish(_answered(self._controls, name, send, silences=True))

    def close(self) -> None:
        self._transport.close()


async def _answered(
    controls: Controls,
    name: str,
    send: Callable[[str, int], Awaitable[Reply]],
    *,
    repeat: bool = True,
    silences: bool = False,
) -> Message:
    """As `AsyncControl.call`. `send` gets an address and how many are left with it; it may block.

    A worker that does not answer a call that `silences` is silent for the others, too.
    """
    failure: WorkerError | StepError = ControlUnavailable(f"no worker answers {name}")
    urls = controls.in_order()
    for place, url in enumerate(urls):
        started = controls.connectivity.started()
        try:
            reply = await send(url, len(urls) - place)
        except (httpx.TransportError, OSError) as error:
            kind = type(error).__name__
            failure = ControlUnavailable(f"no worker answers {name}: {kind}")
            controls.leave(url, silent=silences)
            controls.connectivity.failed(kind, started)
            if not repeat and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                break
            continue
        controls.connectivity.answered(started)
        answer = _read(*reply)
        if isinstance(answer, dict):
            return answer
        failure = answer
        if not isinstance(answer, Unavailable) or isinstance(answer, ControlDenied):
            break
        controls.leave(url)
    raise failure


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _request(controls: Controls, url: str, name: str, content: bytes, seconds: float) -> httpx.Request:
    connect = min(CONNECT_SECONDS, seconds)
    limits = {"connect": connect, "read": seconds, "write": seconds, "pool": connect}
    headers = {**controls.headers(), "Content-Type": "application/json"}
    return httpx.Request(
        "POST", f"{url}{wire.PREFIX}/{name}", headers=headers, content=content, extensions={"timeout": limits}
    )


def _read(status: int, body: bytes, retry_after: float | None) -> Message | WorkerError | StepError:
    """The JSON object of a 200, or the error of any other answer."""
    message: Any
    try:
        message = json.loads(body)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        # Another service, or a proxy before the worker.
        return ControlUnavailable(
            f"a worker answered {status} without a JSON object", retry_after=retry_after
        )
    if status == 200:
        return dict(message)
    error = wire.error_of(message, retry_after)
    if status == 429 or (status >= 500 and not isinstance(error, Unavailable | TokenError)):
        return ControlUnavailable(str(error), retry_after=retry_after)
    # The same status is that of an org without a token, whose error has another code.
    if status in (401, 403) and isinstance(error, WorkerError) and error.code in _DENIED:
        return ControlDenied(error.message)
    return error


# The codes of a problem with the host's token or incarnation.
_DENIED = (TokenError.code, AccessDenied.code)


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _report_lost(error: str) -> None:
    emit("control.lost", error=error)


def _report_back(seconds: float) -> None:
    emit("control.back", seconds=seconds)
