"""Calls: requests to a management API, within its limits; what is repeated, and what failures mean."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_random_exponential,
)

from worker.clock import Clock
from worker.errors import (
    ConfigurationError,
    ProviderThrottled,
    ProviderUnavailable,
    Throttled,
    Unavailable,
    Unclear,
)
from worker.guard.http import Reply, exchange
from worker.guard.strict_json import MalformedJson
from worker.model.throttling import retry_delay
from worker.secret import Secret

RESPONSE_LIMIT = 4 * 1024 * 1024  # bytes; a page of 500 orgs has about 100 KiB
MAX_MEMBERS = 50_000
CONNECTIONS = 8
# Of a request with a broken response, of one that finds no connection, and of one that gets no token.
TRIES = 10
CONNECT_TRIES = 6
TOKEN_TRIES = 3
# Seconds; full jitter: a repeated request waits between 0 and these, doubling.
RETRY_FIRST = 0.5
RETRY_LAST = 8.0
# Throttles of one request in a row; the pause if the provider names none, doubling; the longest accepted one.
THROTTLES = 12
PAUSE_FIRST = 1.0
PAUSE_LAST = 60.0
PAUSE_LONGEST = 300.0
# Requests bunch up on their way; this slack keeps the rate at the provider's end.
SLACK = 1.05
_jitter = wait_random_exponential(multiplier=RETRY_FIRST, max=RETRY_LAST)


class NoConnection(ProviderUnavailable):
    """Nothing was sent: no connection to the management API."""


class Bearer(Protocol):
    """Supplies the access token of the management credentials."""

    async def __call__(self, *, rejected: Secret | None = None) -> Secret:
        """A token; a new one if `rejected` is the one in use and not brand new.

        Raises ConfigurationError if the credentials are rejected, Unavailable or Throttled for now.
        """


class Permit(Protocol):
    """Says whether this process may change anything at the provider."""

    async def __call__(self) -> None:
        """Raises InstallationMismatch if it may not, and StoreUnavailable without the database."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response with status 2xx or 4xx; without a body, `body` is an empty mapping."""

    status: int
    body: Mapping[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class Pace:
    """Limits requests by rate and connections, and sends none during a pause that the provider asked for."""

    def __init__(self, per_second: float, connections: int, *, clock: Clock) -> None:
        self._clock = clock
        self._slots = asyncio.Semaphore(connections)
        self._count = max(1, int(per_second))
        self._window = self._count / per_second * SLACK
        self._sent: deque[float] = deque(maxlen=self._count)
        self._paused_until = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a connection and the rate; then one request may be sent."""
        async with self._slots:
            while (wait := self._wait()) > 0:
                await self._clock.sleep(wait)
            self._sent.append(self._clock.monotonic())
            yield

    def pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, self._clock.monotonic() + seconds)

    def _wait(self) -> float:
        full = len(self._sent) == self._count
        free_at = self._sent[0] + self._window if full else 0.0
        return max(free_at, self._paused_until) - self._clock.monotonic()


class Calls:
    """Requests to the management API of one issuer at one origin.

    `permit` is asked immediately before each request that is not a GET, repeated ones included, so that no
    adapter can change anything without it.
    `carried_out` counts by method and route the requests that the provider answered with success.
    """

    def __init__(
        self,
        issuer: str,
        origin: str,
        client: httpx.AsyncClient,
        bearer: Bearer,
        *,
        permit: Permit,
        clock: Clock,
        per_second: float,
        connections: int = CONNECTIONS,
        reset_headers: tuple[str, ...] = (),
    ) -> None:
        self.issuer = issuer
        self.carried_out: Counter[str] = Counter()
        self._origin = origin.rstrip("/")
        self._client = client
        self._bearer = bearer
        self._permit = permit
        self._clock = clock
        self._pace = Pace(per_second, connections, clock=clock)
        self._reset_headers = reset_headers

    async def read(
        self, route: str, path: str, *, scope: str, query: Mapping[str, str] | None = None
    ) -> Response:
        """GET a path; `route` is its template, for counts and messages, `scope` what the token needs.

        Raises:
            ProviderUnavailable: several times no usable response.
            Throttled: the provider asks for a longer pause than five minutes.
            ConfigurationError: it does not accept the credentials, or they lack the scope.
        """
        asked = f"?{urlencode(query)}" if query else ""
        return await self._retrying(lambda _: True)(self._send, "GET", route, path + asked, scope, None)

    async def write(
        self,
        method: str,
        route: str,
        path: str,
        *,
        scope: str,
        body: Mapping[str, Any] | None = None,
        repeatable: bool = False,
    ) -> Response:
        """Change something. It is sent again only if nothing was carried out, or it is `repeatable`.

        Raises as `read` and `Permit` do, and Unclear if the change may have been carried out.
        """
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        retrying = self._retrying(lambda error: repeatable or not isinstance(error, Unclear))
        return await retrying(self._send, method, route, path, scope, content)

    def _retrying(self, may_repeat: Callable[[Unavailable], bool]) -> AsyncRetrying:
        return AsyncRetrying(
            sleep=self._clock.sleep,
            stop=_tried_enough,
            wait=_wait_before_retry,
            retry=retry_if_exception(lambda error: isinstance(error, Unavailable) and may_repeat(error)),
            reraise=True,
        )

    async def _send(self, method: str, route: str, path: str, scope: str, content: bytes | None) -> Response:
        """Send a request until it is neither throttled nor its token rejected; raises as `write` does."""
        throttles, renewed = 0, False
        bearer = await self._token()
        while True:
            async with self._pace.turn():
                if method != "GET":
                    # Only now: the token and the pace can take minutes.
                    await self._permit()
                reply = await self._exchange(method, path, bearer, content)
            if not isinstance(reply, str) and reply.status in (401, 403) and not renewed:
                # Kinde's document has 403 for invalid credentials, its guides 401.
                renewed, refused, bearer = True, bearer, await self._token(rejected=bearer)
                if bearer != refused:
                    continue
            if not isinstance(reply, str) and reply.status == 429:
                throttles += 1
                self._throttle(reply, throttles)
                continue
            return self._judge(method, route, reply, scope)

    async def _token(self, *, rejected: Secret | None = None) -> Secret:
        """The token, after the pauses that the issuer asks for; raises as Bearer does."""
        for _ in range(THROTTLES):
            try:
                return await self._bearer(rejected=rejected)
            except Throttled as throttled:
                wait = throttled.retry_after or PAUSE_FIRST
                if wait > PAUSE_LONGEST:
                    raise
                await self._clock.sleep(wait)
        return await self._bearer(rejected=rejected)

    async def _exchange(self, method: str, path: str, bearer: Secret, content: bytes | None) -> Reply | str:
        # In a frame of its own: errors raised by the callers hold no header.
        headers = {"Authorization": f"Bearer {bearer.reveal()}"}
        url = self._origin + path
        return await exchange(
            self._client,
            method,
            url,
            clock=self._clock,
            limit=RESPONSE_LIMIT,
            headers=headers,
            json=content,
        )

    def _throttle(self, reply: Reply, times: int) -> None:
        asked = retry_delay(reply.headers, self._reset_headers, self._clock.now().timestamp())
        seconds = min(PAUSE_FIRST * 2 ** (times - 1), PAUSE_LAST) if asked is None else max(asked, 0.1)
        if seconds > PAUSE_LONGEST or times > THROTTLES:
            raise ProviderThrottled(
                f"issuer {self.issuer} asks for fewer management requests",
                retry_after=seconds,
                fix="wait, then run the command again; if it happens often, lower max_requests_per_second in "
                f"[issuers.{self.issuer}.management]",
            )
        self._pace.pause(seconds)

    def _judge(self, method: str, route: str, reply: Reply | str, scope: str) -> Response:
        """The response, or what its failure means."""
        what = f"issuer {self.issuer}: {method} {route}"
        if isinstance(reply, str):
            if reply == "unreachable":
                raise NoConnection(f"{what}: no connection to the management API")
            raise self._failed(method, f"{what}: no usable response: {reply}")
        if reply.status in (401, 403):
            raise ConfigurationError(
                f"{what}: the provider denies the management credentials this request: {reply.status}",
                fix=f"give the application in [issuers.{self.issuer}.management] the scope {scope} "
                "of the management API",
            )
        if not (200 <= reply.status < 300 or 400 <= reply.status < 500) or reply.status == 408:
            error = self._failed(method, f"{what}: status {reply.status}")
            error.retry_after = retry_delay(reply.headers, (), self._clock.now().timestamp())
            raise error
        try:
            body = reply.json_object(max_members=MAX_MEMBERS) if reply.content.strip() else {}
        except MalformedJson as malformed:
            if reply.status < 300:
                raise self._failed(method, f"{what}: a malformed response: {malformed.code}") from None
            body = {}
        if reply.status < 300:
            self.carried_out[f"{method} {route}"] += 1
        return Response(reply.status, body)

    def _failed(self, method: str, message: str) -> ProviderUnavailable:
        if method == "GET":
            return ProviderUnavailable(message)
        return Unclear(f"{message}; it may or may not have been carried out")


def _tried_enough(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, NoConnection):
        return state.attempt_number >= CONNECT_TRIES
    return state.attempt_number >= (TRIES if isinstance(error, ProviderUnavailable) else TOKEN_TRIES)


def _wait_before_retry(state: RetryCallState) -> float:
    """Jitter, or longer if the error asks for it."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Unavailable) else None
    return max(_jitter(state), min(asked or 0.0, PAUSE_LONGEST))
