"""Calls a handler and turns its result or exception into an outcome.

Detects errors caused by the sandbox and names the setting to change.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from worker.errors import LeaseLost, TokenError, Unavailable
from worker.handlers.blocking import finish
from worker.handlers.blocking_context import BlockingContext
from worker.handlers.children import ChildFailed
from worker.handlers.context import Context, state_of
from worker.handlers.given import State
from worker.handlers.job import Job
from worker.handlers.json_text import UNMASKED_LIMIT, NotStorable, clean, to_json_text
from worker.handlers.models import CheckpointInvalid, HandlerMissing, ParamsInvalid, SettingsInvalid
from worker.handlers.results import (
    Cancel,
    HandBack,
    PermanentError,
    Retry,
    Snooze,
    as_timedelta,
    limited_by,
)
from worker.handlers.spending import BudgetExceeded
from worker.handlers.steps import StepError
from worker.handlers.waits import WaitTimeout
from worker.model.limits import MAX_PAUSE
from worker.model.runs.outcome import (
    SUCCEEDED,
    Cancelled,
    Error,
    Failed,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Parked,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
)

# Characters that are stored, once the worker has masked them.
MESSAGE_LIMIT = 4_000
TRACE_LIMIT = 16_000
DETAIL_LIMIT = 500
TOKEN_PAUSE = timedelta(seconds=30)

_OURS = str(Path(__file__).parent.parent)


async def call(job: Job, ctx: Context[Any, Any] | BlockingContext[Any, Any]) -> Outcome:
    """Call a handler, await it if it is async. SystemExit propagates; everything else becomes an outcome."""
    try:
        result = job(ctx)
        outcome = _with_state(outcome_of(await result if job.is_async else result), state_of(ctx))
    except BaseException as error:
        # Once the attempt parks, what the handler returns or raises does not count.
        if _parked(ctx) is not None:
            outcome = SUCCEEDED
        elif isinstance(error, SystemExit):
            await _stored(ctx)
            raise
        else:
            outcome = outcome_of_error(error)
    unstored = await _stored(ctx)
    if unstored is not None and isinstance(outcome, Succeeded):
        outcome = outcome_of_error(unstored)
    return _parked(ctx) or outcome


def call_blocking(job: Job, ctx: BlockingContext[Any, Any]) -> Outcome:
    """The same without an event loop, for a handler that blocks."""
    return finish(call(job, ctx))


async def _stored(ctx: object) -> BaseException | None:
    """Store the children that the handler has started last; the error if that fails."""
    children = ctx.__dict__.get("_children")
    if children is not None:
        try:
            await children.store()
        except BaseException as error:
            return error
    return None


def _parked(ctx: object) -> Parked | None:
    """The outcome of the attempt of a context if it parks."""
    waits = ctx.__dict__.get("_waits")
    return None if waits is None else waits.parked


def outcome_of(result: Any) -> Outcome:
    """The outcome for what a handler returned: a value, or one of the results such as `Retry`."""
    try:
        match result:
            case None:
                return SUCCEEDED
            case Retry(after, reason):
                return Retried(None if after is None else as_timedelta(after), _detail(reason))
            case Snooze(after, reason):
                return Snoozed(as_timedelta(after), _detail(reason))
            case Cancel(reason):
                return Cancelled("by_handler", _detail(reason))
            case HandBack():
                return HandedBack()
            case _:
                return Succeeded(to_json_text(result, "result"))
    except NotStorable as error:
        return Failed(Error("NotStorable", str(error)), reason="result_invalid")
    except Exception as error:  # from a duration, or from a model's own serialiser
        return Failed(error_of(error), reason="result_invalid")


def _with_state(outcome: Outcome, state: State | None) -> Outcome:
    """A success with the state that it commits; failed if that cannot be stored."""
    if state is None or not isinstance(outcome, Succeeded):
        return outcome
    try:
        changed = state.changed()
    except NotStorable as error:
        return Failed(Error("NotStorable", str(error)), reason="result_invalid")
    except Exception as error:  # from a model's own serialiser
        return Failed(error_of(error), reason="result_invalid")
    return outcome if changed is None else Succeeded(outcome.result, changed)


def outcome_of_error(error: BaseException) -> Outcome:
    """The outcome for an exception that a handler raised."""
    if (limited := limited_by(error)) is not None:
        return Snoozed(timedelta(seconds=min(limited.retry_after, MAX_PAUSE)), _detail(str(limited)))
    match error:
        case BudgetExceeded():
            return Failed(error_of(error), reason="budget", permanent=True)
        case PermanentError() | StepError() | WaitTimeout() | ChildFailed():
            return Failed(error_of(error), permanent=True)
        case SettingsInvalid():
            return Refused("settings_invalid", error.property, str(error))
        case ParamsInvalid() | CheckpointInvalid():
            return Failed(error_of(error), permanent=True)
        case HandlerMissing():
            return NoHandler(str(error))
        case LeaseLost():
            return Lost("another worker has taken the run over")
        case TokenError() | Unavailable():
            # From ctx.token() or ctx.http: a missing token does not fail the handler.
            pause = getattr(error, "retry_after", None)
            return NoToken(TOKEN_PAUSE if pause is None else timedelta(seconds=pause), error.code)
        case MemoryError():
            return Failed(error_of(error), reason="out_of_memory")
        case _:
            return Failed(error_of(error))


def error_of(error: BaseException) -> Error:
    """The exception's type, message and trace, at most 64 KiB each, as they are not masked yet.

    The trace begins at the handler's own frames.
    """
    kind = type(error)
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be formatted)"
    if (denied := hint(error)) is not None:
        # A long message is cut at its end.
        is_long = len(message) > MESSAGE_LIMIT // 2
        message = f"{denied}; {message}" if is_long else f"{message}; {denied}"
    try:
        lines = traceback.TracebackException(
            kind, error, _from_the_handler_on(error.__traceback__), limit=-50, compact=True
        ).format()
        trace = "".join(lines)
    except Exception:
        trace = ""
    if len(trace) > UNMASKED_LIMIT:  # the end is the most useful part
        trace = "…\n" + trace[-UNMASKED_LIMIT:]
    prefix = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    name = prefix + kind.__qualname__
    most = UNMASKED_LIMIT
    return Error(clean(name, most), clean(message, most), clean(trace, most + 2))


def _from_the_handler_on(trace: TracebackType | None) -> TracebackType | None:
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    return trace


def _detail(text: str | None) -> str | None:
    return None if text is None else clean(str(text), UNMASKED_LIMIT)


_HINT = "the sandbox denies {paths}: add it to [execution] read_paths or write_paths"
_MULTIPROCESSING = "the sandbox may have denied it; multiprocessing needs /dev/shm in [execution] write_paths"
_sandboxed = False


def sandboxed() -> None:
    """Record that this process is in the sandbox."""
    global _sandboxed
    _sandboxed = True


def hint(error: BaseException) -> str | None:
    """What to do if the sandbox caused the error, or None if it did not.

    It did if the file's own permissions allow the access.
    """
    if not _sandboxed:
        return None
    denied = [cause for cause in _causes(error) if isinstance(cause, PermissionError)]
    paths = [
        path
        for cause in denied
        for path in (cause.filename, cause.filename2)
        if isinstance(path, (str, bytes)) and _permitted(path)
    ]
    if paths:
        names = dict.fromkeys(repr(os.path.abspath(os.fsdecode(path))) for path in paths)
        return _HINT.format(paths=" and ".join(names))
    if any(cause.filename is None and _in_multiprocessing(cause) for cause in denied):
        return _MULTIPROCESSING
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        cause = queue.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        queue += [cause.__cause__, cause.__context__]
        if isinstance(cause, BaseExceptionGroup):
            queue += cause.exceptions


def _permitted(path: str | bytes) -> bool:
    """Whether the permissions of the file, or of the folder to create it in, allow access."""
    if os.path.exists(path):
        return any(os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK))
    return os.access(os.path.dirname(path) or os.curdir, os.W_OK | os.X_OK)


def _in_multiprocessing(error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("multiprocessing.") for frame in frames)
