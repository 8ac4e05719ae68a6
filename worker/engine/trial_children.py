"""The children of a trial's run: kept in memory, and run to their end while their parent is parked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.handlers.steps import StepError
from worker.ids import RunId, new_id
from worker.model.runs.children import (
    MAX_DEPTH,
    ChildPage,
    ChildrenWait,
    EndedRow,
    FamilyCap,
    NewChild,
    PlacedChild,
    Span,
    within,
)
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, Isolation


@dataclass(slots=True)
class TrialChild:
    """A child of a trial's run, and how it ended."""

    new: NewChild
    place: int
    run_id: str
    ended: EndedAttempt | None = None
    seen: int | None = None

    def row(self) -> EndedRow:
        end = self.ended
        if end is None:
            return EndedRow(self.place, None)
        return EndedRow(self.place, end.state, end.reason, end.error, end.result, self.seen)


# Runs one child to its end, within the cap of its parent and at this depth.
RunChild = Callable[[NewChild, FamilyCap, int], Awaitable[EndedAttempt]]


@dataclass(frozen=True, slots=True)
class Family:
    """What a trial knows of its children: who runs them, and of its own parent, if it is a child itself."""

    run_child: RunChild | None = None
    cap: FamilyCap | None = None
    depth: int = 0


@dataclass(eq=False, repr=False)
class TrialChildren:
    """What a worker's store does with children, for the one run of a trial."""

    family: Family = field(default_factory=Family)
    children: dict[tuple[str, str | None, int], TrialChild] = field(default_factory=dict)
    _cap: FamilyCap | None = None
    _seen: int = 0

    async def start_children(
        self,
        run: AdmittedRun,
        children: Sequence[NewChild],
        *,
        cap: FamilyCap,
        keep: bool,
        isolations: Mapping[str, Isolation],
    ) -> Sequence[PlacedChild] | None:
        if self.family.run_child is None:
            raise StepError("ctx.start: nothing runs children here; test them by orgworker.run(children=[…])")
        if self.family.depth >= MAX_DEPTH:
            raise StepError(f"ctx.start: this run is {MAX_DEPTH} levels below the first one, the limit")
        self._cap = cap
        placed = []
        for new in children:
            identity = new.handler, new.key, new.occurrence
            found = self.children.get(identity)
            if found is None:
                found = TrialChild(new, len(self.children) + 1, new_id())
                self.children[identity] = found
            placed.append(PlacedChild(found.place, found.run_id))
        return placed

    async def read_children(self, run_id: RunId, places: Sequence[int]) -> ChildPage:
        wanted = set(places)
        rows = (child.row() for child in self.children.values() if child.place in wanted)
        return ChildPage(tuple(sorted(rows, key=lambda row: row.place)))

    async def read_ended(self, run: AdmittedRun, spans: Sequence[Span], after: int) -> ChildPage | None:
        for child in self._of(spans):
            if child.ended is not None and child.seen is None:
                self._seen += 1
                child.seen = self._seen
        rows = [child.row() for child in self._of(spans) if child.seen is not None and child.seen > after]
        return ChildPage(tuple(sorted(rows, key=lambda row: row.seen or 0)))

    async def cap_of(self, run: AdmittedRun) -> FamilyCap | None:
        return self.family.cap

    def children_are_over(self, wait: ChildrenWait) -> bool:
        """Whether a wait for children is over."""
        mine = self._of(wait.spans)
        if wait.any:
            return any(child.ended is not None and child.seen is None for child in mine)
        return all(child.ended is not None for child in mine)

    async def run_children(self) -> None:
        """Run the children that have not ended, one after another."""
        for child in self.children.values():
            if child.ended is None and self.family.run_child is not None and self._cap is not None:
                child.ended = await self.family.run_child(child.new, self._cap, self.family.depth + 1)

    def _of(self, spans: Sequence[Span]) -> list[TrialChild]:
        mine = within(spans, [child.place for child in self.children.values()])
        return [child for child in self.children.values() if child.place in mine]
