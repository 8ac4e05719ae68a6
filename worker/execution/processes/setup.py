"""What a zygote is started with; names, numbers and descriptors only, since others can read it."""

from __future__ import annotations

from dataclasses import dataclass

from worker.handlers.installed import ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Setup:
    """`max_freeze` is in seconds, `folder` the runs' home.

    `lock` is the descriptor of the SQLite file's lock. The zygote holds it; each run holds
    a read lock of its own on the same file.
    """

    folder: str
    parent: int = 0
    lock: int | None = None
    environment: tuple[str, ...] = ENVIRONMENT
    preload: tuple[str, ...] = ()
    max_freeze: float = 600.0
