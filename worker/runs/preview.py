"""Preview: the next instants of a stored definition, and what the code that fires would make of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from worker.definitions.definition import Definition, from_spec
from worker.definitions.spread import spread_of
from worker.definitions.units import format_duration
from worker.ids import DefinitionId, OrgId
from worker.runs.fire import decide
from worker.runs.firing import Decision, DueDefinition

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Upcoming:
    """An instant, and what is particular about it; `note` is empty where it simply runs then."""

    scheduled_for: datetime
    note: str


class Preview:
    """Of a row of `definitions show`, with its `unfinished` serial runs (id and state), as of `now`."""

    def __init__(self, row: Row, unfinished: Sequence[Row], now: datetime) -> None:
        self._row = row
        self._now = now
        self._definition = from_spec(row["org"], row["name"], row["spec"])
        self._trigger = self._definition.trigger(row["timezone"])
        self._spread = spread_of(
            row["org"], row["name"], self._definition.schedule, self._trigger, self._definition.spread
        )
        self._overdue = self._decided()
        self._meets = _Overlaps(self._definition, unfinished)

    def instants(self, start: datetime | None, count: int) -> list[Upcoming]:
        """The first `count` instants from `start` on; without it from what is due, or from now."""
        first = self._row["next_scheduled_for"]
        if start is None:
            start = self._now if first is None else min(first, self._now)
        return [
            Upcoming(instant, self._note(instant)) for instant in islice(self._trigger.instants(start), count)
        ]

    def _note(self, instant: datetime) -> str:
        stopped = stopped_by(self._row)
        if stopped:
            return stopped
        first = self._row["next_scheduled_for"]
        if instant <= self._now and (first is None or instant < first):
            return "decided already"
        if self._overdue is not None:
            for skip in self._overdue.skips:
                if skip.skipped_from <= instant <= skip.skipped_until:
                    return f"would be skipped: {skip.reason}"
        late = self._overdue is not None and any(run.scheduled_for == instant for run in self._overdue.runs)
        when = "late: as soon as a worker fires it" if late else ""
        if not late and self._spread:
            when = f"fires {format_duration(self._spread)} later"
        return "; ".join(filter(None, (when, self._meets.note())))

    def _decided(self) -> Decision | None:
        """What a worker that fires now would make of the instants that have come."""
        first = self._row["next_scheduled_for"]
        if first is None or first > self._now:
            return None
        due = DueDefinition(
            DefinitionId(self._row["id"]),
            OrgId(""),
            self._row["org"],
            self._row["timezone"],
            self._row["name"],
            self._row["revision"],
            first,
            self._row["spec"],
        )
        return decide(due, self._now, lambda handler: "child")


class _Overlaps:
    """What the next run to come meets; those behind it, nobody can know."""

    def __init__(self, definition: Definition, unfinished: Sequence[Row]) -> None:
        self._overlap = definition.overlap
        self._others = list(unfinished) if definition.serial else []

    def note(self) -> str:
        if not self._others:
            return ""
        others, self._others = self._others, []
        on, held = others[0]["id"], [other for other in others if other["state"] == "held"]
        if self._overlap == "replace":
            return f"replaces run {on} if that is still on"
        if self._overlap == "queue_one" and not held:
            return f"held behind run {on} if that is still on"
        return f"would be skipped: overlap, if run {on} is still on"


def stopped_by(row: Row) -> str:
    """Why nothing of this definition is due; empty where it is."""
    if row["org_state"] != "active":
        return f"not due: the org is {row['org_state']}"
    return "" if row["state"] == "active" else f"not due: the definition is {row['state']}"
