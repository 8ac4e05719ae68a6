"""Whether a new version does worse, compared by org: an estimate, and a bound that holds at every look.

**Estimate.** Each org counts once, as the difference of what its runs do now and what they did before. What
they did before is shrunk towards the mean of all orgs (empirical Bayes), as few runs say little; as the orgs
of both sides are drawn by a hash, any function of the time before leaves the difference of the sides unbiased
(Deng, Xu, Kohavi, Walker: "Improving the sensitivity of online controlled experiments by utilizing
pre-experiment data", WSDM 2013). The effect is the weighted mean of the differences of the new side less that
of the old side in the same time: a difference in differences. Weights are by precision, and capped.

**Variance.** The larger one of that between orgs (cluster-robust) and that which runs independent of each
other would have. With the first, an org whose runs all fail one night raises the variance as it raises the
estimate, so that one org alone never passes the bound.

**Bound.** An estimate with the variance V, times the information 1/V, moves like a Brownian motion with drift
in the information (Scharfstein, Tsiatis, Robins: JASA 92, 1997), also with the variance of the time before,
which does not shrink. The one-sided normal mixture boundary (Robbins, 1970; Howard, Ramdas, McAuliffe,
Sekhon: "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49, 2021) is
crossed at any look, however many there are, with a probability of at most alpha. Alpha is that of a rollout
divided by its metrics and steps (Bonferroni). The central limit theorem enters here: hence `MIN_ORGS` and
`MIN_RUNS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Metric = Literal["failed", "refused", "duration_p95", "money", "score"]
Kind = Literal["share", "ratio"]

# Of a whole rollout: the probability to halt one that is no worse than its tolerances.
ERROR = 0.01
# With which a step shows a regression before it ends, and the quantile of the normal distribution for it.
POWER = 0.9
POWER_QUANTILE = 1.2816
# The largest share of a side's weight that one org has.
MAX_WEIGHT = 0.1
# Orgs and runs of a side below which there is no verdict.
MIN_ORGS = 10
MIN_RUNS = 50
# Runs of an org, before and now, below which it has no ratio.
MIN_FOR_RATIO = 5
# By how much the larger of two estimates of one variance exceeds it on average, for a few dozen orgs.
OF_TWO = 1.1
# The gap, in standard errors, at which the bound is tightest.
AIM = 5.0
_LEAST = 1e-12


class Sums(NamedTuple):
    """Runs of an org and version, and the sum and the sum of squares of a value of each."""

    runs: int = 0
    total: float = 0.0
    squares: float = 0.0


class OrgSums(NamedTuple):
    """An org before the rollout, and since the step began."""

    before: Sums
    after: Sums


@dataclass(frozen=True, slots=True)
class Scale:
    """What is compared, in its own unit: a share of the runs, or the logarithm of a mean.

    The `tolerance` is what may be lost, the `gap` what beyond it must be shown; `sign` is -1 if less is
    worse.
    """

    kind: Kind
    tolerance: float
    gap: float
    sign: int = 1


@dataclass(frozen=True, slots=True)
class Effect:
    """An estimate in the unit of its scale; it is at least `lower`, at any look. None without a verdict."""

    estimate: float | None
    lower: float | None
    error: float | None
    tolerance: float
    new: Side
    old: Side

    @property
    def exceeds(self) -> bool:
        """Whether the new version is worse than the tolerance allows."""
        return self.lower is not None and self.lower > self.tolerance


class Side(NamedTuple):
    """One side: the mean difference of its orgs, its variance, and what they are of."""

    mean: float = 0.0
    variance: float = 0.0
    orgs: int = 0
    runs: int = 0


class Prior(NamedTuple):
    """How orgs differ before a rollout: the mean of their values, their variance, and that of one run."""

    mean: float
    between: float
    within: float


class _Known(NamedTuple):
    """What an org's runs are expected to give, and the variance of that."""

    expected: float
    variance: float


NOTHING = Prior(0.0, 0.0, 0.0)


