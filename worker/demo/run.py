"""`orgworker demo`: four orgs, one worker, and a line for what happens to each run.

Provider and API run in threads of this process. The commands and the worker are the same child
processes that an operator would start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from worker.clock import Clock, SystemClock
from worker.demo.api import TOPICS
from worker.demo.installation import (
    DIGEST,
    FLAG,
    HANDBOOK,
    HANDBOOK_ORG,
    LETTERS,
    REFUND,
    REFUND_ORG,
    DemoFailed,
    DemoInstallation,
    begin,
    free_address,
    later_file,
    say,
    settings_file,
    world,
)
from worker.demo.journal import ASKED, HEAD, Journal, Quiet, RunChange, advice_on, line, words_of
from worker.errors import WorkerError
from worker.store.database import Database

POLL = 0.05
# Seconds until the knowledge base of each org has another article.
NEWS_EVERY = 2.0


class Keyboard:
    """Standard input, if it is a terminal; else it only waits.

    In the background a read would stop the process, so nothing is read there.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def of_terminal(cls) -> Keyboard:
        try:
            return cls(sys.stdin.fileno() if sys.stdin.isatty() else None)
        except (AttributeError, ValueError, OSError):  # none, closed or replaced
            return cls(None)

    @property
    def is_there(self) -> bool:
        return self._descriptor is not None

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """Wait until Enter is pressed, at most `seconds`; returns whether it was."""
        if self._descriptor is None or not self._is_in_front():
            stop.wait(seconds)
            return False
        try:
            ready, _, _ = select.select([self._descriptor], [], [], seconds)
            # Several lines at once count as one.
            typed = os.read(self._descriptor, 4096) if ready else None
        except OSError:  # the terminal is gone
            typed = b""
        if typed == b"":
            self._descriptor = None
        return bool(typed)

    def _is_in_front(self) -> bool:
        with contextlib.suppress(OSError):
            return self._descriptor is not None and os.tcgetpgrp(self._descriptor) == os.getpgrp()
        return False


class Narrator:
    """Prints a line for what happens to runs, and says what the reader can do about those that wait.

    `command` is what runs a command on this installation from anywhere, `console` its console's address.
    """

    def __init__(self, journal: Journal, clock: Clock, started: float, *, command: str, console: str) -> None:
        self._command = command
        self._console = console
        self._journal = journal
        self._clock = clock
        self._started = started
        self._quiet = Quiet()
        self._advised: set[tuple[str, str | None]] = set()
        self._ends: Counter[tuple[str, str]] = Counter()
        self._latest: dict[str, RunChange] = {}
        self._open: dict[str, RunChange] = {}
        self.succeeded: set[tuple[str, str]] = set()
        """The orgs and definitions of which a run has succeeded."""

    def narrate(self) -> None:
        for change in self._journal.read():
            words = self._quiet.words_of(change, self._clock.monotonic())
            is_first = change.state == "succeeded" and (change.org, change.definition) not in self.succeeded
            if words is not None:
                told = f"{words}{flag_of(change)}" if is_first and change.definition == DIGEST else words
                print(line(self._clock.now(), change, told), flush=True)
            if is_first and not self.succeeded:
                elapsed = self._clock.monotonic() - self._started
                say(f"the first run succeeded {elapsed:.1f} s after the worker's start")
            self._note(change)
            if words is not None:
                self._advise(change)

    def say_what_waits(self) -> None:
        """Repeat what waits for the reader."""
        for change in self._open.values():
            say(f"{change.definition} of {change.org} {words_of(change)}")
            self._say_advice(change)

    def sum_up(self) -> None:
        """Print the outcomes of each org's runs, or the state of its latest run if none has ended."""
        for org, latest in sorted(self._latest.items()):
            counts = [f"{count} {state}" for (of, state), count in sorted(self._ends.items()) if of == org]
            counts += [
                f"{each.definition} {words_of(each)}" for each in self._open.values() if each.org == org
            ]
            say(f"{org}: {', '.join(counts) or f'no run has ended, {words_of(latest) or latest.state}'}")

    def _note(self, change: RunChange) -> None:
        self._latest[change.org] = change
        if change.state not in ("waiting", "running"):
            self._ends[change.org, change.state] += 1
        if change.state == "succeeded":
            self.succeeded.add((change.org, change.definition))
        if change.reason in ASKED:
            self._open[change.run] = change
        else:
            self._open.pop(change.run, None)

    def _advise(self, change: RunChange) -> None:
        # A secret is rejected for all runs of an org alike.
        key = (change.run if change.reason in ASKED else change.org), change.reason
        if key not in self._advised:
            self._advised.add(key)
            self._say_advice(change)

    def _say_advice(self, change: RunChange) -> None:
        for text in advice_on(change, console=self._console, command=self._command):
            say(f"    {text}")


