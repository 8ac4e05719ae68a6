"""Context: what a handler may use. BlockingContext offers the same to a handler that blocks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal

from worker.clock import Clock
from worker.guard.claims import Claims, flag_value
from worker.handlers.blocking import ThreadLock, finish
from worker.handlers.calls import AskToken, Port, Progress, Save
from worker.handlers.children import Child, ChildCalls, ChildResults, EndedChild, KeyOfRun, each
from worker.handlers.completions import (
    STEP,
    Completions,
    Decode,
    Encode,
    api_of,
    encoded_body,
    read_response,
    response_of,
    sent,
    used_by,
)
from worker.handlers.given import (
    BlockingCancellation,
    Cancellation,
    Given,
    Org,
    P,
    S,
    State,
    ThisRun,
)
from worker.handlers.json_text import UNMASKED_LIMIT, clean
from worker.handlers.model_usage import LLM_TOKENS
from worker.handlers.models import checkpoint_text
from worker.handlers.results import Duration
from worker.handlers.spending import (
    DONE,
    Budget,
    KnownBudget,
    Spending,
)
from worker.handlers.step_calls import (
    BACKOFF,
    CONCURRENCY,
    BlockingStepCalls,
    KeyOf,
    StepCalls,
    Tries,
    done,
)
from worker.handlers.step_tracing import StepTracing
from worker.handlers.steps import StepJournal
from worker.handlers.waits import (
    SLEEP,
    AsyncWaits,
    BlockingWaits,
    OnPark,
    no_runner,
)
from worker.model.prices import Kind
from worker.model.runs.children import WINDOW, OnFailure
from worker.model.runs.waits import Option
from worker.secret import AccessToken

if TYPE_CHECKING:
    import httpx

# What `http_client` makes a client of.
Library = Literal["httpx", "httpx2"]
# Characters that are stored, once the worker has masked them.
NOTE_LIMIT = 500
# The members that are HTTP clients, each created on first use.
CLIENTS = ("http", "public_http")


class _Shared(Generic[P, S]):
    """The members that both forms share."""

    org: Org
    """The org that the run acts for."""
    run: ThisRun
    """The current run."""
    params: P
    """The definition's params, as the handler's model, or a plain mapping."""
    settings: S
    """The token's properties over the model's defaults, as the handler's model, or a plain mapping."""
    checkpoint: Any
    """The run's last checkpoint, from an earlier attempt, as the handler's model; None if it saved none."""
    deadline: datetime
    """When the attempt is stopped if it has not ended; aware, in UTC."""
    log: logging.Logger
    """Writes to the run's log, as `logging` and `print` do."""

    # How steps and spends wait.
    _waits: cached_property[Any]
    _steps: cached_property[Any]

    def __init__(self, given: Given[P, S], port: Port, on_park: OnPark) -> None:
        self.org = given.org
        self.run = given.run
        self.params = given.params
        self.settings = given.settings
        self.checkpoint = given.checkpoint
        self.deadline = given.deadline
        self.log = given.log
        self._given = given
        # What the handler starts; None if it declares no children.
        self._children: ChildCalls | None = None
        self._port = port
        if given.job is not None and given.job.children:
            declared, keep = given.job.children, given.job.keep_children
            lock = self._new_lock()
            self._children = ChildCalls(port, self._journal, declared, keep=keep, lock=lock)
            self._port = self._children.port
        self._on_park = on_park
        # Numbers of the saves of this attempt, in the order in which they were called.
        self._saves = itertools.count(1)

    @cached_property
    def _journal(self) -> StepJournal:
        return StepJournal(replays=self._given.replays)

    @property
    def _of_steps(self) -> tuple[StepJournal, Port, Clock, Spending, StepTracing | None]:
        tracing = StepTracing.of(self._given, self._port)
        return self._journal, self._port, self._given.held.clock, self._spending, tracing

    def _new_lock(self) -> AbstractAsyncContextManager[object]:
        """A lock of the tasks, or threads, of the handler."""
        raise NotImplementedError

    def _started(self, what: str) -> ChildCalls:
        if self._children is None:
            raise TypeError(f"{what} needs @job(..., children={{...}})")
        return self._children

    @cached_property
    def _results(self) -> ChildResults:
        return ChildResults(self._started("ctx.gather"), self._waits.park)

    def start(self, handler: str, params: Any = None, *, key: str | int | None = None) -> Child:
        """Start a run of another handler, for the same org, and return at once; see `ctx.gather`.

        The handler is one of `@job(children={…})`. `params` are a mapping or a model, of at most 64 KiB of
        JSON. `key` names the child in this run: there is exactly one for it, however often the run is
        attempted. Without one, the number of its use does; two tasks start one handler only with different
        keys. It is stored at the latest by the next step, save or wait, or with the attempt's end. The
        maximum is 10,000 children a run, 4 levels and 100,000 runs below the first one, and 64 KiB a
        result. Wrong use and limits raise StepError.
        """
        return self._started("ctx.start").start(handler, params, key)

    @cached_property
    def _spending(self) -> Spending:
        given = self._given
        return Spending(self._port, self._waits, given.budgets, given.run.attempt, given.held.clock)

    @cached_property
    def _completions(self) -> Completions:
        return Completions(self._steps, self._waits, self._spending, self._given.batched)

    @property
    def claims(self) -> Claims:
        """The claims of the newest token."""
        return self._given.held.claims

    @property
    def state(self) -> dict[str, Any]:
        """What the definition remembers, for handlers with `@job(state=True)`: a JSON object to change.

        Changes are committed with the run's success, and only then; at most 64 KiB of JSON.
        """
        if self._given.state is None:
            raise TypeError("ctx.state needs @job(..., state=True)")
        return self._given.state.value

    def secret(self, name: str, /) -> str:
        """The value of one of the org's secrets, such as its own model key; declared by `@job(secrets={…})`.

        It is as it was when the attempt began. It is masked in all that runs of the org write. Of a bound
        secret it is a placeholder: put it into a header of a request, and the broker puts the value there.
        """
        try:
            return self._given.secrets[name]
        except KeyError:
            raise TypeError(f"ctx.secret({name!r}) needs @job(..., secrets={{{name!r}}})") from None

    def flag(self, name: str, default: Any = False) -> Any:
        """The value of a feature flag in the newest token, or of a property of that name."""
        return flag_value(self.claims, name, default)

    def progress(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Report progress. May be called often; only the newest value is kept."""
        check_progress(done, total)
        self._port.tell(Progress(done, total, None if note is None else clean(note, UNMASKED_LIMIT)))

    async def _token(
        self, fresh: bool = False, *, audience: str | None = None, resource: str | None = None
    ) -> AccessToken:
        if audience is not None or resource is not None:
            if audience is not None and resource is not None:
                raise TypeError("ctx.token takes an audience or a resource, not both")
            if (other := audience or resource or "") not in self._given.audiences:
                raise TypeError(
                    f"ctx.token: {other!r} is not in audiences of @job(...) and of the definition"
                )
            token, _ = await self._port.ask(AskToken(fresh, audience or "", resource or ""))
            return token
        held = self._given.held
        if fresh or held.stale:
            held.token, held.claims = await self._port.ask(AskToken(fresh))
        return held.token

    def _save(self, data: Any) -> Save:
        return Save(checkpoint_text(self._given.job, data), next(self._saves))


class Context(_Shared[P, S]):
    """What an async handler may use: its org's run, token and API, and nothing of another org.

    `transports` replace the network of `http` and `public_http`, by name. `on_park` is called when
    the attempt parks.
    """

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

    def _new_lock(self) -> asyncio.Lock:
        return asyncio.Lock()

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


class BlockingContext(_Shared[P, S]):
    """The members of `Context` for a handler that blocks, without await."""

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

    def _new_lock(self) -> ThreadLock:
        return ThreadLock()

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


def state_of(ctx: Context[Any, Any] | BlockingContext[Any, Any]) -> State | None:
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


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def used_clients(ctx: Context[Any, Any] | BlockingContext[Any, Any]) -> list[str]:
    """The members that are HTTP clients and that a handler has used."""
    return [name for name in CLIENTS if name in ctx.__dict__]


async def close_http(ctx: Context[Any, Any]) -> None:
    """Close the clients that a handler has used."""
    for name in used_clients(ctx):
        await getattr(ctx, name).aclose()


def close_blocking_http(ctx: BlockingContext[Any, Any]) -> None:
    """The same for a handler that blocks."""
    for name in used_clients(ctx):
        getattr(ctx, name).close()


def check_progress(done: Any, total: Any) -> None:
    """Raise ValueError unless `done`, and `total` if given, are finite numbers."""
    for what, number in (("done", done), ("total", total)):
        if number is None and what == "total":
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"progress: {what} is a finite number")
