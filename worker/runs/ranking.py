"""Ranking: which waiting runs start next, fair over held slots and within every limit.

This is the plain reference of what the admit statements do; the tests hold both
against each other. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from worker.ids import DefinitionId, OrgId, RunId
from worker.orgs.org import MAX_CONCURRENT_RUNS, WEIGHT
from worker.runs.run import Isolation


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run that could start now: available, its org active, its handlers offered here."""

    id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    handler: str
    available_at: datetime
    isolation: Isolation = "child"
    priority: int = 0
    max_concurrent: int | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What an org may hold at once, and its weight against others."""

    max_concurrent_runs: int = MAX_CONCURRENT_RUNS
    weight: int = WEIGHT


@dataclass(frozen=True, slots=True)
class Running:
    """How many runs are running in the whole cluster, by org, definition and handler."""

    orgs: Mapping[OrgId, int]
    definitions: Mapping[DefinitionId, int]
    handlers: Mapping[str, int]


def rank(
    waiting: Iterable[Waiting],
    running: Running,
    *,
    shares: Mapping[OrgId, Share],
    handler_limits: Mapping[str, int | None],
    free: Mapping[Isolation, int],
) -> list[Waiting]:
    """The runs that start now, in the order in which they take the free slots.

    Each org forms one line, by priority, then age; only as many as its limit still
    admits stand in it. All lines are then merged by (running runs of the org + place
    in line) / weight, and each run is taken whose definition, handler and isolation
    still have room.
    """
    lines: dict[OrgId, list[Waiting]] = {}
    for run in sorted(waiting, key=lambda run: (-run.priority, run.available_at, run.id)):
        share, line = shares.get(run.org_id, Share()), lines.setdefault(run.org_id, [])
        if running.orgs.get(run.org_id, 0) + len(line) < share.max_concurrent_runs:
            line.append(run)
    ranked = sorted(
        (
            ((running.orgs.get(org_id, 0) + place) / shares.get(org_id, Share()).weight, run)
            for org_id, line in lines.items()
            for place, run in enumerate(line, start=1)
        ),
        key=lambda pair: (pair[0], pair[1].available_at, pair[1].id),
    )
    definitions, handlers = Counter(running.definitions), Counter(running.handlers)
    slots = Counter(free)
    started = []
    for _, run in ranked:
        limit = handler_limits.get(run.handler)
        if (
            slots[run.isolation] < 1
            or (run.max_concurrent is not None and definitions[run.definition_id] >= run.max_concurrent)
            or (limit is not None and handlers[run.handler] >= limit)
        ):
            continue
        slots[run.isolation] -= 1
        definitions[run.definition_id] += 1
        handlers[run.handler] += 1
        started.append(run)
    return started
