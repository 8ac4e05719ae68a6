"""`./dev simulate`: run seeds, report what they violate, and repeat, shrink and tell one of them."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from tests.fakes import unsynced
from tests.fakes.issuer import jwk
from tests.simulation import batch_ablations, family_ablations, rollout_ablations  # noqa: F401 add to them
from tests.simulation import ledger as ledgers
from tests.simulation.ablations import ABLATIONS
from tests.simulation.oracle import Oracle, Watch
from tests.simulation.plan import Plan, plan_of
from tests.simulation.stage import Stage
from tests.simulation.templates import Template, made
from tests.simulation.world import World
from worker.app.features import FEATURES
from worker.kit.feature import use

# Real seconds after which a simulation is given up.
PATIENCE = 900.0
# How the objection begins if a simulation could not run.
FAILED = "the simulator failed: "
Leave = tuple[frozenset[int], frozenset[int], frozenset[int]]
NOTHING: Leave = (frozenset(), frozenset(), frozenset())


@dataclass(frozen=True)
class Variant:
    """A seed, without a part of its plan: the numbers of commands, faults and definitions; or a defence."""

    seed: int
    leave: Leave = NOTHING
    ablate: str = ""
    trace: bool = False


@dataclass
class Result:
    """What one simulation showed."""

    seed: int
    dialect: str
    digest: str = ""
    objections: list[str] = field(default_factory=list)
    runs: int = 0
    virtual: float = 0.0
    real: float = 0.0
    # Seconds of the processor that this process took; on PostgreSQL the server's are not in them.
    processor: float = 0.0
    steps: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    actions: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)


def simulate(variant: Variant, template: Template) -> Result:
    """Run one seed in this process, which must not be used for anything else."""
    began, worked, seed = time.monotonic(), time.process_time(), variant.seed
    gc.disable()  # what is collected would be unwound, at a time that is not the seed's
    unsynced.begin()
    full: Plan = plan_of(seed, template.dialect)
    plan = full.without(*variant.leave)
    result = Result(seed, template.dialect)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="simulation-") as name, ExitStack() as stack:
        folder = Path(name)
        url = stack.enter_context(template.copied(folder))
        world = World(
            seed,
            template.dialect,
            url,
            folder,
            template.tokens,
            workers=plan.workers,
            hosts=plan.hosts,
            batches=plan.has_batches,
            trace=lines if variant.trace else None,
        )
        world.has_rollout = plan.has_rollout
        if variant.ablate:
            ABLATIONS[variant.ablate].cut(stack, url)
        with world.simulated():
            database = world.open_database(world.clock)
            stage = Stage(world, plan, database)
            watch = world.watch = Watch(world)
            if plan.has_trees:
                watch.watch_trees()
            world.server.on_commit = watch.committed
            world.on_admission = watch.look
            try:
                world.run(stage.run())
            except BaseException as error:
                world.loop.failures.append("".join(traceback.format_exception(error))[-3000:])
        oracle = Oracle(world, stage)
        result.objections = oracle.judge()
        result.runs = len(oracle.rows["runs"])
    result.digest = world.loop.digest()
    result.virtual, result.steps = world.loop.time(), world.loop.steps
    for action in plan.faults:
        result.faults[action.kind] = result.faults.get(action.kind, 0) + 1
    result.actions = [str(action) for action in sorted([*plan.acts, *plan.faults], key=lambda one: one.at)]
    result.trace = lines
    result.real, result.processor = time.monotonic() - began, time.process_time() - worked
    return result


class Child:
    """A simulation in a fork of this process."""

    def __init__(self, variant: Variant, work: Callable[[], Result]) -> None:
        self.variant = variant
        self.began = time.monotonic()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.reader)
            try:
                result = work()
            except BaseException:
                failed = f"{FAILED}{traceback.format_exc()[-3000:]}"
                result = Result(variant.seed, "", objections=[failed])
            with os.fdopen(writer, "w") as pipe:
                json.dump(asdict(result), pipe)
            os._exit(0)
        os.close(writer)
        self._told = b""

    def read(self) -> Result | None:
        """What it has told, if that is all."""
        part = os.read(self.reader, 1 << 20)
        self._told += part
        if part:
            return None
        return self._end()

    def kill(self) -> Result:
        os.kill(self.pid, signal.SIGKILL)
        result = self._end()
        result.objections.append(f"given up after {PATIENCE:g} s of real time")
        return result

    def _end(self) -> Result:
        os.close(self.reader)
        _, status = os.waitpid(self.pid, 0)
        try:
            return Result(**json.loads(self._told))
        except ValueError:
            return Result(self.variant.seed, "", objections=[f"the simulation ended with status {status}"])


def run_all(
    variants: Iterator[Variant], template: Template, *, jobs: int, until: float | None = None
) -> Generator[tuple[Variant, Result], None, None]:
    """Run them, `jobs` at a time, each in its own fork, until a time of the monotonic clock."""
    running: dict[int, Child] = {}
    more = True
    try:
        while more or running:
            while more and len(running) < jobs:
                variant = next(variants, None)
                if variant is None or (until is not None and time.monotonic() >= until):
                    more = False
                    break
                child = Child(variant, partial(simulate, variant, template))
                running[child.reader] = child
            ready, _, _ = select.select(list(running), [], [], 1.0) if running else ([], [], [])
            for reader in ready:
                result = running[reader].read()
                if result is not None:
                    yield running.pop(reader).variant, result
            for reader, child in list(running.items()):
                if time.monotonic() - child.began > PATIENCE:
                    del running[reader]
                    yield child.variant, child.kill()
    finally:
        for child in running.values():
            child.kill()


def one(variant: Variant, template: Template) -> Result:
    [(_, result)] = run_all(iter([variant]), template, jobs=1)
    return result


def shrink(variant: Variant, template: Template, first: str, *, jobs: int) -> Variant:
    """Leave out what is not needed for a violation of the same kind: first halves, at last single parts."""
    plan, kind = plan_of(variant.seed, template.dialect), kind_of(first)
    sizes = (len(plan.acts), len(plan.faults), len(plan.entries))
    kept = [(place, number) for place, size in enumerate(sizes) for number in range(size)]
    size = len(kept)
    while size > 1:
        size = (size + 1) // 2
        parts = [kept[start : start + size] for start in range(0, len(kept), size)]
        while parts:
            tried, parts = parts[:jobs], parts[jobs:]
            fewer = [_without(variant, part) for part in tried]
            found = dict(run_all(iter(fewer), template, jobs=jobs))
            for number, smaller in enumerate(fewer):
                if any(kind_of(objection) == kind for objection in found[smaller].objections):
                    variant, kept = smaller, [each for each in kept if each not in tried[number]]
                    # The others were tried beside what is left out now.
                    parts = [*tried[number + 1 :], *parts]
                    break
    return variant


def _without(variant: Variant, part: Sequence[tuple[int, int]]) -> Variant:
    acts, faults, entries = (
        leave | {number for place, number in part if place == which}
        for which, leave in enumerate(variant.leave)
    )
    return replace(variant, leave=(acts, faults, entries))


def kind_of(objection: str) -> str:
    """An objection without its numbers and names."""
    return " ".join(word for word in objection.split() if word.isalpha())[:80]


def told(result: Result, *, most: int = 120) -> str:
    """The timeline of a violation, for a person: what was done, what happened to the run, in order."""
    ids = {found for objection in result.objections for found in re.findall(r"[0-9a-f-]{36}", objection)}
    lines = [f"seed {result.seed} on {result.dialect}, trace {result.digest}", *result.objections, ""]
    kept = [
        line
        for line in result.trace
        if " ACTION " in line
        or any(id_ in line for id_ in ids)
        or any(word in line for word in (" killed", " frozen", " thawed", " ended ", "lost", " END "))
    ]
    return "\n".join([*lines, *kept[-most:]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of texts must not be another one in the next process.
        command = [sys.executable, "-m", "tests.simulation.simulate", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, os.environ | {"PYTHONHASHSEED": "0"})
    if given.ledger is None and (given.report or given.fold):
        parser.error("--report and --fold need --ledger FILE")
    if given.ablate and given.ledger is not None:
        parser.error("a ledger is of seeds with all defences; leave out --ledger or --ablate")
    if given.fold:
        ledgers.fold(given.ledger)
    if given.report or given.fold:
        print(ledgers.report(given.ledger))
        return 0
    logging.disable(logging.CRITICAL)
    use(FEATURES)
    jwk()  # a key for all seeds
    with tempfile.TemporaryDirectory(prefix="simulations-") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        template = stack.enter_context(made(Path(folder) / "template", given.dialect))
        if given.ablations:
            return _ablations(given, template)
        if given.replays and (given.seed is not None or given.failing):
            return _replays(given, template)
        if given.seed is None:
            return _many(given, template)
        return _one(given, template)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev simulate", description=__doc__)
    parser.add_argument("--dialect", choices=("sqlite", "postgresql"), default="sqlite", help="the database")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds to run (default: 20)")
    parser.add_argument("--first", type=int, help="the first seed (default: a random one)")
    parser.add_argument("--seconds", type=float, help="begin no more seeds after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="seeds at a time")
    parser.add_argument("--ledger", type=Path, help="a file that keeps which seeds were run at which commit")
    parser.add_argument("--report", action="store_true", help="say what the ledger has, and run nothing")
    parser.add_argument("--fold", action="store_true", help="likewise, and keep one line for each commit")
    parser.add_argument("--seed", type=int, help="run this seed and tell what happened")
    parser.add_argument("--shrink", action="store_true", help="leave out what its violation does not need")
    parser.add_argument("--replays", type=int, default=0, help="run it so many times and compare the traces")
    parser.add_argument("--failing", type=int, default=0, help="replay so many seeds that violate something")
    parser.add_argument("--ablate", choices=sorted(ABLATIONS), default="", help="take this defence out")
    parser.add_argument("--ablations", action="store_true", help="find a seed that notices each ablation")
    return parser


def _one(given: argparse.Namespace, template: Template) -> int:
    variant = Variant(given.seed, ablate=given.ablate, trace=True)
    result = one(variant, template)
    if given.shrink and result.objections:
        variant = shrink(variant, template, result.objections[0], jobs=given.jobs)
        result = one(variant, template)
    print("\n".join(result.actions), told(result), _summary(result), sep="\n")
    return 1 if result.objections else 0


def _replays(given: argparse.Namespace, template: Template) -> int:
    """Repeat one seed, or the first ones that violate something: each has one trace."""
    bad, tried = 0, 0
    for seed in [given.seed] if given.seed is not None else _violating(given, template):
        variants = iter([Variant(seed, ablate=given.ablate)] * given.replays)
        results = [result for _, result in run_all(variants, template, jobs=given.jobs)]
        traces = sorted({result.digest for result in results})
        print(f"seed {seed}: {len(results)} replays, traces {' '.join(traces)}", flush=True)
        bad, tried = bad + (len(traces) > 1), tried + 1
    if given.seed is None:
        print(f"{tried} failing seeds on {given.dialect}, {given.replays} replays each; {bad} differ")
    return 1 if bad or not tried else 0


def _violating(given: argparse.Namespace, template: Template) -> Iterator[int]:
    """The first `failing` seeds that violate something with this defence taken out."""
    first, found = given.first or 0, 0
    for seed in range(first, first + given.seeds):
        if found < given.failing and one(Variant(seed, ablate=given.ablate), template).objections:
            found += 1
            yield seed


def _ablations(given: argparse.Namespace, template: Template) -> int:
    """For each defence the first seed that notices its absence, and nothing while it is there."""
    first, missed = given.first or 0, 0
    for name in [given.ablate] if given.ablate else list(ABLATIONS):
        ablation = ABLATIONS[name]
        if given.dialect not in ablation.where:
            continue
        began, tried = time.monotonic(), 0
        variants = (Variant(seed, ablate=name) for seed in range(first, first + given.seeds))
        results = run_all(variants, template, jobs=given.jobs)
        for tried, (_, result) in enumerate(results, 1):
            if any(objection.startswith(FAILED) for objection in result.objections):
                raise SystemExit(f"{name}: {result.objections[0]}")
            if result.objections and not one(Variant(result.seed), template).objections:
                took = time.monotonic() - began
                noticed = f"seed {result.seed}, after {tried} seeds and {took:.0f} s"
                print(f"{name}: {noticed}: {result.objections[0][:160]}")
                results.close()
                break
        else:
            missed += 1
            print(f"{name}: not noticed by {tried} seeds: {ablation.what}")
        sys.stdout.flush()
    return 1 if missed else 0


def _many(given: argparse.Namespace, template: Template) -> int:
    first = given.first if given.first is not None else int.from_bytes(os.urandom(4), "big")
    began, commit = time.monotonic(), ledgers.commit_of_code()
    until = None if given.seconds is None else began + given.seconds
    kept = ledgers.read(given.ledger).get((given.dialect, commit), ledgers.Kept())
    seeds = (seed for seed in range(first, first + given.seeds) if seed not in kept.seeds)
    variants = (Variant(seed, ablate=given.ablate) for seed in seeds)
    results: list[Result] = []
    for _, result in run_all(variants, template, jobs=given.jobs, until=until):
        results.append(result)
        print(
            _summary(result), *(f"    {shown[:400]}" for shown in result.objections[:6]), sep="\n", flush=True
        )
        if result.objections:
            print(f"    again: ./dev simulate --dialect {given.dialect} --seed {result.seed}", flush=True)
        if given.ledger is not None:
            with given.ledger.open("a") as file:
                print(_entry(given.dialect, commit, result), file=file)
    took, bad = time.monotonic() - began, sum(bool(result.objections) for result in results)
    runs, hours = sum(result.runs for result in results), sum(result.virtual for result in results) / 3600
    print(
        f"{len(results)} seeds from {first} on {given.dialect}: {runs} runs, "
        f"{hours:.1f} virtual hours in {took:.0f} s, "
        f"{60 * len(results) / max(took, 1e-9):.1f} seeds a minute, each "
        f"{sum(result.processor for result in results) / max(len(results), 1):.2f} s of a processor; "
        f"{bad} violated; each at least "
        f"{min((each.runs for each in results), default=0)} runs, "
        f"{min((each.virtual for each in results), default=0):.0f} virtual s and "
        f"{min((sum(each.faults.values()) for each in results), default=0)} faults"
    )
    return 1 if bad else 0


def _entry(dialect: str, commit: str, result: Result) -> str:
    """A line of the ledger."""
    seed = result.seed
    told = {"dialect": dialect, "commit": commit, "seeds": [[seed, seed]], "trace": result.digest}
    told |= {"violated": [seed] if result.objections else [], "runs": result.runs}
    return json.dumps(told | {"virtual": round(result.virtual), "faults": result.faults})


def _summary(result: Result) -> str:
    mark = "VIOLATED" if result.objections else "kept"
    return (
        f"seed {result.seed} {mark}: {result.runs} runs and {sum(result.faults.values())} faults in "
        f"{result.virtual:.0f} virtual s, {result.steps} steps, {result.real:.1f} s, "
        f"{result.processor:.1f} s of a processor"
    )


if __name__ == "__main__":
    sys.exit(main())
