"""BlockingContext: what Context offers, for a handler that blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from worker.handlers.blocking import ThreadLock, finish
from worker.handlers.calls import Port
from worker.handlers.children import Child, EndedChild, KeyOfRun, each
from worker.handlers.completions import STEP, api_of, encoded_body, read_response, response_of, sent, used_by
from worker.handlers.context import Library, used_clients
from worker.handlers.given import BlockingCancellation, Given, P, S
from worker.handlers.model_usage import LLM_TOKENS
from worker.handlers.results import Duration
from worker.handlers.shared_context import SharedContext
from worker.handlers.spending import Budget
from worker.handlers.step_calls import BACKOFF, CONCURRENCY, BlockingStepCalls, KeyOf, Tries, done
from worker.handlers.waits import SLEEP, BlockingWaits, OnPark, no_runner
from worker.model.prices import Kind
from worker.model.runs.children import WINDOW, OnFailure
from worker.model.runs.waits import Option
from worker.secret import AccessToken

if TYPE_CHECKING:
    import httpx


class BlockingContext(SharedContext[P, S]):
    """The members of `Context` for a handler that blocks, without await."""

    _lock = ThreadLock

    def __init__(
        self,
        given: Given[P, S],
        port: Port,
        cancelled: BlockingCancellation,
        transports: Mapping[str, httpx.BaseTransport] | None = None,
        on_park: OnPark = no_runner,
    ) -> None:
        super().__init__(given, port, on_park)
        self.cancelled = cancelled
        self._transports = transports or {}

    @cached_property
    def _steps(self) -> BlockingStepCalls:
        return BlockingStepCalls(*self._of_steps)

    @cached_property
    def _waits(self) -> BlockingWaits:
        return BlockingWaits(self._journal, self._port, self._on_park)

    def gather(self, children: Iterable[Child], on_failure: OnFailure = "raise") -> Iterator[Any]:
        """As `Context.gather`. Ends the handler by a BaseException, which it must not catch."""
        return each(self._results.gather(children, on_failure))

    def as_ended(self, children: Iterable[Child]) -> Iterator[EndedChild]:
        """As `Context.as_ended`. Ends the handler by a BaseException, which it must not catch."""
        return each(self._results.as_ended(children))

    def map_runs(
        self,
        handler: str,
        items: Iterable[Any],
        /,
        *,
        concurrency: int = WINDOW,
        key: KeyOfRun | None = None,
        on_failure: OnFailure = "raise",
    ) -> Iterator[Any]:
        """As `Context.map_runs`. Ends the handler by a BaseException, which it must not catch."""
        started = self._started("ctx.map_runs").map_runs(handler, items, concurrency, key)
        return each(self._results.gather(started, on_failure))

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        /,
        *args: Any,
        key: str | int | None = None,
        retries: int = 0,
        backoff: Duration = BACKOFF,
        timeout: Duration | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Context.step`, for a function that blocks; `timeout` is a TypeError."""
        tries = Tries.of(retries, backoff, timeout)
        return done(self._steps.step(name, function, args, kwargs, key, tries))

    def map(
        self,
        name: str,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        /,
        *,
        concurrency: int = CONCURRENCY,
        key: KeyOf | None = None,
        retries: int = 0,
        backoff: Duration = BACKOFF,
        timeout: Duration | None = None,
    ) -> list[Any]:
        """As `Context.map`, with a thread for each concurrent call."""
        tries = Tries.of(retries, backoff, timeout)
        return done(self._steps.map(name, function, items, concurrency, key, tries))

    def complete(
        self, request: Mapping[str, Any], /, *, via: str | None = None, key: str | int | None = None
    ) -> Any:
        """As `Context.complete`. Ends the handler by a BaseException, which it must not catch."""
        api = api_of(self._given.model_apis, via)
        encoded = encoded_body(api, request)
        step = self._steps._id(STEP, key)

        def send() -> Any:
            body = read_response(self.http_client().post(**sent(encoded, self._given.secrets)))
            if (used := used_by(encoded, body)) is not None and not self._given.meter_usage:
                self.spend(LLM_TOKENS, dict(used.kinds), model=used.model, provider=used.provider)
            return body

        return done(self._completions.complete(step, encoded, send, response_of(api)))

    def sleep(self, duration: Duration, /, *, name: str = SLEEP) -> None:
        """As `Context.sleep`. Ends the handler by a BaseException, which it must not catch."""
        finish(self._waits.sleep(duration, name))

    def wait_for(
        self,
        name: str,
        /,
        *,
        timeout: Duration | None = None,
        ask: Any = None,
        options: Sequence[Option] | None = None,
        alert: bool = False,
    ) -> Any:
        """As `Context.wait_for`. Ends the handler by a BaseException, which it must not catch."""
        return finish(self._waits.wait_for(name, timeout, ask, alert, options))

    def spend(
        self,
        meter: str,
        amount: int | Mapping[Kind, int],
        /,
        *,
        model: str | None = None,
        provider: str | None = None,
        kind: Kind | None = None,
    ) -> None:
        """As `Context.spend`."""
        if (spent := self._spending.spend(meter, amount, model, provider, kind)) is not None:
            finish(spent)

    def budget(self, meter: str, /) -> Budget:
        """As `Context.budget`, as it is now."""
        return finish(self._spending.now(meter))

    @cached_property
    def http(self) -> httpx.Client:
        """An httpx client that sends the org's token only to the issuer's `api_origins`.

        `api_base_url` is the base of relative URLs.
        """
        return self._client("http", base_url=self._given.api_base_url)

    @cached_property
    def public_http(self) -> httpx.Client:
        """As `ctx.http`, for a URL from params: it reaches only public addresses and listed origins."""
        return self._client("public_http")

    def http_client(self, library: Library = "httpx") -> Any:
        """As `Context.http_client`; a `Client` of the library."""
        client = self._client("http", of_library=True)
        if library == "httpx":
            return client
        from worker.handlers.httpx2_transport import blocking_over

        return blocking_over(client)

    def _client(
        self, name: Literal["http", "public_http"], *, base_url: str = "", of_library: bool = False
    ) -> httpx.Client:
        from worker.handlers.clients import blocking_client

        def count(tokens: int) -> None:
            finish(self._spending.count(LLM_TOKENS, tokens))

        given, counts = self._given, self._given.meter_usage and name == "http"
        replaced, counted = self._transports.get(name), count if counts else None
        given_to = (given, self._token, name, replaced)
        return blocking_client(*given_to, base_url=base_url, count=counted, of_library=of_library)

    def token(self, *, audience: str | None = None, resource: str | None = None) -> AccessToken:
        """As `Context.token`."""
        return finish(self._token(audience=audience, resource=resource))

    def save(self, data: Any) -> None:
        """As `Context.save`."""
        if "_waits" in self.__dict__:
            self._waits.refuse()
        finish(self._port.ask(self._save(data)))


def close_blocking_http(ctx: BlockingContext[Any, Any]) -> None:
    """The same for a handler that blocks."""
    for name in used_clients(ctx):
        getattr(ctx, name).close()
