"""Rollouts: the file's entry, the place of orgs, and the statistics."""

from __future__ import annotations

import math
from datetime import timedelta
from random import Random

import pytest

from worker.errors import DefinitionError
from worker.ids import OrgId
from worker.model.definitions.file import parse_file
from worker.model.orgs import Selector
from worker.model.rollouts.effect import (
    MAX_WEIGHT,
    Effect,
    OrgSums,
    Side,
    Sums,
    capped,
    compare,
    prior_of,
    side_of,
    width,
)
from worker.model.rollouts.metrics import EndedRun, counts, measure, score_of, slow_after
from worker.model.rollouts.rollout import Rollout, place_of, scale_of
from worker.model.rollouts.verdict import OrgRuns, OrgVolume, judge, plan, priors_of, shown_effect

FILE = """
[[rollout]]
name = "v2"
definitions = "digest"
from = "a"
to = "b"
{0}
"""
STEPS = 'steps = ["1%", "5%", "100%"]'
FAILED = scale_of("failed", "+2 points")
ALPHA = 0.0007


def rollout(**changed) -> Rollout:
    watch = {"failed": "+2 points", "refused": "+1 point"}
    scales = {metric: scale_of(metric, allowed) for metric, allowed in watch.items()}
    given = ("id", "v2", "digest", "a", "b", Selector(), None, ("10%", "50%", "100%"), False, watch)
    made = Rollout(*given, "running", 1, scales)
    return Rollout(**{name: changed.get(name, getattr(made, name)) for name in Rollout.__slots__})


def test_an_entry_has_defaults():
    [entry] = parse_file(FILE.format(STEPS)).rollouts

    assert (entry.old, entry.new, entry.auto, entry.flag) == ("a", "b", False, None)
    assert entry.watch == {"failed": "+2 points", "refused": "+1 point"}
    assert entry.selector == Selector()


@pytest.mark.parametrize(
    ("keys", "field", "says"),
    [
        ("", "steps", "steps is missing"),
        ('steps = ["5%", "1%"]', "steps", "do not rise"),
        ('steps = ["5"]', "steps", "is not a share"),
        ('steps = ["0%"]', "steps", "is not a share"),
        (STEPS + '\nwatch = { failed = "2x" }', "watch", "number of points"),
        (STEPS + '\nwatch = { money = "+2 points" }', "watch", "is not a factor"),
        (STEPS + '\nwatch = { duration_p95 = "0.5x" }', "watch", "take the same time"),
        (STEPS + "\nother = 1", "other", "unknown key"),
    ],
)
def test_a_wrong_entry_names_its_field(keys: str, field: str, says: str):
    with pytest.raises(DefinitionError) as raised:
        parse_file(FILE.format(keys))

    assert raised.value.field == field
    assert says in raised.value.message


def test_orgs_are_spread_evenly_and_differently_by_rollout():
    orgs = [OrgId(f"org-{number}") for number in range(4000)]
    one, other = ([place_of(name, org) for org in orgs] for name in ("one", "other"))

    assert sum(place < 0.05 for place in one) == pytest.approx(200, abs=45)
    assert sum(a < 0.05 and b < 0.05 for a, b in zip(one, other, strict=True)) < 30


def test_the_bound_holds_at_every_look():
    """Of walks without an effect beyond the truth, no more than alpha ever cross it."""
    random, alpha, crossed = Random(3), 0.05, 0
    for _ in range(1500):
        total = information = 0.0
        step = (5 / 0.03) ** 2 / 40
        for _ in range(200):
            total += random.gauss(0, math.sqrt(step))
            information += step
            if total / information > width(1 / information, alpha=alpha, gap=0.03):
                crossed += 1
                break

    assert crossed / 1500 <= alpha
    # The control: the usual bound of one look, looked at often.
    assert width(1 / step, alpha=alpha, gap=0.03) > 1.645 / math.sqrt(step)


@pytest.mark.parametrize(
    "weights", [[1.0] * 30, [100.0, 1, 1] + [1.0] * 30, [9.0, 8, 7] + [0.1] * 20, [1.0, 2]]
)
def test_no_org_has_more_than_its_share_of_the_weight(weights: list[float]):
    found = capped(weights)

    assert sum(found) == pytest.approx(1)
    assert max(found) <= max(MAX_WEIGHT, 1 / len(weights)) + 1e-9


def orgs(random: Random, count: int, runs: int, failing: float, *, before: int = 200) -> list[OrgSums]:
    found = []
    for _ in range(count):
        base = random.choice((0.01, 0.05, 0.10))
        had, now = random.binomialvariate(before, base), random.binomialvariate(runs, base + failing)
        found.append(OrgSums(Sums(before, had, had), Sums(runs, now, now)))
    return found


def test_a_regression_is_found_and_none_is_invented():
    random = Random(5)
    found = []
    for worse in (0.0, 0.05):
        new, old = orgs(random, 40, 200, worse), orgs(random, 400, 200, 0.0)
        prior = prior_of(FAILED, [org.before for org in new + old])
        found.append(compare(FAILED, prior, new, old, alpha=ALPHA))

    same, worse = found
    assert not same.exceeds and same.estimate == pytest.approx(0, abs=0.02)
    assert worse.exceeds and worse.estimate == pytest.approx(0.05, abs=0.02)


