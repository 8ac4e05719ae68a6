"""The quickstart, executed as it stands: every shell block in order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.fakes.postgres import free_port

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with `python` and `pip` of an environment that has our packages and may be added to."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = (folder / "lib").glob("python3*/site-packages")
    # site.addsitedir, unlike a plain line, also reads the .pth file by which the checkout is installed.
    (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {folder}/bin/python "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


@pytest.mark.timeout(180)
def test_the_quickstart_does_what_it_says(commands, tmp_path):
    text = PAGE.read_text().replace("8480", str(free_port()))
    script = "set -euo pipefail\nset -m\n" + "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.S | re.M))
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (tmp_path / "out").touch()

    with (tmp_path / "out").open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env={"PATH": f"{commands}:{os.defpath}", "HOME": str(tmp_path), "WORKER_WEB__LISTEN": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=150)
        finally:
            stop_what_is_left(tmp_path)
    shown = (tmp_path / "out").read_text()

    assert code == 0, shown + (folder / "worker.log").read_text()
    assert "acme.greet" in shown
    assert "flag_off" in shown
    run = json.loads(shown[shown.index("\n{") :])
    assert run["state"] == "succeeded"
    assert run["result"] == {"org": "org_acme", "greetings": ["Hallo, Ada!", "Hallo, Grace!"]}
    assert "secret-of" not in (folder / "worker.log").read_text() + shown


def stop_what_is_left(folder: Path) -> None:
    """Kill whatever still works in the folder: the page starts things in the background."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = (process / "cwd").readlink().is_relative_to(folder)
        except OSError:
            continue
        if inside:
            os.kill(int(process.name), signal.SIGKILL)
