"""A process of its own that loads one distribution's entry points and prints what each offers.

`python -m worker.handlers.describe DISTRIBUTION SECONDS NAME…`: a JSON line for each
name, in that order. It may hang or die with any of them; the one who reads knows which.
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
    """What a handler offers, as fields of its catalogue entry.

    Raises:
        ValueError: its timeout or memory cannot be read, or a model has no JSON Schema.
    """
    if job.timeout is not None:
        parse_duration(job.timeout)
    if job.memory is not None:
        parse_memory(job.memory)
    return {
        "isolation": job.isolation,
        "scopes": sorted(job.scopes),
        "params_schema": job.params_schema(),
        "settings_schema": job.settings_schema(),
        "timeout": job.timeout,
        "max_attempts": job.max_attempts,
        "memory": job.memory,
        "max_concurrent": job.max_concurrent,
    }


def described(load: Any, name: str, target: str) -> dict[str, Any]:
    """An entry point's offer, or `error`: whatever its import raises is caught."""
    try:
        job = load()
        if not isinstance(job, Job):
            return {"error": f"{target} is no function declared with @job"}
        if job.name != name:
            return {"error": f"the entry point is called {name}, but its handler {job.name}"}
        return offer_of(job)
    except SystemExit as end:
        return {"error": f"SystemExit: its import calls sys.exit({end.code!r})"}
    except BaseException as error:
        why = denials.hint(error)
        return {"error": f"{type(error).__name__}: {error}" + (f"; {why}" if why else "")}


def main() -> None:
    """Print the lines; a plug-in's own prints go nowhere."""
    distribution, seconds, *names = sys.argv[1:]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    points = {point.name: point for found in distributions([distribution]) for point in found.points}
    for name in names:
        # Whoever started this may be gone, and an import may hang.
        signal.alarm(int(float(seconds)) + 5)
        lines.write(json.dumps(described(points[name].load, name, points[name].value)) + "\n")
        lines.flush()
    os._exit(0)  # threads that an import has left behind do not matter


if __name__ == "__main__":
    main()
