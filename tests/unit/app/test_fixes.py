"""Every error that can end a command is made with a sentence on what to do next."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import worker
from worker import errors

ROOMS = (
    *("cli", "claims", "definitions", "operations", "orgs", "providers"),
    *("settings", "store", "tokens", "wiring"),
)
# A verdict on a token and the loss of a run end a run, not a command; commands report them as findings.
OF_RUNS = {"TokenRefused", "LeaseLost"}
NEED_ONE = {
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.WorkerError) and not kind.usual_fix
} - OF_RUNS
PACKAGE = Path(worker.__file__).parent
# What only the worker's own loops ask for.
LOOPS = {PACKAGE / "store" / "worker_store.py"}


def made(room: str) -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if path in LOOPS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEED_ONE:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


@pytest.mark.parametrize("room", ROOMS)
def test_each_error_made_in_a_room_says_what_to_do(room: str):
    lacking = [
        f"{place} {ast.unparse(call)}"
        for place, call in made(room)
        if not any(keyword.arg == "fix" and ast.unparse(keyword.value) != "''" for keyword in call.keywords)
    ]

    assert lacking == []


def test_the_errors_are_found():
    assert {"UsageError", "NotFound", "Conflict", "ConfigurationError"} <= NEED_ONE
    assert sum(1 for room in ROOMS for _ in made(room)) > 60
