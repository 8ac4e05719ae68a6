"""Tests of handlers: the real attempt on a settable clock, with fake claims and faults.

The pytest fixture `orgworker` is an `Orgworker`; without pytest, create one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.testing.clock import SettableClock
    from worker.testing.faults import Crash, ProviderDown, SecretRotated, Stop, WrongOrg
    from worker.testing.orgworker import Attempt, Finished, LogLine, Orgworker, Step, Wait

_HOMES = {
    **dict.fromkeys(("Attempt", "Finished", "LogLine", "Orgworker", "Step", "Wait"), "orgworker"),
    **dict.fromkeys(("Crash", "ProviderDown", "SecretRotated", "Stop", "WrongOrg"), "faults"),
    "SettableClock": "clock",
}

__all__ = [
    "Attempt",
    "Crash",
    "Finished",
    "LogLine",
    "Orgworker",
    "ProviderDown",
    "SecretRotated",
    "SettableClock",
    "Step",
    "Stop",
    "Wait",
    "WrongOrg",
]


def __getattr__(name: str) -> Any:
    # pytest imports this wherever the package is installed, even if no test uses it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
