"""The pages for contributors: what they name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "contributing").glob("*.md")))
# Placeholders, and what a command makes.
MADE = ("NAME", "NNNN", ".venv/")
PATH = re.compile(r"(?<![\w./-])((?:worker|tests|docs|config|migrations|jobs|bench)/[\w./-]+)")


def paths_of(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    links = {str((page.parent / link).resolve().relative_to(ROOT)) for link in linked(text)}
    return links | {path.rstrip("./") for path in PATH.findall(re.sub(r"\]\([^)]*\)", "]", text))}


def linked(text: str) -> set[str]:
    return {link.partition("#")[0] for link in re.findall(r"\]\(([^):#][^):]*)\)", text)}


@pytest.mark.feature("checkout")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page: Path):
    found = {path for path in paths_of(page) if not any(part in path for part in MADE)}

    assert {path for path in found if not (ROOT / path).exists()} == set()
    assert found
    assert not (ROOT / "worker/nowhere.py").exists() and "worker/nowhere.py" in PATH.findall(
        "`worker/nowhere.py`"
    )


@pytest.mark.feature("checkout")
def test_every_commit_that_a_page_names_is_in_the_history():
    named = {
        commit
        for page in PAGES
        for commit in re.findall(r"commit ([0-9a-f]{8})\b", page.read_text(encoding="utf-8"))
    }

    assert len(named) >= 5
    for commit in named:
        subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, check=True)


def test_each_thing_that_is_often_added_has_a_page_with_an_example():
    pages = [page for page in PAGES if page.parent.name == "contributing" and page.name != "index.md"]

    assert len(pages) == 8
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "Run: `" in text and "Example: " in text, page.name
        assert f"]({page.name})" in (page.parent / "index.md").read_text(encoding="utf-8")
