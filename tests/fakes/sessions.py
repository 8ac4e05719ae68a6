"""The store's sessions on PostgreSQL, kept for the next test: a new one reads the system's tables again.

That takes some 15 ms of CPU time. Kept are those of the superuser in a database that tests use one after
the other; the next test finds nothing of the one before but what the session knows of these tables.
"""

from __future__ import annotations

import select
from collections import defaultdict
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from worker.store.sessions import DeadlineConnection

# Of one kind.
MOST = 4
RESET = (
    "RESET ALL; RESET ROLE; UNLISTEN *; SELECT pg_advisory_unlock_all(); CLOSE ALL;"
    " DISCARD TEMP; DISCARD SEQUENCES"
)
# The databases whose sessions are kept, and those with a clock of the test's; see `ManualClock.moves`.
reused: set[str] = set()
moved: set[str] = set()

# libpq's arguments, and whether the database has such a clock, which a session learns at its start.
Kind = tuple[str, bool]


class Session(DeadlineConnection):
    """In place of `DeadlineConnection`: closing it puts it aside, connecting takes it again."""

    kind: Kind

    @classmethod
    def connect(cls, conninfo: str = "", **options: Any) -> Self:  # type: ignore[override]
        kind = (conninfo, conninfo_to_dict(conninfo).get("dbname") in moved)
        while _idle[kind]:
            session = _idle[kind].pop()
            # One that is readable has been ended.
            if not session.closed and not select.select([session.fileno()], [], [], 0)[0]:
                return session
            session.end()
        made = super().connect(conninfo, **options)
        made.kind = kind
        return made

    def close(self) -> None:
        if self._may_be_kept() and self._forgets_all():
            _idle[self.kind].append(self)
        else:
            self.end()

    def end(self) -> None:
        super().close()

    def _may_be_kept(self) -> bool:
        return (
            self.info.transaction_status is TransactionStatus.IDLE
            and self.info.dbname in reused
            and self.info.user == "postgres"
            and len(_idle[self.kind]) < MOST
        )

    def _forgets_all(self) -> bool:
        try:
            # A rollback forgets the prepared statements, here and at the server.
            self.autocommit = False
            self.execute("SELECT 1")
            self.rollback()
            self.autocommit = True
            self.execute(RESET)
            self.autocommit = False
        except psycopg.Error:
            return False
        return True


_idle: dict[Kind, list[Session]] = defaultdict(list)


def kept(database: str) -> list[Session]:
    """Those that wait for the next test on this database."""
    return [one for idle in _idle.values() for one in idle if not one.closed and one.info.dbname == database]


def forget(database: str) -> None:
    """End them; no more are kept."""
    reused.discard(database)
    for session in kept(database):
        session.end()
