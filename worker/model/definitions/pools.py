"""Pools: names of the places where runs execute, and which of them a run belongs to. Pure."""

from __future__ import annotations

import re
from typing import Any

# What a worker serves, and where a run executes, if nothing else is said.
DEFAULT_POOL = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def parse_pool(value: Any) -> str:
    """The name of a pool; raises ValueError."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r:.60} is not the name of a pool; use at most 63 characters of a-z, 0-9, ., _ and -, "
            "such as eu-gpu"
        )
    return value


def pool_of(*declared: str | None) -> str:
    """The first that is declared: the definition's, then its handler's, then its org's; else `default`."""
    for pool in declared:
        if pool:
            return pool
    return DEFAULT_POOL
