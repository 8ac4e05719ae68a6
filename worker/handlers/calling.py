"""Calls a handler and turns what comes out of it, whatever that is, into an outcome."""

from __future__ import annotations

import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from worker.errors import LeaseLost, TokenError, Unavailable
from worker.handlers import denials
from worker.handlers.context import BlockingContext, Context
from worker.handlers.job import Job
from worker.handlers.json_text import NotStorable, clean, to_json_text
from worker.handlers.models import HandlerMissing, ParamsInvalid, SettingsInvalid
from worker.handlers.results import Cancel, HandBack, PermanentError, Retry, Snooze, as_timedelta
from worker.runs.outcome import (
    Cancelled,
    Error,
    Failed,
    HandedBack,
    Lost,
    NoHandler,
    NoToken,
    Outcome,
    Refused,
    Retried,
    Snoozed,
    Succeeded,
)

MESSAGE_LIMIT = 4_000
TRACE_LIMIT = 16_000
DETAIL_LIMIT = 500
TOKEN_PAUSE = timedelta(seconds=30)

_OURS = str(Path(__file__).parent.parent)


async def call(job: Job, ctx: Context[Any, Any]) -> Outcome:
    """Await an async handler; SystemExit is let through, everything else becomes an outcome."""
    try:
        return outcome_of(await job(ctx))
    except SystemExit:
        raise
    except BaseException as error:
        return outcome_of_error(error)


def call_blocking(job: Job, ctx: BlockingContext[Any, Any]) -> Outcome:
    """Call a handler that blocks; SystemExit is let through, everything else becomes an outcome."""
    try:
        return outcome_of(job(ctx))
    except SystemExit:
        raise
    except BaseException as error:
        return outcome_of_error(error)


def outcome_of(answer: Any) -> Outcome:
    """What a returned value means: a result, or one of the answers."""
    try:
        match answer:
            case None:
                return Succeeded(None)
            case Retry(after, reason):
                return Retried(None if after is None else as_timedelta(after), _detail(reason))
            case Snooze(after, reason):
                return Snoozed(as_timedelta(after), _detail(reason))
            case Cancel(reason):
                return Cancelled("by_handler", _detail(reason))
            case HandBack():
                return HandedBack()
            case _:
                return Succeeded(to_json_text(answer, "result"))
    except NotStorable as error:
        return Failed(Error("NotStorable", str(error)), reason="result_invalid")
    except Exception as error:  # of a duration, or of a model's own serialiser
        return Failed(error_of(error), reason="result_invalid")


def outcome_of_error(error: BaseException) -> Outcome:
    """What an exception out of a handler means."""
    match error:
        case PermanentError():
            return Failed(error_of(error), permanent=True)
        case SettingsInvalid():
            return Refused("settings_invalid", error.property, str(error))
        case ParamsInvalid():
            return Failed(error_of(error), permanent=True)
        case HandlerMissing():
            return NoHandler(str(error))
        case LeaseLost():
            return Lost("another worker has taken the run over")
        case TokenError() | Unavailable():
            # Ours, out of ctx.token() or ctx.http: no token is no failure of the handler.
            pause = getattr(error, "retry_after", None)
            return NoToken(TOKEN_PAUSE if pause is None else timedelta(seconds=pause), error.code)
        case MemoryError():
            return Failed(error_of(error), reason="out_of_memory")
        case _:
            return Failed(error_of(error))


def error_of(error: BaseException) -> Error:
    """The exception's type, message and trace, cut to size; from the handler's own frames on."""
    kind = type(error)
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be written)"
    if (why := denials.hint(error)) is not None:
        message = f"{message[: MESSAGE_LIMIT // 2]}; {why}"
    try:
        lines = traceback.TracebackException(
            kind, error, _from_the_handler_on(error.__traceback__), limit=-50, compact=True
        ).format()
        trace = "".join(lines)
    except Exception:
        trace = ""
    if len(trace) > TRACE_LIMIT:  # its end says most
        trace = "…\n" + trace[-TRACE_LIMIT:]
    home = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    name = home + kind.__qualname__
    return Error(clean(name, DETAIL_LIMIT), clean(message, MESSAGE_LIMIT), clean(trace, TRACE_LIMIT + 2))


def _from_the_handler_on(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        if trace.tb_next is None:
            break
        trace = trace.tb_next
    return trace


def _detail(text: str | None) -> str | None:
    return None if text is None else clean(str(text), DETAIL_LIMIT)
