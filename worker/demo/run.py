"""`python -m worker demo`: four orgs, one worker, and a line for each change of a run's state.

Provider and API run in threads of this process. The commands and the worker are the same child
processes that an operator would start.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from worker.clock import Clock, SystemClock, to_text
from worker.demo.api import CustomerApi
from worker.demo.provider import Application, Fault, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.guard import Guard

AUDIENCE = "https://api.demo.example"
FLAG = "agent-v2"
POLL = 0.05


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
        credential = {"client_id": self.application.client_id, "client_secret": self.stored_secret}
        return json.dumps(
            {"code": self.code, "name": self.name, "issuer": "main", "tags": ["demo"], **credential}
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


class Installation:
    """The folder of one demo: its files, its environment and its worker."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.database = folder / "demo.db"
        self.settings = folder / "worker.toml"
        self.log = folder / "worker.log"
        self._environment = environment

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "worker", "--config", str(self.settings), *arguments]

    def run(self, *arguments: str) -> None:
        """Run one command; its failure ends the demo."""
        say(f"$ python -m worker {' '.join(Path(item).name for item in arguments)}")
        done = subprocess.run(
            self._command(*arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DemoFailed(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")

    def start_worker(self) -> subprocess.Popen[bytes]:
        # In its own session, so that Ctrl-C reaches only this process, which then drains the worker.
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self._command("run"),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


class DemoFailed(Exception):
    """A command of the demo failed, or its worker ended unexpectedly."""


# Polling `run_view` would miss states that last a few milliseconds, so triggers write a journal.
JOURNAL = """
CREATE TABLE demo_changes (
    seq INTEGER PRIMARY KEY, run_id TEXT NOT NULL, definition_id TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT, detail TEXT
);
CREATE TRIGGER demo_run_made AFTER INSERT ON live_runs BEGIN
    INSERT INTO demo_changes (run_id, definition_id, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, CASE NEW.state WHEN 'held' THEN 'waiting' ELSE NEW.state END,
            CASE NEW.state WHEN 'held' THEN 'held' ELSE NEW.reason END, NEW.detail);
END;
CREATE TRIGGER demo_run_moved AFTER UPDATE ON live_runs
WHEN OLD.state IS NOT NEW.state
     OR NEW.state = 'waiting' AND (OLD.reason IS NOT NEW.reason OR OLD.detail IS NOT NEW.detail) BEGIN
    INSERT INTO demo_changes (run_id, definition_id, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.state,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.reason END,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.detail END);
END;
CREATE TRIGGER demo_run_ended AFTER UPDATE ON runs WHEN OLD.state IS NOT NEW.state BEGIN
    INSERT INTO demo_changes (run_id, definition_id, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.state, NEW.reason, NEW.detail);
END;
"""

READ_CHANGES = """
SELECT c.seq, o.code, d.name, c.state, c.reason, c.detail, a.handler, a.handler_started_at
FROM demo_changes c JOIN definitions d ON d.id = c.definition_id JOIN orgs o ON o.id = d.org_id
LEFT JOIN attempts a ON a.run_id = c.run_id
     AND a.attempt = (SELECT max(attempt) FROM attempts WHERE run_id = c.run_id)
WHERE c.seq > ? ORDER BY c.seq
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A run entered a state; `handler` is that of its last attempt."""

    org: str
    definition: str
    state: str
    reason: str | None
    detail: str | None
    handler: str | None
    handler_started_at: str | None


class Journal:
    """Creates the journal in a migrated SQLite file, and reads each change once."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        self._connection.executescript(JOURNAL)
        self._seq = 0

    def read(self) -> list[Change]:
        """The changes since the last call."""
        rows = self._connection.execute(READ_CHANGES, (self._seq,)).fetchall()
        if rows:
            self._seq = rows[-1][0]
        return [Change(*row[1:]) for row in rows]

    def close(self) -> None:
        self._connection.close()


class Narrator:
    """Prints each change of a run's state, and explains it once for each org."""

    def __init__(self, journal: Journal, clock: Clock, started: float) -> None:
        self._journal = journal
        self._clock = clock
        self._started = started
        self._explained: set[tuple[str, str, str | None]] = set()
        self._ends: Counter[tuple[str, str]] = Counter()
        self._latest: dict[str, Change] = {}
        self._succeeded = False

    def narrate(self) -> None:
        for change in self._journal.read():
            at = to_text(self._clock.now())[:-4] + "Z"
            print_line(at, change.org, change.definition, change.state, change.reason, change.detail)
            self._latest[change.org] = change
            if change.state not in ("waiting", "running"):
                self._ends[change.org, change.state] += 1
            key = (change.org, change.state, change.reason)
            if key not in self._explained:
                self._explained.add(key)
                self._explain(change)

    def _explain(self, change: Change) -> None:
        if change.state == "succeeded":
            if not self._succeeded:
                self._succeeded = True
                elapsed = self._clock.monotonic() - self._started
                say(f"the first run succeeded {elapsed:.1f} s after the worker's start")
            new = (change.handler or "").endswith("_v2")
            which = "on: the new agent" if new else "off: the old agent"
            say(f"{change.org}: the flag agent-v2 is {which}, {change.handler}, answered")
        elif change.state == "refused":
            began = "was started" if change.handler_started_at else "was not started"
            say(f"{change.org}: the provider returned a token of another org; the handler {began}")
        elif change.reason == "no_token":
            say(f"{change.org}: the provider no longer takes its secret; its runs wait. To fix this:")
            command = f"credentials add {change.org} --client-id m2m-{change.org} --secret-file FILE"
            say(f"    python -m worker {command}")

    def sum_up(self) -> None:
        """Print the outcomes of each org's runs, or the state of its latest run if none has ended."""
        for org, latest in sorted(self._latest.items()):
            ends = [f"{count} {state}" for (of, state), count in sorted(self._ends.items()) if of == org]
            say(f"{org}: {', '.join(ends) or f'still {latest.state} ({latest.reason})'}")


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def print_line(
    time: str, org: str, definition: str, state: str, reason: str | None, detail: str | None
) -> None:
    flat = " ".join((detail or "-").split())
    print(f"{time:<24}  {org:<12}  {definition:<14}  {state:<9}  {reason or '-':<16}  {flat}", flush=True)


def run(seconds: float | None = None) -> int:
    """Run the demo for `seconds`, or until Ctrl-C; returns the process exit code."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        with ExitStack() as stack:
            play(stack, stop, seconds, SystemClock())
    except DemoFailed as error:
        if not stop.is_set():  # else Ctrl-C interrupted a command
            print(f"demo: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def play(stack: ExitStack, stop: threading.Event, seconds: float | None, clock: Clock) -> None:
    """Set up the demo, start the worker and print what it does."""
    ends_at = None if seconds is None else clock.monotonic() + seconds
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
    installation = Installation(folder, clean_environment() | {"ASSISTANT_API_KEY": chat_key})
    org_lines, definitions = folder / "orgs.jsonl", folder / "demo.toml"
    installation.settings.write_text(settings_file(installation.database, provider.url, api_url))
    org_lines.write_text("".join(f"{org.as_import_line()}\n" for org in orgs))
    definitions.write_text(definitions_file(orgs, api_url))
    say(f"a development provider at {provider.url}, a customer API at {api_url}")
    installation.run("db", "upgrade")
    journal = Journal(installation.database)
    stack.callback(journal.close)
    installation.run("orgs", "import", str(org_lines))
    installation.run("apply", str(definitions))
    say("$ python -m worker run")
    print_line("time", "org", "definition", "state", "reason", "detail")
    started = clock.monotonic()
    worker = installation.start_worker()
    stack.callback(end_worker, worker)
    narrator = Narrator(journal, clock, started)
    while not stop.is_set() and (ends_at is None or clock.monotonic() < ends_at):
        narrator.narrate()
        if worker.poll() is not None:
            raise DemoFailed(f"the worker ended with {worker.returncode}\n{tail(installation.log)}")
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
