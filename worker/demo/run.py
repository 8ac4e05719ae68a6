"""`python -m worker demo`: four orgs, one worker, and a line for each change of a run's state.

Provider and API run in threads of this process. The commands and the worker are the same child
processes that an operator would start.
"""

from __future__ import annotations

import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from worker.clock import Clock, SystemClock, to_text
from worker.demo.api import TOPICS
from worker.demo.installation import (
    DIGEST,
    HANDBOOK,
    HANDBOOK_ORG,
    DemoFailed,
    Installation,
    begin,
    free_address,
    handbook_file,
    say,
    settings_file,
    world,
)
from worker.operations.operators import make_link
from worker.store.database import Database

POLL = 0.05
# Seconds until the knowledge base of each org has another article.
NEWS_EVERY = 2.0

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
    VALUES (NEW.id, NEW.definition_id, CASE NEW.state WHEN 'parked' THEN 'waiting' ELSE NEW.state END,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.reason END,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.detail END);
END;
CREATE TRIGGER demo_run_ended AFTER UPDATE ON runs WHEN OLD.state IS NOT NEW.state BEGIN
    INSERT INTO demo_changes (run_id, definition_id, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.state, NEW.reason, NEW.detail);
END;
"""

READ_CHANGES = """
SELECT c.seq, o.code, d.name, c.state, c.reason, c.detail, a.handler, a.handler_started_at,
       (SELECT client_id FROM credentials k WHERE k.org_id = o.id AND k.state = 'active'
        ORDER BY generation DESC LIMIT 1)
FROM demo_changes c JOIN definitions d ON d.id = c.definition_id JOIN orgs o ON o.id = d.org_id
LEFT JOIN attempts a ON a.run_id = c.run_id
     AND a.attempt = (SELECT max(attempt) FROM attempts WHERE run_id = c.run_id)
WHERE c.seq > ? ORDER BY c.seq
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A run entered a state; `handler` is that of its last attempt, `client_id` the org's newest."""

    org: str
    definition: str
    state: str
    reason: str | None
    detail: str | None
    handler: str | None
    handler_started_at: str | None
    client_id: str | None


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
    """Prints each change of a run's state, and explains those of the digests once for each org.

    `command` is what runs a command on this installation from anywhere.
    """

    def __init__(self, journal: Journal, clock: Clock, started: float, command: str) -> None:
        self._command = command
        self._journal = journal
        self._clock = clock
        self._started = started
        self._explained: set[tuple[str, str, str | None]] = set()
        self._ends: Counter[tuple[str, str]] = Counter()
        self._latest: dict[str, Change] = {}
        self.succeeded: set[tuple[str, str]] = set()
        """The orgs and definitions of which a run has succeeded."""

    def narrate(self) -> None:
        for change in self._journal.read():
            at = to_text(self._clock.now())[:-4] + "Z"
            print_line(at, change.org, change.definition, change.state, change.reason, change.detail)
            self._latest[change.org] = change
            if change.state not in ("waiting", "running"):
                self._ends[change.org, change.state] += 1
            first = not self.succeeded
            if change.state == "succeeded":
                self.succeeded.add((change.org, change.definition))
            key = (change.org, change.state, change.reason)
            if change.definition == DIGEST and key not in self._explained:
                self._explained.add(key)
                self._explain(change, first)

    def _explain(self, change: Change, first: bool) -> None:
        if change.state == "succeeded":
            if first:
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
            client = change.client_id or "ID"
            say(f"    python -m worker credentials add {change.org} --client-id {client} --secret-file FILE")
            say("or let orgworker make another application, in another terminal:")
            say(f"    {self._command} orgs sync --provision --org {change.org}")

    def sum_up(self) -> None:
        """Print the outcomes of each org's runs, or the state of its latest run if none has ended."""
        for org, latest in sorted(self._latest.items()):
            ends = [f"{count} {state}" for (of, state), count in sorted(self._ends.items()) if of == org]
            say(f"{org}: {', '.join(ends) or f'still {latest.state} ({latest.reason})'}")


