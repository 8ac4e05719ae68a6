"""The client of the HTTP API, for threads (`Client`) and for asyncio (`AsyncClient`).

The token goes to the API's own address only: no redirect is followed, and nothing shows or logs it.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx

from . import plans
from .errors import BadAnswer, ConfigurationError, Unavailable
from .plans import BASE, Listen, Plan, Reply, Retries, Send
from .results import Run, Started

if TYPE_CHECKING:
    from .outbox import Outbox
    from .relay import RelayCounts

T = TypeVar("T")
# A token, or what reads it: called for each request, so that a token in a file can be replaced.
Token = str | Callable[[], str]
# Seconds.
CONNECT = 5.0
READ = 15.0
EXCHANGE = 30.0
# The API sends at least a comment every 15 s.
QUIET = 45.0
RETRY_FOR = 30.0
# Bytes of a token that is masked; a shorter one is a test's, and would be found in other words.
LEAST_MASKED = 8


def token_file(path: str | Path) -> Callable[[], str]:
    """Reads the token from a file, at each request."""

    def read() -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(
                f"the token file {path} cannot be read: {type(error).__name__}",
                fix="put the token of `operators add NAME --role starter` there",
            ) from None

    return read


class _Endpoint:
    """The address and the token: what both forms know."""

    def __init__(
        self, url: str, token: Token, ca_file: str, plain_http: bool, retry_for: float, transport: Any
    ) -> None:
        self.url = _checked(url, plain_http=plain_http)
        self._token = token
        self._context = None if transport else _trusting(ca_file)
        self._retry_for = retry_for
        self._transport = transport

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} has a token and is not pickled; make one where it is used")

    def _retries(self, seconds: float | None = None) -> Retries:
        return Retries(self._retry_for if seconds is None else seconds, time.monotonic)

    def _read_token(self) -> str:
        token = self._token() if callable(self._token) else self._token
        if not (isinstance(token, str) and token.isascii() and token.isprintable() and " " not in token):
            raise ConfigurationError("the token is not a line of ASCII text", fix="see `operators add`")
        if not token:
            raise ConfigurationError("the token is empty", fix="see `operators add NAME --role starter`")
        return token

    def _options(self) -> dict[str, Any]:
        """What both of httpx's clients take."""
        return {
            "verify": self._context or True,
            "transport": self._transport,
            "follow_redirects": False,
            # A cookie of one caller must not travel with another's request.
            "cookies": CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            "limits": httpx.Limits(max_connections=100, max_keepalive_connections=20),
        }

    def _request(self, step: Send | Listen) -> tuple[httpx.Request, str]:
        """The request with the token, and the token, which is masked in what comes back."""
        token = self._read_token()
        # A compressed answer could exceed any limit while it is read.
        headers = {"authorization": f"Bearer {token}", "accept-encoding": "identity"}
        if isinstance(step, Listen):
            step.reader.begin()
            headers["accept"] = "text/event-stream"
            if step.reader.last_id:
                headers["last-event-id"] = step.reader.last_id
            read = QUIET if step.seconds is None else min(QUIET, max(0.05, step.seconds))
            timeout = {"connect": CONNECT, "read": read, "write": READ, "pool": CONNECT}
            request = httpx.Request("GET", self.url + BASE + step.path, headers=headers)
        else:
            headers["accept"] = "application/json"
            if step.body is not None:
                headers["content-type"] = "application/json"
            timeout = {"connect": CONNECT, "read": READ, "write": READ, "pool": CONNECT}
            url = self.url + BASE + step.path
            request = httpx.Request(step.method, url, headers={**headers, **step.headers}, content=step.body)
        request.extensions = {"timeout": timeout}
        return request, token


