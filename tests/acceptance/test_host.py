"""`python -m worker host` as its workers see it: what it takes, sends and leaves behind.

Runs that are cancelled or take too long are tested in test_where_runs_execute.py, a drain that hands them
back in test_temporal.py, a lost lease and the worker that is asked next in test_host_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.fakes import forked
from tests.fakes.attempts import TOKEN, Attempts, problem
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.pages import ROOT, blocks
from tests.fakes.ports import free_port
from tests.fakes.site import wait_until
from worker.execution.runners.child import linux
from worker.runs import outcome as outcomes


class Machine:
    """A machine with a host, its configuration and its plug-ins; nothing of the database."""

    def __init__(self, folder: Path, attempts: Attempts) -> None:
        self.folder = folder
        self.attempts = attempts
        self.out = folder / "out"
        self.journal = self.out / "journal"
        self.config, self.token, self.log = folder / "host.toml", folder / "token", folder / "host.log"
        self.out.mkdir()
        (folder / "plugins").mkdir()
        install_handlers(folder / "plugins")
        self.token.write_text(f"{TOKEN}\n")
        self.token.chmod(0o600)
        self.configure()
        self.processes: list[subprocess.Popen[bytes]] = []

    def configure(self, *, control: list[str] | None = None, execution: str = "", extra: str = "") -> None:
        self.config.write_text(
            f"""\
