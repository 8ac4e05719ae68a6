"""Installed distributions with handlers, and the environment of processes that run their code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.metadata import EntryPoint

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
    points: dict[metadata.Distribution, list[EntryPoint]] = {}
    for point in metadata.entry_points(group=GROUP):
        if point.dist is not None:
            points.setdefault(point.dist, []).append(point)
    found = []
    for dist, offered in points.items():
        about = dist.metadata  # each access reads and parses the file
        if wanted is None or normalised(about["Name"]) in wanted:
            offered.sort(key=lambda point: point.name)
            found.append(Distribution(about["Name"], about["Version"], tuple(offered)))
    return found


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
