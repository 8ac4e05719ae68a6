"""The loop of `provision`: an issuer's orgs and applications stay as provider and definitions say.

A round compares everything, in turns: within a turn no other process provisions the issuer, and between two
of them others may, such as `orgs sync`. Orgs that a webhook named are served first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Literal

from worker.errors import Busy, Conflict, NotFound, WorkerError
from worker.features.provisioning import sync
from worker.features.provisioning.fleet import Fleet
from worker.features.provisioning.management.contract import Notice
from worker.features.provisioning.provisioning import Provisioned, Provisioner, exclusive
from worker.features.provisioning.scopes import Scopes
from worker.features.provisioning.sync import Plan, SyncRow, SyncRules
from worker.telemetry.events import emit

# Orgs that wait for their turn; more webhooks are refused, and sent again by the provider.
MAX_QUEUED = 1_000
# Seconds before it looks again whether another process has ended.
LOOK_AGAIN = 1.0
# Seconds before a failed round is repeated, at most `every`, and before an org that a webhook named is tried
# again; after the last of these the next round does it.
ROUND_AGAIN = 60.0
NOTICE_AGAIN = (1.0, 3.0, 10.0, 30.0)
# Seconds for which deletions are collected before a round looks whether they are many.
COLLECT = 30.0
# Seconds that a turn may take to end when the process stops.
LAST_TURN = 10.0

Doing = Literal["starting", "idle", "working", "waiting"]


@dataclass(slots=True)
class ProvisionLoop:
    """Follows one issuer. `fleet` makes what rotates credentials older than `rotate_after` (0: none)."""

    provisioner: Provisioner
    rules: SyncRules
    issuers: Collection[str]
    every: timedelta
    scopes: Scopes
    fleet: Callable[[], Fleet]
    rotate_after: timedelta = timedelta()
    doing: Doing = field(default="starting", init=False)
    """`waiting`: another process provisions the issuer."""
    _queue: dict[str, Notice] = field(default_factory=dict, init=False)
    _tries: Counter[str] = field(default_factory=Counter, init=False)
    # Orgs that were read again while a round read the list.
    _newer: set[str] = field(default_factory=set, init=False)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _soon: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _turns: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _later: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _stopping: bool = field(default=False, init=False)
    _requests: Counter[str] = field(default_factory=Counter, init=False)

    def notify(self, notice: Notice) -> None:
        """Queue the org that a webhook is about; nothing that it says is believed.

        Raises:
            Busy: too many orgs are queued.
        """
        code = notice.org
        if code is None:
            return
        if code not in self._queue and len(self._queue) >= MAX_QUEUED:
            raise Busy("too many orgs wait to be read from the provider", fix="send it again later")
        self._queue[code] = notice
        self._tries.pop(code, None)
        self._arrived.set()
        emit("webhook.taken", issuer=self.provisioner.issuer, org=code, kind=notice.kind)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop`; a turn that has begun may end, for LAST_TURN seconds."""
        tasks = [asyncio.create_task(work()) for work in (self._rounds, self._notices, self._rotations)]
        stopped = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            self._stopping = True
            if self.doing != "waiting":
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_TURN), self._turns:
                        pass
        finally:
            for running in (*tasks, *self._later, stopped):
                running.cancel()
            await asyncio.gather(*tasks, *self._later, stopped, return_exceptions=True)

    async def round(self) -> None:
        """Compare all orgs, applications, scopes and ages once, and change what is to change.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError, StoreUnavailable: it is incomplete.
            Conflict: more orgs are gone than may be suspended at once; everything else was done.
        """
        provisioner = self.provisioner
        clock, database = provisioner.clock, provisioner.database
        started = clock.monotonic()
        self._newer.clear()
        began = await database.call_autocommit(database.now)
        # Not in a turn: it may take long, and webhooks must not wait for it.
        listed = await sync.read_orgs(provisioner.management, self.rules, None)
        counts: Counter[str] = Counter()
        async with self._turn():
            made = await database.run(sync.planned, database, listed, self.rules, None)
            made.leave(self._newer)
            made.leave_newer(began)
            rows = await self._apply(made, self.rules)
        counts["synced"] += sum(bool(row["changes"]) for row in rows)
        counts["failed"] += len(made.failed)
        after: str | None = ""
        while after is not None:
            async with self._turn():
                results, after = await provisioner.provision_next(after, provisioner.concurrency)
            _count(counts, "provisioned", results)
        await self._change_scopes(counts)
        for result in ("synced", "provisioned", "scopes", "failed"):
            self._counted(result, counts[result])
        emit(
            "provisioning.round",
            issuer=provisioner.issuer,
            seconds=round(clock.monotonic() - started, 3),
            changed=counts.total() - counts["failed"],
            failed=counts["failed"],
            ended=round(clock.now().timestamp()),
        )
        made.check_suspended(self.rules)

    async def follow(self, notice: Notice) -> list[Provisioned]:
        """Read the org of a notice from the provider, and provision it; within a turn.

        Returns what became of its application, if it had no working credential.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError, StoreUnavailable: try again later.
            NotFound: the provider does not have a new org yet.
        """
        provisioner, code = self.provisioner, notice.org or ""
        database = provisioner.database
        # Only a round can tell whether too many orgs are gone at once.
        rules = SyncRules(self.rules.issuer, self.rules.tags, "keep")
        listed = await sync.read_orgs(provisioner.management, rules, code)
        self._newer.add(code)
        made = await database.run(sync.planned, database, listed, rules, code)
        if made.is_unknown and notice.kind == "org_created":
            raise NotFound(f"the provider has no org {code} yet", fix="it is read again in a moment")
        await self._apply(made, rules)
        if not listed:
            if self.rules.absent == "suspend":
                self._soon.set()
            return []
        results = await provisioner.provision(code)
        for result in results:
            self._counted("provisioned" if result.error is None else "failed", 1)
        return results

    async def rotate(self, until: float) -> None:
        """Begin to rotate what is old enough, and carry on all rotations, those of commands too.

        Ends when all are over, or at the time `until` of the monotonic clock; the next call continues.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError, StoreUnavailable: try again later.
        """
        provisioner, fleet = self.provisioner, self.fleet()
        clock = provisioner.clock
        if self.rotate_after:
            chosen, _ = await provisioner.database.run(fleet.candidates, self.rotate_after)
            fleet.choose(chosen)
        seconds: float | None = 0.0
        try:
            while seconds is not None and clock.monotonic() + seconds < until:
                await clock.sleep(seconds)
                async with self._turn():
                    seconds = await fleet.advance()
        finally:
            results = fleet.results.values()
            self._counted("rotated", sum(each.is_over for each in results))
            self._counted("failed", sum(each.error is not None for each in results))

    async def _apply(self, made: Plan, rules: SyncRules) -> list[SyncRow]:
        provisioner, issuers = self.provisioner, list(self.issuers)
        apply = partial(sync.apply, actor=provisioner.actor, issuers=issuers)
        return await provisioner.database.run(apply, provisioner.database, made, rules)

    async def _change_scopes(self, counts: Counter[str]) -> None:
        provisioner = self.provisioner
        after: str | None = ""
        while after is not None:
            changes, after = await provisioner.database.run(self.scopes.next, after)
            for start in range(0, len(changes), provisioner.concurrency):
                async with self._turn():
                    part = changes[start : start + provisioner.concurrency]
                    _count(counts, "scopes", await self.scopes.change_all(part))

    async def _rounds(self) -> None:
        """A round every `every`, sooner after a failure or a deletion."""
        every = self.every.total_seconds()
        while True:
            pause = min(every, ROUND_AGAIN)
            with self._reporting("provisioning"):
                try:
                    await self.round()
                except Conflict as error:
                    self._report(error)
                pause = every
            self._count_requests()
            if self.doing == "starting":
                self.doing = "idle"
            await self._sleep(pause)

    async def _rotations(self) -> None:
        """Rotate without end; a new look for old credentials every `every`."""
        clock, every = self.provisioner.clock, self.every.total_seconds()
        while True:
            until = clock.monotonic() + every
            try:
                await self.rotate(until)
            except WorkerError as error:
                until = min(until, clock.monotonic() + ROUND_AGAIN)
                self._report(error)
            except Exception as error:
                emit("loop.failed", loop="rotation", error=type(error).__name__)
            self._count_requests()
            await clock.sleep(max(until - clock.monotonic(), LOOK_AGAIN))

    async def _sleep(self, seconds: float) -> None:
        """Wait until the next round: `seconds`, or COLLECT after a deletion."""
        soon = asyncio.create_task(self._soon.wait())
        sleeping = asyncio.create_task(self.provisioner.clock.sleep(seconds))
        try:
            await asyncio.wait({soon, sleeping}, return_when=asyncio.FIRST_COMPLETED)
            if self._soon.is_set():
                await self.provisioner.clock.sleep(min(COLLECT, seconds))
                self._soon.clear()
        finally:
            soon.cancel()
            sleeping.cancel()

    async def _notices(self) -> None:
        """Follow the orgs that webhooks named, some at a time."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._queue:
                codes = list(self._queue)[: self.provisioner.concurrency]
                taken = [self._queue.pop(code) for code in codes]
                failed = taken
                with self._reporting("webhooks"):
                    async with self._turn():
                        done = await asyncio.gather(*map(self._follow, taken))
                        failed = [notice for notice, ok in zip(taken, done, strict=True) if not ok]
                self._count_requests()
                self._put_back(failed)

    async def _follow(self, notice: Notice) -> bool:
        """Whether the org could be followed."""
        with self._reporting("webhooks"), suppress(NotFound):
            return all(result.error is None for result in await self.follow(notice))
        return False

    def _put_back(self, failed: Sequence[Notice]) -> None:
        """Queue again what failed, each after a pause; what failed often is left to the next round."""
        for notice in failed:
            code = notice.org or ""
            if self._tries[code] < len(NOTICE_AGAIN):
                task = asyncio.create_task(self._queue_later(notice, NOTICE_AGAIN[self._tries[code]]))
                self._later.add(task)
                task.add_done_callback(self._later.discard)
                self._tries[code] += 1
            else:
                del self._tries[code]

    async def _queue_later(self, notice: Notice, seconds: float) -> None:
        await self.provisioner.clock.sleep(seconds)
        self._queue.setdefault(notice.org or "", notice)
        self._arrived.set()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Provision the issuer alone within the block; waits while another process does.

        Raises InstallationMismatch as `exclusive`.
        """
        database = self.provisioner.database
        async with self._turns:
            if self._stopping:
                raise asyncio.CancelledError
            while True:
                lock = exclusive(self.provisioner.ownership, self.provisioner.issuer)
                try:
                    await database.run(lock.__enter__)
                    break
                except Busy:
                    if self.doing != "waiting":
                        emit("provisioning.waiting", issuer=self.provisioner.issuer)
                    self.doing = "waiting"
                    await self.provisioner.clock.sleep(LOOK_AGAIN)
            self.doing = "working"
            try:
                yield
            finally:
                self.doing = "idle"
                await asyncio.shield(database.run(lock.__exit__, None, None, None))

    @contextmanager
    def _reporting(self, loop: str) -> Iterator[None]:
        """Report an error in the block, which then ends."""
        try:
            yield
        except WorkerError as error:
            self._report(error)
        except Exception as error:
            emit("loop.failed", loop=loop, error=type(error).__name__)

    def _report(self, error: WorkerError) -> None:
        issuer = self.provisioner.issuer
        emit("provisioning.unavailable", issuer=issuer, error=error.code, detail=error.message)

    def _counted(self, result: str, orgs: int) -> None:
        emit("provisioning.counted", issuer=self.provisioner.issuer, result=result, orgs=orgs)

    def _count_requests(self) -> None:
        """Report the management requests since the last call."""
        carried_out = Counter(self.provisioner.management.carried_out)
        for request, count in (carried_out - self._requests).items():
            emit("provisioning.requests", issuer=self.provisioner.issuer, request=request, count=count)
        self._requests = carried_out


def _count(counts: Counter[str], result: str, results: Sequence[Provisioned]) -> None:
    failed = sum(each.error is not None for each in results)
    counts[result] += len(results) - failed
    counts["failed"] += failed
