"""Commands of quickstart.md that need a checkout, run in one of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_build import OFFLINE, commands, copy_of_checkout

pytestmark = pytest.mark.timeout(300)
# What `./dev setup` leaves behind, for a checkout at another place.
SET_UP = "{ pwd; cat pyproject.toml config/requirements/dev.lock; } | cksum >.venv/stamp"


def run(lines: list[str], folder: Path) -> str:
    script = "\n".join(["set -eum", *lines])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=os.environ | OFFLINE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.feature("checkout")
def test_the_first_steps_of_the_quickstart(tmp_path: Path):
    source = copy_of_checkout(tmp_path / "source")
    (clone, demo), ahead = commands("quickstart.md", by="test_checkout_pages")
    assert demo == "./dev demo"

    printed = run(
        [
            clone.replace("<this repository>", str(source)),
            f"cp -a {source}/.venv . && {SET_UP}",
            f"{demo} >../log 2>&1 &",
            'until grep --quiet "  succeeded in " ../log; do',
            "    kill -0 %1 || { cat ../log; exit 1; }; sleep 0.2",
            "done",
            "kill -INT %1; wait %1",
            *ahead,
            "pwd; python -m worker --version",
        ],
        tmp_path,
    )

    assert "http://127.0.0.1:" in (tmp_path / "log").read_text()
    assert printed.splitlines()[-2] == str(tmp_path / "quickstart")
