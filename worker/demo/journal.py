"""The demo's journal: each change of a run's state, once and in order.

Polling lists would miss states that last a few milliseconds, so triggers write it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