def prior_of(scale: Scale, orgs: Iterable[Sums]) -> Prior:
    """How the orgs of both sides differed before; the variance between them by the method of moments."""
    least = 1 if scale.kind == "share" else MIN_FOR_RATIO
    found = [sums for sums in orgs if sums.runs >= least and (scale.kind == "share" or sums.total > 0)]
    if not found:
        return NOTHING
    # Neither the largest orgs decide nor those with one run.
    weights = [sums.runs / (sums.runs + 10) for sums in found]
    weight = sum(weights)
    values = [_value(scale, sums) for sums in found]
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / weight
    spread = sum(w * (value - mean) ** 2 for w, value in zip(weights, values, strict=True)) / weight
    by_chance = sum(w / sums.runs for w, sums in zip(weights, found, strict=True)) / weight
    if scale.kind == "share":
        whole = mean * (1 - mean)
        between = (spread - whole * by_chance) / max(1 - by_chance, 0.1)
        between = min(max(between, 0.0), 0.9 * whole)
        return Prior(mean, between, whole - between)
    within = _variation(found)
    return Prior(mean, max(spread - within * by_chance, 0.0), within)


def compare(
    scale: Scale, prior: Prior, new: Sequence[OrgSums], old: Sequence[OrgSums], *, alpha: float
) -> Effect:
    """The effect of the new version, with the bound that holds at every look with probability 1 - alpha."""
    return compare_sides(scale, side_of(scale, prior, new), side_of(scale, prior, old), alpha=alpha)


def compare_sides(scale: Scale, new: Side, old: Side, *, alpha: float) -> Effect:
    """As `compare`, of two sides; without an effect if there is too little of one of them."""
    if any(side.orgs < MIN_ORGS or side.runs < MIN_RUNS for side in (new, old)):
        return Effect(None, None, None, scale.tolerance, new, old)
    estimate, variance = new.mean - old.mean, new.variance + old.variance
    lower = estimate - width(variance, alpha=alpha, gap=scale.gap)
    return Effect(estimate, lower, math.sqrt(variance), scale.tolerance, new, old)


def side_of(scale: Scale, prior: Prior, orgs: Iterable[OrgSums]) -> Side:
    """The mean difference of the orgs of one side, and its variance."""
    least = 1 if scale.kind == "share" else MIN_FOR_RATIO
    rows = [
        (_known(scale, prior, org.before), _value(scale, org.after), org.after.runs)
        for org in orgs
        if org.after.runs >= least and (scale.kind == "share" or org.after.total > 0)
    ]
    if len(rows) < 2:
        return Side(orgs=len(rows), runs=sum(runs for _, _, runs in rows))
    differences = [value - known.expected for known, value, _ in rows]
    mean = 0.0
    # The variance of a share depends on the share: once as before, then with the mean difference.
    for _ in range(2 if scale.kind == "share" else 1):
        variances = [_variance(scale, prior, known, runs, mean) for known, _, runs in rows]
        weights = capped([1 / variance for variance in variances])
        mean = sum(map(float.__mul__, weights, differences))
    alone = sum(w * w * variance for w, variance in zip(weights, variances, strict=True))
    robust = sum(
        w * w * (each - mean) ** 2 / (1 - w) for w, each in zip(weights, differences, strict=True) if w < 1
    )
    return Side(mean, max(alone, robust, _LEAST), len(rows), sum(runs for _, _, runs in rows))


def shows(
    scale: Scale,
    prior: Prior,
    new: Sequence[tuple[Sums, float]],
    old: Sequence[tuple[Sums, float]],
    *,
    alpha: float,
    seen: float = 0.0,
) -> bool:
    """Whether these runs show a regression by tolerance and gap with `POWER`, if there is one.

    `new` and `old` have the time before of each org, and its runs since, made or expected. `seen` is the
    variance that was seen between orgs, if it is known.
    """
    if len(new) < MIN_ORGS or len(old) < MIN_ORGS or sum(runs for _, runs in new) < MIN_RUNS:
        return False
    shift = scale.tolerance + scale.gap if scale.kind == "share" else 0.0
    expected = alone(scale, prior, new, shift) + alone(scale, prior, old, 0.0)
    return enough(scale, expected, alpha=alpha, seen=seen)


