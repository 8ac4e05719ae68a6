"""What the services of a simulation must see: limits, pauses, leases and the record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tests.simulation import jobs
from tests.simulation.entries import Action
from tests.simulation.plan import LIMITS
from tests.simulation.service import FREE, LIMITED, Seen
from tests.simulation.world import World

Row = Mapping[str, Any]

# The shortest window for which a rate is promised, in seconds.
WINDOW = 10.0
# Seconds after an answer until each worker knows of its pause: promised, and for answers of the network that
# come late.
KNOWN, LATE = 1.0, 3.0
# Seconds after a fault until all is as before, and after the last request of a run until its record is
# written.
AFTER, RECORDED = 30.0, 10.0
# Faults after which workers and brokers may know late what others know, and those that befall all of them.
HOLDING = ("lose", "slow", "cut database", "cut host", "outage", "kill", "freeze", "drain", "late")
OF_ALL = ("slow", "outage", "cut host", "freeze worker of host at", "lose host answer")


class Calls:
    """Judges what services have seen. `runs` have `org` and `id`, `sent` are the rows of the record."""

    def __init__(
        self, world: World, faults: Sequence[Action], runs: Sequence[Row], sent: Sequence[Row]
    ) -> None:
        self.world = world
        self.seen = sorted(world.service.seen, key=lambda seen: seen.at)
        self.faults = [fault for fault in faults if fault.kind.startswith(HOLDING)]
        # Those that strike at a call strike when it comes.
        self.faults += [
            Action(struck.since, "slow" if struck.machine == "*" else "kill", struck.machine, struck.lasting)
            for struck in world.struck
        ]
        self.wrong_clock = any(fault.kind in ("clock", "drift") for fault in faults)
        self.runs = {run["id"]: run for run in runs}
        self.sent = sent

    def objections(self) -> Iterator[str]:
        yield from self._rates()
        yield from self._concurrent()
        yield from self._leases()
        yield from self._pauses()
        yield from self._refusals()
        yield from self._left()
        yield from self._record()
        yield from self._tokens()

    def _by_key(self) -> dict[str, tuple[Mapping[str, float], list[Seen]]]:
        """The requests to the limited service, of each org and of all."""
        limited = [seen for seen in self.seen if seen.origin == LIMITED]
        found = {"all": (LIMITS["all"], limited)}
        for org in sorted({seen.org for seen in limited}):
            found[org] = LIMITS["org"], [seen for seen in limited if seen.org == org]
        return found

    def _rates(self) -> Iterator[str]:
        """Over any window of w >= 10 s there are at most rate * (w + 1 s) + burst requests."""
        if self.world.on_file and self.wrong_clock:
            return  # the buckets have the times of that clock
        for name, (limit, seen) in self._by_key().items():
            rate, times = limit["rate"], [each.at for each in seen]
            for first, since in enumerate(times):
                for last in range(first, len(times)):
                    window = max(times[last] - since, WINDOW)
                    count, most = last - first + 1, rate * (window + 1) + limit["burst"]
                    if count > most:
                        yield (
                            f"the service saw {count} requests of {name} in {window:.3f} s from {since:.3f}, "
                            f"and {most:.2f} were allowed"
                        )
                        return

    def _concurrent(self) -> Iterator[str]:
        """At most `concurrent` requests are under way whose slots have not ended."""
        for name, (limit, seen) in self._by_key().items():
            for now in (each.at for each in seen):
                under_way = [each for each in seen if each.at <= now < each.ended_at]
                if len(under_way) > limit["concurrent"]:
                    leased = [each for each in under_way if self._has_slot(each, name, now)]
                    if len(leased) > limit["concurrent"]:
                        yield f"{len(leased)} requests of {name} were under way at {now:.3f}"
                        return

    def _has_slot(self, seen: Seen, name: str, now: float) -> bool:
        """Whether a broker that lives has renewed the slots of its request until now."""
        ends = [
            until
            for (broker, key), shares in self.world.service.slots.items()
            if broker is seen.sender.broker and (key.org_id is None) == (name == "all")
            for at, until in shares
            if at <= now
        ]
        return seen.sender.broker.alive and max(ends, default=0.0) > now

    def _leases(self) -> Iterator[str]:
        """Nothing leaves without a lease, nor what its attempt had queued before one was over."""
        asked = {
            (line["run"], line["attempt"], line["number"]): line["at"]
            for line in jobs.JOURNAL.lines
            if line["who"] == "calls"
        }
        for seen in self.seen:
            queued_at = seen.sender.queued_at
            if queued_at < asked[seen.run, seen.attempt, seen.number]:
                yield f"request {seen.number} of run {seen.run} was sent before it was asked for"
            for since, until in self._lapses(seen):
                if since < seen.at and (queued_at < since or seen.at < until):
                    yield (
                        f"request {seen.number} of attempt {seen.attempt} of run {seen.run} was queued at "
                        f"{queued_at:.3f} and sent at {seen.at:.3f}; its lease was over from {since:.3f} to "
                        f"{until:.3f}"
                    )
            if seen.sender.is_stopped:
                yield f"request {seen.number} of run {seen.run} was sent after its attempt was stopped"

    def _lapses(self, seen: Seen) -> Iterator[tuple[float, float]]:
        """When no lease held: from when it froze the runs to its next renewal."""
        renewals = self.world.service.leases.get(seen.sender.worker, [])
        for place, (_, freeze_at) in enumerate(renewals):
            renewed_at = renewals[place + 1][0] if place + 1 < len(renewals) else float("inf")
            if renewed_at > freeze_at:
                yield freeze_at, renewed_at

    def _pauses(self) -> Iterator[str]:
        """A pause holds: at its own broker at once, at all others within a second."""
        for paused in self.seen:
            if not paused.pause or paused.status != 429:
                continue
            until = paused.ended_at + paused.pause
            for seen in self.seen:
                if (seen.origin, seen.org) != (
                    paused.origin,
                    paused.org,
                ) or not paused.ended_at < seen.at < until:
                    continue
                late = seen.at - paused.ended_at
                machines = self._machines_of([paused, seen])
                if (seen.sender.broker is paused.sender.broker and late > 0.01) or (
                    late > KNOWN + LATE and self._is_calm(paused.ended_at, seen.at, machines)
                ):
                    yield (
                        f"{seen.org} was paused at {seen.origin} at {paused.ended_at:.3f} by "
                        f"{paused.sender.broker} for {paused.pause:.1f} s, and {seen.sender.broker} sent a "
                        f"request {late:.3f} s later"
                    )

    def _is_calm(self, since: float, until: float, machines: Collection[str]) -> bool:
        """Whether nothing held up or ended one of these workers and hosts, or their brokers, meanwhile."""
        return not any(
            since - fault.size - AFTER < fault.at < until
            for fault in self.faults
            if fault.target in machines or fault.kind in OF_ALL
        )

    def _machines_of(self, seen: Iterable[Seen]) -> set[str]:
        """Those that sent these requests; a host asks any worker."""
        found = {each.sender.worker.name for each in seen}
        return found.union(self.world.workers if any(name.startswith("h") for name in found) else ())

    def _refusals(self) -> Iterator[str]:
        """A service without a limit refuses an org that it has paused, and no other."""
        for line in jobs.JOURNAL.lines:
            if line["who"] != "limited" or line["origin"] != FREE:
                continue
            if not any(
                seen.pause and (seen.origin, seen.org) == (FREE, line["org"]) and seen.at < line["at"]
                for seen in self.seen
            ):
                yield f"run {line['run']} was refused by {FREE}, which had not paused {line['org']}"

    def _left(self) -> Iterator[str]:
        """At the end each request has an answer, or was refused."""
        for name in self.world.still_waiting:
            yield f"requests still wait in the broker of {name}"

    def _record(self) -> Iterator[str]:
        """The record counts the requests of a run that were begun, or less where something died meanwhile.

        Such a request may have ended before the service saw it.
        """
        counted = Counter({(row["run_id"], row["origin"]): row["requests"] for row in self.sent})
        of_run: dict[str, list[Seen]] = defaultdict(list)
        for seen in self.seen:
            of_run[seen.run].append(seen)
        begun = self.world.service.begun
        for run, origin in sorted(counted.keys() | begun.keys()):
            count, most = counted[run, origin], begun[run, origin]
            # One that is refused while its connection is opened is begun, and not sent.
            least = sum(seen.origin == origin for seen in of_run[run])
            if count > most or (count < least and self._is_recorded(of_run[run])):
                yield f"run {run} has {count} requests to {origin} on record of {least} to {most}"

    def _is_recorded(self, seen: Sequence[Seen]) -> bool:
        """Whether nothing has happened to those who count these requests of a run."""
        machines = self._machines_of(seen)
        return bool(seen) and self._is_calm(seen[0].at, seen[-1].at + RECORDED, machines)

    def _tokens(self) -> Iterator[str]:
        """The API gets the token of the run's org, and the other service none."""
        for seen in self.seen:
            run = self.runs.get(seen.run)
            if seen.token_of != ("" if seen.origin == FREE or run is None else run["org"]):
                yield f"request {seen.number} of run {seen.run} had a token of {seen.token_of!r}"
