"""Ranking: which waiting runs start next, fair over held slots and within every limit.

The plain reference for the admit statements, which tests compare with it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf

from worker.ids import DefinitionId, OrgId, RunId
from worker.orgs import MAX_CONCURRENT_RUNS, WEIGHT
from worker.runs.run import Isolation


@dataclass(frozen=True, slots=True)
class Waiting:
    """A waiting run that is available now, of an active org and a handler that is offered here."""

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

    Each org forms one line of the runs that nothing but its own limit holds up, by
    priority, then age. Lines are merged by (running runs of the org + place in line)
    / weight. The first of a definition, then of a handler, then of an isolation take
    what room there is; what they leave unused is taken by the next call.
    """
    slots = sum(max(0, count) for count in free.values())
    lines: dict[OrgId, list[Waiting]] = {}
    for run in sorted(waiting, key=lambda run: (-run.priority, run.available_at, run.id)):
        share = shares.get(run.org_id, Share())
        room = min(share.max_concurrent_runs - running.orgs.get(run.org_id, 0), slots)
        line = lines.setdefault(run.org_id, [])
        if len(line) < room and _could_start(run, running, handler_limits, free):
            line.append(run)
    ranks = {
        run.id: (running.orgs.get(org_id, 0) + place) / shares.get(org_id, Share()).weight
        for org_id, line in lines.items()
        for place, run in enumerate(line, start=1)
    }
    ranked = sorted(
        (run for line in lines.values() for run in line),
        key=lambda run: (ranks[run.id], run.available_at, run.id),
    )
    ranked = _first_of_each(
        ranked,
        lambda run: run.definition_id,
        lambda run: _room(run.max_concurrent, running.definitions.get(run.definition_id, 0)),
    )
    ranked = _first_of_each(
        ranked,
        lambda run: run.handler,
        lambda run: _room(handler_limits[run.handler], running.handlers.get(run.handler, 0)),
    )
    return _first_of_each(ranked, lambda run: run.isolation, lambda run: free.get(run.isolation, 0))


def _could_start(
    run: Waiting,
    running: Running,
    handler_limits: Mapping[str, int | None],
    free: Mapping[Isolation, int],
) -> bool:
    return (
        free.get(run.isolation, 0) > 0
        and run.handler in handler_limits
        and _room(handler_limits[run.handler], running.handlers.get(run.handler, 0)) > 0
        and _room(run.max_concurrent, running.definitions.get(run.definition_id, 0)) > 0
    )


def _room(limit: int | None, taken: int) -> float:
    return inf if limit is None else limit - taken


def _first_of_each(
    runs: Iterable[Waiting], group_of: Callable[[Waiting], str], room_of: Callable[[Waiting], float]
) -> list[Waiting]:
    """The first runs of each group, as many as fit."""
    taken: Counter[str] = Counter()
    kept = []
    for run in runs:
        taken[group_of(run)] += 1
        if taken[group_of(run)] <= room_of(run):
            kept.append(run)
    return kept
