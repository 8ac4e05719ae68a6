"""Context: what an async handler may use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from worker.handlers.calls import Port
from worker.handlers.children import Child, EndedChild, KeyOfRun
from worker.handlers.completions import (
    STEP,
    Decode,
    Encode,
    api_of,
    encoded_body,
    read_response,
    response_of,
    sent,
    used_by,
)
from worker.handlers.given import Cancellation, Given, P, S, State
from worker.handlers.model_usage import LLM_TOKENS
from worker.handlers.results import Duration
from worker.handlers.shared_context import SharedContext
from worker.handlers.spending import DONE, KnownBudget
from worker.handlers.step_calls import BACKOFF, CONCURRENCY, KeyOf, StepCalls, Tries
from worker.handlers.waits import SLEEP, AsyncWaits, OnPark, no_runner
from worker.model.prices import Kind
from worker.model.runs.children import WINDOW, OnFailure
from worker.model.runs.waits import Option
from worker.secret import AccessToken

if TYPE_CHECKING:
    import httpx

# What `http_client` makes a client of.
Library = Literal["httpx", "httpx2"]
# The members that are HTTP clients, each created on first use.
CLIENTS = ("http", "public_http")


class Context(SharedContext[P, S]):
    """What an async handler may use: its org's run, token and API, and nothing of another org.

    `transports` replace the network of `http` and `public_http`, by name. `on_park` is called when
    the attempt parks.
    """

    _lock = asyncio.Lock

    def __init__(
        self,
        given: Given[P, S],
        port: Port,
        cancelled: Cancellation,
        transports: Mapping[str, httpx.AsyncBaseTransport] | None = None,
        on_park: OnPark = no_runner,
    ) -> None:
        super().__init__(given, port, on_park)
        self.cancelled = cancelled
        self._transports = transports or {}
        self._task = _current_task()

    @cached_property
    def _steps(self) -> StepCalls:
        return StepCalls(*self._of_steps)

    @cached_property
    def _waits(self) -> AsyncWaits:
        storing = self._children.storing if self._children is not None else lambda: None
        return AsyncWaits(self._journal, self._port, self._on_park, self._task, storing)

    def gather(self, children: Iterable[Child], on_failure: OnFailure = "raise") -> AsyncIterator[Any]:
        """The results of these children, in their order, as an async iterator, once all have ended.

        Until then the run waits without a process. A child that did not succeed raises ChildFailed in its
        place; with `on_failure="return"` that is returned there. Results are read some at a time.
        """
        return self._results.gather(children, on_failure)

    def as_ended(self, children: Iterable[Child]) -> AsyncIterator[EndedChild]:
        """These children as they end, as an async iterator of `EndedChild`: `child`, `state`, `result`.

        The order is stored: a later attempt sees the same one. While none ends the run waits without a
        process, and goes on at most once a second.
        """
        return self._results.as_ended(children)

    def map_runs(
        self,
        handler: str,
        items: Iterable[Any],
        /,
        *,
        concurrency: int = WINDOW,
        key: KeyOfRun | None = None,
        on_failure: OnFailure = "raise",
    ) -> AsyncIterator[Any]:
        """Start a child for the params in each of the items; the results as those of `ctx.gather`.

        At most `concurrency` of them are unfinished at the same time; workers start the next ones while this
        run waits. `key` makes the key of a child from its item.
        """
        started = self._started("ctx.map_runs").map_runs(handler, items, concurrency, key)
        return self._results.gather(started, on_failure)

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
    ) -> Coroutine[Any, Any, Any]:
        """Call `function(*args, **kwargs)` once in the run, and return its JSON result as stored.

        The result is durable before it is returned, and later attempts get it without a call. A step is
        identified by its name and the number of its use, or by its name and `key`; two tasks share a
        name only with different keys. A function that is not async runs in a thread. If it raises, it
        is called up to `retries` more times, after `backoff` and then twice as long each time. `timeout`
        limits each call of an async function. The maximum is 256 KiB a result, 10,000 steps and 64 MiB
        a run. Wrong use and limits raise StepError.
        """
        tries = Tries.of(retries, backoff, timeout)
        return self._steps.step(name, function, args, kwargs, key, tries)

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
    ) -> Coroutine[Any, Any, list[Any]]:
        """Make a step of each item, at most `concurrency` at a time; returns the results in order.

        `key` makes the key of a step from its item. Without it, a later attempt returns the stored
        result of the item at the same place, if that item is equal. The first error is raised after the
        calls in flight have ended. `retries`, `backoff` and `timeout` as for `ctx.step`.
        """
        tries = Tries.of(retries, backoff, timeout)
        return self._steps.map(name, function, items, concurrency, key, tries)

    def complete(
        self, request: Mapping[str, Any], /, *, via: str | None = None, key: str | int | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Send a request to a model, as a step named `complete`, and return the JSON of its response.

        `request` is the body as the API takes it, with its `model`: of OpenAI's responses (`input`) or chat
        completions (`messages`), or of Anthropic's messages. If the definition has `model_requests = "batch"`
        it goes into a batch, and the run waits without a process; else it is sent at once. `via` is the NAME
        of `[batches.NAME]`, by default the only one. `key` as for `ctx.step`. Its tokens count as
        `llm_tokens`.
        """
        api = api_of(self._given.model_apis, via)
        encoded = encoded_body(api, request)
        step = self._steps._id(STEP, key)

        async def send() -> Any:
            arguments = sent(encoded, self._given.secrets)
            body = read_response(await self.http_client().post(**arguments))
            if (used := used_by(encoded, body)) is not None and not self._given.meter_usage:
                await self.spend(LLM_TOKENS, dict(used.kinds), model=used.model, provider=used.provider)
            return body

        return self._completions.complete(step, encoded, send, response_of(api))

    def sleep(self, duration: Duration, /, *, name: str = SLEEP) -> Coroutine[Any, Any, None]:
        """Wait without a process: the attempt ends, and the next one goes on after `duration`.

        The time counts from the first call in the run. Steps and waits before it return what they
        returned, without a call. Other sleeps in tasks that run at the same time need a `name` each.
        """
        return self._waits.sleep(duration, name)

    def wait_for(
        self,
        name: str,
        /,
        *,
        timeout: Duration | None = None,
        ask: Any = None,
        options: Sequence[Option] | None = None,
        alert: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """Wait for a person's or a program's answer, without a process, and return its JSON data.

        `runs answer RUN NAME`, the console and the API give the answer; the first one counts. With
        `options`, a list of 1 to 50 texts, numbers, true, false or None, any other answer is refused.
        `ask` is JSON for the people asked, with the options at most 16 KiB; without `options`, a list
        `options` in it becomes buttons and binds nothing. After `timeout` WaitTimeout is raised. `ask`,
        `options` and the time are those of the first call in the run. With `alert` an alert fires while
        the run waits.
        """
        return self._waits.wait_for(name, timeout, ask, alert, options)

    def spend(
        self,
        meter: str,
        amount: int | Mapping[Kind, int],
        /,
        *,
        model: str | None = None,
        provider: str | None = None,
        kind: Kind | None = None,
    ) -> Awaitable[None]:
        """Add `amount`, a whole number, to what the org's runs have spent of a meter, such as `llm_tokens`.

        With a `model` the worker also counts what it costs. `kind` says what the units are, such as `input`
        or `output`; or `amount` has the units of one request by kind: `{"input": 1200, "output": 80}`.

        It counts once: inside a step it is stored with the step's result, and outside of steps it is
        durable when this returns. If a budget of the org is used up, the run stops before its next new
        step or its next spend outside of steps: it waits without a process, or BudgetExceeded is raised.
        """
        return self._spending.spend(meter, amount, model, provider, kind) or DONE

    def budget(self, meter: str, /) -> KnownBudget:
        """The tightest budget of a meter: `limit`, `used`, `left` and `resets_at`.

        They are as the worker said last: at the start of the attempt, at a new step or at a spend outside
        of steps. `await ctx.budget(…)` returns them as they are now.
        """
        return self._spending.budget(meter)

    @cached_property
    def http(self) -> httpx.AsyncClient:
        """An httpx client that sends the org's token only to the issuer's `api_origins`.

        `api_base_url` is the base of relative URLs.
        """
        return self._client("http", base_url=self._given.api_base_url)

    @cached_property
    def public_http(self) -> httpx.AsyncClient:
        """As `ctx.http`, for a URL from params: it reaches only public addresses and listed origins."""
        return self._client("public_http")

    def http_client(self, library: Library = "httpx") -> Any:
        """As `ctx.http`, without a base URL, for a library that takes a client and may close it.

        It is an `AsyncClient` of `library`: httpx, or httpx2, which the packages of OpenAI and MCP need. To
        `api_origins` it sends the org's token in place of the library's key, which may be any text.
        """
        client = self._client("http", of_library=True)
        if library == "httpx":
            return client
        from worker.handlers.httpx2_transport import over

        return over(client)

    def _client(
        self, name: Literal["http", "public_http"], *, base_url: str = "", of_library: bool = False
    ) -> httpx.AsyncClient:
        from worker.handlers.clients import client

        async def count(tokens: int) -> None:
            await self._spending.count(LLM_TOKENS, tokens)

        given, counts = self._given, self._given.meter_usage and name == "http"
        replaced, counted = self._transports.get(name), count if counts else None
        given_to = (given, self._token, name, replaced)
        return client(*given_to, base_url=base_url, count=counted, of_library=of_library)

    async def token(self, *, audience: str | None = None, resource: str | None = None) -> AccessToken:
        """The org's token, renewed before it expires; `.reveal()` returns its text.

        In a sealed run that text is a placeholder, which the broker replaces in headers of requests to
        `api_origins`, or with a `resource`, the URL of an MCP server, to its origin (RFC 8707). `audience` or
        `resource` is one of the definition's `audiences`; any other is a TypeError.
        """
        return await self._token(audience=audience, resource=resource)

    async def save(self, data: Any) -> None:
        """Store a checkpoint of at most 1 MiB of JSON; the next attempt gets it as `ctx.checkpoint`.

        Returns once it is durable. Fails if another worker has taken the run over.
        """
        await self._port.ask(self._save(data))


def state_of(ctx: SharedContext[Any, Any]) -> State | None:
    """The state that the attempt loaded, if its handler declares one."""
    return ctx._given.state


def given_of(ctx: Context[Any, Any]) -> Given[Any, Any]:
    """The data of the attempt."""
    return ctx._given


def batched(
    ctx: Context[Any, Any],
    name: str,
    key: str,
    encode: Encode,
    send: Callable[[], Any],
    decode: Decode,
    meter: str | None,
) -> Coroutine[Any, Any, Any]:
    """A model request as a step that may go into a batch; see `Completions.request`."""
    return ctx._completions.request(ctx._steps._id(name, key), encode, send, decode, meter)


def used_clients(ctx: SharedContext[Any, Any]) -> list[str]:
    """The members that are HTTP clients and that a handler has used."""
    return [name for name in CLIENTS if name in ctx.__dict__]


async def close_http(ctx: Context[Any, Any]) -> None:
    """Close the clients that a handler has used."""
    for name in used_clients(ctx):
        await getattr(ctx, name).aclose()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
