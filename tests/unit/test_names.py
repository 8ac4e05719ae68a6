"""The name check finds a class with two homes, and exceptions that are no longer needed."""

from __future__ import annotations

import subprocess
import sys

from docs.names import EXCEPTIONS, MAX_EXCEPTIONS, ROOT, Problem, problems


def texts(found: list[Problem], rule: str) -> list[str]:
    return [problem.text for problem in found if problem.rule == rule]


def test_a_public_class_has_one_home():
    sources = {
        "worker/a.py": "class Found:\n    pass\n",
        "worker/b.py": "try:\n    import ssl\nexcept ImportError:\n    class Found: ...\n",
    }

    [problem] = problems(sources, {})

    assert (problem.rule, problem.place) == ("class", "worker/b.py:4")
    assert "worker/a.py:1, worker/b.py:4" in problem.text


def test_private_and_nested_classes_may_share_a_name():
    text = "class _Found: ...\nclass {}:\n    class Inner: ...\n"

    assert problems({"worker/a.py": text.format("A"), "worker/b.py": text.format("B")}, {}) == []


def test_an_exception_that_is_not_needed_is_a_problem():
    one, two = {"worker/a.py": "class A: ..."}, {"worker/a.py": "class A: ...", "worker/b.py": "class A: ..."}

    assert texts(problems(one, {"A": "a reason"}), "class") == ["A has one home now: drop it from EXCEPTIONS"]
    assert problems(two, {"A": "a reason"}) == []


def test_a_maximum_is_called_max_and_constants_stand_alone():
    text = "MOST = 1\n_MOST_ROWS: int = 2\nA, B = 1, 2\na, b = 1, 2\nC, D = f()\nALMOST = MAX_ROWS = 3\n"

    found = problems({"worker/a.py": text + "class K:\n    MOST_KEYS = 1\n"}, {})

    assert [problem.place for problem in found if problem.rule == "max"] == [
        "worker/a.py:1",
        "worker/a.py:2",
        "worker/a.py:8",
    ]
    assert texts(found, "tuple") == ["A, B: give each constant a statement of its own"]


def test_the_worker_has_no_such_problem():
    check = subprocess.run([sys.executable, "-m", "docs.names"], cwd=ROOT, capture_output=True, text=True)

    assert check.returncode == 0, check.stdout
    assert len(EXCEPTIONS) <= MAX_EXCEPTIONS and all(EXCEPTIONS.values())


def test_the_clients_names_are_counted_apart():
    """Products import them from a distribution of its own."""
    twice = {"worker/client/errors.py": "class NotFound: ...", "worker/errors.py": "class NotFound: ..."}
    within = {"worker/client/errors.py": "class NotFound: ...", "worker/client/x.py": "class NotFound: ..."}

    assert problems(twice, {}) == []
    assert len(problems(within, {})) == 1
