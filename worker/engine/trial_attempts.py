"""The attempts of a trial, one after another, and how a person interrupts one or looks into its error."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from worker.engine.trial import Trial
from worker.handlers.job import Job
from worker.handlers.models import load
from worker.model.definitions import CANCEL_GRACE
from worker.model.definitions.units import format_duration
from worker.model.runs.outcome import EndedAttempt

OnError = Callable[[Exception], None]


async def run_to_end(trial: Trial, on_resume: Callable[[str], None]) -> EndedAttempt:
    """The end of the run, or of an attempt that waits for an answer that is not given.

    `on_resume` gets what an attempt waited for before the next one begins.
    """
    ended = await trial.attempt()
    while ended.state == "parked":
        await trial.run_children()
        if (delay := trial.resume()) is None:
            break
        on_resume(_resumed(ended, delay))
        ended = await trial.attempt()
    return ended


def interrupt(trial: Trial) -> None:
    """Cancel the attempt; kill it at the second call."""
    stop = trial.inflight.stop
    if stop.requested.is_set():
        stop.kill()
    else:
        stop.request("cancel", CANCEL_GRACE.total_seconds())


def with_on_error(entry_point: str, *, on_error: OnError) -> Job:
    """The handler, wrapped so that `on_error` receives its exception first."""
    job = copy.copy(load(entry_point))
    function = job.function

    async def call(ctx: Any) -> Any:
        try:
            return await function(ctx)
        except Exception as error:
            on_error(error)
            raise

    def call_blocking(ctx: Any) -> Any:
        try:
            return function(ctx)
        except Exception as error:
            on_error(error)
            raise

    job.function = call if inspect.iscoroutinefunction(function) else call_blocking
    return job


def _resumed(ended: EndedAttempt, delay: timedelta) -> str:
    what = f" ({ended.detail})" if ended.detail else ""
    if not delay:
        return f"it waits for an answer{what}, which --answer gives: the next attempt goes on"
    doing = "sleeps" if ended.reason == "asleep" else "waits for an answer"
    return f"it {doing}{what} for {format_duration(delay)}, which is skipped here: the next attempt goes on"
