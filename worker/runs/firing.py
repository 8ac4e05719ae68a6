"""What fire reads and writes: due definitions, the skips of instants that do not run, what is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from worker.ids import DefinitionId, OrgId, RunId
from worker.runs.run import NewRun

SkipReason = Literal["missed", "overlap"]


@dataclass(frozen=True, slots=True)
class DueDefinition:
    """A definition whose next fire has come, locked by this transaction."""

    definition_id: DefinitionId
    org_id: OrgId
    org_code: str
    org_timezone: str | None
    name: str
    revision: int
    next_scheduled_for: datetime
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NewSkip:
    """Consecutive instants that do not become runs; both ends inclusive, within one UTC day."""

    org_id: OrgId
    definition_id: DefinitionId
    revision: int
    skipped_from: datetime
    skipped_until: datetime
    count: int
    reason: SkipReason


@dataclass(frozen=True, slots=True)
class NextFire:
    """When a definition is due next; both None when it never is again."""

    definition_id: DefinitionId
    next_scheduled_for: datetime | None
    next_fire_at: datetime | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What fire does with one due definition."""

    runs: Sequence[NewRun]
    skips: Sequence[NewSkip]
    next: NextFire


@dataclass(frozen=True, slots=True)
class FireReport:
    """What one call of fire did; `more` is true where its limit was reached."""

    inserted: Sequence[NewRun] = ()
    overlapped: Sequence[NewRun] = ()
    skips: Sequence[NewSkip] = ()
    next_fire_at: datetime | None = None
    now: datetime | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run taken from a dead worker: `state` is waiting, or failed past `max_recoveries`.

    `org` is the org's code, `definition` the definition's name; None where that row is gone.
    """

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    org: str | None
    definition: str | None
    attempt: int
    worker: str
    state: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a run's log; `seq` counts from 1 within the attempt, `source` is log, stdout or stderr."""

    run_id: RunId
    attempt: int
    seq: int
    org_id: OrgId
    at: datetime
    level: str
    source: str
    text: str
