"""The wiring constructs, and nothing else: what runs stands in other rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "worker"
WIRING = (
    ROOT / "wiring",
    ROOT / "app" / "process.py",
    ROOT / "app" / "trying.py",
    *sorted((ROOT / "features").rglob("*wiring.py")),
)
MAX_LINES = 2_200
MAX_FUNCTION = 60

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def files_of(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def trees(*places: Path) -> Iterator[tuple[str, ast.Module]]:
    for place in places:
        for file in files_of(place):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def loops(tree: ast.Module) -> list[int]:
    """The lines with a loop that may have no end, or a function that is one."""
    found = (node for node in ast.walk(tree))
    return [
        node.lineno
        for node in found
        if isinstance(node, ast.While | ast.AsyncFor)
        or (isinstance(node, ast.AsyncFunctionDef) and node.name == "run")
    ]


def long_functions(tree: ast.Module) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, Function))
    return [node.name for node in nodes if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION]


def test_the_wiring_has_no_loop():
    assert {name: found for name, tree in trees(*WIRING) if (found := loops(tree))} == {}
    assert loops(ast.parse("async def run():\n    while True:\n        pass")) == [1, 2]


@pytest.mark.feature("checkout")
def test_the_wiring_stays_small():
    files = [file for place in WIRING for file in files_of(place)]
    assert len(files) > 10
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= MAX_LINES


def test_functions_of_the_wiring_and_of_execution_fit_on_a_page():
    found = {
        f"{name}:{function}"
        for name, tree in trees(*WIRING, ROOT / "engine")
        for function in long_functions(tree)
    }
    assert found == set()
    assert long_functions(ast.parse("def long():\n" + "    pass\n" * MAX_FUNCTION)) == ["long"]