def enough(scale: Scale, expected: float, *, alpha: float, seen: float = 0.0) -> bool:
    """Whether an estimate shows the gap with `POWER`: its variance as expected, and as seen between orgs."""
    variance = max(OF_TWO * expected, seen)
    needed = width(variance, alpha=alpha, gap=scale.gap) + POWER_QUANTILE * math.sqrt(variance)
    return needed <= scale.gap


def alone(scale: Scale, prior: Prior, orgs: Sequence[tuple[Sums, float]], shift: float) -> float:
    """The variance of a side's mean difference if all runs are independent."""
    variances = [
        _variance(scale, prior, _known(scale, prior, before), runs, shift)
        for before, runs in orgs
        if runs > 0
    ]
    weights = capped([1 / variance for variance in variances])
    return sum(w * w * variance for w, variance in zip(weights, variances, strict=True)) or math.inf


def width(variance: float, *, alpha: float, gap: float) -> float:
    """How far an estimate of this variance strays above the truth at any look, with probability 1 - alpha.

    Tightest where the gap is `AIM` standard errors; valid anywhere.
    """
    information, rho = 1 / variance, (AIM / gap) ** 2 / _tuning(alpha)
    total = information + rho
    return math.sqrt(2 * total * math.log1p(math.sqrt(total / rho) / (2 * alpha))) / information


def _tuning(alpha: float) -> float:
    # Howard et al., section 3.5: where the mixture is tightest, to first order.
    logs = 2 * math.log(1 / (2 * alpha))
    return max(logs + math.log1p(logs), 1.0)


def capped(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1, none above `MAX_WEIGHT`; equal ones if there are too few for that."""
    if not weights:
        return []
    most = max(MAX_WEIGHT, 1 / len(weights))
    left, share, found = sum(weights), 1.0, list(weights)
    # The largest first: once one is below the cap, all others are.
    for place in sorted(range(len(weights)), key=lambda n: -weights[n]):
        if left <= 0 or weights[place] * share <= most * left * (1 + 1e-9):
            break
        left -= weights[place]
        share -= most
        found[place] = -1.0
    scale = share / left if left > 0 else 0.0
    return [most if weight < 0 else weight * scale for weight in found]


def _known(scale: Scale, prior: Prior, before: Sums) -> _Known:
    """What the runs of an org are expected to give, from its runs before and all orgs."""
    least = 1 if scale.kind == "share" else MIN_FOR_RATIO
    if prior.between <= 0 or before.runs < least or (scale.kind == "ratio" and before.total <= 0):
        return _Known(prior.mean, prior.between)
    trust = prior.between / (prior.between + prior.within / before.runs)
    return _Known(prior.mean + trust * (_value(scale, before) - prior.mean), prior.between * (1 - trust))


def _variance(scale: Scale, prior: Prior, known: _Known, runs: float, shift: float) -> float:
    """The variance of an org's difference if its runs are independent."""
    if scale.kind == "share":
        share = min(max(known.expected + shift, 1 / (runs + 2), 0.002), 0.5)
        return share * (1 - share) / runs + known.variance
    return max(prior.within, _LEAST) / runs + known.variance


def _value(scale: Scale, sums: Sums) -> float:
    mean = sums.total / sums.runs
    return mean if scale.kind == "share" else scale.sign * math.log(mean)


def _variation(orgs: Sequence[Sums]) -> float:
    """The squared coefficient of variation of one run's value, over all orgs."""
    squares = runs = 0.0
    for sums in orgs:
        mean = sums.total / sums.runs
        squares += max(sums.squares - sums.runs * mean * mean, 0.0) / (mean * mean)
        runs += sums.runs - 1
    return squares / runs if runs else 0.0
