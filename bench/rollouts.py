"""Rollouts of 2,000 orgs that advance by themselves, simulated: how often they halt, and why.

python -m bench.rollouts plan | null | regression | whale | outage [--rollouts N] [--points 5]

Orgs have failure rates of 1, 5 or 10 %, sizes with a heavy tail, weekends, and seasons that all share. All
five metrics are watched, at 24 looks a day.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from worker.ids import OrgId
from worker.model.definitions.rollouts import POINTS, share_of
from worker.model.orgs import Selector
from worker.model.rollouts.effect import OrgSums, Prior, Side, Sums, alone, compare_sides, enough, side_of
from worker.model.rollouts.rollout import Rollout, place_of, scale_of
from worker.model.rollouts.verdict import OrgVolume, alpha_of, plan, priors_of

WATCH = {
    "failed": "+2 points",
    "refused": "+1 point",
    "duration_p95": "1.5x",
    "money": "1.3x",
    "score": "0.9x",
}
STEPS = ("1%", "5%", "25%", "100%")
BEFORE = 28
LOOKS = 24
ORGS = 2_000
# Orgs of the old side that are drawn: more would change its variance little.
OLD = 400
# Values of one run: share of slow ones, and the coefficients of variation of money and score.
SLOW, MONEY, SCORE = 0.01, 1.0, 0.15


@dataclass
class Org:
    """One org: runs a day, and what its runs give."""

    id: OrgId
    per_day: float
    failed: float
    refused: float
    money: float
    place: float = 0.0
    before: dict[str, Sums] = field(default_factory=dict)
    after: dict[str, Sums] = field(default_factory=dict)


@dataclass
class World:
    """What happens to the orgs of one rollout, day by day."""

    rng: random.Random
    step: int = 1
    orgs: list[Org] = field(default_factory=list)
    worse: dict[str, float] = field(default_factory=dict)
    whale: Org | None = None
    outage: tuple[int, int] = (0, 0)
    bad_night: int = -1

    def runs(self, org: Org, day: int, hours: int) -> int:
        """How many runs an org has in some hours of a day."""
        expected = org.per_day * (0.4 if day % 7 >= 5 else 1.24) * hours / 24
        whole = int(expected)
        return whole + (self.rng.random() < expected - whole)

    def season(self, day: int) -> float:
        return 1 + 0.4 * math.sin(day / 30 * 2 * math.pi)

    def draw(self, org: Org, day: int, hours: int, *, new: bool, hour: int = 0) -> dict[str, Sums] | None:
        count = self.runs(org, day, hours)
        if self.outage[0] <= day * 24 + hour < self.outage[1]:
            # Its runs wait for a token and expire: they count on neither side.
            count = 0
        if not count:
            return None
        worse = self.worse if new else {}
        draw = self.rng.binomialvariate
        failed = min(org.failed * self.season(day) + worse.get("failed", 0.0), 0.95)
        if org is self.whale and day == self.bad_night:
            failed = 0.95
        refused = draw(count, min(org.refused + worse.get("refused", 0.0), 0.95))
        bad = draw(count - refused, failed)
        good = count - refused - bad
        found = {
            "failed": Sums(count, bad, bad),
            "refused": Sums(count, refused, refused),
        }
        if good:
            slow = draw(good, SLOW)
            found["duration_p95"] = Sums(good, slow, slow)
            found["money"] = self._values(good, org.money, MONEY)
            found["score"] = self._values(good, 0.8, SCORE)
        return found

    def _values(self, count: int, mean: float, variation: float) -> Sums:
        total = max(self.rng.gauss(count * mean, math.sqrt(count) * mean * variation), 0.05 * count * mean)
        return Sums(count, total, max(count * mean * mean * (1 + variation**2), total * total / count))


def world_of(seed: int, *, whale: bool = False) -> World:
    rng = random.Random(seed)  # noqa: S311
    world = World(rng)
    for number in range(ORGS):
        org = Org(
            OrgId(f"{seed}-{number}"),
            max(rng.lognormvariate(math.log(6), 1.1), 1.0),
            rng.choice((0.01, 0.05, 0.10)),
            rng.choice((0.0, 0.002, 0.01)),
            rng.lognormvariate(0, 1),
        )
        org.place = place_of(str(seed), org.id)
        world.orgs.append(org)
    if whale:
        # One of the first to move; it has 60 % of all runs.
        org = min(world.orgs, key=lambda each: each.place)
        org.per_day = 1.5 * sum(each.per_day for each in world.orgs if each is not org)
        world.whale = org
    # Without those that no comparison has, for speed.
    world.orgs.sort(key=lambda each: each.place)
    world.orgs = world.orgs[: ORGS // 4 + 2 * OLD]
    for org in world.orgs:
        # As two halves, with the share of each in the season.
        for day in (-21, -7):
            add(org.before, _many(world, org, day))
        org.before.pop("duration_p95", None)
    return world


def _many(world: World, org: Org, day: int) -> dict[str, Sums] | None:
    many = Org(org.id, org.per_day * BEFORE / 2 / 1.24, org.failed, org.refused, org.money)
    return world.draw(many, day - day % 7, 24, new=False)


def add(to: dict[str, Sums], found: dict[str, Sums] | None) -> None:
    for metric, (runs, total, squares) in (found or {}).items():
        had = to.get(metric)
        to[metric] = (
            Sums(runs, total, squares)
            if had is None
            else Sums(had.runs + runs, had.total + total, had.squares + squares)
        )


def rollout_of(seed: int) -> Rollout:
    scales = {metric: scale_of(metric, allowed) for metric, allowed in WATCH.items()}
    return Rollout(
        *(str(seed), "r", "d", "a", "b", Selector(), None, STEPS, True, WATCH, "running", 1, scales)
    )


def simulate(world: World, rollout: Rollout, *, most_days: int = 400) -> tuple[str, str, int, str]:
    """How a rollout ends, `halted`, `advanced` (to the last step) or `stuck`: the step, the day, and why."""
    day = 0
    for step in rollout.steps:
        if share_of(step) >= 1:
            return "advanced", step, day, ""
        end, day, metric = _Step(world, rollout, share_of(step), day).run(most_days)
        if end != "ready":
            return end, step, day, metric
    return "advanced", rollout.steps[-1], day, ""


class _Step:
    """One step: both sides, and what was seen of the old one last."""

    def __init__(self, world: World, rollout: Rollout, share: float, day: int) -> None:
        self.world, self.rollout, self.began, self.drawn = world, rollout, day, day
        self.priors = priors_of(rollout.scales, [org.before for org in world.orgs])
        self.alpha = alpha_of(rollout)
        for org in world.orgs:
            org.after = {}
        self.new = [org for org in world.orgs if org.place < share]
        self.old = [org for org in world.orgs if org.place >= share][:OLD]
        self.sides: dict[str, Side] = {}
        self.expected: dict[str, float] = {}

    def run(self, most_days: int) -> tuple[str, int, str]:
        world, scales, day = self.world, self.rollout.scales, self.began
        while day - self.began < most_days:
            if day >= self.drawn:
                self._draw_old(day)
            for hour in range(LOOKS):
                for org in self.new:
                    add(org.after, world.draw(org, day, 24 // LOOKS, new=True, hour=hour))
                for metric, scale in scales.items():
                    if metric in POINTS or hour % 6 == 5:
                        side = _side(self.rollout, self.priors, self.new, metric)
                        if compare_sides(scale, side, self.sides[metric], alpha=self.alpha).exceeds:
                            return "halted", day + 1, metric
            day += 1
            if all(self._shows(metric) for metric in POINTS):
                return "ready", day, ""
        return "stuck", day, ""

    def _draw_old(self, day: int) -> None:
        """The days until the next draw, all at once: their variance is small beside that of the new side."""
        days = max((day - self.began) // 4, 1)
        for each in range(day, day + days):
            for org in self.old:
                add(org.after, self.world.draw(org, each, 24, new=False, hour=12))
        self.drawn = day + days
        for metric, scale in self.rollout.scales.items():
            self.sides[metric] = _side(self.rollout, self.priors, self.old, metric)
            if metric in POINTS:
                self.expected[metric] = alone(scale, self.priors[metric], self._runs(self.old, metric), 0.0)

    def _shows(self, metric: str) -> bool:
        """As `shows`, with what is known of the old side."""
        scale, prior = self.rollout.scales[metric], self.priors[metric]
        worse = alone(scale, prior, self._runs(self.new, metric), scale.tolerance + scale.gap)
        seen = _side(self.rollout, self.priors, self.new, metric).variance + self.sides[metric].variance
        return enough(scale, worse + self.expected[metric], alpha=self.alpha, seen=seen)

    def _runs(self, orgs: list[Org], metric: str) -> list[tuple[Sums, float]]:
        none = Sums()
        return [(org.before.get(metric, none), float(org.after.get(metric, none).runs)) for org in orgs]


def _side(rollout: Rollout, priors: dict[str, Prior], orgs: list[Org], metric: str) -> Side:
    none = Sums()
    sums = [OrgSums(org.before.get(metric, none), org.after.get(metric, none)) for org in orgs]
    return side_of(rollout.scales[metric], priors[metric], sums)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("plan", "null", "regression", "whale", "outage"))
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument(
        "--points", type=float, default=5.0, help="of failed, or of --metric: true regression"
    )
    parser.add_argument("--metric", default="failed")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    ends: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    days, began = [], time.monotonic()
    for seed in range(asked.seed, asked.seed + asked.rollouts):
        world = world_of(seed, whale=asked.what == "whale")
        rollout = rollout_of(seed)
        if asked.what == "plan":
            volumes = [OrgVolume(org.id, org.per_day, org.before) for org in world.orgs]
            for each in plan(rollout, volumes):
                print(seed, each, each.runs)
            continue
        if asked.what == "regression":
            world.worse = {asked.metric: asked.points / 100}
        world.bad_night = 2
        if asked.what == "outage":
            world.outage = (30, 54)
        end, step, day, metric = simulate(world, rollout)
        ends[end] += 1
        steps[f"{end} at {step} {metric}".strip()] += 1
        days.append(day)
        done = seed - asked.seed + 1
        if done % 10 == 0 or done == asked.rollouts:
            middle = sorted(days)[len(days) // 2]
            took = time.monotonic() - began
            print(
                f"{asked.what}: {done} rollouts {dict(ends)} {dict(steps)} days {middle} ({took:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
