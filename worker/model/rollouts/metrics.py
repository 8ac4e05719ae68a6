"""Metrics: what an ended run says of its version, and the sums of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from worker.model.definitions.rollouts import DURATION, POINTS, SCORE, factor_of
from worker.model.rollouts.effect import Sums
from worker.model.runs.causes import CAUSES

# Runs of an org that say how long its runs took before.
MIN_DURATIONS = 20
MAX_SCORE = 1e15
# Whose faults say nothing of a version: an issuer's, or one of the workers.
_LEFT_OUT = ("provider", "operator")
_COUNTED = ("succeeded", "failed", "refused")
OWN_METRICS = (*POINTS, DURATION, SCORE)


class EndedRun(NamedTuple):
    """A run that has ended: `seconds` of its last attempt, and what its handler returned and spent."""

    state: str
    reason: str | None
    seconds: float | None
    score: float | None
    spends: Mapping[str, int]


def counts(run: EndedRun) -> bool:
    """Whether a run says anything of its version."""
    if run.state not in _COUNTED:
        return False
    meaning = CAUSES.get((run.state, run.reason)) or CAUSES.get((run.state, None))
    return run.state == "succeeded" or meaning is None or meaning.whose not in _LEFT_OUT


def measure(watch: Mapping[str, str], run: EndedRun, slow: float | None) -> dict[str, float]:
    """The value of a run that counts, by metric; `slow` are the seconds above which it is slow."""
    found: dict[str, float] = {}
    for metric in watch:
        if metric in POINTS:
            found[metric] = float(run.state == metric)
        elif run.state == "refused":
            continue
        elif metric == DURATION:
            if slow is not None and run.seconds is not None and run.state == "succeeded":
                found[metric] = float(run.seconds > slow)
        elif metric == SCORE:
            if run.score is not None:
                found[metric] = run.score
        else:
            found[metric] = float(run.spends.get(metric, 0))
    return found


def slow_after(watch: Mapping[str, str], runs: Iterable[EndedRun]) -> float | None:
    """Seconds above which a run of an org is slow; None if it had too few runs to say."""
    if DURATION not in watch:
        return None
    took = sorted(run.seconds for run in runs if run.state == "succeeded" and run.seconds is not None)
    if len(took) < MIN_DURATIONS:
        return None
    return factor_of(DURATION, watch[DURATION]) * took[math.ceil(0.95 * len(took)) - 1]


def sum_before(watch: Mapping[str, str], runs: Iterable[EndedRun]) -> dict[str, Sums]:
    """The sums of an org's runs before a rollout, without slow ones: those are defined by that time."""
    found: dict[str, Sums] = {}
    for run in runs:
        if counts(run):
            add(found, measure(watch, run, None))
    return found


def add(to: dict[str, Sums], values: Mapping[str, float]) -> None:
    """Add the values of one run."""
    for metric, value in values.items():
        had = to.get(metric, Sums())
        to[metric] = Sums(had.runs + 1, had.total + value, had.squares + value * value)


def score_of(text: str | None) -> float | None:
    """The score of a result, of its text; None if it is not a number from 0 to `MAX_SCORE`."""
    try:
        value = float(text) if text is not None else -1.0
    except ValueError:
        return None
    # The square of a smaller one could be 0, as that of a larger one infinite.
    return round(value, 9) if 0 <= value <= MAX_SCORE else None


def as_json(sums: Mapping[str, Sums]) -> dict[str, list[float]]:
    return {metric: list(each) for metric, each in sums.items()}


def from_json(values: Mapping[str, list[float]] | None) -> dict[str, Sums]:
    return {
        metric: Sums(int(runs), total, squares) for metric, (runs, total, squares) in (values or {}).items()
    }
