"""What deadlines must show: what is not done in time is noted soon, and forgotten once it is done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from tests.simulation.calm import Calm
from tests.simulation.database import EPOCH
from tests.simulation.entries import END, Entry
from tests.simulation.stage import Stage
from tests.simulation.world import DEADLINES_EVERY, World
from worker.clock import from_text
from worker.operations.chores import FORGET

Row = Mapping[str, Any]

# Seconds after a deadline until its definition is late, with what answers take; after a success until it is
# no longer, when the worker died that saw it.
NOTED, FORGOTTEN = DEADLINES_EVERY + 10.0, FORGET + 15.0
# Seconds by which a success may be committed after the time in its row.
BLUR = 40.0
# Of a range of missed times the first and the last have a deadline; what overlaps keeps its own.
UNDONE = ("missed", "overlap")
# What a person does that changes or clears deadlines.
CHANGES = ("edit", "pause", "suspend", "pause org", "close")


class Deadlines:
    """Judges definitions with `done_within`. `runs` and `skips` have `org` and `definition`."""

    def __init__(
        self,
        world: World,
        stage: Stage,
        calm: Calm,
        entries: Mapping[tuple[str, str], Entry],
        runs: Sequence[Row],
        skips: Sequence[Row],
    ) -> None:
        self._calm = calm
        self._stage = stage
        self._within = {key: entry.done_within for key, entry in entries.items() if entry.done_within}
        changed = {action.target for action in stage.plan.acts if action.kind in CHANGES}
        orgs = {target[0] for target in changed}
        self._changed = {
            (f"org_{entry.org}", entry.name)
            for entry in entries.values()
            if f"{entry.org}/{entry.name}" in changed or str(entry.org) in orgs
        }
        self._runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for run in runs:
            if run["origin"] != "child":
                self._runs[run["org"], run["definition"]].append(run)
        # Scheduled times without a run, which have deadlines, too.
        self._skipped: dict[tuple[str, str], set[datetime]] = defaultdict(set)
        for skip in skips:
            if skip["reason"] in UNDONE:
                self._skipped[skip["org"], skip["definition"]] |= {
                    skip["skipped_from"],
                    skip["skipped_until"],
                }
        self._ids = {run["definition_id"]: (run["org"], run["definition"]) for run in runs}
        # By definition when it became late, and when it was no longer.
        self._noted: dict[tuple[str, str], list[tuple[float, datetime]]] = defaultdict(list)
        self._ended: dict[tuple[str, str], list[float]] = defaultdict(list)
        for at, _, name, fields in world.emitted:
            if name == "schedule.late":
                noted = at, from_text(fields["scheduled_for"])
                self._noted[fields["org"], fields["definition"]].append(noted)
            elif name == "schedule.done":
                self._ended[fields["org"], fields["definition"]].append(at)

    def objections(self) -> Iterator[str]:
        for key, within in self._within.items():
            yield from self._rightly(key)
            if key not in self._changed:
                yield from self._missed(key, within)
                yield from self._forgotten(key, within)
        yield from self._kept()

    def _done_at(self, key: tuple[str, str], scheduled_for: datetime) -> float:
        """When a run for that time or a later one first succeeded, in seconds."""
        ends = [
            _seconds(run["finished_at"])
            for run in self._runs[key]
            if run["state"] == "succeeded" and run["scheduled_for"] >= scheduled_for
        ]
        return min(ends, default=float("inf"))

    def _rightly(self, key: tuple[str, str]) -> Iterator[str]:
        """Nothing is noted as late that was done."""
        for at, scheduled_for in self._noted[key]:
            done_at = self._done_at(key, scheduled_for)
            if at <= done_at + BLUR:
                continue
            # What a worker notes just before it stands still is reported once it goes on.
            if self._calm.between(done_at, done_at + BLUR) or self._calm.between(at - BLUR, at):
                yield f"{key} was late for {scheduled_for} at {at:.1f}, and was done at {done_at:.1f}"

    def _missed(self, key: tuple[str, str], within: float) -> Iterator[str]:
        """What is not done by its deadline is noted soon, unless it is late already."""
        for run in self._runs[key]:
            deadline = _seconds(run["scheduled_for"]) + within
            until = deadline + NOTED
            if run["origin"] != "schedule" or until > END or not self._calm.between(deadline, until):
                continue
            if self._done_at(key, run["scheduled_for"]) < until:
                continue
            became = [at for at, _ in self._noted[key] if at <= until]
            if not became and not self._noted_by_one_that_died(key, deadline):
                yield f"{key}: run {run['id']} was due at {deadline:.1f}, and nobody noted that it was late"
            if not became:
                continue
            over = [at for at in self._ended[key] if max(became) < at < deadline]
            if over:
                yield f"{key}: run {run['id']} was due at {deadline:.1f}, and was forgotten at {over[0]:.1f}"

    def _noted_by_one_that_died(self, key: tuple[str, str], deadline: float) -> bool:
        """Whether it was late already, noted by a worker that may have died before it reported that."""
        for id_, _, first in self._stage.late:
            late_at = _seconds(first)
            if self._ids.get(id_) == key and late_at < deadline:
                return not self._calm.between(late_at, late_at + NOTED)
        return False

    def _forgotten(self, key: tuple[str, str], within: float) -> Iterator[str]:
        """What is done is soon no longer late, unless a newer scheduled time is late by then."""
        for at, scheduled_for in self._noted[key]:
            since = max(at, self._done_at(key, scheduled_for))
            until = since + NOTED
            if until > END or not self._calm.between(since, until):
                continue
            if any(since <= ended_at <= until for ended_at in self._ended[key]):
                continue
            times = {run["scheduled_for"] for run in self._runs[key]} | self._skipped[key]
            newer = {time for time in times if time > scheduled_for}
            deadlines = {time: _seconds(time) + within for time in newer}
            if not any(
                passed <= until and self._done_at(key, time) > passed for time, passed in deadlines.items()
            ):
                yield f"{key} was done for {scheduled_for} at {since:.1f}, and was late until {until:.1f}"

    def _kept(self) -> Iterator[str]:
        """What is done is no longer late."""
        for id_, scheduled_for, _ in self._stage.late:
            key = self._ids.get(id_)
            if key is None or key in self._changed:
                continue
            done_at = self._done_at(key, scheduled_for)
            if done_at < END - FORGOTTEN and self._calm.between(done_at, done_at + FORGOTTEN):
                yield f"{key} was done for {scheduled_for} at {done_at:.1f}, and was late until {END}"


def _seconds(at: Any) -> float:
    return (at - EPOCH) / timedelta(seconds=1)
