"""Fire, the pure part: a due definition and the time -> its runs, its skips, and what is next."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from worker.definitions.definition import Definition, from_spec
from worker.definitions.due import decide_due, start_deadline
from worker.definitions.spread import spread_of
from worker.definitions.triggers import Trigger
from worker.ids import RunId, new_id
from worker.runs.firing import Decision, DueDefinition, NewSkip, NextFire
from worker.runs.run import Isolation, NewRun

IsolationOf = Callable[[str], Isolation]


def decide(due: DueDefinition, now: datetime, isolation_of: IsolationOf) -> Decision:
    """Decide every instant of a definition that has come by `now`.

    `isolation_of` says where a handler wants to run when the definition does not say.

    Raises:
        DefinitionError: the stored spec or zone is not understood by this version.
    """
    definition = from_spec(due.org_code, due.name, due.spec)
    trigger = definition.trigger(due.org_timezone)
    spread = spread_of(due.org_code, due.name, definition.schedule, trigger, definition.spread)
    what = decide_due(
        trigger, definition.misfire_policy, first=due.next_scheduled_for, now=now, spread=spread
    )
    return Decision(
        runs=[_run(due, definition, trigger, instant, spread, now, isolation_of) for instant in what.runs],
        skips=[
            NewSkip(
                due.org_id,
                due.definition_id,
                due.revision,
                span.skipped_from,
                span.skipped_until,
                span.count,
                span.reason,
            )
            for span in what.skipped
        ],
        next=next_fire(due, what.next, spread),
    )


def next_fire(due: DueDefinition, instant: datetime | None, spread: timedelta) -> NextFire:
    """When the definition fires for its next instant."""
    return NextFire(due.definition_id, instant, None if instant is None else instant + spread)


def _run(
    due: DueDefinition,
    definition: Definition,
    trigger: Trigger,
    instant: datetime,
    spread: timedelta,
    now: datetime,
    isolation_of: IsolationOf,
) -> NewRun:
    run_id = RunId(new_id())
    available_at = instant + spread
    patience = start_deadline(trigger, instant, definition.start_deadline)
    return NewRun(
        id=run_id,
        org_id=due.org_id,
        definition_id=due.definition_id,
        revision=due.revision,
        handler=definition.handler,
        origin="schedule",
        scheduled_for=instant,
        available_at=available_at,
        idempotency_key=run_id,
        isolation=definition.isolation or isolation_of(definition.handler),
        serial=definition.serial,
        overlap=definition.overlap,
        priority=definition.priority,
        variant_handlers=definition.handlers if definition.variants else (),
        max_concurrent=definition.max_concurrent,
        # A missed instant that runs all the same is patient from now on, not from when it was missed.
        start_by=None if patience is None else max(available_at, now) + patience,
    )
