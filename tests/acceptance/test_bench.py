"""The benchmarks still run: each imports, and a backlog of a few runs is measured."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(bench.__file__).parents[1]


@pytest.mark.feature("checkout")
def test_every_benchmark_imports():
    names = [module.name for module in pkgutil.iter_modules(bench.__path__, "bench.")]
    # Those of other queues need packages that only the benchmark's own environment has.
    ours = [name for name in names if "peer" not in name]

    assert len(ours) > 8
    for name in ours:
        importlib.import_module(name)


def test_a_short_backlog_is_measured():
    command = [sys.executable, "-m", "bench.throughput", "--database", "sqlite", "--runs", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)

    assert (done.returncode, done.stderr) == (0, "")
    assert "of the ceiling" in done.stdout
