"""Verifies tokens in a customer's own backend.

It needs no database and no worker: `Guard("https://acme.kinde.com", audience="https://api.acme.com")`.
Nothing here imports the rest of the project; the distribution `orgworker-guard` has the same files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import bearer_token
    from .asgi import App, Message, Receive, RequireToken, Scope, Send
    from .claims import Claims, Flag
    from .errors import ConfigurationError, IssuerUnavailable, TokenRefused, Unavailable, WorkerError
    from .guard import Guard, check
    from .issuer import Issuer

_HOMES = {
    **dict.fromkeys(("Claims", "Flag"), "claims"),
    **dict.fromkeys(
        ("ConfigurationError", "IssuerUnavailable", "TokenRefused", "Unavailable", "WorkerError"), "errors"
    ),
    **dict.fromkeys(("App", "Message", "Receive", "RequireToken", "Scope", "Send"), "asgi"),
    **dict.fromkeys(("Guard", "check"), "guard"),
    "bearer_token": "access",
    "Issuer": "issuer",
}

__all__ = [
    "App",
    "Claims",
    "ConfigurationError",
    "Flag",
    "Guard",
    "Issuer",
    "IssuerUnavailable",
    "Message",
    "Receive",
    "RequireToken",
    "Scope",
    "Send",
    "TokenRefused",
    "Unavailable",
    "WorkerError",
    "bearer_token",
    "check",
]


def __getattr__(name: str) -> Any:
    # A run's own process reads claims and needs neither cryptography nor an HTTP client.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
