"""The testing API: faults and the finished run, from their docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

from docs.generate.docstrings import attributes
from docs.generate.tables import code, table
from worker.testing import Attempt, Finished, LogLine, Step, Wait, faults


def testing_faults() -> str:
    """Return a table of the faults, each followed by its parameters."""
    rows = []
    for fault in get_args(faults.Fault):
        rows.append((code(f"{fault.__name__}(…)"), "", " ".join((fault.__doc__ or "").split())))
        rows += list(_fields(fault))
    return table(("fault", "default", "meaning"), rows)


def testing_finished() -> str:
    """Return a table of the attributes of a finished run, its attempts, steps and log lines."""
    rows = []
    for owner, above in (
        (Finished, "finished"),
        (Attempt, "finished.attempts[0]"),
        (Step, "finished.steps[0]"),
        (Wait, "finished.waits[0]"),
        (LogLine, "finished.logs[0]"),
    ):
        rows += [(code(f"{above}.{name}"), words) for name, (_, words) in attributes(owner).items()]
    return table(("", "meaning"), rows)


def _fields(owner: type[Any]) -> Iterator[tuple[str, str, str]]:
    words = {}
    for base in reversed(owner.__mro__):
        if base.__module__ == owner.__module__:
            words |= attributes(base)
    for field in fields(owner):
        yield code(f"{owner.__name__}({field.name}=…)"), code(repr(field.default)), words[field.name][1]