def test_a_change_that_all_orgs_share_is_no_effect():
    """A season, or an outage of a service that both versions use."""
    random = Random(6)
    new, old = orgs(random, 40, 200, 0.2), orgs(random, 400, 200, 0.2)
    prior = prior_of(FAILED, [org.before for org in new + old])

    assert not compare(FAILED, prior, new, old, alpha=ALPHA).exceeds


@pytest.mark.parametrize("size", [1, 100])
def test_one_org_alone_never_halts(size: int):
    random = Random(8)
    new, old = orgs(random, 30, 50, 0.0), orgs(random, 300, 50, 0.0)
    new[0] = OrgSums(new[0].before, Sums(50 * size, 50 * size, 50 * size))
    prior = prior_of(FAILED, [org.before for org in new + old])

    assert not compare(FAILED, prior, new, old, alpha=ALPHA).exceeds


def test_few_orgs_or_runs_give_no_verdict():
    random = Random(9)
    new, old = orgs(random, 9, 500, 0.5), orgs(random, 100, 100, 0.0)
    prior = prior_of(FAILED, [org.before for org in new + old])

    assert compare(FAILED, prior, new, old, alpha=ALPHA).lower is None
    assert side_of(FAILED, prior, []).orgs == 0


@pytest.mark.parametrize(("metric", "allowed", "factor"), [("money", "1.3x", 2.0), ("score", "0.9x", 0.6)])
def test_ratios_are_compared_by_org(metric: str, allowed: str, factor: float):
    random, scale = Random(10), scale_of(metric, allowed)

    def some(count: int, times: float) -> list[OrgSums]:
        found = []
        for _ in range(count):
            mean = random.lognormvariate(0, 1)
            sums = []
            for of in (mean, mean * times):
                values = [of * random.lognormvariate(0, 0.5) for _ in range(60)]
                sums.append(Sums(60, sum(values), sum(value * value for value in values)))
            found.append(OrgSums(*sums))
        return found

    old = some(200, 1.0)
    for times, exceeds in ((factor, True), (1.0, False), (1 / factor, False)):
        new = some(30, times)
        prior = prior_of(scale, [org.before for org in new + old])
        assert compare(scale, prior, new, old, alpha=ALPHA).exceeds is exceeds


def test_a_plan_says_when_a_step_is_too_small():
    random = Random(11)
    volumes = []
    for number in range(400):
        base = random.choice((0.01, 0.05, 0.10))
        had = random.binomialvariate(560, base)
        none = Sums(560, 0, 0)
        volumes.append(OrgVolume(f"org-{number}", 20.0, {"failed": Sums(560, had, had), "refused": none}))

    small, half, whole = plan(rollout(steps=("2%", "50%", "100%")), volumes)

    assert small.days is None and "no verdict with fewer than 10" in small.why
    assert half.days is not None and 1 <= half.days <= 10
    assert half.runs == round(half.runs_per_day * half.days)
    assert (whole.days, whole.why) == (None, "no org is left to compare with")


def test_a_step_lasts_at_least_a_day():
    random = Random(12)
    runs = []
    for side, count in (("to", 200), ("from", 400)):
        for org in orgs(random, count, 500, 0.0, before=500):
            none = Sums(500, 0, 0)
            sums = [{"failed": org.before, "refused": none}, {"failed": org.after, "refused": none}]
            runs.append(OrgRuns(side, *sums))
    priors = priors_of(rollout().scales, [one.before for one in runs])

    early = judge(rollout(), priors, runs, lasted=timedelta(hours=23))
    later = judge(rollout(), priors, runs, lasted=timedelta(days=1))

    assert (early.action, later.action) == ("wait", "ready")
    assert judge(rollout(), priors, [], lasted=timedelta(days=9)).action == "wait"


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("succeeded", None, True),
        ("failed", "error", True),
        ("failed", "timed_out", True),
        ("failed", "lost", False),
        ("refused", "scope_missing", True),
        ("refused", "settings_invalid", True),
        ("refused", "token_invalid", False),
        ("refused", "org_mismatch", False),
        ("refused", "org_inactive", False),
        ("skipped", "expired", False),
        ("cancelled", "requested", False),
    ],
)
def test_whose_faults_count(state: str, reason: str | None, expected: bool):
    assert counts(EndedRun(state, reason, 1.0, None, {})) is expected


def test_what_a_run_says_by_metric():
    watch = {"failed": "+2 points", "duration_p95": "1.5x", "score": "0.9x", "tokens": "1.3x"}
    run = EndedRun("succeeded", None, 20.0, 0.5, {"tokens": 7})
    history = [EndedRun("succeeded", None, float(n), None, {}) for n in range(1, 21)]

    slow = slow_after(watch, history)
    assert slow == 1.5 * 19
    assert measure(watch, run, slow) == {"failed": 0.0, "duration_p95": 0.0, "score": 0.5, "tokens": 7.0}
    assert measure(watch, run._replace(seconds=30.0), slow)["duration_p95"] == 1.0
    assert slow_after(watch, history[:19]) is None
    texts = ("0.5", "1e-200", "1e200", "inf", "-1", "nan", "x", None)
    assert [score_of(text) for text in texts] == [0.5, 0.0, *[None] * 6]


def test_a_bound_that_is_far_away_is_a_number():
    scale, side = scale_of("score", "0.9x"), Side(0.0, 1.0, 20, 100)

    shown = shown_effect("score", scale, Effect(0.0, -4000.0, 1.0, scale.tolerance, side, side))

    assert (shown["effect"], math.isfinite(shown["at_least"])) == (1.0, True)
