"""Rollout: which orgs get the new version, and what it may lose."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from worker.ids import OrgId, RunId
from worker.model.definitions.flags import FlagCondition
from worker.model.definitions.rollouts import DURATION, POINTS, factor_of, points_of, share_of
from worker.model.orgs import Selector, parse_selector
from worker.model.rollouts.effect import Scale

State = Literal["planned", "running", "halted", "finished", "undone"]
STATES: tuple[State, ...] = ("planned", "running", "halted", "finished", "undone")
# In these a rollout says which version a run gets; in the last two for good.
OPEN: tuple[State, ...] = ("planned", "running", "halted")
Side = Literal["from", "to"]
# Why a run got its version: by its step, its org's flag, a halt, the end, or what it had stored before.
Why = Literal["step", "flag", "halted", "finished", "undone", "stored"]

# After which all workers know of a rollout whose first step has begun.
KNOWN_AFTER = timedelta(seconds=30)
# Beyond its tolerance a share must show this, and a ratio this factor.
GAP = 0.03
RATIO_GAP = 1.3
# The share of runs above the 95th percentile of durations.
SLOW = 0.05


def scale_of(metric: str, allowed: str) -> Scale:
    """What is compared for a metric of `watch`, and what it may lose; raises ValueError.

    `duration_p95` is compared by the share of runs that take longer than the allowed multiple of what 95 %
    of the org's runs took before: at its tolerance that is 5 %.
    """
    if metric in POINTS:
        return Scale("share", points_of(metric, allowed), GAP)
    factor = factor_of(metric, allowed)
    if metric == DURATION:
        return Scale("share", SLOW, SLOW)
    sign = 1 if factor >= 1 else -1
    return Scale("ratio", abs(math.log(factor)), math.log(RATIO_GAP), sign)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as workers and its evaluation use it; `step` counts from 1, 0 before the first."""

    id: str
    name: str
    definitions: str
    old: str
    new: str
    selector: Selector
    flag: FlagCondition | None
    steps: tuple[str, ...]
    auto: bool
    watch: Mapping[str, str]
    state: State
    step: int
    scales: Mapping[str, Scale] = field(default_factory=dict)
    began_at: datetime | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Rollout:
        """The rollout of a row of `rollouts`."""
        flag = None if row["flag"] is None else FlagCondition(row["flag"]["flag"], row["flag"]["equals"])
        return cls(
            id=row["id"],
            name=row["name"],
            definitions=row["definitions"],
            old=row["from_handler"],
            new=row["to_handler"],
            selector=parse_selector(row["orgs"]),
            flag=flag,
            steps=tuple(row["steps"]),
            auto=row["auto"],
            watch=row["watch"],
            state=row["state"],
            step=row["step"],
            scales={metric: scale_of(metric, allowed) for metric, allowed in row["watch"].items()},
            began_at=row["began_at"],
        )

    @property
    def share(self) -> float:
        """The share of the orgs that the step gives the new version."""
        return share_of(self.steps[self.step - 1]) if self.step else 0.0

    @property
    def compared_steps(self) -> int:
        """How many steps leave orgs to compare with."""
        return max(sum(share_of(step) < 1 for step in self.steps), 1)

    def version(self, org_id: OrgId, *, flag_on: bool = True) -> Version:
        """Which version a run of an org gets that starts now."""
        if self.state in ("planned", "undone"):
            return Version("from", "undone" if self.state == "undone" else "step", self.step)
        if self.state == "halted":
            return Version("from", "halted", self.step)
        if not flag_on:
            return Version("from", "flag", self.step)
        if self.state == "finished":
            return Version("to", "finished", self.step)
        return Version("to" if place_of(self.id, org_id) < self.share else "from", "step", self.step)

    def may_precede(self, created_at: datetime) -> bool:
        """Whether a run may have started before all workers knew of the rollout."""
        return self.began_at is None or created_at < self.began_at + KNOWN_AFTER

    def handler(self, side: Side) -> str:
        return self.new if side == "to" else self.old


class Version(NamedTuple):
    """The version of a run: its side, and why it got it, at which step."""

    side: Side
    why: Why
    step: int


def place_of(rollout_id: str, org_id: OrgId) -> float:
    """Where an org stands between 0 and 1, for good: it moves with the first step that is above."""
    digest = sha256(f"{rollout_id}:{org_id}".encode()).digest()
    return float(int.from_bytes(digest[:8]) / 2**64)


class VersionAsk(NamedTuple):
    """A run that starts and needs a version; `stored` is the handler of its checkpoint, if it has one."""

    run_id: RunId
    fencing_token: int
    attempt: int
    origin: str
    org_id: OrgId
    rollout_id: str
    flag_on: bool
    stored: str | None


class RunVersion(NamedTuple):
    """The version that a run has, for good."""

    handler: str
    side: Side


# Runs of these origins are compared: a retry follows a failure, and a backfill is of another time.
COMPARED = ("schedule", "manual")


def decide(rollout: Rollout, ask: VersionAsk, created_at: datetime | None = None) -> tuple[Version, bool]:
    """The version of a run that has none yet, and whether it is compared.

    `created_at` is known of a run that had attempts: if it is younger than the rollout, none of them started.
    """
    precedes = created_at is not None and rollout.may_precede(created_at)
    if ask.stored in (rollout.old, rollout.new) or precedes:
        # It goes on with what it began with, before the rollout or on another worker.
        side: Side = "to" if ask.stored == rollout.new else "from"
        return Version(side, "stored", rollout.step), False
    version = rollout.version(ask.org_id, flag_on=ask.flag_on)
    return version, rollout.state == "running" and version.why == "step" and ask.origin in COMPARED


class RolloutBook:
    """The rollouts that a worker knows, by the name of the definitions."""

    def __init__(self) -> None:
        self._by_name: Mapping[str, Sequence[Rollout]] = {}

    def take(self, rollouts: Iterable[Rollout]) -> None:
        """Replace what is known; of several for one definition the last decides."""
        found: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            found.setdefault(rollout.definitions, []).insert(0, rollout)
        self._by_name = found

    def evaluated(self) -> list[str]:
        """The ids of the rollouts whose runs are counted."""
        every = [each for some in self._by_name.values() for each in some]
        return [each.id for each in every if each.state == "running"]

    def find(self, definition: str, handler: str, *, tags_json: str, issuer: str) -> Rollout | None:
        """The rollout of a definition of an org, whose tags are a JSON list."""
        for rollout in self._by_name.get(definition, ()):
            selector = rollout.selector
            tags = json.loads(tags_json) if selector.tags else ()
            if rollout.old == handler and selector.matches(tags=tags, issuer=issuer):
                return rollout
        return None
