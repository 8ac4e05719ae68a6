"""Settle: before a change of what is due, decide the past under the old rules; then schedule from now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import WorkerError
from worker.ids import ALL_ORGS, AllOrgs, DefinitionId, Scope
from worker.model.definitions.deadline import Deadline
from worker.model.definitions.definition import Definition, from_spec
from worker.model.definitions.triggers import Trigger
from worker.model.runs.fire import decide, spread_of
from worker.model.runs.run import Decision, DueDefinition, NewDeadline, NextFire
from worker.operations.handlers import Handlers
from worker.store import audit, deadlines, definitions, firing, schema
from worker.store.database import Database
from worker.store.dialect import Row, chunks, compact_json
from worker.store.sweeps import EndCounts
from worker.telemetry.events import emit

ACTOR = "worker"
# Definitions that one step of `recompute` reads.
PAGE = 500


@contextmanager
def rescheduling(
    connection: Connection, rows: Iterable[Row], *, at: datetime, scope: Scope
) -> Iterator[EndCounts]:
    """Settle locked definitions, let the caller change them or their org, then schedule them from now.

    Their deadlines follow the change, also those of times that were decided before. With an org as `scope`,
    all of them are its own, and no statement looks further. The caller adds the runs that it ends to the
    counts that it gets.
    """
    before = {row["id"]: row for row in rows}
    counts = EndCounts()
    settle(connection, list(before.values()), at=at, scope=scope, counts=counts)
    yield counts
    changed = definitions.read(connection, scope, before)
    schedule_next(connection, changed, at=at, scope=scope)
    _move_deadlines(connection, changed, at=at, scope=scope)
    counts.write(connection, at=at)


def _move_deadlines(connection: Connection, rows: Sequence[Row], *, at: datetime, scope: Scope) -> None:
    """Let the deadlines of changed definitions be those of the new revision; drop them if it has none.

    A definition is no longer late if its new deadline is still to come, if it is closed or disabled, or if
    its org is suspended or removed.
    """
    if not rows or not deadlines.is_any(connection, scope):
        return
    wanted = {row["id"]: _deadline_of(row) for row in rows}
    moved, new = [], []
    for each in deadlines.stored(connection, scope, wanted):
        deadline = wanted[each.definition_id]
        until = None if deadline is None else deadline.of(each.scheduled_for)
        is_still_late = each.is_late and until is not None and until <= at
        if until != each.deadline_at and not is_still_late:
            moved.append(each)
        elif each.is_late:
            continue
        if until is not None:
            # Also of one that stays: a moved one may come to its time, and the last scheduled time counts.
            new.append(NewDeadline(each.definition_id, each.org_id, each.scheduled_for, until))
    if moved:
        deadlines.drop(connection, moved)
        deadlines.add(connection, new)


def _deadline_of(row: Row) -> Deadline | None:
    if row["closed_at"] is not None or not row["enabled"] or row["org_state"] in deadlines.UNWANTED:
        return None
    return from_spec(row["org"], row["name"], row["spec"]).deadline(row["org_timezone"])


def settle(
    connection: Connection, rows: Sequence[Row], *, at: datetime, scope: Scope, counts: EndCounts
) -> None:
    """Decide every scheduled time of locked definitions up to now, by the revision in force.

    A time whose spread has not passed yet becomes a run that is available when it has. The caller writes
    the `counts` of runs that were replaced.
    """
    due = [row for row in rows if row["next_scheduled_for"] is not None and row["next_scheduled_for"] <= at]
    handlers = Handlers(connection)
    for part in chunks(due, 100):
        decisions: list[Decision] = []
        nexts = [_decide(row, at, handlers, decisions) for row in part]
        runs = [run for decision in decisions for run in decision.runs]
        skips = [skip for decision in decisions for skip in decision.skips]
        until = [each for decision in decisions for each in decision.deadlines]
        if isinstance(scope, AllOrgs):
            firing.write(connection, runs, skips, nexts, until, counts)
        else:
            # The next times follow: what was decided is not decided again.
            firing.write_of_org(connection, scope, runs, skips, until, counts)


def _decide(row: Row, at: datetime, handlers: Handlers, decisions: list[Decision]) -> NextFire:
    next_fire = NextFire(row["id"], row["next_scheduled_for"], row["next_fire_at"])
    while next_fire.next_scheduled_for is not None and next_fire.next_scheduled_for <= at:
        due = DueDefinition(
            definition_id=row["id"],
            org_id=row["org_id"],
            org_code=row["org"],
            org_timezone=row["org_timezone"],
            name=row["name"],
            revision=row["revision"],
            next_scheduled_for=next_fire.next_scheduled_for,
            spec=row["spec"],
            org_pool=row["org_pool"],
        )
        decision = decide(due, max(at, next_fire.next_fire_at or at), handlers.declared)
        decisions.append(decision)
        next_fire = decision.next
    return next_fire


def schedule_next(
    connection: Connection,
    rows: Sequence[Row],
    *,
    at: datetime,
    inclusive: bool = False,
    scope: Scope,
) -> None:
    """Set the next scheduled time of definitions, counted from now; None for inactive ones.

    With `inclusive`, for new definitions, a time equal to `at` counts. Times that were
    decided are not decided again, even if the clock has gone back since.
    """
    active = [] if inclusive else [row["id"] for row in rows if _is_active(row)]
    decided = definitions.last_decided(connection, scope, active)
    schedules = _Schedules(inclusive)
    nexts = [(row, schedules.next(row, max(at, decided.get(row["id"], at)))) for row in rows]
    definitions.set_next(connection, [(row["org_id"], row["id"], *next_) for row, next_ in nexts])


class _Schedules:
    """The next scheduled times of definitions, many of which have one spec, as those of a template."""

    def __init__(self, inclusive: bool = False) -> None:
        self._inclusive = inclusive
        self._read: dict[tuple[str, str | None], tuple[Definition, Trigger]] = {}
        self._next: dict[tuple[int, datetime], datetime | None] = {}
        self._last: tuple[Any, str] | None = None

    def next(self, row: Row, at: datetime) -> tuple[datetime | None, datetime | None]:
        """A definition's first scheduled time after `at`, and that plus its spread."""
        if not _is_active(row):
            return None, None
        key = (self._text_of(row["spec"]), row["org_timezone"])
        read = self._read.get(key)
        if read is None:
            definition = from_spec(row["org"], row["name"], row["spec"])
            read = self._read[key] = (definition, definition.trigger(row["org_timezone"]))
        definition, trigger = read
        # Its trigger lives as long as this object, so its id is not used again.
        place = (id(trigger), at)
        if place not in self._next:
            # Also those that a calendar will skip: each scheduled time is decided when it comes.
            self._next[place] = trigger.nominal.after(at, inclusive=self._inclusive)
        nominal = self._next[place]
        if nominal is None:
            return None, None
        spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
        return nominal, nominal + spread

    def _text_of(self, spec: Any) -> str:
        # The new definitions of a template share one object.
        if self._last is None or self._last[0] is not spec:
            self._last = (spec, compact_json(spec))
        return self._last[1]