[host]
control = {json.dumps(control or [self.attempts.url])}
token_file = "{self.token}"
[execution]
inline = ["acme-jobs"]
write_paths = ["{self.out}"]
{execution}
{extra}
"""
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
        environment = kept | {"PYTHONPATH": str(self.folder / "plugins")}
        command = [sys.executable, "-m", "worker", "--config", str(self.config), "host", *arguments]
        with self.log.open("ab") as log:
            process = forked.start(command, cwd=self.folder, env=environment, output=log)
        self.processes.append(process)
        return process

    def started(self) -> subprocess.Popen[bytes]:
        """A host that offers what is installed."""
        process = self.start()
        self.until(lambda: self.attempts.complete, "the catalogue")
        return process

    def until(self, probe: Any, what: str, *, timeout: float = 30.0) -> Any:
        try:
            return wait_until(probe, what, timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-3000:]}") from None

    def give(self, name: str, **changes: Any) -> Any:
        params = {"journal": str(self.journal), **changes.pop("params", {})}
        return self.attempts.give(f"acme.{name}", params=params, **changes)

    def ended(self, count: int = 1) -> list[Any]:
        self.until(lambda: len(self.attempts.ends) >= count, f"{count} ends")
        return [end.outcome for end in self.attempts.ends]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [row for row in rows if row.get("event") == name]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def attempts() -> Iterator[Attempts]:
    made = Attempts()
    made.thread.start()
    yield made
    made.stop()


@pytest.fixture
def machine(tmp_path: Path, attempts: Attempts) -> Iterator[Machine]:
    made = Machine(tmp_path, attempts)
    yield made
    made.close()


def test_a_host_runs_child_and_inline_handlers_and_drains(machine: Machine, attempts: Attempts) -> None:
    host = machine.started()
    assert {"acme.note", "acme.inline"} <= set(attempts.entries)
    assert attempts.registration.slots == {"child": 50, "inline": 1000}

    child = machine.give("note")
    inline = machine.give("inline", isolation="inline")
    machine.ended(2)

    ends = {end.run: end for end in attempts.ends}
    assert isinstance(ends[child.run.id].outcome, outcomes.Succeeded)
    assert json.loads(ends[child.run.id].outcome.result)["org"] == "org_acme"
    assert isinstance(ends[inline.run.id].outcome, outcomes.Succeeded)
    assert ends[child.run.id].sealed == "c2VhbGVk"
    assert {line["who"] for line in read_journal(machine.journal)} == {"note", "inline"}

    # Its only worker restarts: it says until the next one hears it that it has stopped.
    attempts.instead = lambda name: problem(503, "busy", "later") if name == "unregister" else None
    host.terminate()
    machine.until(lambda: attempts.calls.count("unregister") > 1, "a second farewell")
    assert host.poll() is None
    attempts.instead = lambda name: None
    assert host.wait(20) == 0
    assert attempts.unregistered
    assert len(machine.events("host.stopped")) == 1
    assert machine.events("run.ended") == []
    assert {event["outcome"] for event in machine.events("attempt.ended")} == {"succeeded"}


def test_what_a_handler_saves_and_prints_reaches_the_workers_masked(machine: Machine) -> None:
    machine.started()
    machine.give("leak")
    machine.give("steps", params={"steps": 2, "pause": 0})

    failed, succeeded = sorted(machine.ended(2), key=lambda outcome: type(outcome).__name__)

    assert isinstance(failed, outcomes.Failed) and failed.error.message == "raised [masked]"
    assert isinstance(succeeded, outcomes.Succeeded)
    assert machine.attempts.saved == ['{"step":1}', '{"step":2}']
    assert {"printed [masked]", "logged [masked]"} <= {line.text for line in machine.attempts.lines}
    assert [end.moved for end in machine.attempts.ends].count(True) == 1
    assert "org-token-canary" not in machine.text()


def test_runs_freeze_at_80_percent_of_an_unrenewed_lease_and_go_on(
    machine: Machine, attempts: Attempts
) -> None:
    attempts.lease, attempts.renew_every = 2.0, 0.2
    machine.started()
    machine.give("steps", params={"steps": 10_000, "pause": 0.02})
    machine.until(lambda: read_journal(machine.journal, "step"), "the handler")

    # A busy machine may have been late with a renewal before.
    earlier = len(machine.events("children.frozen"))
    attempts.instead = lambda name: problem(503, "database_unavailable", "away")
    cut = time.time()
    (frozen,) = machine.until(lambda: machine.events("children.frozen")[earlier:], "frozen children")
    time.sleep(0.7)
    lines = len(read_journal(machine.journal))
    last = read_journal(machine.journal)[-1]["at"]
    time.sleep(0.3)

    assert frozen["runs"] == 1
    assert len(read_journal(machine.journal)) == lines
    assert last <= cut + attempts.lease + 1

    attempts.instead = lambda name: None
    machine.until(lambda: len(read_journal(machine.journal)) > lines + 5, "thawed children")


def test_no_process_of_a_run_survives_a_killed_host(machine: Machine) -> None:
    host = machine.started()
    machine.give("steps", params={"steps": 10_000})
    machine.until(lambda: read_journal(machine.journal, "grandchild"), "the handler and its process")
    pids = {line["pid"] for line in read_journal(machine.journal)}

    host.kill()

    machine.until(lambda: not any(map(psutil.pid_exists, pids)), "the end of all processes", timeout=5)


def test_a_host_survives_its_zygote(machine: Machine, attempts: Attempts) -> None:
    host = machine.started()
    machine.give("block")
    machine.until(lambda: read_journal(machine.journal, "block"), "the handler")
    children = psutil.Process(host.pid).children()
    [zygote] = [child for child in children if child.name() == linux.ProcessName.ZYGOTE]

    zygote.kill()

    assert isinstance(machine.ended()[0], outcomes.Lost)
    machine.give("note")
    assert isinstance(machine.ended(2)[1], outcomes.Succeeded)


def test_a_host_waits_for_the_first_worker(machine: Machine, attempts: Attempts) -> None:
    attempts.instead = lambda name: problem(503, "busy", "later")
    host = machine.start()
    machine.until(lambda: attempts.calls.count("register") > 1, "a second try")
    assert host.poll() is None

    attempts.instead = lambda name: None
    machine.until(lambda: attempts.complete, "the catalogue")


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        ((), "wrong", "the workers do not accept this host"),
        (("--pool", "us"), TOKEN, "--pool us: the token in .* is for the pool eu"),
    ],
)
def test_a_token_that_is_not_accepted_exits_78(
    machine: Machine, arguments: tuple[str, ...], token: str, message: str
) -> None:
    machine.token.write_text(token)
    host = machine.start(*arguments)

    assert host.wait(30) == 78
    assert re.search(f"error: {message}", machine.text())
    assert TOKEN not in machine.text()


def test_the_command_of_the_page_starts_a_host(machine: Machine, attempts: Attempts) -> None:
    """That of docs/operating/hosts.md, whose host has a token of the pool `eu-gpu`."""
    page = blocks((ROOT / "docs" / "operating" / "hosts.md").read_text(encoding="utf-8"))
    [command] = [block.text.split() for block in page if block.marks.get("by") == "test_host"]
    assert command[:7] == ["$", "python", "-m", "worker", "--config", machine.config.name, "host"]
    attempts.pool = "eu-gpu"

    machine.start(*command[7:])

    machine.until(lambda: attempts.complete, "the catalogue")


def test_a_token_that_others_may_read_exits_78(machine: Machine, attempts: Attempts) -> None:
    machine.token.chmod(0o644)

    assert machine.start().wait(30) == 78
    assert f"host.token_file: others may read {machine.token}" in machine.text()
    assert attempts.calls == []


def test_health_says_whether_the_host_takes_runs(machine: Machine, attempts: Attempts) -> None:
    port = free_port()
    machine.configure(extra=f'[web]\nhealth_listen = "127.0.0.1:{port}"')
    machine.started()

    def lacking() -> list[str]:
        body: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/readyz").json()
        return list(body["lacking"])

    machine.until(lambda: lacking() == [], "readiness")
    assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    assert "orgworker" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    attempts.instead = lambda name: problem(503, "busy", "later")
    machine.until(lambda: "admission" in lacking() or "lease" in lacking(), "that no worker answers")


def test_doctor_on_a_host_says_what_it_lacks(machine: Machine) -> None:
    checks = ("token", "control", "sandbox", "changeable_files", "trusted_code")

    def failed(mode: str) -> tuple[int, list[str]]:
        command = [sys.executable, "-m", "worker", "--config", str(machine.config), "doctor", "-o", "json"]
        done = forked.run(command, cwd=machine.folder, env=os.environ | {"WORKER_EXECUTION__SANDBOX": mode})
        assert tuple(row["check"] for row in done.json()) == checks
        return done.code, [row["check"] for row in done.json() if not row["ok"]]

    assert failed("auto") == (0, [])
    # The token belongs to the account of the host, so a handler could open it to others.
    assert failed("require") == (1, ["changeable_files"])
    machine.token.write_text("another")
    assert failed("auto") == (1, ["control"])
