"""`python -m worker demo`: four orgs, one worker, and a line for each change of a run's state.

Provider and API run in threads of this process. The commands and the worker are the same child
processes that an operator would start.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from worker.clock import Clock, SystemClock
from worker.demo.api import CustomerApi
from worker.demo.provider import Application, Fault, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.demo.story import COLUMNS, Journal, Narrator, line_of, say
from worker.guard import Guard

AUDIENCE = "https://api.demo.example"
FLAG = "agent-v2"
POLL = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Org:
    """One org of the demo: its application at the provider, and the secret that the operator has."""

    application: Application
    name: str
    stored_secret: str

    @property
    def code(self) -> str:
        return self.application.org_code

    def as_import_line(self) -> str:
        return json.dumps(
            {
                "code": self.code,
                "name": self.name,
                "issuer": "main",
                "client_id": self.application.client_id,
                "client_secret": self.stored_secret,
                "tags": ["demo"],
            }
        )


def make_org(
    name: str, *, model: str = "gpt-4", flags: dict[str, bool] | None = None, dead_secret: bool = False
) -> Org:
    code, secret = f"org_{name.lower()}", secrets.token_urlsafe(24)
    application = Application(
        org_code=code,
        client_id=f"m2m-{code}",
        client_secret=secret,
        scopes=("read:kb",),
        audiences=(AUDIENCE,),
        properties={"model_version": model, "max_tokens": 400, "language": "en"},
        flags=flags or {},
    )
    return Org(application, name, secrets.token_urlsafe(24) if dead_secret else secret)


def make_orgs() -> list[Org]:
    """Acme has the flag, Globex does not, Initech's secret is dead, Umbrella gets Acme's token."""
    return [
        make_org("Acme", model="gpt-4o", flags={FLAG: True, "beta-tools": False}),
        make_org("Globex"),
        make_org("Initech", dead_secret=True),
        make_org("Umbrella"),
    ]


def settings_file(database: Path, provider_url: str, api_url: str) -> str:
    """The demo's worker.toml."""
    return f"""\
[database]
url = "sqlite:///{database}"

[issuers.main]
profile = "kinde"
url = "{provider_url}"
audience = "{AUDIENCE}"
api_origins = ["{api_url}"]

[execution]
pass_environment = ["ASSISTANT_API_KEY"]
drain = "3s"

[web]
listen = ""
"""


def definitions_file(orgs: list[Org], api_url: str) -> str:
    """The file for `apply`: the same definition for each org."""
    return "\n".join(
        f"""\
[[definition]]
org = "{org.code}"
name = "support-digest"
handler = "assistant.digest"
variants = [{{ flag = "{FLAG}", handler = "assistant.digest_v2" }}]
schedule = "every 3s"
spread = "off"
scopes = ["read:kb"]
params = {{ knowledge_base = "{api_url}", chat = "{api_url}" }}
"""
        for org in orgs
    )


class Stage:
    """The folder of one demo: its files, its environment and its worker."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.database = folder / "demo.db"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        self._environment = environment

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "worker", "--config", str(self.settings), *arguments]

    def run(self, *arguments: str) -> None:
        """Run one command; its failure ends the demo."""
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
        # In its own session, so that Ctrl-C reaches only this process, which then drains the worker.
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
    """A command of the demo failed, or its worker ended unexpectedly."""


def run(seconds: float | None = None, *, clock: Clock | None = None) -> int:
    """Run the demo for `seconds`, or until Ctrl-C; returns the process exit code."""
    clock = clock or SystemClock()
    ends_at = None if seconds is None else clock.monotonic() + seconds
    with stopping_on_signals() as stop:
        try:
            with ExitStack() as stack:
                play(stack, stop, ends_at, clock)
        except StageError as error:
            if stop.is_set():  # Ctrl-C interrupted a command
                return 0
            print(f"demo: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def play(stack: ExitStack, stop: threading.Event, ends_at: float | None, clock: Clock) -> None:
    """Set up the demo, start the worker and print what it does."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-demo-")))
    orgs = make_orgs()
    provider, provider_thread = serve_provider()
    stack.enter_context(provider_thread)
    for org in orgs:
        provider.add(org.application)
    provider.misbehave(Fault(replace={"org_code": "org_acme"}), "m2m-org_umbrella")
    chat_key = secrets.token_urlsafe(24)
    guard = Guard(provider.url, audience=AUDIENCE, scopes={"read:kb"})
    api = CustomerApi(guard, orgs={org.code: org.name for org in orgs}, chat_key=chat_key)
    listener = bind_loopback()
    api_url = url_of(listener)
    stack.enter_context(ServerThread(api.asgi(), listener))
    stage = Stage(folder, clean_environment() | {"ASSISTANT_API_KEY": chat_key})
    org_lines, definitions = folder / "orgs.jsonl", folder / "demo.toml"
    stage.settings.write_text(settings_file(stage.database, provider.url, api_url))
    org_lines.write_text("".join(f"{org.as_import_line()}\n" for org in orgs))
    definitions.write_text(definitions_file(orgs, api_url))
    say(f"a development provider at {provider.url}, a customer API at {api_url}")
    stage.run("db", "upgrade")
    journal = Journal(str(stage.database))
    stack.callback(journal.close)
    journal.install()
    stage.run("orgs", "import", str(org_lines))
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
    """This process's environment without worker settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}


def end_worker(worker: subprocess.Popen[bytes]) -> None:
    """Drain the worker with SIGTERM, send another to shorten the grace, then kill it."""
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
    """An event that SIGINT, SIGTERM and SIGHUP set; restores their handlers at the end."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
