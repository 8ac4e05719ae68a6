"""Entry points of group `worker.jobs` -> what each offers, or why it does not load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUP = "worker.jobs"


@dataclass(frozen=True, slots=True)
class HandlerEntry:
    """A handler that a distribution offers, or fails to: then `error` says why.

    `entry_point` is `module:attribute`; `timeout` and `memory` are texts such as
    `2h` and `512MiB`, None where the author left the default.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    isolation: str = "child"
    scopes: tuple[str, ...] = ()
    params_schema: Mapping[str, Any] | None = None
    settings_schema: Mapping[str, Any] | None = None
    timeout: str | None = None
    max_attempts: int | None = None
    memory: str | None = None
    max_concurrent: int | None = None
    error: str | None = None
