"""How the life of a worker, or of a host's incarnation, ended: as data, in words, and in a run's log. Pure.

A row is one of the table `workers`, with `host_id`, `renewed_at`, `ended_at`, `outcome`, `recovered_runs` and
`recovered_by`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from worker.ids import WorkerId

STOPPED = "stopped"
CRASHED = "crashed"
REMOVED = "removed"
# A host whose lease expired and that left no run behind. It may have stopped while no worker answered.
SILENT = "silent"

# The log line of a worker: its source, and its number. Lines of handlers have lower numbers.
SOURCE = "worker"
LOST_LINE = 2**31 - 2

Row = Mapping[str, Any]


def end_of(row: Row) -> str | None:
    """`stopped`, `crashed`, `silent` or `removed`; None before the end."""
    if row["ended_at"] is None:
        return None
    if row["outcome"] == CRASHED and row["host_id"] is not None and not row["recovered_runs"]:
        return SILENT
    # The previous release does not say how a row ended.
    return row["outcome"] or STOPPED


def end_in_words(row: Row, now: datetime) -> str:
    """The end, when it was, and who recovered how many runs: `crashed 02:51 UTC, 1 run recovered by ID`.

    A crash is dated by the last renewal of the lease.
    """
    end = end_of(row)
    at = row["renewed_at"] if end in (CRASHED, SILENT) else row["ended_at"]
    clock = f"{at:%H:%M} UTC" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M} UTC"
    words = f"silent since {clock}" if end == SILENT else f"{end} {clock}"
    if not row["recovered_runs"]:
        return words
    return f"{words}, {recovered(row['recovered_runs'])} by {row['recovered_by'] or 'another worker'}"


def named_end(row: Row, now: datetime) -> str:
    """The host, or the machine of a worker, and its end; the row has both names."""
    return f"{row['of_host'] or row['host']} {end_in_words(row, now)}"


def recovered(runs: int) -> str:
    """`1 run recovered`."""
    return f"{runs:,} run{'' if runs == 1 else 's'} recovered"


def lost_line(attempt: int, worker: WorkerId, row: Row | None, by: WorkerId | None, *, waits: bool) -> str:
    """Why an attempt was lost, and with which worker; `row` is None if that worker is forgotten.

    `waits` if the run waits for another attempt. An org sees it without ids: see `redaction.line`.
    """
    outcome = None if row is None else row["outcome"]
    if row is not None and outcome == CRASHED:
        how = f": worker {worker} crashed, last seen {row['renewed_at']:%H:%M:%S} UTC"
    elif outcome == REMOVED:
        how = f": the host of worker {worker} was removed"
    elif row is not None:
        how = f": worker {worker} ended before it handed the run back"
    else:
        how = f" with worker {worker}"
    then = "" if by is None else f"; {'recovered' if waits else 'found'} by worker {by}"
    return f"attempt {attempt} was lost{how}{then}"
