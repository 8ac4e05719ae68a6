"""What rollouts must show: each run has one version for all its attempts, and after a halt the old one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from tests.simulation import jobs
from tests.simulation.calm import Calm
from tests.simulation.database import EPOCH
from tests.simulation.world import POLL
from worker.model.rollouts.rollout import KNOWN_AFTER, place_of

Row = Mapping[str, Any]

HANDLERS = {1: "sim.rolled", 2: "sim.rolled_2"}
SHARES = (0.3, 0.6, 1.0)
NEW = 2
# Seconds after the time in the row of a halt in which a handler may be called that was chosen before it; and
# where a fault may have kept either waiting.
SOON, LATE = POLL, 90.0


class Rollouts:
    """Judges the rollout. By `by_clock` the times in the rows are those of one clock."""

    def __init__(self, rows: Mapping[str, Sequence[Row]], calm: Calm, *, by_clock: bool) -> None:
        self._calm = calm
        self._by_clock = by_clock
        self._runs = {run["id"]: run for run in rows["runs"]}
        self._versions = {row["run_id"]: row for row in rows["run_versions"]}
        self._orgs = rows["rollout_orgs"]
        [self._rollout] = rows["rollouts"] or [None]
        found = [row for row in rows["audit"] if row["action"].startswith("rollout.")]
        self._moves = [
            (_seconds(row["at"]), row["action"].partition(".")[2])
            for row in sorted(found, key=lambda row: row["id"])
        ]
        # By run which versions were called, and when it was first.
        self._called: dict[str, list[int]] = defaultdict(list)
        self._first: dict[str, float] = {}
        for line in jobs.JOURNAL.lines:
            if line["who"] == "version":
                self._called[line["run"]].append(line["version"])
                if line["attempt"] == 1:
                    self._first[line["run"]] = line["at"]

    def objections(self) -> Iterator[str]:
        yield from self._one()
        if self._rollout is not None and self._by_clock:
            yield from self._each_has_one()
            yield from self._places()
        if self._rollout is not None and (self._by_clock or all(verb != "resume" for _, verb in self._moves)):
            yield from self._counts(self._rollout)
        yield from self._halts()

    def _one(self) -> Iterator[str]:
        for run, versions in self._called.items():
            if len(set(versions)) > 1:
                yield f"the attempts of run {run} had the versions {versions}"
            kept = self._versions.get(run)
            if kept is not None and {kept["handler"]} != {HANDLERS[each] for each in versions}:
                yield f"run {run} was given {kept['handler']} and had the versions {versions}"

    def _each_has_one(self) -> Iterator[str]:
        """A run that starts once all workers know of a rollout has a version stored."""
        began = self._rollout["began_at"] if self._rollout is not None else None
        if began is None or any(verb == "undo" for _, verb in self._moves):
            return
        known = _seconds(began) + KNOWN_AFTER.total_seconds()
        for run in self._called:
            if _seconds(self._runs[run]["created_at"]) > known and run not in self._versions:
                yield f"run {run} has no version"

    def _places(self) -> Iterator[str]:
        """An org has its version by its place and the step alone, so it moves at most once a step."""
        for run, row in self._versions.items():
            if row["why"] != "step":
                continue
            share = SHARES[row["step"] - 1] if row["step"] else 0.0
            side = "to" if place_of(row["rollout_id"], row["org_id"]) < share else "from"
            if row["side"] != side:
                yield f"run {run} was given {row['side']} in step {row['step']}, and its org is at {side}"

    def _halts(self) -> Iterator[str]:
        """From a halt until its end no handler of the new version is called for a run's first attempt."""
        for number, (at, verb) in enumerate(self._moves):
            if verb not in ("halt", "undo"):
                continue
            until = next((then for then, other in self._moves[number + 1 :] if other == "resume"), 1e9)
            for run, began in self._first.items():
                since = at + (SOON if self._calm.between(at, began) else LATE)
                if self._called[run][0] == NEW and since < began < until:
                    yield f"run {run} began with the new version at {began:.1f}; {verb} was at {at:.1f}"

    def _counts(self, rollout: Row) -> Iterator[str]:
        """What is compared are the runs of the step that have ended, once each.

        A run starts by the clock of its worker, and a step by that of the person who resumed the rollout.
        """
        if rollout["state"] != "running":
            return
        for side in ("from", "to"):
            sums = [json.loads(text) for row in self._orgs if (text := row[f"{side}_sums"])]
            summed = sum(each["failed"][0] for each in sums if "failed" in each)
            counted = [
                run
                for run, row in self._versions.items()
                if row["counted"]
                and (row["side"], row["step"]) == (side, rollout["step"])
                and row["started_at"] >= rollout["step_began_at"]
                and self._runs[run]["state"] in ("succeeded", "failed")
            ]
            if summed != len(counted):
                yield f"{summed} runs were compared of the side {side}, and {len(counted)} were counted"


def _seconds(at: Any) -> float:
    if isinstance(at, str):  # as SQLite has it
        at = datetime.fromisoformat(at)
    return float((at - EPOCH) / timedelta(seconds=1))
