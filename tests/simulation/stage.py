"""Carries out a plan: gives the commands of people, and lets the faults befall their targets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from tests.simulation import jobs
from tests.simulation.batch_plan import MODEL_BUDGETS
from tests.simulation.database import EPOCH
from tests.simulation.entries import END, Action, Entry
from tests.simulation.faults import Faults
from tests.simulation.loop import SimulatedProcess
from tests.simulation.plan import (
    BUDGET,
    LATE_SPENDERS,
    LIMIT,
    LIMITED_ORG,
    LIMITS,
    LIVENESS,
    LIVENESS_BY_ONE,
    PAGES,
    RAISES,
    ROLLED,
    ROLLOUT,
    Plan,
)
from tests.simulation.product import Product
from tests.simulation.queries import (
    late_definitions,
    live_by_definition,
    newest_of,
    newest_parent,
    open_batches,
    open_waits,
    unfinished,
    waiting_of,
    with_lease,
)
from tests.simulation.service import LIMITED
from tests.simulation.world import ORGS, World, app_of
from worker.errors import StoreUnavailable, WorkerError
from worker.features.rollouts import operations as rollouts
from worker.model.definitions.budgets import MONEY
from worker.model.definitions.file import parse_file
from worker.model.money import NANO
from worker.operations import (
    answers,
    apply,
    approvals,
    backfill,
    budgets,
    credentials,
    definitions,
    orgs,
    runs,
)
from worker.store.database import Database
from worker.tokens.sealing import KeyRing


def _of_models(part: float) -> Iterator[tuple[str, str, int | str]]:
    """Org, meter, and a part of the limit of each budget of what models use."""
    for (org, meter), limit in MODEL_BUDGETS.items():
        amount = int(limit * part)
        yield org, meter, f"{amount / NANO:.9f} USD" if meter == MONEY else amount


# The runs of each simulation at least, and for how many seconds more it goes on for them.
RUNS, LONGER = 100, 60


class Stage(Faults):
    """Carries out a plan in a world."""

    def __init__(self, world: World, plan: Plan, database: Database) -> None:
        self.world = world
        self.plan = plan
        self.database = database
        self.ring = KeyRing.load(world.settings.keyring_file)
        self.process = SimulatedProcess(world.loop, "people")
        # What a person did to whom; the oracle expects its effects.
        self.done: list[tuple[float, Action, object]] = []
        self.generations = 0
        # By run the first answer that was accepted.
        self.answered: dict[str, str] = {}
        # Machines that lived at the end without a lease.
        self.forgotten: list[str] = []
        self.product = Product(world)
        # The definitions that were late as the load ended, for which scheduled time, and since when.
        self.late: list[tuple[str, datetime, datetime]] = []

    async def do(self, work: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        """A person's command; tried again while the database does not answer. None if it was refused."""
        loop = self.world.loop
        while True:
            context = self.process.context.copy()
            call: Callable[[], Any] = lambda: work(self.database, *args, **keys)  # noqa: E731
            try:
                return await context.run(loop.run_in_executor, None, call)
            except StoreUnavailable:
                await asyncio.sleep(1.0)
            except WorkerError:
                return None

    async def run(self) -> None:
        with self.product.watched():
            await self._run()

    async def _run(self) -> None:
        world, loop = self.world, self.world.loop
        for machine in world.machines.values():
            machine.start()
        await asyncio.sleep(4)
        await self._apply(enabled=True)
        actions = sorted([*self.plan.acts, *self.plan.faults], key=lambda action: action.at)
        tasks = []
        for action in actions:
            await asyncio.sleep(max(0.0, action.at - loop.time()))
            loop.note(None, f"ACTION {action}")
            strike = getattr(self, f"_{action.kind.replace(' ', '_')}")
            found = strike(action)
            if found is not None:
                tasks.append(loop.create_task(self._carry_out(action, found)))
        await asyncio.sleep(max(0.0, END - loop.time()))
        await self._heal()
        # Where orgs were paused for long, fewer have come so far.
        for _ in range(LONGER):
            if world.watch.runs() < RUNS:
                await asyncio.sleep(1)
        for task in tasks:
            await task
        self.late = await self.do(late_definitions)
        await self._apply(enabled=False)
        loop.note(None, "END of the load")
        await self._until_done()
        world.still_waiting = world.brokers.waiting()
        world.stop_restarts()
        for machine in world.machines.values():
            machine.stop()
        await asyncio.sleep(12)

    async def _carry_out(self, action: Action, work: Awaitable[object]) -> None:
        self.done.append((self.world.loop.time(), action, await work))

    async def _until_done(self) -> None:
        patience = LIVENESS_BY_ONE if self.plan.has_batches else LIVENESS
        # When a clock that was an hour behind is set right, everything it held back becomes due at once.
        until = self.world.loop.time() + max(patience, LIVENESS / 2 + await self._backlog())
        number = 0
        while self.world.loop.time() < until:
            await asyncio.sleep(3)
            number += 1
            if number % 3 == 0:
                await self._answer(Action(self.world.loop.time(), "answer"))
            if await self.do(unfinished) or await self._without_lease():
                continue
            if not (self.plan.has_batches and await self.do(open_batches)):
                return

    async def _backlog(self) -> float:
        """How many seconds the org with a limit needs for the runs that it has left."""
        live = await self.do(live_by_definition, f"org_{LIMITED_ORG}")
        lasts = {e.name: e.params.get("seconds", 0) for e in self.plan.entries if e.org == LIMITED_ORG}
        return sum(count * lasts[name] for name, count in live.items()) / LIMIT

    async def _without_lease(self) -> list[str]:
        """Workers and hosts that live and have no lease, so that they get no runs."""
        started: dict[str, str] = {}
        for _, process, name, fields in self.world.emitted:
            if name in ("worker.started", "host.started"):
                started[process.partition("/")[0]] = fields["worker"]
        leased = await self.do(with_lease)
        living = [name for name, machine in self.world.machines.items() if machine.up]
        self.forgotten = [name for name in living if started.get(name) not in leased]
        return self.forgotten

    async def _heal(self) -> None:
        world = self.world
        self.product.stop()
        world.net.armed.clear()
        for machine in world.machines.values():
            machine.skew.ahead = machine.skew.drift = 0.0
            for process in (machine.process, machine.broker and machine.broker.process):
                if process is not None and process.frozen:
                    process.thaw()
        for number in range(ORGS):
            await self.do(orgs.set_org_state, f"org_{number}", "active", actor="people")
        for entry in self.plan.entries:
            await self.do(definitions.resume_definition, f"org_{entry.org}", entry.name, actor="people")
        # Runs that want to spend as the budget is raised for good.
        for _ in range(LATE_SPENDERS):
            await self.do(runs.run_now, "org_1", "pays", actor="people")
        await asyncio.sleep(2 * world.loop.choices.random())
        await self._raise_by(100_000)
        if self.plan.has_batches:
            await self._raise_tokens(Action(0, "", size=1000))

    # what people do

    async def _apply(self, *, enabled: bool) -> None:
        applied = await self.do(self._apply_text, self._file(enabled=enabled))
        assert applied is not None, "the file of the simulation was refused"

    def _file(self, *, enabled: bool) -> str:
        text_ = "".join(
            f'[[org]]\ncode = "org_{number}"\nissuer = "main"\n'
            f"max_concurrent_runs = {LIMIT if number == LIMITED_ORG else 20}\n"
            for number in range(ORGS)
        )
        text_ += "".join(entry.toml(enabled=enabled) for entry in self.plan.entries)
        text_ += (
            f'[[budget]]\norg = "org_1"\nmeter = "calls"\nlimit = {BUDGET}\nper = "day"\nat_limit = "wait"\n'
        )
        if self.plan.has_trees:
            text_ += "".join(
                f'[[budget]]\norg = "{org}"\nmeter = "{jobs.PAGES}"\nlimit = {limit}\nper = "run"\n'
                'at_limit = "fail"\n'
                for org, limit in PAGES.items()
            )
        if self.plan.has_rollout:
            text_ += ROLLOUT
        if self.plan.has_batches:
            text_ += "".join(
                f'[[budget]]\n{"orgs" if org == "all" else "org"} = "{org}"\nmeter = "{meter}"\n'
                f'limit = {json.dumps(amount)}\nper = "day"\n'
                for org, meter, amount in _of_models(1.0)
            )
        if any(entry.name == "calls" for entry in self.plan.entries):
            text_ += "".join(
                f'[[limit]]\norigin = "{LIMITED}"\nper = "{per}"\nrate = "{60 * limit["rate"]:g}/m"\n'
                f"burst = {limit['burst']}\nconcurrent = {limit['concurrent']}\n"
                for per, limit in LIMITS.items()
            )
        return text_

    @staticmethod
    def _apply_text(database: Database, text_: str, *, prune: bool = False) -> object:
        return apply.apply(
            database,
            parse_file(text_),
            actor="people",
            prune=prune,
            allow_unknown_handlers=True,
            inline=[jobs.DISTRIBUTION],
        )

    def _named(self, action: Action) -> tuple[str, str]:
        org, _, name = action.target.partition("/")
        return f"org_{org}", name

    def _entry(self, action: Action) -> Entry:
        return next(e for e in self.plan.entries if f"{e.org}/{e.name}" == action.target)

    async def _run_now(self, action: Action) -> object:
        key = f"key-{action.at:.3f}"
        made = [
            await self.do(runs.run_now, *self._named(action), actor="people", request_key=key)
            for _ in range(2)
        ]
        return {run["id"] for run in made if run is not None}

    async def _cancel(self, action: Action) -> object:
        run = await self.do(newest_of, *self._named(action), False)
        return run if run and await self.do(runs.cancel, run, actor="people") else None

    async def _bulk_cancel(self, action: Action) -> object:
        org = self._named(action)[0]
        ids = await self.do(waiting_of, org)
        return [run for run in ids or () if await self.do(runs.cancel, run, actor="people", org=org)]

    async def _retry(self, action: Action) -> object:
        run = await self.do(newest_of, *self._named(action), True)
        return await self.do(runs.retry, run, actor="people", again=True) if run else None

    async def _cancel_tree(self, action: Action) -> object:
        run = await self.do(newest_parent, *self._named(action))
        return run if run and await self.do(runs.cancel, run, actor="people") else None

    async def _retry_tree(self, action: Action) -> object:
        """Those of its children that did not succeed: in their places, or by a run that continues it."""
        run = await self.do(newest_parent, *self._named(action))
        return await self.do(runs.retry_children, run, actor="people", again=True) if run else None

    async def _continue_tree(self, action: Action) -> object:
        run = await self.do(newest_parent, *self._named(action))
        return await self.do(runs.retry, run, actor="people", from_checkpoint=True) if run else None

    async def _advance_rollout(self, action: Action) -> object:
        return await self.do(rollouts.advance, ROLLED, anyway=True, actor="people")

    async def _halt_rollout(self, action: Action) -> object:
        return await self._move_rollout(action)

    _resume_rollout = _undo_rollout = _finish_rollout = _halt_rollout

    async def _move_rollout(self, action: Action) -> object:
        verb = action.kind.partition(" ")[0]
        return await self.do(rollouts.move, ROLLED, verb, reason="to see", actor="people")

    async def _approve(self, action: Action) -> object:
        """What the hosts declare."""
        for row in await self.do(approvals.list_approvals) or ():
            step = approvals.step_of(row).subject
            await self.do(approvals.approve, step["pool"], step["handler"], step["digest"], actor="people")
        return None

    async def _close(self, action: Action) -> object:
        """The file of its org has every other definition."""
        org, name = self._named(action)
        others = [e for e in self.plan.entries if f"org_{e.org}" == org and e.name != name]
        text_ = f'[[org]]\ncode = "{org}"\nissuer = "main"\nmax_concurrent_runs = 20\n'
        text_ += "".join(entry.toml(enabled=True) for entry in others)
        return await self.do(self._apply_text, text_, prune=True)

    def _product_commit(self, action: Action) -> None:
        self.product.transact(action, commits=True)

    def _product_rollback(self, action: Action) -> None:
        self.product.transact(action, commits=False)

    def _kill_product(self, action: Action) -> None:
        self.product.kill()

    async def _pause(self, action: Action) -> object:
        await self.do(definitions.pause_definition, *self._named(action), actor="people")
        await asyncio.sleep(action.size)
        return await self.do(definitions.resume_definition, *self._named(action), actor="people")

    async def _edit(self, action: Action) -> object:
        entry = self._entry(action)
        changed = entry.toml(enabled=True, extra=f"priority = {int(action.size)}\n")
        return await self.do(self._apply_text, changed)

    async def _suspend(self, action: Action) -> object:
        return await self._org_state(action, "suspended")

    async def _pause_org(self, action: Action) -> object:
        return await self._org_state(action, "paused")

    async def _org_state(self, action: Action, state: Any) -> object:
        org = self._named(action)[0]
        await self.do(orgs.set_org_state, org, state, actor="people")
        await asyncio.sleep(action.size)
        return await self.do(orgs.set_org_state, org, "active", actor="people")

    async def _backfill(self, action: Action) -> object:
        now = EPOCH + timedelta(seconds=int(self.world.loop.time()))
        return await self.do(
            backfill.backfill,
            *self._named(action),
            start=now - timedelta(seconds=40),
            until=now - timedelta(seconds=2),
            limit=2,
            actor="people",
        )

    async def _raise(self, action: Action) -> object:
        for _ in range(RAISES):
            await self._raise_by(int(action.size / 4) + 1)
            await asyncio.sleep(1.0)
        return None

    async def _raise_by(self, amount: int) -> None:
        await self.do(budgets.raise_budget, "org_1", "calls", by=amount, per="day", actor="people")

    async def _raise_tokens(self, action: Action) -> object:
        """The budget of what models use that is reached."""
        org, meter, amount = next(_of_models(action.size / 20))
        return await self.do(budgets.raise_budget, org, meter, by=amount, per="day", actor="people")

    async def _answer(self, action: Action) -> object:
        for run, name, occurrence in await self.do(open_waits) or ():
            for choice in ("yes", "no") if action.size > 0.5 else ("yes",):
                given = await self.do(
                    answers.answer, run, name, choice, occurrence=occurrence, actor="people"
                )
                if given is not None:
                    self.answered.setdefault(run, choice)
        return None

    def _flag(self, action: Action) -> None:
        app = self.world.issuer.apps.get(f"client-{self._named(action)[0][-1]}")
        if app is not None:
            app.flags = {jobs.FLAG: {"t": "b", "v": action.size > 10}}

    async def _rotate(self, action: Action) -> object:
        """A new secret of the same application; the old one stops after some seconds."""
        org = self._named(action)[0]
        app = self.world.issuer.apps[app_of(int(org[-1])).client_id]
        self.generations += 1
        app.secret = f"secret-{org}-{self.generations}"
        return await self.do(
            credentials.add_credential,
            self.ring,
            org,
            client_id=app.client_id,
            secret=app.secret,
            actor="people",
        )
