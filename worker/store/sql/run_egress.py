"""What runs sent, as rows of `run_egress`: written with the end of an attempt, added to those before it.

Only the owner of a run writes its rows, with an end that is fenced. So the rows of earlier attempts, which
ended before this one began, can be read first and added up here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions.budgets import EGRESS_REQUESTS, EGRESS_WAIT_SECONDS, MAX_AMOUNT
from worker.model.runs.egress import EgressRow, merge
from worker.model.runs.outcome import EndedAttempt

# The columns of an `EgressRow`, in the order of its fields.
COLUMNS = "origin, requests, bytes_out, bytes_in, statuses, denied, waited_seconds"


class StoredEgress(NamedTuple):
    """What a run has sent to an origin, up to and with `attempt`."""

    run_id: RunId
    org_id: OrgId
    attempt: int
    total: EgressRow
    fencing_token: int


class Used(NamedTuple):
    """What an attempt adds to a meter, for the usage of its org."""

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    attempt: int
    meter: str
    amount: int
    fencing_token: int


def used_by(attempts: Iterable[EndedAttempt]) -> list[Used]:
    """The requests of attempts, and the seconds for which these waited, rounded for each attempt."""
    found = []
    for attempt in attempts:
        rows = attempt.trail.egress
        for meter, amount in (
            (EGRESS_REQUESTS, sum(row.requests for row in rows)),
            (EGRESS_WAIT_SECONDS, round(sum(row.waited_seconds for row in rows))),
        ):
            if amount > 0:
                key = attempt.run_id, attempt.org_id, attempt.definition_id, attempt.attempt
                found.append(Used(*key, meter, min(amount, MAX_AMOUNT), attempt.fencing_token))
    return found


def sending(attempts: Iterable[EndedAttempt]) -> list[EndedAttempt]:
    """The attempts that sent anything, or tried to."""
    return [attempt for attempt in attempts if attempt.trail.egress]


def repeated(attempts: Iterable[EndedAttempt]) -> list[RunId]:
    """The runs of these attempts that may have rows of earlier ones."""
    return [attempt.run_id for attempt in attempts if attempt.attempt > 1]


def by_run(
    rows: Iterable[Sequence[Any]], statuses: Callable[[Any], Mapping[str, int]] = dict
) -> dict[RunId, list[EgressRow]]:
    """Stored rows by run: each has the run's id and `COLUMNS`; `statuses` reads those from their column."""
    found: dict[RunId, list[EgressRow]] = {}
    for run_id, *values in rows:
        row = EgressRow(*values)
        found.setdefault(run_id, []).append(replace(row, statuses=statuses(row.statuses)))
    return found


def totals_of(
    attempts: Sequence[EndedAttempt], before: Mapping[RunId, Collection[EgressRow]]
) -> list[StoredEgress]:
    """The rows to write, in the order of their keys; `before` are those of earlier attempts."""
    found = []
    for attempt in attempts:
        known = before.get(attempt.run_id, ())
        for total in merge((*known, *attempt.trail.egress)):
            if total not in known:
                key = attempt.run_id, attempt.org_id, attempt.attempt
                found.append(StoredEgress(*key, total, attempt.fencing_token))
    return sorted(found, key=lambda row: (row.run_id, row.total.origin))
