"""What a zygote is started with; names, numbers and descriptors only, since others can read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from worker.execution.processes.sandbox import Rules
from worker.handlers.installed import ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Setup:
    """`max_freeze` is in seconds, `folder` the runs' home.

    `lock` is the descriptor of the SQLite file's lock. The zygote holds it; each run holds
    a read lock of its own on the same file. Without `sandbox` nothing is denied to the runs.
    """

    folder: str
    parent: int = 0
    lock: int | None = None
    environment: tuple[str, ...] = ENVIRONMENT
    preload: tuple[str, ...] = ()
    max_freeze: float = 600.0
    sandbox: Rules | None = None

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """What `as_json` has written."""
        given = json.loads(text)
        rules = given.pop("sandbox", None)
        return cls(**given, sandbox=None if rules is None else Rules.of(rules))

    def as_json(self) -> str:
        """For the command line of the zygote."""
        return json.dumps(asdict(self))
