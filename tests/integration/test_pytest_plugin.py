"""The pytest plug-in as other people's tests meet it: there by installation, and no burden where unused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fakes.plugins import make_plugin
from worker.testing import Crash

UNUSED = """\
import sys


def test_nothing_but_the_plugin_is_loaded():
    loaded = {name for name in sys.modules if name.partition(".")[0] in ("worker", "jobs")}
    assert loaded == {"worker", "worker.testing", "worker.testing.plugin"}
    assert not {"httpx", "pydantic", "sqlalchemy"} & set(sys.modules)
"""
USED = """\
from worker import Context, job


@job("acme.greet")
async def greet(ctx: Context) -> str:
    return f"Hello, {ctx.org.name}"


def test_it_greets(orgworker):
    assert orgworker.run(greet, org="org_acme").result == "Hello, org_acme"
"""

IN_A_CHILD = """\
import os
import time
from worker import BlockingContext, job


@job("acme.pids", memory="512MiB")
def pids(ctx: BlockingContext) -> list[int]:
    seen = [*(ctx.checkpoint or []), os.getpid()]
    print("attempt", ctx.run.attempt)
    ctx.save(seen)
    if ctx.run.attempt == 1:
        time.sleep(60)  # it is killed in here
    return seen
"""


def run_pytest(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one file of tests in a folder of its own, with the installed plug-ins but schemathesis.

    Only this project's tests use that, and its import takes as long as the rest.
    """
    (folder / "test_it.py").write_text(source)
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    environment = {"PATH": os.defpath, "HOME": str(folder)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:schemathesis",
        *options,
    ]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=60)


def test_tests_that_do_not_use_it_load_nothing_of_the_worker(tmp_path):
    # Plug-ins of this project's own tests bring httpx and pydantic with them.
    done = run_pytest(tmp_path, UNUSED, "-p", "no:anyio", "-p", "no:hypothesispytest")

    assert done.returncode == 0, done.stdout


def test_the_fixture_is_there_by_installation(tmp_path):
    done = run_pytest(tmp_path, USED)

    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_it_can_be_left_out(tmp_path):
    done = run_pytest(tmp_path, USED, "-p", "no:orgworker")

    assert done.returncode == 1
    assert "fixture 'orgworker' not found" in done.stdout


def test_in_a_child_a_crash_kills_its_process(orgworker, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(
        make_plugin(tmp_path, modules={"acme_pids": IN_A_CHILD}, entry_points={"acme.pids": "acme_pids:pids"})
    )
    monkeypatch.delitem(sys.modules, "acme_pids", raising=False)

    finished = orgworker.run("acme.pids", place="child", faults=[Crash(after_save=1)])

    assert [attempt.outcome for attempt in finished.attempts] == ["lost", "succeeded"]
    assert len({os.getpid(), *finished.result}) == 3
    assert not Path(f"/proc/{finished.result[0]}").exists()
    assert [(line.attempt, line.text) for line in finished.logs] == [(1, "attempt 1"), (2, "attempt 2")]