class _Body:
    """The body of an answer, in chunks: of an event stream, or of limited size."""

    def __init__(self, step: Send | Listen, response: httpx.Response, token: str) -> None:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise BadAnswer(
                "the answer is compressed, which was not asked for", fix="see the proxy before the API"
            )
        self._token = token.encode()
        self._response = response
        self._content = bytearray()
        is_stream = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        self._reader = step.reader if isinstance(step, Listen) and is_stream else None
        seconds = step.seconds if isinstance(step, Listen) and self._reader is not None else EXCHANGE
        self._until = None if seconds is None else time.monotonic() + seconds

    def take(self, chunk: bytes) -> bool:
        """Whether this was enough. Raises BadAnswer if it is too large, Unavailable if it is late."""
        if self._reader is not None:
            done = self._reader.feed(chunk)
            return done or self._is_late()
        self._content += chunk
        if len(self._content) > plans.ANSWER_LIMIT:
            raise BadAnswer("the answer is too large", fix="check the address of the API")
        if self._is_late():
            raise Unavailable("the answer takes too long", fix="try again")
        return False

    def _is_late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def reply(self) -> Reply:
        response = self._response
        # A server that sends the token back gets it into no error and no log of ours.
        content = bytes(self._content)
        if len(self._token) >= LEAST_MASKED:
            content = content.replace(self._token, b"[token]")
        return Reply(response.status_code, dict(response.headers), content)


class Client(_Endpoint):
    """Starts runs and reads them, over the HTTP API, from any number of threads.

    `url` is the API's address, https, or http for this machine; `plain_http` allows http for others, whose
    network then reads the token. `token` is a starter's, or what returns it (`token_file`). `ca_file` has
    further authorities (PEM). Calls that may succeed later are repeated for `retry_for` seconds. It may be
    made before a fork: each process opens connections of its own.

    Raises:
        ConfigurationError: an unusable address.
    """

    def __init__(
        self,
        url: str,
        token: Token,
        *,
        ca_file: str = "",
        plain_http: bool = False,
        retry_for: float = RETRY_FOR,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, token, ca_file, plain_http, retry_for, transport)
        # By process: a child of fork must neither use nor close the connections of its parent.
        self._open: dict[int, httpx.Client] = {}

    def start(
        self,
        org: str,
        definition: str,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        not_before: datetime | None = None,
    ) -> Started:
        """Start a run of a definition; the same key makes one run, of the first params that came with it.

        Without a key, each call makes a run; it is repeated safely in any case. Raises a ClientError.
        """
        request = plans.start_request(org, definition, params, key, not_before)
        return self._take(plans.start(request, self._retries()))

    def run(self, run_id: str) -> Run:
        """One run that this token has started. Raises a ClientError."""
        return self._take(plans.show(run_id, self._retries()))

    def wait(self, run_id: str, *, timeout: float | None = None) -> Run:
        """The run once it has ended, however it ended. Raises WaitTimeout after `timeout` seconds."""
        return self._take(plans.wait(run_id, timeout, self._retries()))

    def close(self) -> None:
        """Close this process's connections; a later call opens new ones."""
        if (found := self._open.pop(os.getpid(), None)) is not None:
            found.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _http(self) -> httpx.Client:
        found = self._open.get(os.getpid())
        if found is None:
            # Without a lock, which a fork could leave locked: of two threads, one discards its own.
            direct = httpx.HTTPTransport() if self._transport is None else None
            made = httpx.Client(**self._options(), mounts={"http://": direct} if direct else None)
            found = self._open.setdefault(os.getpid(), made)
        return found

    def _take(self, plan: Plan[T]) -> T:
        answer: Reply | Unavailable | None = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, plans.Sleep):
                time.sleep(step.seconds)
                answer = None
            else:
                answer = self._exchange(step)

    def _exchange(self, step: Send | Listen) -> Reply | Unavailable:
        request, token = self._request(step)
        try:
            response = self._http().send(request, stream=True)
            try:
                body = _Body(step, response, token)
                for chunk in response.iter_bytes():
                    if body.take(chunk):
                        break
                return body.reply()
            finally:
                response.close()
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            return _lost(error)
        except Unavailable as late:
            return late


