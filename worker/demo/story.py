"""Prints every change of a run's state, in database order, from a journal that triggers write.

Polling `run_view` would miss states that last a few milliseconds. The triggers exist only in the
demo's temporary database.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass

from worker.clock import Clock, to_text

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
SELECT c.seq, c.run_id, o.code, d.name, c.state, c.reason, c.detail
FROM demo_changes c JOIN definitions d ON d.id = c.definition_id JOIN orgs o ON o.id = d.org_id
WHERE c.seq > ? ORDER BY c.seq
"""

LAST_ATTEMPT = """
SELECT handler, handler_started_at IS NOT NULL FROM attempts
WHERE run_id = ? ORDER BY attempt DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A run entered a state."""

    run_id: str
    org: str
    definition: str
    state: str
    reason: str | None
    detail: str | None


class Journal:
    """Reads each change of one SQLite file once."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        self._seq = 0

    def install(self) -> None:
        """Create the journal and its triggers."""
        self._connection.executescript(JOURNAL)

    def read(self) -> list[Change]:
        """The changes since the last call."""
        rows = self._connection.execute(READ_CHANGES, (self._seq,)).fetchall()
        if rows:
            self._seq = rows[-1][0]
        return [Change(*row[1:]) for row in rows]

    def last_attempt(self, run_id: str) -> tuple[str, bool] | None:
        """The handler of the last attempt, and whether it was started."""
        row = self._connection.execute(LAST_ATTEMPT, (run_id,)).fetchone()
        return (row[0], bool(row[1])) if row else None

    def close(self) -> None:
        self._connection.close()


COLUMNS = ("time", "org", "definition", "state", "reason", "detail")


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
            print(
                line_of(at, change.org, change.definition, change.state, change.reason, change.detail),
                flush=True,
            )
            self._latest[change.org] = change
            if change.state not in ("waiting", "running"):
                self._ends[change.org, change.state] += 1
            key = (change.org, change.state, change.reason)
            if key not in self._explained:
                self._explained.add(key)
                self._explain(change)

    def _explain(self, change: Change) -> None:
        handler, handler_started = self._journal.last_attempt(change.run_id) or ("", False)
        if change.state == "succeeded":
            if not self._succeeded:
                self._succeeded = True
                elapsed = self._clock.monotonic() - self._started
                say(f"the first run succeeded {elapsed:.1f} s after the worker's start")
            which = "on: the new agent" if handler.endswith("_v2") else "off: the old agent"
            say(f"{change.org}: the flag agent-v2 is {which}, {handler}, answered")
        elif change.state == "refused":
            began = "was started" if handler_started else "was not started"
            say(f"{change.org}: the provider returned a token of another org; the handler {began}")
        elif change.reason == "no_token":
            say(f"{change.org}: the provider no longer takes its secret; its runs wait. To fix this:")
            say(
                f"    python -m worker credentials add {change.org}"
                f" --client-id m2m-{change.org} --secret-file FILE"
            )

    def sum_up(self) -> None:
        """Print the outcomes of each org's runs, or the state of its latest run if none has ended."""
        for org, latest in sorted(self._latest.items()):
            ends = [f"{count} {state}" for (of, state), count in sorted(self._ends.items()) if of == org]
            say(f"{org}: {', '.join(ends) or f'still {latest.state} ({latest.reason})'}")


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def line_of(time: str, org: str, definition: str, state: str, reason: str | None, detail: str | None) -> str:
    """One line in columns; an empty column shows a dash."""
    flat = " ".join((detail or "-").split())
    return f"{time:<24}  {org:<12}  {definition:<14}  {state:<9}  {reason or '-':<16}  {flat}"
