"""Children: runs that a run starts and waits for, as handler, worker and store exchange them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self

from worker.model.egress import is_wider

# Runs below a run, and below the run at the top of its tree, without that one.
MAX_CHILDREN = 10_000
MAX_TREE = 100_000
# Levels below the run at the top.
MAX_DEPTH = 4
# Bytes of JSON text: the params of a child, and its result.
MAX_CHILD_PARAMS = 64 * 1024
MAX_CHILD_RESULT = 64 * 1024
# Handlers that one handler may start.
MAX_CHILD_HANDLERS = 50
# Children that one call starts or reads, and the bytes of the results that it reads; rows of consecutive
# places that one call names. The message of a run's process may have some 8,000 parts.
AT_ONCE = 400
MAX_SPANS = 1_000
READ_BYTES = 1024 * 1024
# Children of one `ctx.map_runs` that are unfinished at the same time: by default, and at most.
WINDOW = 50
MAX_WINDOW = 1_000
# Seconds between two attempts of a run that takes its children as they end.
PACE = 1.0
# Why a child is refused whose handler declares more than its parent has, and cancelled with its parent.
EXCEEDS = "child_exceeds"
BY_PARENT = "parent"

# The first and the last of a row of children, by their places among the children of their run.
Span = tuple[int, int]


# Not frozen: a run may start thousands.
@dataclass(slots=True)
class NewChild:
    """A child to start: its handler, its params as JSON text, and what names it among its siblings.

    `window` is that of its `ctx.map_runs`, of which the run makes several: `map` counts them from 1.
    """

    handler: str
    key: str | None
    occurrence: int
    params_json: str
    map: int = 0
    window: int = 0


@dataclass(slots=True)
class PlacedChild:
    """A child that is stored: its place among the children of its run, from 1, and its run."""

    place: int
    run_id: str


@dataclass(slots=True)
class EndedRow:
    """A child as its parent reads it; `state` is None until it has ended, `seen` its place among those that
    `ctx.as_ended` gave.
    """

    place: int
    state: str | None
    reason: str | None = None
    error: Mapping[str, str] | None = None
    result_json: str | None = None
    seen: int | None = None


@dataclass(frozen=True, slots=True)
class ChildPage:
    """Children of a run that were read; `more` if there are others."""

    rows: tuple[EndedRow, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class FamilyCap:
    """What the handler of a run declared in the last attempt that started children: none of them has more.

    `egress` has the lists of an attempt, all of which a request must be allowed by; none if it is open.
    `traceparent` is that of this attempt.
    """

    handler: str
    scopes: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()
    egress: tuple[tuple[str, ...], ...] = ()
    audiences: frozenset[str] = frozenset()
    traceparent: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "handler": self.handler,
            "scopes": sorted(self.scopes),
            "secrets": sorted(self.secrets),
            "egress": [list(items) for items in self.egress],
            "audiences": sorted(self.audiences),
            "traceparent": self.traceparent,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        return cls(
            stored["handler"],
            frozenset(stored["scopes"]),
            frozenset(stored["secrets"]),
            tuple(tuple(items) for items in stored["egress"]),
            frozenset(stored["audiences"]),
            stored.get("traceparent"),
        )

    def excess(self, child: FamilyCap) -> str | None:
        """What a child's handler declares beyond this, such as `the scope write:kb`; None if nothing."""
        for what, mine, its in (
            ("scope", self.scopes, child.scopes),
            ("secret", self.secrets, child.secrets),
            ("audience", self.audiences, child.audiences),
        ):
            if more := sorted(its - mine):
                return f"the {what} {more[0]}"
        for mine_listed in self.egress:
            # It is within a list of its parent's if one of its own is.
            if not any(not is_wider(items, mine_listed) for items in child.egress):
                return f"egress beyond {', '.join(mine_listed) or 'none'}"
        return None


@dataclass(frozen=True, slots=True)
class ChildrenWait:
    """Children that a run waits for: all of them, or with `any` the next one that ends."""

    spans: tuple[Span, ...] = ()
    any: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"any": self.any, "spans": [list(span) for span in self.spans]}


def spans_of(places: Collection[int]) -> tuple[Span, ...]:
    """Places as rows of consecutive ones, in order."""
    ordered = sorted(set(places))
    if not ordered:
        return ()
    breaks = [index for index, (one, other) in enumerate(pairwise(ordered), 1) if other != one + 1]
    edges = [0, *breaks, len(ordered)]
    return tuple((ordered[begin], ordered[end - 1]) for begin, end in pairwise(edges))


def within(spans: Sequence[Span], places: Iterable[int]) -> set[int]:
    """Those of the places that are in one of the spans."""
    found = set[int]()
    for first, last in spans:
        found.update(place for place in places if first <= place <= last)
    return found


@dataclass(frozen=True, slots=True)
class ChildCounts:
    """How many children of a run there are, by state; `waiting` and `running` are unfinished."""

    by_state: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_state.values())

    @property
    def ended(self) -> int:
        return self.total - sum(self.by_state.get(state, 0) for state in ("waiting", "running"))

    @property
    def not_succeeded(self) -> int:
        """Those that a retry starts again."""
        return self.ended - self.by_state.get("succeeded", 0)

    @property
    def failed(self) -> int:
        return sum(self.by_state.get(state, 0) for state in ("failed", "refused"))


OnFailure = Literal["raise", "return"]