class AsyncClient(_Endpoint):
    """`Client` for asyncio, with the same arguments; each event loop has connections of its own."""

    def __init__(
        self,
        url: str,
        token: Token,
        *,
        ca_file: str = "",
        plain_http: bool = False,
        retry_for: float = RETRY_FOR,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, token, ca_file, plain_http, retry_for, transport)
        # By loop, with the process that opened it: a fork may copy a loop, too.
        self._open: WeakKeyDictionary[Any, tuple[int, httpx.AsyncClient]] = WeakKeyDictionary()
        # Those of a parent process, which are neither used nor closed.
        self._of_parents: list[httpx.AsyncClient] = []

    async def start(
        self,
        org: str,
        definition: str,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        not_before: datetime | None = None,
    ) -> Started:
        """As `Client.start`."""
        request = plans.start_request(org, definition, params, key, not_before)
        return await self.send_start(request)

    async def send_start(self, request: plans.StartRequest, *, retry_for: float | None = None) -> Started:
        """Send a checked request, repeated for `retry_for` seconds."""
        return await self._take(plans.start(request, self._retries(retry_for)))

    async def run(self, run_id: str) -> Run:
        """As `Client.run`."""
        return await self._take(plans.show(run_id, self._retries()))

    async def wait(self, run_id: str, *, timeout: float | None = None) -> Run:
        """As `Client.wait`."""
        return await self._take(plans.wait(run_id, timeout, self._retries()))

    async def relay(
        self,
        outbox: Outbox,
        *,
        once: bool = False,
        stop: asyncio.Event | None = None,
        **how: Any,
    ) -> RelayCounts:
        """Start what the outbox has, until `stop` is set; with `once` until nothing is due.

        The options of `Relay` are taken too. Several may relay one outbox.
        """
        from .relay import Relay

        return await Relay(self, outbox, **how).run(once=once, stop=stop)

    async def aclose(self) -> None:
        """Close this loop's connections; a later call opens new ones."""
        found = self._open.pop(asyncio.get_running_loop(), None)
        if found is not None and found[0] == os.getpid():
            await found[1].aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()

    def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        found = self._open.get(loop)
        if found is None or found[0] != os.getpid():
            if found is not None:
                self._of_parents.append(found[1])
            direct = httpx.AsyncHTTPTransport() if self._transport is None else None
            made = httpx.AsyncClient(**self._options(), mounts={"http://": direct} if direct else None)
            found = self._open[loop] = (os.getpid(), made)
        return found[1]

    async def _take(self, plan: Plan[T]) -> T:
        answer: Reply | Unavailable | None = None
        while True:
            try:
                step = plan.send(answer)
            except StopIteration as done:
                result: T = done.value
                return result
            if isinstance(step, plans.Sleep):
                await asyncio.sleep(step.seconds)
                answer = None
            else:
                answer = await self._exchange(step)

    async def _exchange(self, step: Send | Listen) -> Reply | Unavailable:
        request, token = self._request(step)
        try:
            # Also for headers that come one byte at a time.
            async with asyncio.timeout(EXCHANGE if isinstance(step, Send) else step.seconds):
                response = await self._http().send(request, stream=True)
                try:
                    body = _Body(step, response, token)
                    async for chunk in response.aiter_bytes():
                        if body.take(chunk):
                            break
                    return body.reply()
                finally:
                    await response.aclose()
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            # TimeoutError is an OSError.
            return _lost(error)
        except Unavailable as late:
            return late


def _checked(url: str, *, plain_http: bool) -> str:
    """The address without its last slash; raises ConfigurationError."""
    fix = "such as https://jobs.acme.com"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except (TypeError, ValueError):
        raise ConfigurationError("the address of the API is not a URL", fix=fix) from None
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ConfigurationError("the address of the API is not http(s)://HOST[:PORT][/PATH]", fix=fix)
    if parts.scheme == "http" and not (plain_http or _is_local(host)):
        raise ConfigurationError(
            f"http://{host} would send the token in clear",
            fix="use https, or plain_http=True within a network that you trust",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _trusting(ca_file: str) -> ssl.SSLContext:
    """Trusts Mozilla's authorities, the system's, and those of a file; raises ConfigurationError."""
    context = httpx.create_ssl_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"ca_file {ca_file} cannot be used: {type(error).__name__}",
            fix="name a file with certificates in PEM",
        ) from None
    return context


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _lost(error: Exception) -> Unavailable:
    """What happened, without the exception itself: its request has the token."""
    lost = Unavailable(
        f"the API did not answer: {type(error).__name__}", fix="try again; see that it runs, and its address"
    )
    lost.was_sent = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
    return lost
