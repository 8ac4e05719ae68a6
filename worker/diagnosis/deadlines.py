"""Deadlines for `check`: definitions that are late before they fire, or due again before they are late."""

from __future__ import annotations

from collections.abc import Iterator

from worker.errors import Diagnostic, WorkerError
from worker.ids import ALL_ORGS
from worker.model.definitions.deadline import before_firing, beyond_period
from worker.model.definitions.definition import from_spec
from worker.model.runs.fire import spread_of
from worker.store import deadlines
from worker.store.database import Database

_FIXES = (
    "write a done_within of at most one period, or done_by",
    'write spread = "off" or a shorter time, or a later deadline',
)


def odd_deadlines(database: Database) -> Iterator[Diagnostic]:
    """Deadlines that pass too late, or too early, among the newest; nothing without any."""
    with database.autocommit() as connection:
        now, rows = database.now(connection), deadlines.with_deadline(connection, ALL_ORGS)
    late: list[str] = []
    early: list[str] = []
    for row in rows:
        try:
            definition = from_spec(row["org"], row["name"], row["spec"])
            trigger = definition.trigger(row["timezone"])
        except WorkerError:
            # Of another release, whose worker understands it.
            continue
        name, deadline = f"{row['org']}/{row['name']}", definition.deadline(row["timezone"])
        spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
        if deadline is not None and (why := before_firing(deadline, trigger.nominal, spread, now)):
            early.append(f"{name}: {why}")
        within = definition.done_within
        if within is not None and (why := beyond_period(within, trigger.nominal, now)):
            late.append(f"{name}: {why}")
    for found, fix in zip((late, early), _FIXES, strict=True):
        if found:
            more = f"; and {len(found) - 1:,} more" if len(found) > 1 else ""
            yield Diagnostic("deadlines", True, f"{found[0]}{more}", fix)
