"""For a handler's author: the real attempt in a test, on a settable clock, with made-up claims and faults.

The pytest fixture `orgworker` gives an `Orgworker`; without pytest, make one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.testing.clock import SettableClock
    from worker.testing.faults import Crash, ProviderDown, SecretRotated, Stop, WrongOrg
    from worker.testing.finished import Attempt, Finished, LogLine
    from worker.testing.orgworker import Orgworker

_HOMES = {
    "Attempt": "finished",
    "Crash": "faults",
    "Finished": "finished",
    "LogLine": "finished",
    "Orgworker": "orgworker",
    "ProviderDown": "faults",
    "SecretRotated": "faults",
    "SettableClock": "clock",
    "Stop": "faults",
    "WrongOrg": "faults",
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
    "Stop",
    "WrongOrg",
]


def __getattr__(name: str) -> Any:
    # pytest imports this wherever the package is installed, also where no test uses it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
