"""A `worker.py` or `worker/` of the user, which `python -m worker` runs in place of orgworker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.cli import CommandLine, run_command
from worker.diagnosis.shadow import shadow_in

SHADOWS = {
    "worker.py": True,
    "worker/__init__.py": True,
    "worker/notes.txt": False,
    "worker/worker.py": False,
}


@pytest.fixture(params=SHADOWS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    """A folder with this file in it, and whether that is in the way."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("print('mine')\nraise SystemExit\n")
    return tmp_path, SHADOWS[request.param]


def test_what_python_would_run_is_what_is_warned_of(folder: tuple[Path, bool]):
    """Python itself is the control: it runs the user's module, or that of orgworker."""
    place, is_shadowed = folder
    asked = [sys.executable, "-m", "worker", "--version"]
    ran = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=False)

    assert (shadow_in(place) is not None) == is_shadowed
    assert (ran.stdout == "mine\n") == is_shadowed


@pytest.mark.feature("console")
def test_doctor_new_job_and_demo_warn(
    folder: tuple[Path, bool], cli: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    place, is_shadowed = folder
    monkeypatch.chdir(place)
    monkeypatch.setattr("worker.demo.run.run", lambda seconds: 0)
    line = "`python -m worker` runs " + str(place / "worker")
    fix = "rename it, or use `orgworker` or `python -P -m worker` there"

    found = {row["check"]: row["fix"] for row in cli("doctor", "-o", "json", check=False).json()}
    warned = [run_command("new-job", "acme.shadowed").err, run_command("demo").err]

    assert found.get("shadow") == (fix if is_shadowed else None)
    assert [line in text and fix in text for text in warned] == [is_shadowed] * 2


def test_the_checkout_does_not_shadow_itself():
    assert shadow_in(Path(__file__).parents[3]) is None
