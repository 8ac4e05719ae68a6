"""The wiring constructs, and nothing else: what runs stands in other rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "worker"
CORE = (ROOT / "wiring", ROOT / "app" / "process.py", ROOT / "app" / "trying.py")
FEATURES = {
    folder.name: tuple(sorted(folder.rglob("*wiring.py"))) for folder in sorted((ROOT / "features").glob("*"))
}
WIRING = (*CORE, *(file for files in FEATURES.values() for file in files))
MAX_LINES, MAX_LINES_OF_A_FEATURE = 1_400, 500
MAX_FUNCTION = 60

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def files_of(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def lines_of(*places: Path) -> int:
    files = (file for place in places for file in files_of(place))
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


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
    assert lines_of(*CORE) <= MAX_LINES
    by_feature = {name: lines_of(*files) for name, files in FEATURES.items() if files}
    assert len(by_feature) > 4
    assert max(by_feature.values()) <= MAX_LINES_OF_A_FEATURE


def test_functions_of_the_wiring_and_of_execution_fit_on_a_page():
    found = {
        f"{name}:{function}"
        for name, tree in trees(*WIRING, ROOT / "engine")
        for function in long_functions(tree)
    }
    assert found == set()
    assert long_functions(ast.parse("def long():\n" + "    pass\n" * MAX_FUNCTION)) == ["long"]
