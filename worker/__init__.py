"""The names for authors of handlers; the rest of this package is internal."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.guard.claims import Claims
    from worker.handlers.agents import durable
    from worker.handlers.blocking_context import BlockingContext
    from worker.handlers.children import Child, ChildFailed, EndedChild
    from worker.handlers.context import Context
    from worker.handlers.httpx2_client import httpx2_client
    from worker.handlers.job import job
    from worker.handlers.results import (
        Cancel,
        EgressDenied,
        HandBack,
        PermanentError,
        RateLimited,
        Retry,
        Snooze,
    )
    from worker.handlers.spending import BudgetExceeded
    from worker.handlers.steps import StepError
    from worker.handlers.waits import WaitTimeout
    from worker.secret import AccessToken

_HOMES = {
    "BlockingContext": "worker.handlers.blocking_context",
    "Context": "worker.handlers.context",
    **dict.fromkeys(
        ("Cancel", "EgressDenied", "HandBack", "PermanentError", "RateLimited", "Retry", "Snooze"),
        "worker.handlers.results",
    ),
    **dict.fromkeys(("Child", "ChildFailed", "EndedChild"), "worker.handlers.children"),
    "AccessToken": "worker.secret",
    "BudgetExceeded": "worker.handlers.spending",
    "Claims": "worker.guard.claims",
    "StepError": "worker.handlers.steps",
    "WaitTimeout": "worker.handlers.waits",
    "durable": "worker.handlers.agents",
    "httpx2_client": "worker.handlers.httpx2_client",
    "job": "worker.handlers.job",
}

__all__ = [
    "AccessToken",
    "BlockingContext",
    "BudgetExceeded",
    "Cancel",
    "Child",
    "ChildFailed",
    "Claims",
    "Context",
    "EgressDenied",
    "EndedChild",
    "HandBack",
    "PermanentError",
    "RateLimited",
    "Retry",
    "Snooze",
    "StepError",
    "WaitTimeout",
    "durable",
    "httpx2_client",
    "job",
]


def __getattr__(name: str) -> Any:
    # Every command imports this module first, so the names load on first use.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
