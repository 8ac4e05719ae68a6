"""Changes since a page was made: which of them it would show, counted once for all who look at the same list.

Pure: `worker.features.console.live` reads the changes and sends the counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from worker.ids import DefinitionId, OrgId
from worker.model.search import Query
from worker.store.lists.live import ChangedRun, Changes, LiveChange, Moment
from worker.store.tables import FINAL_STATES, WAITING_REASONS

# Changes that are kept, of all lists together, and those that are counted of one list.
MAX_CHANGES = 5_000
MAX_COUNTED = 1_000
# How far each read goes back behind the one before, in microseconds: a change may commit late.
OVERLAP = 3_000_000
NEVER: Moment = 2**62
# A change and its place.
PlacedChange = tuple[Moment, LiveChange]
# The parts of a query that are compared with the same column of a run.
_EQUAL = ("definition", "handler", "origin", "pool")
_COMPARED = frozenset((*_EQUAL, "org", "states", "since", "until", "reason", "children"))


@dataclass(frozen=True, slots=True)
class ListFilter:
    """Which changes a list shows: those of workers, or of the runs that match `query` in these orgs.

    `org_ids` are the orgs that `org:` and the caller's scope leave; None for all.
    """

    query: Query = field(default_factory=Query)
    org_ids: frozenset[OrgId] | None = None
    definition_id: DefinitionId | None = None
    of_workers: bool = False

    def shows(self, change: LiveChange) -> bool | None:
        """Whether the list shows this change; None if the row does not say."""
        run = change.run
        if run is None or self.of_workers:
            return run is None and self.of_workers
        if self.org_ids is not None and run["org_id"] not in self.org_ids:
            return False
        if self.definition_id not in (None, run["definition_id"]):
            return False
        found = matches(self.query, run)
        # Many orgs have the words of `org:`.
        return None if found and self.query.org is not None and self.org_ids is None else found


def matches(query: Query, run: ChangedRun) -> bool | None:
    """Whether a search finds this run, apart from `org:`; None if its row does not say."""
    if run["origin"] == "child" and not query.has_children:
        return False
    for name in _EQUAL:
        if getattr(query, name) not in (None, run[name]):  # type: ignore[literal-required]
            return False
    if query.since is not None and run["created_at"] < query.since:
        return False
    if query.until is not None and run["created_at"] >= query.until:
        return False
    # A run that has left a state, or is about to have it, changes the list of that state.
    state = _is_one(run["state"], query.states, query.states - set(FINAL_STATES))
    reasons = frozenset({query.reason} if query.reason else ())
    reason = _is_one(run["reason"], reasons, reasons & set(WAITING_REASONS))
    if state is False or reason is False:
        return False
    rest = any(getattr(query, each.name) for each in fields(query) if each.name not in _COMPARED)
    return None if rest or state is None or reason is None else True


def _is_one(value: str | None, wanted: frozenset[str], passing: frozenset[str]) -> bool | None:
    """Whether the value is wanted; None if it is not, but a `passing` one is: the run may have had it."""
    return True if not wanted or value in wanted else None if passing else False


class WatchedList:
    """One list that somebody looks at: the runs or workers that have changed, each by its newest change."""

    def __init__(self, which: ListFilter) -> None:
        self._filter = which
        self.streams = 0
        # The place of the oldest page.
        self.oldest = NEVER
        self._restart()

    def _restart(self) -> None:
        self._places: dict[str, Moment] = {}
        self._sorted: list[Moment] | None = None
        # Up to here changes are left out of the count; and the newest change that may belong to the list.
        self._left_out = self._maybe = 0

    def take_all(self, changes: Iterable[PlacedChange]) -> None:
        """Count these changes only."""
        self._restart()
        for place, change in changes:
            self.take(place, change)

    def take(self, place: Moment, change: LiveChange) -> None:
        """Count one more change; the newest last."""
        shown = self._filter.shows(change)
        if shown is None:
            self._maybe = place
        if not shown:
            return
        self._places.pop(change.id, None)
        self._places[change.id] = place
        self._sorted = None
        if len(self._places) > MAX_COUNTED:
            self._left_out = self._places.pop(next(iter(self._places)))

    def since(self, place: Moment) -> tuple[int, bool]:
        """How many have changed since a place, and whether there may be more."""
        if self._sorted is None:
            self._sorted = sorted(self._places.values())
        count = len(self._sorted) - bisect_right(self._sorted, place)
        return count, place < max(self._left_out, self._maybe)


class ChangeWindow:
    """The newest changes in order, each with its place: a page that was made before it does not show it.

    It has all changes with a place from `begins` on. `reached` is how far back it was read; 0 if reading
    further back finds nothing.
    """

    def __init__(self) -> None:
        self.begins = self.reached = NEVER
        self._read_at: Moment | None = None
        self._wanted = NEVER
        self._changes: dict[tuple[str, str], PlacedChange] = {}

    def __iter__(self) -> Iterator[PlacedChange]:
        return iter(self._changes.values())

    def __contains__(self, key: object) -> bool:
        return key in self._changes

    def want(self, place: Moment) -> None:
        """Let the next read go back to this place, if none did."""
        if place < self.reached:
            self._wanted = min(self._wanted, place)

    def next_since(self) -> Moment:
        """Where the next read begins."""
        return self._wanted if self._read_at is None else min(self._wanted, self._read_at - OVERLAP)

    def take(self, since: Moment, read: Changes) -> list[PlacedChange]:
        """Take what happened since then; returns what is new, in order."""
        before = self._read_at
        new: list[PlacedChange] = []
        for change in read.found:
            if change.key not in self._changes:
                # What the read before did not find had not been committed then.
                is_late = before is not None and self.begins <= change.at < before
                new.append((before if is_late and before is not None else change.at, change))
        new.sort(key=lambda placed: placed[0])
        self._changes |= {change.key: (place, change) for place, change in new}
        if since < self.reached:
            self._changes = dict(sorted(self._changes.items(), key=lambda item: item[1][0]))
            self.reached = since if read.begins == since else 0
        # Without a gap after the read before, what is here still counts.
        has_gap = before is None or read.begins > before
        self.begins = read.begins if has_gap else min(self.begins, read.begins)
        while len(self._changes) > MAX_CHANGES:
            place, _ = self._changes.pop(next(iter(self._changes)))
            self.begins = max(self.begins, place)
        self._read_at = read.read_at
        if self._wanted >= since:
            self._wanted = NEVER
        return new


class ChangedLists:
    """All lists that somebody looks at, and what has changed meanwhile."""

    def __init__(self) -> None:
        self._lists: dict[ListFilter, WatchedList] = {}
        self._window = ChangeWindow()

    @contextlib.contextmanager
    def watching(self, which: ListFilter, place: Moment) -> Iterator[WatchedList]:
        """Watch a list since a place, with all others who do, as long as the block lasts."""
        watched = self._lists.get(which)
        if watched is None:
            watched = self._lists[which] = WatchedList(which)
            watched.take_all(self._window)
        watched.streams += 1
        watched.oldest = min(watched.oldest, place)
        self._window.want(place)
        try:
            yield watched
        finally:
            watched.streams -= 1
            if not watched.streams:
                del self._lists[which]
            if not self._lists:
                # No one reads on.
                self._window = ChangeWindow()

    def window(self) -> ChangeWindow | None:
        """What the next read goes into; None if no one looks."""
        return self._window if self._lists else None

    def take(self, window: ChangeWindow, since: Moment, read: Changes) -> None:
        """Take what happened since then."""
        reached = window.reached
        new = window.take(since, read)
        # Others may look by now.
        for watched in self._lists.values() if window is self._window else ():
            if watched.oldest < reached:
                watched.take_all(window)
                continue
            for place, change in new:
                if place >= reached:
                    watched.take(place, change)

    def news(self, watched: WatchedList, place: Moment) -> bytes | None:
        """The data of an event: how many have changed since a place; None before they were read."""
        if self._window.reached > place:
            return None
        count, is_least = watched.since(place)
        return news(count, is_least or place < self._window.begins)


@functools.lru_cache(maxsize=2 * MAX_COUNTED)
def news(count: int, is_least: bool) -> bytes:
    """The data of an event: how many are new, and whether there may be more; made once for all of them."""
    return json.dumps({"new": count, "more": is_least}).encode()