class Accident:
    """Kills the worker in the middle of a run with many model calls, and says which calls were made again.

    `asked` returns how many calls that run has made.
    """

    CALLS_BEFORE = 3

    def __init__(self, installation: Installation, narrator: Narrator, asked: Callable[[], int]) -> None:
        self._installation = installation
        self._narrator = narrator
        self._asked = asked
        self._steps = iter((self._begin, self._kill, self._sum_up))
        self._next: Callable[[], bool] | None = next(self._steps)

    def advance(self) -> None:
        """Do what is next, if its time has come."""
        if self._next is not None and self._next():
            self._next = next(self._steps, None)

    def _begin(self) -> bool:
        """Once the org's first digest has succeeded, start the run."""
        if (HANDBOOK_ORG, DIGEST) not in self._narrator.succeeded:
            return False
        self._installation.run("definitions", "run", HANDBOOK_ORG, HANDBOOK)
        return True

    def _kill(self) -> bool:
        before = self._asked()
        if before < self.CALLS_BEFORE:
            return False
        self._installation.kill_worker()
        say(f"kill -9 of the worker, in {HANDBOOK} of {HANDBOOK_ORG}, after {before} model calls")
        say("$ python -m worker run")
        self._installation.start_worker()
        return True

    def _sum_up(self) -> bool:
        if (HANDBOOK_ORG, HANDBOOK) not in self._narrator.succeeded:
            return False
        calls, pages = self._asked(), len(TOPICS)
        again = "no call" if calls == pages else "only the call in flight"
        say(f"{HANDBOOK} of {HANDBOOK_ORG}: {calls} model calls for {pages} pages; the kill repeated {again}")
        return True


def print_line(
    time: str, org: str, definition: str, state: str, reason: str | None, detail: str | None
) -> None:
    flat = " ".join((detail or "-").split())
    print(f"{time:<24}  {org:<12}  {definition:<14}  {state:<9}  {reason or '-':<16}  {flat}", flush=True)


def run(seconds: float | None = None) -> int:
    """Run the demo until the worker has run for `seconds`, or until Ctrl-C; returns the process exit code."""
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
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-demo-")))
    around = stack.enter_context(world(news_every=NEWS_EVERY))
    installation = Installation(folder, around.environment())
    listen, token = free_address(), secrets.token_urlsafe(24)
    installation.settings.write_text(settings_file(installation.database, around, listen=listen, token=token))
    say(f"a development provider at {around.provider.url}, a customer API at {around.api_url}")
    # Meanwhile the commands run in processes of their own.
    threading.Thread(target=import_module, args=("worker.demo.history",), daemon=True).start()
    begin(installation.folder, around, installation.run, now=clock.now())
    from worker.demo import history

    say("adding what these orgs' jobs did in the last 24 hours")
    history.add(f"sqlite:///{installation.database}", around.orgs, around.api_url, until=clock.now())
    handbook = folder / "handbook.toml"
    handbook.write_text(handbook_file(around.api_url), encoding="utf-8")
    installation.run("apply", str(handbook))
    # After the past, which it does not tell.
    journal = Journal(installation.database)
    stack.callback(journal.close)
    database = Database.open(f"sqlite:///{installation.database}", clock=clock)
    link = make_link(database, "demo", at=clock.now())
    database.close()
    say("$ python -m worker run")
    started = clock.monotonic()
    ends_at = None if seconds is None else started + seconds
    installation.start_worker()
    stack.callback(installation.end_worker)
    # The link works as soon as it is seen.
    while not stop.is_set() and not answers(listen):
        wait_for(installation, stop)
    say("")
    say(f"OPEN THIS in a browser: http://{listen}{link}")
    say("It logs in once, within ten minutes, on this machine: what went wrong last night, why, what to do.")
    say(f"Later: http://{listen}/ with the token {token}, or as a person of the provider.")
    say("Ctrl-C ends the demo.")
    say("")
    print_line("time", "org", "definition", "state", "reason", "detail")
    narrator = Narrator(journal, clock, started, installation.command_line())
    accident = Accident(installation, narrator, around.api.chat.asked_about_handbooks)
    while not stop.is_set() and (ends_at is None or clock.monotonic() < ends_at):
        narrator.narrate()
        accident.advance()
        wait_for(installation, stop)
    say("stopping: the worker drains")
    installation.end_worker()
    narrator.narrate()
    narrator.sum_up()


def wait_for(installation: Installation, stop: threading.Event) -> None:
    """Wait a moment; raises DemoFailed if the worker has ended."""
    installation.check_worker()
    stop.wait(POLL)


def answers(address: str) -> bool:
    """Whether something listens at this address of this machine."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
