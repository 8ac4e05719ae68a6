"""Imports what the operator lists in `preload`, so that runs start with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module

from worker.handlers.installed import distributions


def preload(names: Iterable[str]) -> list[tuple[str, str]]:
    """Import modules, or the handlers' modules of distributions; returns what failed, and why."""
    failures = []
    for name in names:
        try:
            modules = {point.module for found in distributions([name]) for point in found.points}
            for module in sorted(modules) or [name]:
                import_module(module)
            if len(os.listdir("/proc/self/task")) > 1:
                # The lock that such a thread holds at a fork is never released in the copy.
                failures.append((name, "its import leaves a thread behind, which poisons every fork"))
        except BaseException as error:
            failures.append((name, f"{type(error).__name__}: {error}"))
    return failures
