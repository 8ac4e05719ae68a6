"""Checks that this kernel can run the tests of the sandbox."""

from __future__ import annotations

import os

import pytest

from worker.engine.runners.child import landlock
from worker.engine.runners.child.sandbox import level

WITHOUT = "ORGWORKER_TESTS_WITHOUT_LANDLOCK"


def require_landlock() -> None:
    """Fail on a kernel that cannot confine everything; skip only if the variable WITHOUT is set."""
    if landlock.abi() >= landlock.SCOPES:
        return
    reason = f"the sandbox is NOT tested: {level(landlock.abi())}"
    if WITHOUT in os.environ:
        pytest.skip(reason)
    pytest.fail(f"{reason}; run the tests on Linux 6.12 or newer, or set {WITHOUT}=1 to skip them")
