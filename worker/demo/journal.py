"""The demo's journal: each change of a run's state, once and in order, and its line for the reader.

Polling lists would miss states that last a few milliseconds, so triggers write it.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from worker.ids import short_id

JOURNAL = """
CREATE TABLE demo_changes (
    seq INTEGER PRIMARY KEY, run_id TEXT NOT NULL, definition_id TEXT NOT NULL,
    attempt INTEGER, state TEXT NOT NULL, reason TEXT, detail TEXT
);
CREATE TRIGGER demo_run_made AFTER INSERT ON live_runs BEGIN
    INSERT INTO demo_changes (run_id, definition_id, attempt, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.attempt,
            CASE NEW.state WHEN 'held' THEN 'waiting' ELSE NEW.state END,
            CASE NEW.state WHEN 'held' THEN 'held' ELSE NEW.reason END, NEW.detail);
END;
CREATE TRIGGER demo_run_moved AFTER UPDATE ON live_runs
WHEN OLD.state IS NOT NEW.state
     OR NEW.state = 'waiting' AND (OLD.reason IS NOT NEW.reason OR OLD.detail IS NOT NEW.detail) BEGIN
    INSERT INTO demo_changes (run_id, definition_id, attempt, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.attempt,
            CASE NEW.state WHEN 'parked' THEN 'waiting' ELSE NEW.state END,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.reason END,
            CASE NEW.state WHEN 'running' THEN NULL ELSE NEW.detail END);
END;
CREATE TRIGGER demo_run_ended AFTER UPDATE ON runs WHEN OLD.state IS NOT NEW.state BEGIN
    INSERT INTO demo_changes (run_id, definition_id, attempt, state, reason, detail)
    VALUES (NEW.id, NEW.definition_id, NEW.attempt, NEW.state, NEW.reason, NEW.detail);
END;
"""

READ_CHANGES = """
SELECT c.seq, c.run_id, coalesce(c.attempt, 0), o.code, d.name, c.state, c.reason, c.detail, a.handler,
       a.handler_started_at IS NOT NULL,
       (julianday(r.finished_at) - julianday(r.started_at)) * 86400,
       coalesce(r.error, a.error), w.ask, w.answer, w.answered_by
FROM demo_changes c JOIN definitions d ON d.id = c.definition_id JOIN orgs o ON o.id = d.org_id
LEFT JOIN runs r ON r.id = c.run_id
LEFT JOIN attempts a ON a.run_id = c.run_id
     AND a.attempt = (SELECT max(attempt) FROM attempts WHERE run_id = c.run_id)
LEFT JOIN waits w ON w.rowid = (SELECT rowid FROM waits WHERE run_id = c.run_id AND kind = 'answer'
                                ORDER BY opened_at DESC LIMIT 1)
WHERE c.seq > ? ORDER BY c.seq
"""

WIDTH = 100
# What the printed command adds to the budget.
RAISE = 100
# Seconds in which a definition's ends that are alike have one line.
QUIET = 20.0
# What the reader is asked for.
ASKED = ("answer", "budget")
HEAD = f"{'UTC':<8}  {'org':<12}  {'definition':<14}  what happened"

# States and reasons without a line: a run that starts at once says so by its end.
_SILENT = {("waiting", "due"), ("waiting", "held")}
_WORDS: Mapping[tuple[str, str | None], str] = {
    ("waiting", "no_handler"): "waits: no worker offers its handler",
    ("waiting", "no_pool"): "waits: no worker serves its pool",
    ("waiting", "recovered"): "its worker died: the run goes on from its last step",
    ("waiting", "handed_back"): "its worker stops: the run goes on after the next start",
    ("waiting", "budget"): "used up its budget of {detail}",
    ("waiting", "asleep"): "sleeps, without a process",
    ("waiting", "batch"): "waits in a batch of {detail}, without a process",
    ("waiting", "snoozed"): "asked to be called again later",
    ("failed", "timed_out"): "failed: it took longer than its timeout",
    ("failed", "handler_exited"): "failed: its process exited without a result",
    ("failed", "out_of_memory"): "failed: it exceeded its memory limit",
    ("failed", "lost"): "failed: its worker died too often",
    ("skipped", "flag_off"): "skipped: the flag {detail} is off",
    ("skipped", "expired"): "skipped: no worker could start it in time",
    ("cancelled", "requested"): "cancelled, as requested",
}


@dataclass(frozen=True, slots=True)
class RunChange:
    """A run entered a state.

    `handler` is that of its last attempt, and `took` its seconds once the run has ended. `ask` is what its
    newest question asks, `answer` what `answered_by` answered.
    """

    run: str
    attempt: int
    org: str
    definition: str
    state: str
    reason: str | None = None
    detail: str | None = None
    handler: str | None = None
    handler_started: bool = False
    took: float | None = None
    error: Mapping[str, Any] | None = None
    ask: Any = None
    answer: Any = None
    answered_by: str | None = None


class Journal:
    """Creates the journal in a migrated SQLite file, and reads each change once."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        self._connection.executescript(JOURNAL)
        self._seq = 0

    def read(self) -> list[RunChange]:
        """The changes since the last call."""
        rows = self._connection.execute(READ_CHANGES, (self._seq,)).fetchall()
        if rows:
            self._seq = rows[-1][0]
        return [_change(*row[1:]) for row in rows]

    def close(self) -> None:
        self._connection.close()


