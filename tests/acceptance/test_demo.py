"""The demo tells its stories from nothing, asks the reader for two things, and stops by Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import httpx
import psutil
import pytest

from tests.fakes import forked
from tests.fakes.site import wait_until
from worker.demo.journal import QUIET, WIDTH

pytestmark = pytest.mark.feature("checkout")

PATIENCE = 120


class Row(NamedTuple):
    """A line about a run."""

    text: str
    org: str
    definition: str
    happened: str


@dataclass
class Told:
    """What the demo has printed on its terminal, each line with the moment it came."""

    process: subprocess.Popen[bytes]
    terminal: int
    lines: list[tuple[float, str]] = field(default_factory=list)
    family: list[psutil.Process] = field(default_factory=list)
    templates: str = field(default="", repr=False)
    _rest: bytes = b""

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def found(self, pattern: str) -> str:
        """The first group of the first place that matches."""
        match = re.search(pattern, self.text)
        assert match is not None, self.text
        return match[1]

    def rows(self) -> list[Row]:
        split = ((line, re.split(r" {2,}", line, maxsplit=3)) for _, line in self.lines)
        return [Row(line, *row[1:]) for line, row in split if re.fullmatch(r"\d\d:\d\d:\d\d", row[0])]

    def of(self, org: str, definition: str = "support-digest") -> list[str]:
        """What happened to a definition's runs."""
        return [row.happened for row in self.rows() if (row.org, row.definition) == (org, definition)]

    def ends_of(self, org: str) -> list[str]:
        """How the runs of its digest ended. On a busy machine the kill of the worker may meet one of them."""
        return [happened for happened in self.of(org) if not happened.startswith("its worker")]

    def seconds(self) -> float:
        """From the worker's start to the end."""
        started = next(at for at, line in self.lines if line == "# $ orgworker run")
        return self.lines[-1][0] - started

    def press(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def until(self, found: Callable[[str], object], what: str) -> None:
        """Read until the printed text has what is wanted."""
        deadline = time.monotonic() + PATIENCE
        while not found(self.text):
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.text}"
            assert self.read(), f"the demo ended before {what}:\n{self.text}"

    def read(self) -> bool:
        """Read what there is, waiting for some; returns whether the demo still has the terminal."""
        try:
            if select.select([self.terminal], [], [], 1)[0]:
                self._rest += os.read(self.terminal, 65536)
        except OSError:  # its other end is closed
            return False
        *whole, self._rest = self._rest.split(b"\r\n")
        self.lines += [(time.monotonic(), line.decode()) for line in whole]
        return True


