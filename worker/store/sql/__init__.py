"""The hot statements: fixed text, in batches, one module a verb and one package a dialect.

Both packages offer exactly `Statements`, so that what runs on one database runs on
the other.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Connection

from worker.ids import DefinitionId, OrgId, RunId, WorkerId
from worker.runs.outcome import EndedAttempt
from worker.runs.run import (
    AdmittedRun,
    DueDefinition,
    Isolation,
    LogLine,
    NewRun,
    NewSkip,
    NextFire,
    OwnedRun,
)
from worker.store.sql.ending import Rollups

Progress = tuple[RunId, int, Mapping[str, Any]]
Specs = MutableMapping[tuple[DefinitionId, int], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RingStep:
    """Orgs that seem to have something to admit, and the org where the walk goes on.

    Each comes with how far into its line the free slots can reach if all lines are
    long; `partial` says that this leaves some of a line out. `hops` is how many orgs
    were passed; `complete` that the walk came round.
    """

    orgs: Mapping[OrgId, int]
    partial: bool
    cursor: OrgId
    hops: int
    complete: bool


@dataclass(frozen=True, slots=True)
class AbandonedRun:
    """A running run whose worker is gone, locked by this transaction."""

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    handler: str
    worker_id: WorkerId
    fencing_token: int
    attempt: int
    failures: int
    recoveries: int
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Fired:
    """Which runs were inserted, which met another of their definition, and what is due next of all."""

    inserted: Sequence[NewRun]
    overlapped: Sequence[NewRun]
    next_fire_at: datetime | None
    now: datetime


class Statements(Protocol):
    """What each dialect offers; the docstrings are here, the text is there."""

    def fire_first(self, connection: Connection) -> tuple[datetime, datetime | None]:
        """What time the database has, and when a definition is due first; takes no lock."""
        ...

    def fire_lock(
        self, connection: Connection, *, limit: int, specs: Specs
    ) -> tuple[datetime, list[DueDefinition]]:
        """Lock the definitions due longest, at most `limit`, and say what time the database has.

        `specs` keeps the specs already read, by definition and revision.
        """
        ...

    def fire_write(
        self,
        connection: Connection,
        runs: Sequence[NewRun],
        next_fires: Sequence[NextFire],
    ) -> Fired:
        """Insert runs and set what is due next, under the definitions' locks.

        A serial run that finds another unfinished one of its definition is not inserted
        but given back; one that exists already is ignored.
        """
        ...

    def fire_skips(self, connection: Connection, skips: Sequence[NewSkip]) -> None:
        """Write skips, each in its definition's last row as far as that may grow."""
        ...

    def admit_ring(
        self,
        connection: Connection,
        cursor: OrgId,
        *,
        want: int,
        hops: int,
        handlers: Sequence[str],
        free: Mapping[Isolation, int],
    ) -> RingStep:
        """Walk the ring from after `cursor` until `want` orgs are found; takes no lock."""
        ...

    def admit_choose(
        self,
        connection: Connection,
        worker_id: WorkerId,
        orgs: Mapping[OrgId, int],
        *,
        offered: Mapping[str, int | None],
        free: Mapping[Isolation, int],
    ) -> list[AdmittedRun]:
        """Become the only admitter, then count, rank and mark runs of these orgs as running.

        Of each org's line as much is looked at as `orgs` says. Must be all that its
        transaction does: on PostgreSQL it is committed with the answer on its way.
        """
        ...

    def finish(
        self, connection: Connection, worker_id: WorkerId, ended: Sequence[EndedAttempt]
    ) -> set[RunId]:
        """Write what ended, each row fenced, and return the runs whose attempt stands as given.

        Writing the same again changes nothing and is accepted again.
        """
        ...

    def add_rollups(self, connection: Connection, rollups: Rollups) -> None:
        """Add sums to those that are there."""
        ...

    def promote(self, connection: Connection, definitions: Sequence[DefinitionId] | None) -> int:
        """Let held runs wait whose definition has nothing unfinished left; None means all."""
        ...

    def save_checkpoint(
        self,
        connection: Connection,
        run_id: RunId,
        fencing_token: int,
        *,
        attempt: int,
        org_id: OrgId,
        data_json: str,
    ) -> bool:
        """Keep a run's checkpoint, fenced; False if the run is no longer ours.

        One that differs from the one before sets `recoveries` back to 0.
        """
        ...

    def write_progress(self, connection: Connection, rows: Sequence[Progress]) -> None:
        """Set the progress of running rows, each where its fencing token still holds."""
        ...

    def append_logs(self, connection: Connection, rows: Sequence[LogLine]) -> None:
        """Append lines to runs' logs; one that is there already is left as it is."""
        ...

    def renew(
        self, connection: Connection, worker_id: WorkerId, lease: timedelta
    ) -> tuple[bool, list[OwnedRun]]:
        """Extend the lease; False if the incarnation was given up. Returns what it owns."""
        ...

    def recover_lock(
        self, connection: Connection, *, others_than: WorkerId | None, limit: int
    ) -> list[AbandonedRun]:
        """End the workers whose lease has passed and lock running rows of ended ones.

        With `others_than`, every worker but that one is taken for dead.
        """
        ...


def statements(connection: Connection) -> Statements:
    """The hot statements in the dialect of this connection."""
    if connection.dialect.name == "postgresql":
        from worker.store.sql import postgresql

        return postgresql
    from worker.store.sql import sqlite

    return sqlite