def flag_of(change: RunChange) -> str:
    """How the org's flag chose the handler of a digest."""
    state = "on" if (change.handler or "").endswith("_v2") else "off"
    return f": {FLAG} is {state}, by {change.handler}"


class Story:
    """What happens once: the worker is killed in the middle of a run, then two runs wait for the reader.

    `asked` returns how many model calls the killed run has made.
    """

    CALLS_BEFORE = 3

    def __init__(self, installation: DemoInstallation, narrator: Narrator, asked: Callable[[], int]) -> None:
        self._installation = installation
        self._narrator = narrator
        self._asked = asked
        self._steps = iter((self._begin, self._kill, self._sum_up, self._ask_the_reader))
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
        say("$ orgworker run")
        self._installation.start_worker()
        return True

    def _sum_up(self) -> bool:
        if (HANDBOOK_ORG, HANDBOOK) not in self._narrator.succeeded:
            return False
        calls, pages = self._asked(), len(TOPICS)
        again = "no call" if calls == pages else "only the call in flight"
        say(f"{HANDBOOK} of {HANDBOOK_ORG}: {calls} model calls for {pages} pages; the kill repeated {again}")
        return True

    def _ask_the_reader(self) -> bool:
        say("Your turn: approve a refund and raise a budget, on the console or in another terminal.")
        self._installation.run("definitions", "run", REFUND_ORG, REFUND)
        self._installation.run("templates", "run", LETTERS)
        return True


class ConsoleLinks:
    """The console's address, and links that log in to it once."""

    # Seconds in which Enter makes one link.
    PAUSE = 1.0

    def __init__(self, listen: str, database: Database, clock: Clock) -> None:
        self.origin = f"http://{listen}"
        self._database = database
        self._clock = clock
        self._made_at: float | None = None

    def link(self) -> str:
        from worker.features.console.operators import make_link

        return self.origin + make_link(self._database, "demo", at=self._clock.now())

    def say_link(self) -> bool:
        """Print a new link, unless one was printed a moment ago; returns whether it did."""
        now = self._clock.monotonic()
        if self._made_at is not None and now - self._made_at < self.PAUSE:
            return False
        self._made_at = now
        try:
            say(f"a new link to the console: {self.link()}")
        except WorkerError as error:
            say(f"no new link: {error.message}; press Enter again")
        return True


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
    installation = DemoInstallation(folder, around.environment())
    listen, token = free_address(), secrets.token_urlsafe(24)
    installation.settings.write_text(settings_file(installation.database, around, listen=listen, token=token))
    say(f"a development provider at {around.provider.url}, a customer API at {around.api_url}")
    # Meanwhile the commands run in processes of their own.
    threading.Thread(target=import_module, args=("worker.demo.history",), daemon=True).start()
    begin(installation.folder, around, installation.run, now=clock.now())
    from worker.demo import history

    say("adding what these orgs' jobs did in the last 24 hours")
    history.add(f"sqlite:///{installation.database}", around.orgs, around.api_url, until=clock.now())
    later = folder / "later.toml"
    later.write_text(later_file(around.api_url), encoding="utf-8")
    installation.run("apply", str(later))
    # After the past, which it does not tell.
    journal = Journal(installation.database)
    stack.callback(journal.close)
    database = Database.open(f"sqlite:///{installation.database}", clock=clock)
    stack.callback(database.close)
    console, keyboard = ConsoleLinks(listen, database, clock), Keyboard.of_terminal()
    say("$ orgworker run")
    started = clock.monotonic()
    ends_at = None if seconds is None else started + seconds
    installation.start_worker()
    stack.callback(installation.end_worker)
    # The link works as soon as it is seen.
    while not stop.is_set() and not answers(listen):
        installation.check_worker()
        stop.wait(POLL)
    command = installation.command_line()
    say("")
    say(f"OPEN THIS in a browser: {console.link()}")
    say("It logs in once, within ten minutes, on this machine. See what went wrong last night, and why.")
    say(f"Later, log in with the token {token}, or as a person of the provider.")
    again = "Enter prints a new link" if keyboard.is_there else f"`{command} login` prints a new link"
    say(f"{again}, Ctrl-C ends the demo.")
    say("")
    print(HEAD, flush=True)
    narrator = Narrator(journal, clock, started, command=command, console=console.origin)
    story = Story(installation, narrator, around.api.chat.asked_about_handbooks)
    while not stop.is_set() and (ends_at is None or clock.monotonic() < ends_at):
        narrator.narrate()
        story.advance()
        installation.check_worker()
        if keyboard.wait(stop, POLL) and console.say_link():
            narrator.say_what_waits()
    say("stopping: the worker drains")
    installation.end_worker()
    narrator.narrate()
    narrator.sum_up()


def answers(address: str) -> bool:
    """Whether something listens at this address of this machine."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