class Reader:
    """A person with a browser, logged in by a link that the demo printed."""

    def __init__(self, link: str) -> None:
        self.origin = link.partition("/login/")[0]
        self._http = httpx.Client(
            base_url=self.origin, headers={"origin": self.origin}, follow_redirects=True
        )
        self.logged_in = self.press(link, link)

    def page(self, url: str) -> str:
        answer = self._http.get(url)
        assert answer.status_code == 200, answer.text
        return answer.text

    def press(self, url: str, action: str, **fields: str) -> httpx.Response:
        """Press a button on a page."""
        [*_, csrf] = re.findall(r'name="csrf" value="([^"]+)"', self.page(url))
        return self._http.post(action, data={"csrf": csrf, **fields})

    def close(self) -> None:
        self._http.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """A demo from its start to Ctrl-C, on a terminal; its reader does what it asks for."""
    ours, theirs = os.openpty()
    # `setsid` makes it the terminal of the demo, as a shell does.
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "worker", "demo"],
        cwd=tmp_path_factory.mktemp("demo"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    demo = Told(process, ours)
    try:
        demo.until(lambda text: "runs answer" in text and "budgets raise" in text, "its two requests")
        demo.press(b"\n")
        demo.until(lambda text: "a new link to the console: " in text, "another link")
        reader = Reader(demo.found(r"a new link to the console: (\S+)"))
        demo.templates = reader.page("/templates")
        run = demo.found(r"answer it: (\S+), or")
        reader.press(run, f"{run}/answer", name="approval", occurrence="1", choice='"yes"')
        reader.close()
        raised = subprocess.run(
            ["sh", "-c", demo.found(r"#     (\S+/orgworker budgets raise .*)")],
            capture_output=True,
            check=False,
        )
        assert raised.returncode == 0, raised.stderr
        demo.until(lambda _: len(demo.of("org_acme", "refund")) == 3, "the refund")
        demo.until(lambda _: len(demo.of("org_globex", "letters")) == 3, "the letters")
        demo.until(lambda _: "succeeded" in " ".join(demo.of("org_acme", "reviews")), "a batch")
        demo.family = psutil.Process(process.pid).children(recursive=True)
        demo.press(b"\x03")
        while demo.read():
            pass
        process.wait(timeout=20)
        yield demo
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_everything(told: Told):
    assert told.process.returncode == 0, told.text
    assert told.family
    wait_until(lambda: not any(alive(process) for process in told.family), "the demo's processes to end")
    assert "# org_acme: " in told.lines[-4][1]


def test_orgs_and_credentials_come_from_the_provider(told: Told):
    commands = [line.removeprefix("# $ ") for _, line in told.lines if line.startswith("# $ ")]

    assert "orgworker orgs sync --provision" in commands
    assert not [line for line in commands if "import" in line or " add" in line]


def test_the_first_run_succeeds_before_the_reader_is_asked_for_anything(told: Told):
    assert told.text.index("  succeeded in ") < told.text.index("runs answer")


def test_each_event_is_a_plain_line_that_fits(told: Told):
    """Its commands may be longer. A digest that succeeds every 3 s has a line every 20 s."""
    rows = told.rows()

    # The syncs are due on the quarter of an hour.
    named = {row.definition for row in rows} - {"crm-sync"}
    assert named == {"support-digest", "handbook", "refund", "letters", "reviews"}
    assert max(len(row.text) for row in rows) <= WIDTH
    assert not [row for row in rows if set(row.happened) & set("{}[]\x1b") or not row.happened]
    assert len(told.ends_of("org_globex")) <= 1 + told.seconds() / QUIET


def test_the_flag_chooses_the_agent(told: Told):
    assert "agent-v2 is on, by assistant.digest_v2" in told.of("org_acme")[0]
    assert told.of("org_globex")[0].endswith("agent-v2 is off, by assistant.digest")


def test_model_requests_wait_in_a_batch(told: Told):
    assert told.of("org_globex", "reviews")[0] == "waits in a batch of openai, without a process"


def test_a_dead_secret_waits_and_what_to_do_is_printed(told: Told):
    assert told.of("org_initech") == ["waits: no token, the provider rejects its secret"]
    assert told.found(r"#     \S+/(orgworker orgs sync --provision --org org_initech)")


def test_another_orgs_token_is_refused_and_the_handler_not_started(told: Told):
    assert {happened.partition(" (")[0] for happened in told.ends_of("org_umbrella")} == {
        "refused: another org's token, handler not called"
    }


def test_a_killed_worker_pays_for_no_answered_model_call_again(told: Told):
    before = int(told.found(r"kill -9 of the worker.*after (\d+) model calls"))
    calls = int(told.found(r"(\d+) model calls for 7 pages"))

    assert 3 <= before < 7
    assert calls in (7, 8)
    assert "the kill repeated " + ("no call" if calls == 7 else "only the call in flight") in told.text


def test_an_approval_given_on_the_console_lets_the_run_go_on(told: Told):
    asked, resumed, ended = told.of("org_acme", "refund")

    assert asked == "waits for an answer: Refund 40 EUR to Ada? yes / no"
    assert re.fullmatch(r"goes on: \S.* answered yes", resumed)
    assert ended.startswith("succeeded in ")


def test_a_budget_raised_by_the_printed_command_lets_the_run_go_on(told: Told):
    spent, resumed, ended = told.of("org_globex", "letters")

    assert (spent, resumed) == ("used up its budget of letters", "goes on: there is budget again")
    assert ended.startswith("succeeded in ")
    # The control: the same template's run in an org without a budget.
    [free] = told.of("org_acme", "letters")
    assert free.startswith("succeeded in ")


def test_enter_prints_another_link_and_what_waits(told: Told):
    first, second = re.findall(r"http://\S+/login/once/\S+", told.text)

    assert first != second
    assert told.text.count("# refund of org_acme waits for an answer") == 1
    assert "Enter prints a new link" in told.text


def test_the_console_counts_the_orgs_that_each_template_reaches(told: Told):
    cards = re.findall(r"(?s)<h2>([\w-]+)</h2>.*?<dt>Reaches</dt><dd>(\d+) orgs", told.templates)

    assert dict(cards) == {"support-digest": "4", "letters": "2", "reviews": "2"}


@dataclass
class RunningDemo:
    """A demo that runs until a test ends it; its commands and itself are forks, its worker is not."""

    process: forked.Process | subprocess.Popen[bytes]
    output: IO[str]

    def family_at_work(self) -> list[psutil.Process]:
        """The demo's worker, its zygote and a run."""
        for line in self.output:
            if "  support-digest  " in line:
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


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
