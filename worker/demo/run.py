"""`python -m worker demo`: four orgs, one worker, and a line for each change of a run's state.

Provider and API run in threads of this process; the commands and the worker are
real child processes, the same that an operator would start.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from worker.clock import Clock, SystemClock
from worker.demo.api import CustomerApi
from worker.demo.cast import (
    AUDIENCE,
    definitions_file,
    make_cast,
    prepare,
    settings_file,
)
from worker.demo.provider import serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.demo.story import COLUMNS, Journal, Narrator, line_of, say
from worker.guard import Guard

POLL = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stage:
    """The folder of one demo: its files, its environment, its worker."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.database = folder / "demo.db"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        self._environment = environment

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "worker", "--config", str(self.settings), *arguments]

    def run(self, *arguments: str) -> None:
        """Run one command as an operator would; its failure ends the demo."""
        say(f"$ python -m worker {' '.join(Path(item).name for item in arguments)}")
        done = subprocess.run(
            self.command(*arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise StageError(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")

    def start_worker(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches this process only, which then drains the worker.
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command("run"),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


class StageError(Exception):
    """A command of the demo failed, or its worker ended by itself."""


def run(seconds: float | None = None, *, clock: Clock | None = None) -> int:
    """Tell the story until Ctrl-C, or for so many seconds; the process exit code."""
    clock = clock or SystemClock()
    ends_at = None if seconds is None else clock.monotonic() + seconds
    with stopping_on_signals() as stop:
        try:
            with ExitStack() as stack:
                tell(stack, stop, ends_at, clock)
        except StageError as error:
            if stop.is_set():  # Ctrl-C reached the command that was on
                return 0
            print(f"demo: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def tell(stack: ExitStack, stop: threading.Event, ends_at: float | None, clock: Clock) -> None:
    """Set the stage, start the worker and narrate what it does."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-demo-")))
    cast = make_cast()
    provider, provider_thread = serve_provider()
    stack.enter_context(provider_thread)
    prepare(provider, cast)
    chat_key = secrets.token_urlsafe(24)
    guard = Guard(provider.url, audience=AUDIENCE, scopes={"read:kb"})
    api = CustomerApi(guard, orgs={actor.code: actor.name for actor in cast}, chat_key=chat_key)
    listener = bind_loopback()
    api_url = url_of(listener)
    stack.enter_context(ServerThread(api.asgi(), listener))
    stage = Stage(folder, clean_environment() | {"ASSISTANT_API_KEY": chat_key})
    orgs, definitions = folder / "orgs.jsonl", folder / "demo.toml"
    stage.settings.write_text(settings_file(str(stage.database), provider.url, api_url))
    orgs.write_text("".join(f"{actor.as_import_line()}\n" for actor in cast))
    definitions.write_text(definitions_file(cast, api_url))
    say(f"a development provider at {provider.url}, a customer API at {api_url}")
    stage.run("db", "upgrade")
    journal = Journal(str(stage.database))
    stack.callback(journal.close)
    journal.install()
    stage.run("orgs", "import", str(orgs))
    stage.run("apply", str(definitions))
    say("$ python -m worker run")
    print(line_of(*COLUMNS), flush=True)
    started = clock.monotonic()
    worker = stage.start_worker()
    stack.callback(end_worker, worker)
    narrator = Narrator(journal, clock, started)
    while not stop.is_set() and (ends_at is None or clock.monotonic() < ends_at):
        narrator.narrate()
        if worker.poll() is not None:
            raise StageError(f"the worker ended with {worker.returncode}\n{tail(stage.log)}")
        stop.wait(POLL)
    say("stopping: the worker drains")
    end_worker(worker)
    narrator.narrate()
    narrator.sum_up()


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of another worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}


def end_worker(worker: subprocess.Popen[bytes]) -> None:
    """Drain the worker: SIGTERM, once more to shorten the grace, then kill it."""
    for _ in range(2):
        if worker.poll() is not None:
            return
        worker.terminate()
        try:
            worker.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    if worker.poll() is None:
        worker.kill()
        worker.wait()


def tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set; their handlers are put back at the end."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
