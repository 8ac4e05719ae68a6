"""Begin: a coroutine becomes a task that has taken its first step already, where Python can do so."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


def begin(
    work: Coroutine[Any, Any, T],
    *,
    loop: asyncio.AbstractEventLoop,
    name: str | None = None,
    context: contextvars.Context | None = None,
) -> asyncio.Task[T]:
    """A task that may be done when this returns: most attempts find all that they need at hand.

    Each round through the loop that is saved so is a tenth of an inline run. Python 3.11
    schedules the first step as it does every other.
    """
    return asyncio.Task(work, loop=loop, name=name, context=context, **_EAGER)
