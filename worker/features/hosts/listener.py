"""The HTTP side of the attempt API: `POST /attempts/v1/CALL` for hosts, with bodies of JSON."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from worker.clock import Clock
from worker.errors import AccessDenied, Busy, LeaseLost, TokenError, TooManyRequests, WorkerError
from worker.features.hosts.attempt_api import AttemptApi
from worker.features.hosts.checker import Checker, Message, joined
from worker.features.hosts.wire import BODY_BYTES, INCARNATION, OWN_BYTES, PREFIX, STEP, VERSIONS, Malformed
from worker.guard import bearer_token
from worker.handlers.steps import StepError
from worker.kit.web.clients import Addresses, Buckets
from worker.kit.web.connections import ClientDeadlines
from worker.kit.web.responses import ErrorMiddleware, error_response, json_response
from worker.model.runs.hosts import HostCaller
from worker.pacing import Turns

# Calls that are answered at a time, also of one token: each host has a few open.
MAX_CALLS = 2000
MAX_CALLS_OF_A_TOKEN = 500
# Bodies above OWN_BYTES that are held at a time, one for each token, and the seconds that one waits for that.
LARGE_AT_ONCE = 4
LARGE_WAIT = 5.0
# Bytes of bodies whose calls begin in one iteration of the loop; each call counts for at least A_CALL.
TURN = 32 * 1024
A_CALL = 1024
# Tokens of no host that one address may send at once, and a second.
BURST = 20
RATE = 5
# Seconds that the body of a call may take.
DEADLINES = ClientDeadlines(body=30.0)
NOT_NOW = "the worker is starting or stopping"
SOON = "try again in a moment"
NOT_READ = "the worker is still reading its own handlers"


class Attempts:
    """The routes of the attempt API. `api` is None while the worker has no incarnation that answers."""

    def __init__(self, clock: Clock, checker: Checker | None = None) -> None:
        self.api: AttemptApi | None = None
        # A worker that drains answers what runs on hosts ask for, but no longer gives out runs.
        self.draining = False
        # Until its own handlers are read, it takes in no host and no host's handlers. Those that it knows
        # go on: an entry point that hangs must not freeze their runs.
        self.reading = False
        self.checker = checker or Checker()
        self._calls: Counter[str] = Counter()
        self._large = LargeBodies()
        self._turns = Turns(TURN)
        self._addresses = Addresses()
        self._wrong = Buckets(clock, size=BURST, rate=RATE)

    def begin(self, api: AttemptApi | None) -> None:
        """Answer hosts for an incarnation, which has not read its own handlers yet."""
        self.api, self.draining, self.reading = api, False, True

    def catalogue_read(self) -> None:
        """The incarnation has read and stored its own handlers."""
        self.reading = False

    def app(self) -> ASGIApp:
        routes = [
            Route("/attempts", self._versions, methods=["GET"]),
            Route(f"{PREFIX}/{{call}}", self._call, methods=["POST"]),
        ]
        return ErrorMiddleware(Router(routes=routes, redirect_slashes=False))

    async def _versions(self, request: Request) -> Response:
        return json_response({"versions": list(VERSIONS)})

    async def _call(self, request: Request) -> Response:
        token = bearer_token(request.headers.get("authorization", ""))
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        try:
            with self._counted(digest):
                return await self._answer(request, digest)
        except TokenError as error:
            return _problem(error, 503 if error.transient else 422)
        except (WorkerError, StepError) as error:
            return _problem(
                error, next((status for kinds, status in _STATUS if isinstance(error, kinds)), 503)
            )

    @contextmanager
    def _counted(self, digest: str) -> Iterator[None]:
        """One more call, also of its token. Raises Busy."""
        if self._calls.total() >= MAX_CALLS or self._calls[digest] >= MAX_CALLS_OF_A_TOKEN:
            raise Busy(
                f"{MAX_CALLS} calls, or {MAX_CALLS_OF_A_TOKEN} of this token, are being answered", fix=SOON
            )
        self._calls[digest] += 1
        try:
            yield
        finally:
            self._calls[digest] -= 1
            if not self._calls[digest]:
                del self._calls[digest]

    async def _answer(self, request: Request, digest: str) -> Response:
        api, name = self.api, request.path_params["call"]
        if api is None or (self.draining and name in ("take", "register")):
            raise Busy(NOT_NOW, fix="ask another worker, or this one in a moment")
        if self.reading and name in ("register", "handlers"):
            raise Busy(NOT_READ, fix="ask another worker, or this one in a moment")
        client = self._addresses.client_of(request).key
        # A host with a wrong token must not keep others out that have the same address.
        if not api.knows(digest) and (seconds := self._wrong.wait(client)) > 0:
            raise TooManyRequests(
                "too many calls without the token of a host",
                fix="give the host a token of `python -m worker hosts add`, or wait",
                retry_after=seconds,
            )
        try:
            caller = await api.caller(digest, request.headers.get(INCARNATION), name)
        except TokenError as error:
            self._wrong.charge(client)
            return _problem(error, 401)
        async with AsyncExitStack() as held:
            parts = await self._read(request, name, digest, held)
            answer = await self._answer_parts(request, api, caller, name, parts)
        if not isinstance(answer, bytes):
            answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
        return Response(answer, media_type="application/json")

    async def _answer_parts(
        self, request: Request, api: AttemptApi, caller: HostCaller, name: str, parts: Sequence[Message]
    ) -> Message | bytes:
        left = asyncio.create_task(_left(request)) if name == "take" else None

        def gone() -> bool:
            # A worker that drains ends the takes that wait.
            return left is not None and (left.done() or self.draining or self.api is not api)

        try:
            if len(parts) == 1:
                return await api.call(caller, name, parts[0], gone)
            answers = []
            for part in parts:
                await self._turns.take(TURN)
                answers.append(await api.call(caller, name, part, gone))
            return joined([answer for answer in answers if not isinstance(answer, bytes)])
        finally:
            if left is not None:
                left.cancel()

    async def _read(
        self, request: Request, name: str, digest: str, held: AsyncExitStack
    ) -> Sequence[Message]:
        """The JSON object of a call, or its parts if it is large; `held` then holds a place until its end.

        Raises Malformed, Busy, and HTTPException 413 or LeaseLost for a body that is too large.
        """
        most = BODY_BYTES.get(name, OWN_BYTES)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(name, most)
        body = bytearray()
        is_large = False
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise _too_large(name, most)
            if len(body) > OWN_BYTES and not is_large:
                is_large = True
                await held.enter_async_context(self._large.place(digest))
        if is_large:
            return await self.checker.check(name, body)
        if name != "renew" or len(body) > A_CALL:
            await self._turns.take(max(len(body), A_CALL))
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            raise Malformed("the body is not JSON") from None
        if not isinstance(message, dict):
            raise Malformed("the body is not a JSON object")
        return [message]


class LargeBodies:
    """Places for bodies that take much memory: a few, of which each token has one."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(LARGE_AT_ONCE)
        self._of_token: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def place(self, digest: str) -> AsyncIterator[None]:
        """Hold a place. Raises Busy if none becomes free in time."""
        mine = self._of_token.setdefault(digest, asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(LARGE_WAIT):
                    await held.enter_async_context(mine)
                    await held.enter_async_context(self._free)
            except TimeoutError:
                raise Busy("other large calls are being read", fix=SOON) from None
            yield


def _too_large(name: str, most: int) -> Exception:
    message = f"the body is larger than {most} bytes"
    if name in ("logs", "progress"):
        # Hosts of the previous release send larger batches, and would send this one forever.
        return LeaseLost(message, fix="send fewer rows at a time")
    return HTTPException(413, message)


async def _left(request: Request) -> None:
    """Wait until the host has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Any other error is 503, such as a configuration that an operator has to correct, while hosts go on asking.
_STATUS: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], int]] = (
    ((Malformed, StepError), 422),
    (AccessDenied, 403),
    (LeaseLost, 409),
    (TooManyRequests, 429),
)


def _problem(error: WorkerError | StepError, status: int) -> Response:
    if isinstance(error, StepError):
        return error_response(status, STEP, str(error), "")
    return error_response(status, error.code, error.message, error.fix, error.retry_after)
