"""Histories: how long a handler's runs last and how much memory they take, as its newest ones did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from sqlalchemy import Connection

from worker.ids import DefinitionId, OrgId
from worker.operations.needs import OrgNeeds
from worker.store import needs

# Definitions of a handler that are looked at, and runs of each.
DEFINITIONS = 20
RUNS = 10
# What is taken of a handler that has not run yet.
SECONDS = 10.0
MEMORY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class History:
    """The mean length of a run in seconds, and the most memory of one in bytes; `known`, or assumed."""

    seconds: float
    memory: int
    known: bool = True


class Histories:
    """Of the handlers of these orgs' definitions, each read at first need."""

    def __init__(self, connection: Connection, orgs: Iterable[OrgNeeds]) -> None:
        self._connection = connection
        self._known: dict[str, History] = {}
        self._unknown: set[str] = set()
        self._places: dict[str, list[tuple[OrgId, DefinitionId]]] = defaultdict(list)
        for org in orgs:
            for definition in org.definitions:
                places = self._places[definition.handler]
                if len(places) < DEFINITIONS:
                    places.append((org.org.id, org.ids[definition.name]))

    def of(self, handler: str) -> History:
        if handler not in self._known:
            self._known[handler] = self._read(handler)
        return self._known[handler]

    def assumed(self) -> list[str]:
        """What was taken for granted, in words."""
        if not self._unknown:
            return []
        few = sorted(self._unknown)
        named = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        return [f"{named}: no run is known yet; {SECONDS:.0f} s and {MEMORY // 2**20} MiB are assumed of one"]

    def _read(self, handler: str) -> History:
        rows = [
            row
            for org_id, definition_id in self._places.get(handler, ())
            for row in needs.last_attempts(self._connection, org_id, definition_id, limit=RUNS)
            if row["handler"] == handler
        ]
        if not rows:
            self._unknown.add(handler)
        peaks = [row["peak_memory"] for row in rows if row["peak_memory"]]
        # To three digits, so that handlers alike are counted together.
        seconds = float(f"{mean(row['seconds'] for row in rows):.3g}") if rows else SECONDS
        return History(seconds, max(peaks) if peaks else MEMORY, known=bool(rows))
