"""What a context has in common for handlers that await and handlers that block."""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import cached_property
from typing import Any, Generic

from worker.clock import Clock
from worker.guard.claims import Claims, flag_value
from worker.handlers.calls import AskToken, Port, Progress, Save
from worker.handlers.children import Child, ChildCalls, ChildResults
from worker.handlers.completions import Completions
from worker.handlers.given import Given, Org, P, S, ThisRun
from worker.handlers.json_text import UNMASKED_LIMIT, clean
from worker.handlers.models import checkpoint_text
from worker.handlers.spending import Spending
from worker.handlers.step_tracing import StepTracing
from worker.handlers.steps import StepJournal
from worker.handlers.waits import OnPark
from worker.secret import AccessToken

# Characters that are stored, once the worker has masked them.
NOTE_LIMIT = 500


class SharedContext(Generic[P, S]):
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
    # A lock of the tasks, or threads, of the handler.
    _lock: type[AbstractAsyncContextManager[object]]

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
            self._children = ChildCalls(port, self._journal, declared, keep=keep, lock=self._lock())
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


def check_progress(done: Any, total: Any) -> None:
    """Raise ValueError unless `done`, and `total` if given, are finite numbers."""
    for what, number in (("done", done), ("total", total)):
        if number is None and what == "total":
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"progress: {what} is a finite number")