def _is_active(row: Row) -> bool:
    return (
        row["org_state"] == "active"
        and row["enabled"]
        and row["paused_at"] is None
        and row["closed_at"] is None
    )


@dataclass(frozen=True, slots=True)
class SettledPage:
    """One step of `recompute`: where the next starts (None at the end), and the definitions moved."""

    after: DefinitionId | None
    moved: int


def outdated(database: Database, version: str) -> bool:
    """Whether the stored schedules were computed with zone data other than `version`.

    An empty database records `version`.
    """
    with database.autocommit() as connection:
        known = schema.read(connection, schema.ZONE_DATA)
        if known is None:
            schema.write(connection, schema.ZONE_DATA, version)
    return known is not None and known != version


def recompute(database: Database, *, after: DefinitionId | None = None) -> SettledPage:
    """Recompute the next scheduled times of some definitions with this machine's zone data.

    Those that move are settled first. What has fired does not fire again; what is due
    still fires.
    """
    with database.autocommit() as connection:
        now = database.now(connection)
        rows = definitions.scheduled(connection, ALL_ORGS, after=after, since=now, limit=PAGE)
    schedules = _Schedules()
    moved = [row["id"] for row in rows if _follows_a_zone(row) and _moves(schedules, row, now)]
    if moved:
        with database.transaction() as connection:
            now = database.now(connection)
            locked = definitions.read(connection, ALL_ORGS, moved, lock=True)
            counts = EndCounts()
            settle(connection, locked, at=now, scope=ALL_ORGS, counts=counts)
            schedule_next(connection, locked, at=now, scope=ALL_ORGS)
            counts.write(connection, at=now)
    return SettledPage(rows[-1]["id"] if len(rows) == PAGE else None, len(moved))


def recomputed(database: Database, version: str, *, moved: int) -> None:
    """Record that all schedules were computed with this zone data."""
    with database.transaction() as connection:
        known = schema.read(connection, schema.ZONE_DATA)
        schema.write(connection, schema.ZONE_DATA, version)
        detail, now = {"before": known, "definitions": moved}, database.now(connection)
        audit.note(connection, None, "tzdata.change", version, detail, at=now, actor=ACTOR)
    emit("tzdata.changed", version=version, definitions=moved)


def _follows_a_zone(row: Row) -> bool:
    spec = row["spec"]
    zone = spec.get("timezone") or row["org_timezone"] or "UTC"
    return zone != "UTC" and not spec["schedule"].lstrip().startswith(("every ", "at "))


def _moves(schedules: _Schedules, row: Row, now: datetime) -> bool:
    try:
        nominal, _ = schedules.next(row, now)
    except WorkerError as error:
        emit("definition.failed", org=row["org"], definition=row["name"], error=error.message)
        return False
    return bool(nominal != row["next_scheduled_for"])
