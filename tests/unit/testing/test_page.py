"""The page on testing has all that `orgworker.run` takes, and its examples are code."""

from __future__ import annotations

import inspect
from typing import Any

from tests.fakes.pages import ROOT, blocks
from worker.testing import Orgworker

PAGE = (ROOT / "docs" / "reference" / "testing.md").read_text(encoding="utf-8")


def test_every_parameter_of_run_is_on_the_page():
    parameters = list(inspect.signature(Orgworker.run).parameters)[1:]

    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert [name for name in parameters if not any(row.startswith(f"| `{name}` ") for row in rows)] == []


def test_its_examples_hold(orgworker):
    names: dict[str, Any] = {}
    exec("from worker.testing import *", names)

    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.text, "testing.md", "exec"), names)

    names["test_a_rotated_secret_takes_another_token"](orgworker)
    assert [type(fault).__name__ for fault in names["faults"]] == ["ProviderDown", "Crash", "SecretRotated"]
