"""Verdict: what follows from the runs of a step. It can halt, say that the step is ready, or wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from worker.model.definitions.rollouts import DURATION, POINTS, share_of
from worker.model.rollouts.effect import (
    ERROR,
    MIN_ORGS,
    Effect,
    OrgSums,
    Prior,
    Scale,
    Sums,
    compare,
    prior_of,
    shows,
)
from worker.model.rollouts.rollout import Rollout, Side, place_of

Action = Literal["wait", "ready", "halt"]
# A step takes at least so long: nights differ from days.
SHORTEST = timedelta(days=1)
# Days that `plan` looks ahead.
HORIZON = 366
# The largest logarithm of a factor that is shown: that of a bound may exceed any number.
FURTHEST = 100.0

Metrics = Mapping[str, Sums]


class OrgRuns(NamedTuple):
    """The runs of one org by metric: before the rollout, and since the step began."""

    side: Side
    before: Metrics
    after: Metrics


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a step, with the effect by metric; `halted_by` are the metrics that exceed."""

    action: Action
    effects: Mapping[str, Effect] = field(default_factory=dict)
    halted_by: tuple[str, ...] = ()


def alpha_of(rollout: Rollout) -> float:
    """The probability of an error that one metric has in one step."""
    return ERROR / (len(rollout.scales) * rollout.compared_steps)


def priors_of(scales: Mapping[str, Scale], before: Sequence[Metrics]) -> dict[str, Prior]:
    """How all orgs differed before the rollout, by metric."""
    none = Sums()
    return {
        metric: prior_of(scale, [metrics.get(metric, none) for metrics in before])
        for metric, scale in scales.items()
    }


def judge(
    rollout: Rollout, priors: Mapping[str, Prior], orgs: Sequence[OrgRuns], *, lasted: timedelta
) -> Verdict:
    """The verdict on a step. Missing data neither halts nor makes ready."""
    alpha = alpha_of(rollout)
    effects: dict[str, Effect] = {}
    ready = lasted >= SHORTEST
    for metric, scale in rollout.scales.items():
        new, old = _sides(orgs, metric)
        effect = effects[metric] = compare(scale, priors[metric], new, old, alpha=alpha)
        if ready and metric in POINTS:
            runs = [[(org.before, float(org.after.runs)) for org in side] for side in (new, old)]
            seen = 0.0 if effect.error is None else effect.error**2
            ready = shows(scale, priors[metric], runs[0], runs[1], alpha=alpha, seen=seen)
    if halted := tuple(metric for metric, effect in effects.items() if effect.exceeds):
        return Verdict("halt", effects, halted)
    return Verdict("ready" if ready and rollout.share < 1 else "wait", effects)


def _sides(orgs: Sequence[OrgRuns], metric: str) -> tuple[list[OrgSums], list[OrgSums]]:
    none, new, old = Sums(), list[OrgSums](), list[OrgSums]()
    for side, before, after in orgs:
        if (sums := after.get(metric)) is not None and sums.runs:
            (new if side == "to" else old).append(OrgSums(before.get(metric, none), sums))
    return new, old


class OrgVolume(NamedTuple):
    """An org as a plan sees it: its id, its runs a day, and its metrics before."""

    id: Any
    per_day: float
    before: Metrics


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step before it starts: its orgs, and the runs and days until it shows what it must.

    `days` is None if it never does, within a year; `why` says why.
    """

    step: str
    orgs: int
    runs_per_day: float
    days: int | None
    why: str = ""

    @property
    def runs(self) -> int | None:
        return None if self.days is None else round(self.runs_per_day * self.days)


def plan(rollout: Rollout, orgs: Sequence[OrgVolume]) -> list[PlannedStep]:
    """What each step needs at today's volume, for the orgs that the hash gives it."""
    priors = priors_of(rollout.scales, [org.before for org in orgs])
    placed = [(place_of(rollout.id, org.id), org) for org in orgs]
    return [_plan_step(rollout, priors, placed, step) for step in rollout.steps]


def _plan_step(
    rollout: Rollout, priors: Mapping[str, Prior], placed: Sequence[tuple[float, OrgVolume]], step: str
) -> PlannedStep:
    share = share_of(step)
    new = [org for place, org in placed if place < share]
    old = [org for place, org in placed if place >= share]
    volume = sum(org.per_day for org in new)
    if share >= 1:
        return PlannedStep(step, len(new), volume, None, "no org is left to compare with")
    for side, what in ((new, "of the new version"), (old, "to compare with")):
        if len(side) < MIN_ORGS:
            some = f"{len(side)} orgs {what}: no verdict with fewer than {MIN_ORGS}"
            return PlannedStep(step, len(new), volume, None, some)
    if volume <= 0:
        return PlannedStep(step, len(new), volume, None, "these orgs had no runs")
    points = {metric: scale for metric, scale in rollout.scales.items() if metric in POINTS}
    if not points:
        return PlannedStep(step, len(new), volume, 1)

    def shown(days: float) -> bool:
        none = Sums()
        return all(
            shows(
                scale,
                priors[metric],
                *(
                    [(org.before.get(metric, none), org.per_day * days) for org in side]
                    for side in (new, old)
                ),
                alpha=alpha_of(rollout),
            )
            for metric, scale in points.items()
        )

    if not shown(HORIZON):
        return PlannedStep(step, len(new), volume, None, "too few orgs and runs ever to show it")
    low, high = 0, HORIZON
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return PlannedStep(step, len(new), volume, high)


def shown_effect(metric: str, scale: Scale, effect: Effect) -> dict[str, Any]:
    """An effect for people and JSON: points for shares, factors for ratios."""

    def number(value: float | None) -> float | None:
        if value is None:
            return None
        if scale.kind == "share":
            return round(100 * value, 3)
        return round(math.exp(min(scale.sign * value, FURTHEST)), 4)

    return {
        "metric": metric,
        "unit": "points"
        if scale.kind == "share" and metric != DURATION
        else ("% slow" if metric == DURATION else "x"),
        "effect": number(effect.estimate),
        "at_least": number(effect.lower),
        "tolerance": number(scale.tolerance),
        "exceeds": effect.exceeds,
        "orgs_to": effect.new.orgs,
        "orgs_from": effect.old.orgs,
        "runs_to": effect.new.runs,
        "runs_from": effect.old.runs,
    }