def _change(*values: Any) -> RunChange:
    *plain, error, ask, answer, answered_by = values
    read = [None if text is None else json.loads(text) for text in (error, ask, answer)]
    return RunChange(*(*plain, *read, answered_by))


def line(at: datetime, change: RunChange, words: str) -> str:
    """A line of at most `WIDTH` columns, without characters that control a terminal."""
    flat = " ".join(f"{at:%H:%M:%S}  {change.org:<12}  {change.definition:<14}  {words}".splitlines())
    shown = "".join(letter if letter.isprintable() else "?" for letter in flat)
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 1] + "…"


def words_of(change: RunChange, before: RunChange | None = None) -> str | None:
    """What happened, or None for what needs no line; `before` is the run's last change."""
    state, reason = change.state, change.reason
    if (state, reason) in _SILENT:
        return None
    if state == "running":
        return "tries again" if before is not None and before.reason == "retry" else None
    if state == "succeeded":
        return "succeeded" if change.took is None else f"succeeded in {change.took:.1f} s"
    if reason == "no_token":
        return _without_token(change.detail)
    if reason == "answer":
        return f"waits for an answer: {_question(change)}"
    if reason == "resumed":
        return _resumed(change, before)
    if reason == "retry":
        return f"failed, to be retried: {_error(change.error)}"
    if (state, reason) == ("refused", "org_mismatch"):
        called = "called already" if change.handler_started else "not called"
        return f"refused: another org's token, handler {called}"
    if (state, reason) in (("failed", "error"), ("failed", "budget")):
        return f"failed: {_error(change.error)}"
    if (known := _WORDS.get((state, reason))) is not None:
        return known.format(detail=change.detail or "unknown")
    why = ": ".join(part for part in ((reason or "").replace("_", " "), change.detail) if part)
    return f"{'waits' if state == 'waiting' else state}{f': {why}' if why else ''}"


def advice_on(change: RunChange, *, console: str, command: str) -> Sequence[str]:
    """What the reader can do about a run that waits for them: a page or reason, and a command.

    `console` is its address without a path, `command` what runs a command on this installation.
    """
    org = shlex.quote(change.org)
    if change.reason == "answer":
        options = as_options(change.ask) or [True]
        data = shlex.quote(json.dumps(options[0]))
        name = shlex.quote(change.detail or "NAME")
        do, page = "answer it", f"/runs/{change.run}"
        verb = f"runs answer {short_id(change.run)} {name} --data {data}"
    elif change.reason == "budget":
        do, page = "raise it", f"/usage?org={quote(change.org)}"
        verb = f"budgets raise {org} {shlex.quote(change.detail or 'METER')} --by {RAISE}"
    elif change.reason == "no_token":
        do, page = "what to do", "/credentials"
        verb = f"orgs sync --provision --org {org}"
    else:
        return ()
    return f"{do}: {console}{page}, or", f"{command} {verb}"


def as_options(ask: Any) -> list[Any]:
    """The answers that a question offers."""
    options = ask.get("options") if isinstance(ask, Mapping) else None
    return options if isinstance(options, list) else []


class Quiet:
    """Chooses the lines to print: of the ends of a definition that are alike, one in `QUIET` seconds.

    What people are asked, and what comes of it, always has a line.
    """

    def __init__(self) -> None:
        self._before: dict[str, RunChange] = {}
        self._asked: set[str] = set()
        # When a line was printed last, and how many like it were left out since.
        self._last: dict[tuple[str, str, str], tuple[float, int]] = {}

    def words_of(self, change: RunChange, now: float) -> str | None:
        """The words of this change's line, or None; `now` is in seconds."""
        is_end = change.state not in ("waiting", "running")
        words = words_of(change, self._before.get(change.run))
        self._before[change.run] = change
        if change.reason in ASKED:
            self._asked.add(change.run)
        asked = change.run in self._asked
        if is_end:
            self._before.pop(change.run)
            self._asked.discard(change.run)
        if words is None or asked:
            return words
        key = change.org, change.definition, "succeeded" if change.state == "succeeded" else words
        last, left_out = self._last.get(key, (None, 0))
        if last is not None and now - last < QUIET:
            self._last[key] = last, left_out + 1
            return None
        self._last[key] = now, 0
        return f"{words} (+{left_out} before)" if left_out else words


def _without_token(detail: str | None) -> str:
    if (detail or "").startswith("credentials_rejected"):
        return "waits: no token, the provider rejects its secret"
    return f"waits: no token, {detail or 'the provider does not answer'}"


def _question(change: RunChange) -> str:
    ask = change.ask
    text = ask.get("text") if isinstance(ask, Mapping) else None
    asked = text if isinstance(text, str) else change.detail or "its handler asks"
    return " ".join([asked, " / ".join(map(str, as_options(ask)))]).strip()


def _resumed(change: RunChange, before: RunChange | None) -> str:
    if before is not None and before.reason == "budget":
        return "goes on: there is budget again"
    if change.answered_by is None:
        return "goes on"
    answer = "with data" if isinstance(change.answer, dict | list) else change.answer
    return f"goes on: {change.answered_by} answered {answer}"


def _error(error: Mapping[str, Any] | None) -> str:
    """The type and the message of an error."""
    parts = [str(error[key]) for key in ("type", "message") if error and error.get(key)]
    return ": ".join(parts) or "its handler raised an error"
