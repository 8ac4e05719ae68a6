"""What trees of runs must show: each child once, each result in its place, and nothing left behind.

Parts of a tree end at different times, so what has to happen soon is judged where nothing is going wrong.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from tests.simulation import jobs
from tests.simulation.calm import RECOVERED, Calm
from tests.simulation.database import EPOCH
from tests.simulation.plan import PAGES
from tests.simulation.world import RENEW, World

Row = Mapping[str, Any]
Look = Callable[[str], Sequence[tuple[Any, ...]]]

# At every look: more unfinished children of `ctx.map_runs` than its window.
WINDOWS = f"""
SELECT 'the window of run ' || c.parent_id, count(*) FROM live_runs l JOIN children c ON c.run_id = l.id
WHERE c.parent_id = l.parent_id AND c.map IS NOT NULL AND l.reason IS DISTINCT FROM 'window'
GROUP BY c.parent_id, c.map HAVING count(*) > {jobs.WINDOW}
"""
# Runs that wait for children, and have no unfinished one.
FORGOTTEN = """
SELECT p.id, p.attempt FROM live_runs p WHERE p.state = 'parked' AND p.reason = 'children'
AND NOT EXISTS (SELECT 1 FROM live_runs l WHERE l.parent_id = p.id)
"""
# Seconds between two looks for these, and after which one that was seen is forgotten.
EVERY, SOON = 2.0, 8.0
# Seconds after the end of a run in which those below it may still be begun, and after which those that ran
# have stopped: the next renewal, their grace, and what answers take.
BEGUN, STOPPED = 4.0, RENEW + 10.0 + 10.0
# Seconds after a limit was reached in which a child that spends may still begin.
LATE = 4.0
# Seconds after which workers have learnt of the budgets, which a simulation has them look for rarely.
KNOWN = 50.0


class Waking:
    """Looks for parents that nobody lets go on; `found` has when an attempt was first seen, and last."""

    def __init__(self, world: World, look: Look) -> None:
        self.found: dict[tuple[str, int], tuple[float, float]] = {}
        self._world = world
        self._look = look
        self._next = 0.0

    def look(self) -> None:
        now = self._world.loop.time()
        if now < self._next:
            return
        self._next = now + EVERY
        for id_, attempt in self._look(FORGOTTEN):
            first, _ = self.found.get((str(id_), attempt), (now, now))
            self.found[str(id_), attempt] = first, now


class Families:
    """Judges trees. `runs` have `org` and `definition`; `entries` are the definitions by these."""

    def __init__(
        self, world: World, waking: Waking, calm: Calm, rows: Mapping[str, Sequence[Row]], *, by_clock: bool
    ) -> None:
        """`by_clock` if the rows have the times of a clock that nothing has moved."""
        self._by_clock = by_clock
        self._waking = waking
        self._calm = calm
        self._runs = {run["id"]: run for run in rows["runs"]}
        self._children = rows["children"]
        self._parents = {parent["run_id"]: parent for parent in rows["parents"]}
        # Those that people have cancelled; one may still succeed before it hears of that.
        self._cancelled = {row["subject"] for row in rows["audit"] if row["action"] == "run.cancel"}
        self._spends = [row for row in rows["spends"] if row["meter"] == jobs.PAGES]
        self._attempts: dict[str, list[Row]] = defaultdict(list)
        for attempt in rows["attempts"]:
            self._attempts[attempt["run_id"]].append(attempt)

    def objections(self) -> Iterator[str]:
        yield from self._one_each()
        yield from self._numbers()
        yield from self._results()
        yield from self._orders()
        yield from self._below()
        yield from self._left_waiting()
        yield from self._budgets()

    def _one_each(self) -> Iterator[str]:
        """A key of a run has one child, of its org and definition; each child is of a run."""
        keys = Counter(
            (link["parent_id"], link["handler"], link["key"], link["occurrence"]) for link in self._children
        )
        for (parent, _, key, _), count in keys.items():
            if count > 1:
                yield f"run {parent} has {count} children with the key {key}"
        for link in self._children:
            parent, child = self._runs[link["parent_id"]], self._runs[link["run_id"]]
            if any(parent[name] != child[name] for name in ("org_id", "definition_id", "pool")):
                yield f"run {child['id']} of {child['org']} is below run {parent['id']} of {parent['org']}"
        named = {link["run_id"] for link in self._children}
        # A child that did not succeed is replaced in its place.
        named |= {run["retry_of"] for run in self._runs.values() if run["retry_of"] is not None}
        for run in self._runs.values():
            if run["origin"] == "child" and run["id"] not in named:
                yield f"run {run['id']} is a child of no run"
        for parent in self._parents.values():
            places = sorted(link["place"] for link in self._children if link["parent_id"] == parent["run_id"])
            if places != list(range(1, parent["started"] + 1)):
                yield f"run {parent['run_id']} has started {parent['started']} and has children at {places}"

    def _numbers(self) -> Iterator[str]:
        """Of a run there is one child with the params of each key."""
        numbers: Counter[tuple[str, str, int]] = Counter()
        for link in self._children:
            params = self._runs[link["run_id"]]["params"]
            number = (json.loads(params) if isinstance(params, str) else params)["number"]
            numbers[link["parent_id"], link["handler"], number] += 1
        for (parent, handler, number), count in numbers.items():
            if count > 1:
                yield f"run {parent} has {count} children of {handler} with the number {number}"

    def _results(self) -> Iterator[str]:
        """Results are in the order in which they were asked for, and of this org."""
        for line in jobs.JOURNAL.lines:
            if line["who"] != "results":
                continue
            if [key for key, _ in line["results"]] != line["keys"]:
                yield f"run {line['run']} asked for {line['keys']} and got {line['results']}"
            for key, what in line["results"]:
                # A worker whose clock has jumped finds tokens invalid.
                known = what.startswith(("failed: ", "cancelled: ")) or what == "refused: token_invalid"
                if what != line["org"] and not known:
                    yield f"run {line['run']} of {line['org']} got of its child {key}: {what}"
                # Numbers that end for good, see `sim.leaf`, and those that a limit may end.
                if what.startswith("failed: ") and int(key) % 5 != 4 and line["org"] not in PAGES:
                    yield f"the child {key} of run {line['run']} failed"

    def _orders(self) -> Iterator[str]:
        """Each attempt takes the children that have ended in the same order, each once."""
        given: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
        wanted: dict[str, int] = {}
        for line in jobs.JOURNAL.lines:
            if line["who"] == "ended":
                given[line["run"], line["attempt"]].append((line["key"], line["state"]))
                wanted[line["run"]] = line["left"]
                if line["number"] is not None and str(line["number"]) != line["key"]:
                    yield f"run {line['run']} got the result of {line['number']} as that of {line['key']}"
        longest: dict[str, list[tuple[str, str]]] = {}
        for (run, attempt), found in sorted(given.items()):
            if len({key for key, _ in found}) != len(found):
                yield f"attempt {attempt} of run {run} took a child twice: {found}"
            before = longest.get(run, [])
            if self._is_restarted(run):
                continue  # a child that is started again gets another place
            if any(one != other for one, other in zip(before, found, strict=False)):
                yield f"attempt {attempt} of run {run} took {found}, and one before it {before}"
            longest[run] = max(before, found, key=len)
        for run, count in wanted.items():
            state = self._runs[run]["state"]
            if state == "succeeded" and all(
                len(found) < count for (id_, _), found in given.items() if id_ == run
            ):
                yield f"run {run} has succeeded and took fewer than {count} children"

    def _is_restarted(self, parent: str) -> bool:
        places = [self._runs[link["run_id"]] for link in self._children if link["parent_id"] == parent]
        return any(child["retry_of"] is not None for child in places)

    def _below(self) -> Iterator[str]:
        """Those below a cancelled run end with it; a failed one ends or keeps those that wait."""
        for link in self._children:
            parent, child = self._runs[link["parent_id"]], self._runs[link["run_id"]]
            by_parent = (child["state"], child["reason"]) == ("cancelled", "parent")
            above = [self._runs[other["parent_id"]] for other in self._above(link)]
            if by_parent and not any(
                one["state"] == "cancelled"
                or one["id"] in self._cancelled
                or (one["state"] != "succeeded" and not self._keeps(one["id"]))
                for one in above
            ):
                yield f"run {child['id']} was cancelled with run {parent['id']}, which is {parent['state']}"
            if parent["state"] in (None, "succeeded") or (
                parent["state"] != "cancelled" and self._keeps(parent["id"])
            ):
                continue
            ended = _seconds(parent["finished_at"])
            begun = [_seconds(attempt["started_at"]) for attempt in self._attempts[child["id"]]]
            late = [at for at in begun if at > ended + BEGUN and self._calm.between(ended, at)]
            if late and self._by_clock:
                yield f"run {child['id']} began at {late[0]:.1f}; run {parent['id']} ended at {ended:.1f}"
            stopped = _seconds(child["finished_at"])
            if (
                parent["state"] == "cancelled"
                and self._by_clock
                and stopped > ended + STOPPED
                and self._calm.between(ended, ended + STOPPED, after=RECOVERED)
            ):
                yield f"run {child['id']} ended at {stopped:.1f}, and run {parent['id']} at {ended:.1f}"

    def _keeps(self, parent: str) -> bool:
        return parent in self._parents and bool(self._parents[parent]["keep"])

    def _above(self, link: Row) -> Iterator[Row]:
        """The links from a child up to the top of its tree; also of other runs that have it by a retry."""
        for other in self._children:
            if other["run_id"] == link["run_id"]:
                yield other
            elif other["run_id"] == link["parent_id"]:
                yield from self._above(other)

    def _left_waiting(self) -> Iterator[str]:
        """A parent goes on soon once its children have ended."""
        for (id_, _), (first, last) in self._waking.found.items():
            if last - first > SOON and self._calm.between(first - SOON, last):
                yield f"run {id_} waited for children from {first:.1f} to {last:.1f}, and all had ended"

    def _budgets(self) -> Iterator[str]:
        """A tree spends its budget of a run, and what was under way as that was reached."""
        if not self._by_clock:
            return
        roots = {link["run_id"]: link["root_id"] for link in self._children}
        spent: dict[str, list[Row]] = defaultdict(list)
        for row in self._spends:
            spent[roots.get(row["run_id"], row["run_id"])].append(row)
        begun = {
            (line["run"], line["attempt"]): line["at"] for line in jobs.JOURNAL.lines if line["who"] == "leaf"
        }
        for root, rows in spent.items():
            limit = PAGES.get(self._runs[root]["org"])
            rows.sort(key=lambda row: row["at"])
            if limit is None or len(rows) <= limit:
                continue
            reached = _seconds(rows[limit - 1]["at"])
            for row in rows[limit:]:
                attempt = int(row["key"].partition(":")[0])
                began = begun.get((row["run_id"], attempt), 0.0)
                if reached > KNOWN and began > reached + LATE and self._calm.between(reached, began):
                    yield (
                        f"run {row['run_id']} began at {began:.1f} and spent of a limit that its tree had "
                        f"reached at {reached:.1f}"
                    )


def _seconds(at: Any) -> float:
    if isinstance(at, str):  # as SQLite has it
        at = datetime.fromisoformat(at)
    return float((at - EPOCH).total_seconds())
