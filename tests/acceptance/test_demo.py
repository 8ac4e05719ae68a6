"""The demo tells its four stories from nothing, and stops by itself or by Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.fakes import forked
from tests.fakes.site import wait_until

COLUMNS = ["time", "org", "definition", "state", "reason", "detail"]


@dataclass(frozen=True)
class Told:
    """What the demo printed, each line with the moment it came."""

    code: int
    lines: list[tuple[float, str]]

    def captions(self) -> list[tuple[float, str]]:
        return [(at, line[2:]) for at, line in self.lines if line.startswith("# ")]

    def rows(self) -> list[dict[str, str]]:
        table = [re.split(r" {2,}", line, maxsplit=5) for _, line in self.lines if not line.startswith("# ")]
        assert table[0] == COLUMNS
        return [dict(zip(COLUMNS, row, strict=True)) for row in table[1:]]

    def of(self, org: str) -> list[tuple[str, str]]:
        """The states of an org's digests; its other jobs are due at certain minutes, or expire then."""
        rows = [row for row in self.rows() if row["definition"] == "support-digest"]
        return [(row["state"], row["reason"]) for row in rows if row["org"] == org]


def start_demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "demo", *options],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    with start_demo(tmp_path_factory.mktemp("demo"), "--seconds", "26") as demo:
        assert demo.stdout is not None
        lines = [(time.monotonic(), line.rstrip("\n")) for line in demo.stdout]
    return Told(demo.returncode, lines)


def test_the_demo_stops_by_itself_with_0(told):
    assert told.code == 0, told.lines


def test_orgs_and_credentials_come_from_the_provider(told):
    commands = [line.removeprefix("$ ") for _, line in told.captions() if line.startswith("$ ")]

    assert "python -m worker orgs sync --provision" in commands
    assert not [line for line in commands if "import" in line or " add" in line]


def test_the_first_run_succeeds_within_six_seconds_of_the_workers_start(told):
    started = next(at for at, line in told.captions() if line.endswith("worker run"))
    succeeded = next(at for at, line in told.lines if "  succeeded  " in line)

    assert succeeded - started < 6


def test_an_org_with_the_flag_gets_the_new_agent(told):
    assert ("waiting", "due") in told.of("org_acme")
    assert ("running", "-") in told.of("org_acme")
    assert ("succeeded", "-") in told.of("org_acme")
    assert any("org_acme" in line and "assistant.digest_v2" in line for _, line in told.captions())


def test_an_org_without_the_flag_keeps_the_old_agent(told):
    assert ("succeeded", "-") in told.of("org_globex")
    assert any(re.search(r"org_globex.*assistant\.digest\b(?!_)", line) for _, line in told.captions())


def test_a_dead_secret_waits_and_what_to_do_is_printed(told):
    states = told.of("org_initech")

    assert ("waiting", "no_token") in states
    assert {state for state, _ in states} == {"waiting", "running"}
    assert any("credentials add org_initech" in line for _, line in told.captions())
    assert any("orgs sync --provision --org org_initech" in line for _, line in told.captions())


def test_another_orgs_token_is_refused_and_the_handler_not_started(told):
    refused = [row for row in told.rows() if row["org"] == "org_umbrella" and row["state"] == "refused"]

    assert {row["reason"] for row in refused} == {"org_mismatch"}
    assert any("org_umbrella" in line and "was not started" in line for _, line in told.captions())
    assert ("succeeded", "-") not in told.of("org_umbrella")


def test_a_killed_worker_pays_for_no_answered_model_call_again(told):
    captions = [line for _, line in told.captions()]
    [killed] = [line for line in captions if line.startswith("kill -9 of the worker")]
    [ended] = [line for line in captions if "model calls for 7 pages" in line]

    before = int(re.findall(r"after (\d+) model calls", killed)[0])
    calls = int(re.findall(r"(\d+) model calls for", ended)[0])
    assert 3 <= before < 7
    assert calls in (7, 8)
    assert "the kill repeated " + ("no call" if calls == 7 else "only the call in flight") in ended


@dataclass
class RunningDemo:
    """A demo that runs until a test ends it; its commands and itself are forks, its worker is not."""

    process: forked.Process | subprocess.Popen[bytes]
    output: IO[str]

    def family_at_work(self) -> list[psutil.Process]:
        """The demo's worker, its zygote and a run."""
        for line in self.output:
            if "  running  " in line:
                break
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def running_demo(tmp_path: Path) -> Iterator[RunningDemo]:
    reader, writer = os.pipe()
    with open(reader) as output:
        with open(writer, "wb") as stream:
            command = [sys.executable, "-m", "worker", "demo"]
            process = forked.start(command, cwd=tmp_path, env=os.environ, output=stream)
        yield RunningDemo(process, output)
        process.kill()
        process.wait()


def test_a_demo_that_is_killed_takes_its_worker_and_the_runs_with_it(running_demo: RunningDemo):
    family = running_demo.family_at_work()

    running_demo.process.kill()

    assert family
    wait_until(lambda: not any(alive(process) for process in family), "the demo's processes to end")


def test_ctrl_c_stops_everything(running_demo: RunningDemo):
    family = running_demo.family_at_work()

    running_demo.process.send_signal(signal.SIGINT)

    assert running_demo.process.wait(timeout=20) == 0, running_demo.output.read()
    assert family
    wait_until(lambda: not any(alive(process) for process in family), "the demo's processes to end")


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
