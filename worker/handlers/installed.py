"""Installed distributions with handlers, and the environment of processes that run their code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

GROUP = "worker.jobs"

# Variables of the worker's environment that plug-in code sees, besides those that the operator passes.
ENVIRONMENT = ("PATH", "HOME", "LANG", "TZ")
# Prefix of such processes' folders, which are also their HOME and TMPDIR.
FOLDERS = "orgworker-runs-"


@dataclass(frozen=True, slots=True)
class Distribution:
    """An installed distribution and its entry points of group `worker.jobs`, by name."""

    name: str
    version: str
    points: tuple[EntryPoint, ...]


def distributions(names: Iterable[str] | None = None) -> list[Distribution]:
    """The installed distributions with handlers; only those named, if names are given."""
    wanted = None if names is None else {normalised(name) for name in names}
    found: dict[str, tuple[str, str, list[EntryPoint]]] = {}
    for point in entry_points(group=GROUP):
        if point.dist is None or not (wanted is None or normalised(point.dist.name) in wanted):
            continue
        entry = found.setdefault(normalised(point.dist.name), (point.dist.name, point.dist.version, []))
        entry[2].append(point)
    return [
        Distribution(name, version, tuple(sorted(points, key=lambda point: point.name)))
        for name, version, points in found.values()
    ]


def normalised(name: str) -> str:
    """A distribution's normalised name, as PyPI compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(pass_environment: Iterable[str] = ()) -> dict[str, str]:
    """The environment of a process with plug-in code; PYTHONPATH is this process's import path."""
    names = {*ENVIRONMENT, *pass_environment}
    allowed = {name: os.environ[name] for name in names if name in os.environ}
    return allowed | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def preload(names: Iterable[str]) -> list[tuple[str, str]]:
    """Import modules, or the handlers' modules of distributions; returns what failed and why."""
    failures = []
    for name in names:
        try:
            modules = {point.module for found in distributions([name]) for point in found.points}
            for module in sorted(modules) or [name]:
                import_module(module)
            if len(os.listdir("/proc/self/task")) > 1:
                # A lock that the thread holds during a fork is never released in the copy.
                failures.append((name, "its import leaves a thread running, which makes forks unsafe"))
        except BaseException as error:
            failures.append((name, f"{type(error).__name__}: {error}"))
    return failures
