"""Evaluation: counts the runs that have ended, and halts a rollout that does worse, or finds its step ready.

One worker at a time: the row of the rollout is locked, and what a pass counts, it commits with its verdict.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from worker.clock import Clock, to_text
from worker.ids import ALL_ORGS
from worker.model.rollouts.rollout import Rollout, RolloutBook
from worker.model.rollouts.verdict import Verdict, judge, priors_of, shown_effect
from worker.store import audit, rollout_sums, rollouts, tables
from worker.store.database import Database
from worker.store.dialect import Row, database_now, first_row
from worker.telemetry.events import emit

ACTOR = "worker"
# After which a side without runs is reported.
SILENT = timedelta(days=1)
# Between two verdicts, for each org: one costs some 50 us an org. And without new runs, as time passes.
PER_ORG = timedelta(milliseconds=1)
IDLE = timedelta(minutes=1)
# Seconds that a pass may take once its worker drains.
LAST_PASS = 2.0


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass did; `again` if there is more to do at once."""

    again: bool = False
    halted: bool = False


def evaluate(database: Database, rollout_id: str) -> Passed:
    """One pass over a running rollout. Nothing if another worker is at it."""
    with database.transaction() as connection:
        passed, events = _pass(connection, rollout_id)
    for name, fields in events:
        emit(name, **fields)
    return passed


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluates the rollouts that run, one after another, again after `every` seconds."""

    database: Database
    known: RolloutBook
    clock: Clock
    every: float

    async def run(self) -> None:
        while True:
            for rollout_id in self.known.evaluated():
                while (await self._whole_pass(rollout_id)).again:
                    await self.clock.sleep(0)
            await self.clock.sleep(self.every)

    async def _whole_pass(self, rollout_id: str) -> Passed:
        """One pass. If this is cancelled, it lasts until the pass has reported what it stored."""
        passing = asyncio.ensure_future(self.database.run(evaluate, self.database, rollout_id))
        try:
            return await asyncio.shield(passing)
        except asyncio.CancelledError:
            await asyncio.wait({passing}, timeout=LAST_PASS)
            raise


Events = list[tuple[str, dict[str, Any]]]


def _pass(connection: Connection, rollout_id: str) -> tuple[Passed, Events]:
    table = tables.rollouts
    query = select(table).where(table.c.id == rollout_id, table.c.state == "running")
    row = first_row(connection, query.with_for_update(skip_locked=True))
    if row is None or row["began_at"] is None or row["step_began_at"] is None:
        return Passed(), []
    rollout = Rollout.of(row)
    if rollout_sums.read_before(connection, rollout, row["began_at"]):
        return Passed(again=True), []
    counted = rollout_sums.count_ended(connection, rollout, row["step_began_at"])
    if counted == rollout_sums.COUNTED:
        return Passed(again=True), []
    now, events = database_now(connection), Events()
    lasted = now - row["step_began_at"]
    _note_silence(connection, row, lasted, events)
    if not _is_due(connection, row, counted, now):
        if counted:
            rollouts.change(connection, rollout.id, {"unjudged": True})
        return Passed(), events
    runs = rollout_sums.compared(connection, ALL_ORGS, rollout.id)
    verdict = judge(rollout, priors_of(rollout.scales, [one.before for one in runs]), runs, lasted=lasted)
    numbers = {
        metric: shown_effect(metric, rollout.scales[metric], one) for metric, one in verdict.effects.items()
    }
    values: dict[str, Any] = {"judged_at": now, "unjudged": False, "verdict": numbers}
    if verdict.action == "halt":
        evidence = _evidence(row, verdict, numbers, rollout_sums.totals(runs), now)
        values |= _halt(connection, rollout, verdict, numbers, evidence, now, events)
    elif verdict.action == "ready" and not row["stalled"]:
        values |= _ready(connection, rollout, row, now, events)
    rollouts.change(connection, rollout.id, values)
    return Passed(halted=verdict.action == "halt"), events


def _is_due(connection: Connection, row: Row, counted: int, now: datetime) -> bool:
    """Whether to judge: runs were counted, and the last verdict is long enough ago."""
    last = row["judged_at"]
    if last is None:
        return counted > 0
    pause = IDLE
    if counted or row["unjudged"]:
        pause = PER_ORG * rollout_sums.org_count(connection, ALL_ORGS, row["id"])
    return bool(now - last >= pause)


def _evidence(
    row: Row, verdict: Verdict, numbers: Mapping[str, Any], totals: Mapping[str, Any], now: datetime
) -> dict[str, Any]:
    """What a halt rests on: a recount of the compared runs that started in the step gives the same totals."""
    return {
        "halted_by": list(verdict.halted_by),
        "step": row["step"],
        "since": to_text(row["step_began_at"]),
        "until": to_text(now),
        "metrics": dict(numbers),
        "totals": dict(totals),
    }


def _halt(
    connection: Connection,
    rollout: Rollout,
    verdict: Verdict,
    numbers: Mapping[str, Any],
    evidence: Mapping[str, Any],
    now: datetime,
    events: Events,
) -> dict[str, Any]:
    metric = verdict.halted_by[0]
    found = numbers[metric]
    effect, at_least, tolerance = (_with_unit(found, key) for key in ("effect", "at_least", "tolerance"))
    reason = f"{metric}: {effect}, at least {at_least}; tolerated are {tolerance}"
    audit.note(
        connection, None, "rollout.halt", rollout.name, {"reason": reason, **evidence}, at=now, actor=ACTOR
    )
    fields = {
        "rollout": rollout.name,
        "metric": metric,
        "effect": _with_unit(found, "effect"),
        "tolerance": _with_unit(found, "tolerance"),
        "orgs": found["orgs_to"],
        "runs": found["runs_to"],
    }
    events.append(("rollout.halted", fields))
    return {
        "state": "halted",
        "halted_at": now,
        "halted_by": ACTOR,
        "reason": reason,
        "evidence": dict(evidence),
        "ready": False,
        "updated_at": now,
        "updated_by": ACTOR,
    }


def _ready(
    connection: Connection, rollout: Rollout, row: Row, now: datetime, events: Events
) -> dict[str, Any]:
    last = rollout.step >= len(rollout.steps)
    if rollout.auto and not last:
        return advance_to(
            connection, rollout, rollout.step + 1, now, ACTOR, "its step showed what it must", events
        )
    if not row["ready"]:
        following = None if last else rollout.steps[rollout.step]
        fields = {"rollout": rollout.name, "step": rollout.steps[rollout.step - 1], "next": following}
        events.append(("rollout.ready", fields))
    return {"ready": True}


def advance_to(
    connection: Connection,
    rollout: Rollout,
    step: int,
    now: datetime,
    actor: str,
    reason: str | None,
    events: Events,
) -> dict[str, Any]:
    """The columns of a rollout whose next step begins, with its audit row; its sums begin again."""
    rollout_sums.begin_step(connection, rollout.id)
    share = rollout.steps[step - 1]
    detail = {"step": share} | ({} if reason is None else {"reason": reason})
    audit.note(connection, None, "rollout.advance", rollout.name, detail, at=now, actor=actor)
    if actor == ACTOR:
        events.append(("rollout.advanced", {"rollout": rollout.name, "step": share}))
    return {
        "state": "running",
        "step": step,
        "step_began_at": now,
        "ready": False,
        "stalled": False,
        "verdict": None,
        "reason": reason,
        "updated_at": now,
        "updated_by": actor,
    }


def _note_silence(connection: Connection, row: Row, lasted: timedelta, events: Events) -> None:
    """Report a side that has stopped running while the other one goes on."""
    if lasted < SILENT or Rollout.of(row).share >= 1:
        return
    sides = rollout_sums.recent_sides(connection, row["id"])
    stalled = len(sides) == 1
    if stalled != row["stalled"]:
        rollouts.change(connection, row["id"], {"stalled": stalled})
        if stalled:
            silent = "from" if "to" in sides else "to"
            events.append(("rollout.stalled", {"rollout": row["name"], "side": silent}))
    row["stalled"] = stalled


def _with_unit(numbers: Mapping[str, Any], key: str) -> str:
    value, unit = numbers[key], numbers["unit"]
    return f"{value}{unit}" if unit == "x" else f"{value:+} {unit}"
