"""Loads one distribution's entry points in a process of its own and prints what each declares.

`python -m worker.handlers.describe DISTRIBUTION SECONDS NAME…` prints a JSON line for each
name, in that order. Any of them may hang or end the process; the reader sees which.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from worker.definitions.units import parse_duration, parse_memory
from worker.handlers import denials
from worker.handlers.installed import distributions
from worker.handlers.job import Job


def offer_of(job: Job) -> dict[str, Any]:
    """A handler's declaration, as fields of its catalogue entry; raises ValueError if it is invalid."""
    if job.timeout is not None:
        parse_duration(job.timeout)
    if job.memory is not None:
        parse_memory(job.memory)
    plain = ("isolation", "timeout", "max_attempts", "memory", "max_concurrent", "state")
    schemas = {"params_schema": job.params_schema(), "settings_schema": job.settings_schema()}
    return {"scopes": sorted(job.scopes), **schemas, **{name: getattr(job, name) for name in plain}}


def described(load: Any, name: str, target: str) -> dict[str, Any]:
    """An entry point's declaration, or `error` with what its import raised."""
    try:
        job = load()
        if not isinstance(job, Job):
            return {"error": f"{target} is not a function declared with @job"}
        if job.name != name:
            return {"error": f"the entry point is called {name}, but its handler {job.name}"}
        return offer_of(job)
    except SystemExit as end:
        return {"error": f"SystemExit: its import calls sys.exit({end.code!r})"}
    except BaseException as error:
        denied = denials.hint(error)
        return {"error": f"{type(error).__name__}: {error}" + (f"; {denied}" if denied else "")}


def main() -> None:
    """Print the lines; a plug-in's own output is discarded."""
    distribution, seconds, *names = sys.argv[1:]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    points = {point.name: point for found in distributions([distribution]) for point in found.points}
    for name in names:
        # The parent may be gone, and an import may hang.
        signal.alarm(int(float(seconds)) + 5)
        lines.write(json.dumps(described(points[name].load, name, points[name].value)) + "\n")
        lines.flush()
    os._exit(0)  # without waiting for threads that an import started


if __name__ == "__main__":
    main()
