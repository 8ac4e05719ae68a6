"""Starts runs of orgworker from a product: over HTTP, or by an outbox in the product's own transaction.

`Client("https://jobs.acme.com", token).start("org_acme", "export", {"page": 1}, key="order-4711")`.
Nothing here imports the rest of the project; the distribution `orgworker-client` has the same files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Client, token_file
    from .errors import (
        BadAnswer,
        ClientError,
        ConfigurationError,
        Conflict,
        Denied,
        InvalidRequest,
        NotFound,
        TooManyRequests,
        Unauthorized,
        Unavailable,
        WaitTimeout,
    )
    from .outbox import Outbox
    from .relay import Relay, RelayCounts
    from .results import Run, Started

_ERRORS = (
    "BadAnswer",
    "ClientError",
    "ConfigurationError",
    "Conflict",
    "Denied",
    "InvalidRequest",
    "NotFound",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "WaitTimeout",
)
_HOMES = {
    **dict.fromkeys(("AsyncClient", "Client", "token_file"), "client"),
    **dict.fromkeys(_ERRORS, "errors"),
    "Outbox": "outbox",
    **dict.fromkeys(("Relay", "RelayCounts"), "relay"),
    **dict.fromkeys(("Run", "Started"), "results"),
}

__all__ = [
    "AsyncClient",
    "BadAnswer",
    "Client",
    "ClientError",
    "ConfigurationError",
    "Conflict",
    "Denied",
    "InvalidRequest",
    "NotFound",
    "Outbox",
    "Relay",
    "RelayCounts",
    "Run",
    "Started",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "WaitTimeout",
    "token_file",
]


def __getattr__(name: str) -> Any:
    # A request handler that only inserts into the outbox needs no HTTP client.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
