"""How deeply values nest: read without recursion, so that no depth is too much for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64
"""Levels that params, and the schema of a handler, nest at most."""
TOO_DEEP = f"it nests more than {MAX_DEPTH} levels"


def depth_of(value: Any) -> int:
    """Levels of tables and lists within each other: 0 for a text, 1 for a table of texts."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return depth
