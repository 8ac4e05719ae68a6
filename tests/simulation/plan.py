"""What a seed does to an installation: its definitions, what people do meanwhile, and what goes wrong.

All of it is chosen before the simulation begins, from another stream of chance than what runs when. So an
action can be left out of a seed, and the others stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tests.simulation import jobs
from tests.simulation.batch_plan import COMPLETES, acts_on_batches, asking_entries, faults_of_batches
from tests.simulation.entries import ALL, END, LAST_FAULT, LENGTHS, Action, Entry
from tests.simulation.service import FREE, LIMITED
from tests.simulation.world import LEASE

# Runs that the schedules of a seed make together, some more than a seed must have.
RUNS = 104
# Seconds after the end in which everything must be done that can be.
LIVENESS = 240.0
# The same with batches, where a budget may have room for one request at a time, so that runs wait for others.
LIVENESS_BY_ONE = 480.0
# An org that may have no more runs at a time.
LIMITED_ORG, LIMIT = 4, 2
BUDGET = 20
# Where a process is struck: as it sends a call or as the answer arrives, any call or that of a handler.
POINTS = ("sent", "done", "Save", "Save", "StoreStep", "StoreStep", "CountSpend", "OpenWait")
# Of so many seeds one has runs that call services, runs with children, a product that starts runs, a
# rollout, or batches.
CALLING, TREES, PRODUCT, ROLLOUTS, BATCHES = 4, 2, 2, 3, 3
# What an org may spend of `jobs.PAGES` in a run with all below it.
PAGES = {"org_1": 9, "org_2": 3, "org_4": 3}
# Seconds between two times at which they do so, all at once.
CALLS_EVERY = 100
# How often a person who raises a budget does so, each second, and by how much.
RAISES = 12
# Runs that spend of a budget as it is raised for the last time.
LATE_SPENDERS = 3
# Handlers whose runs start others, and definitions most of which seeds with those leave out.
PARENTS = ("sim.tree", "sim.ended", "sim.mapped", "sim.leaves", "sim.keeps")
SPARED = ("acts", "long", "cron", "inline", "retries", "limited", "asks")
# How a product's transaction ends, and the seconds that one is open.
COMMITS = ("commit", "commit", "commit", "rollback")
OPEN = (0.0, 0.0, 0.3, 3.0, 20.0)


# Of the limited service. Its burst is large beside its rate, so that what is sent besides shows.
LIMITS = {
    "org": {"rate": 0.5, "burst": 5, "concurrent": 3},
    "all": {"rate": 1.0, "burst": 8, "concurrent": 5},
}


# Of the definitions of all orgs with this name.
ROLLED = "rolled"
ROLLOUT = f"""\
[[rollout]]
name = "{ROLLED}"
definitions = "{ROLLED}"
from = "sim.rolled"
to = "sim.rolled_2"
steps = ["30%", "60%", "100%"]
"""


@dataclass(frozen=True)
class Plan:
    """All that a seed does."""

    workers: int
    hosts: int
    entries: tuple[Entry, ...]
    acts: tuple[Action, ...]
    faults: tuple[Action, ...]

    @property
    def has_trees(self) -> bool:
        return any(entry.handler in PARENTS for entry in self.entries)

    @property
    def has_batches(self) -> bool:
        return any(entry.handler == COMPLETES for entry in self.entries)

    @property
    def has_rollout(self) -> bool:
        return any(entry.name == ROLLED for entry in self.entries)

    def without(self, acts: frozenset[int], faults: frozenset[int], entries: frozenset[int]) -> Plan:
        """Without these, and without what people do to definitions that are left out."""
        left = {f"{one.org}/{one.name}" for number, one in enumerate(self.entries) if number in entries}
        return Plan(
            self.workers,
            self.hosts,
            tuple(one for number, one in enumerate(self.entries) if number not in entries),
            tuple(
                one for number, one in enumerate(self.acts) if number not in acts and one.target not in left
            ),
            tuple(one for number, one in enumerate(self.faults) if number not in faults),
        )


def plan_of(seed: int, dialect: str) -> Plan:
    chance = Random(f"plan {seed}")
    on_file = dialect == "sqlite"
    workers = 1 if on_file else chance.choice((3, 3, 3, 3, 4, 5))
    hosts = chance.choice((0, 0, 0, 1, 1, 2))
    entries = _entries(chance, hosts)
    faults = list(_faults(chance, on_file, workers, hosts))
    trees, calling, product = (Random(f"{name} {seed}") for name in ("trees", "calls", "product"))
    more: list[Action] = []
    if not trees.randrange(TREES):
        grown = _trees(trees, hosts)
        # In place of others: a seed has some hundred runs.
        left = trees.sample(SPARED, len(SPARED) - 3)
        entries = tuple(entry for entry in entries if entry.name not in left) + grown
        more += _acts_on_trees(trees, grown, hosts)
        faults += _faults_of_trees(trees, workers, hosts)
    batches, asking = Random(f"batches {seed}"), tuple[Entry, ...]()
    if not batches.randrange(BATCHES):
        asking = asking_entries(batches)
        left = batches.sample(SPARED, 3)
        entries = tuple(entry for entry in entries if entry.name not in left)
    more += _acts(chance, entries)
    if not calling.randrange(CALLING):
        entries += _calls(calling, hosts)
        faults += _faults_of_calls(calling, workers, hosts)
    if not on_file and not product.randrange(PRODUCT):
        entries += _for_product()
        more += _product(product, entries)
        faults += [Action(product.uniform(15, LAST_FAULT), "kill product") for _ in range(2)]
    rollouts = Random(f"rollouts {seed}")
    if not rollouts.randrange(ROLLOUTS):
        entries += _rolled(rollouts)
        more += _moves(rollouts)
    if asking:
        entries += asking
        more += acts_on_batches(batches, asking)
        faults += faults_of_batches(batches, workers, asking)
    entries = (*entries, _filling(entries))
    acts, faults = (sorted(actions, key=lambda one: one.at) for actions in (more, faults))
    return Plan(workers, hosts, entries, tuple(acts), tuple(faults))


def _entries(chance: Random, hosts: int) -> tuple[Entry, ...]:
    misfire = chance.choice(("once", "skip", "all"))
    entries = [
        Entry(0, "saves", "sim.saves", chance.choice((45, 60)),
              params={"steps": chance.randint(3, 9), "rest": 15}, done_within=20),
        Entry(1, "pays", "sim.pays", chance.choice((60, 75)),
              params={"steps": chance.randint(2, 3), "pause": chance.choice((0.2, 4))}),
        Entry(2, "counts", "sim.counts", chance.choice((25, 35)),
              keys=f'overlap = "skip"\nmisfire = "{misfire}"\n', done_within=15),
        Entry(2, "retries", "sim.retries", chance.choice((80, 100))),
        Entry(3, "asks", "sim.asks", 80),
        Entry(3, "fails", "sim.fails", 120, ends=("failed",), done_within=10),
        Entry(3, "versioned", "sim.versioned", 45,
              keys='overlap = "queue_one"\nmisfire = "once"\n'
              f'variants = [{{ flag = "{jobs.FLAG}", equals = true, handler = "sim.versioned_2" }}]\n'),
        Entry(4, "acts", "sim.acts", chance.choice((18, 22)), params={"seconds": chance.randint(15, 30)}),
        Entry(2, "long", "sim.acts", 45, params={"seconds": chance.randint(45, 55)}),
        Entry(4, "cron", "sim.note", 60, schedule="* * * * *"),
        Entry(1, "limited", "sim.acts", 25, params={"seconds": 14},
              keys=f"{ALL}max_concurrent = 1\n"),
        Entry(0, "inline", "sim.note", 37, keys=f'{ALL}isolation = "inline"\n'),
    ]  # fmt: skip
    if hosts:
        hosted = [
            Entry(1, "hosted", "sim.saves", 30, params={"steps": 4, "rest": 15}, pool="private"),
            Entry(2, "hosted-pays", "sim.pays", 35, params={"steps": 2, "pause": 0.2}, pool="private"),
            Entry(4, "hosted-acts", "sim.acts", 28, params={"seconds": 4}, pool="private"),
        ]
        entries += chance.sample(hosted, 2)
    return tuple(entries)


def _filling(entries: tuple[Entry, ...]) -> Entry:
    """Cheap runs, so many that a seed has `RUNS` together."""
    made = sum(END // entry.period * entry.size for entry in entries)
    period = max(5, min(50, int(END / max(RUNS - made, 1.0))))
    return Entry(0, "note", "sim.note", period, done_within=15)


def _calls(chance: Random, hosts: int) -> tuple[Entry, ...]:
    params = {"lanes": chance.choice((2, 3)), "turns": 4, "rest": chance.choice((0.3, 1.0))}
    found = [
        Entry(org, name, "sim.calls", CALLS_EVERY, params=params)
        for org, name in ((0, "calls"), (1, "calls"), (1, "more-calls"))  # of org 1 by two workers at once
    ]
    if hosts:
        found.append(Entry(1, "hosted-calls", "sim.calls", CALLS_EVERY, params=params, pool="private"))
    return tuple(found)


def _trees(chance: Random, hosts: int) -> tuple[Entry, ...]:
    seconds = chance.choice((0.2, 2.5))
    alone = f"{ALL}max_concurrent = 1\n"
    found = [
        Entry(1, "tree", "sim.tree", 100, params={"leaves": 4, "seconds": seconds}, size=8,
              keys=chance.choice((ALL, alone))),
        Entry(2, "ended", "sim.ended", 95, params={"leaves": 4, "seconds": seconds}, size=5),
        Entry(4, "mapped", "sim.mapped", 105, params={"leaves": 5, "seconds": seconds}, size=6,
              keys=chance.choice((ALL, f'{ALL}isolation = "inline"\n'))),
        Entry(0, "leaves", chance.choice(("sim.leaves", "sim.keeps")), 115, ends=("failed",),
              keys=alone, params={"leaves": 3, "seconds": 3}, size=4),
    ]  # fmt: skip
    if hosts:
        found.append(Entry(1, "hosted-tree", "sim.tree", 130, params={"leaves": 1, "seconds": 0.2}, size=5,
                           pool="private"))  # fmt: skip
    return tuple(chance.sample(found, 3))


def _acts_on_trees(chance: Random, trees: tuple[Entry, ...], hosts: int) -> list[Action]:
    found = [Action(at, "approve") for at in (8.0, 16.0) if hosts]
    for kind in chance.choices(("cancel tree", "retry tree", "continue tree"), weights=(2, 1, 1), k=3):
        entry = chance.choice(trees)
        # Just after it began, or when it has ended.
        late = chance.uniform(1, 12) if kind == "cancel tree" else chance.uniform(10, 50)
        at = entry.period * chance.randint(1, 2) + late
        found.append(Action(min(at, LAST_FAULT), kind, f"{entry.org}/{entry.name}"))
    return found


def _faults_of_trees(chance: Random, workers: int, hosts: int) -> list[Action]:
    """What befalls workers and hosts just as a run stores children, or reads them."""
    who = [f"w{number}" for number in range(1, workers + 1)]
    of_hosts = [f"h{number}" for number in range(1, hosts + 1)]
    found = []
    for _ in range(2):
        target, kind = chance.choice([*who, *of_hosts]), chance.choice(("kill at", "freeze at"))
        where = chance.choice(("StartChildren", "StartChildren", "ReadEnded", "ReadChildren", "OpenWait"))
        size = chance.choice(LENGTHS[2:]) * LEASE if "freeze" in kind else 0.0
        found.append(Action(chance.uniform(15, LAST_FAULT), kind, target, size, where))
    return found


def _rolled(chance: Random) -> tuple[Entry, ...]:
    """A definition of several orgs, whose runs have two attempts."""
    period, params = chance.choice((22, 28)), {"rest": chance.choice((1, 12))}
    return tuple(Entry(org, ROLLED, "sim.rolled", period, params=params) for org in range(4))


def _moves(chance: Random) -> list[Action]:
    """What people do to a rollout: it advances, is halted and goes on, and may end."""
    kinds = ["advance", "advance", "halt", "resume"]
    kinds += chance.choices(("advance", "halt", "resume"), weights=(1, 3, 2), k=3)
    kinds += chance.choice((["halt"], ["undo"], ["finish"], []))
    times = sorted(chance.uniform(8, LAST_FAULT) for _ in kinds)
    return [Action(at, f"{kind} rollout") for at, kind in zip(times, kinds, strict=True)]


def _for_product() -> tuple[Entry, ...]:
    """Definitions that a product starts, one of which is closed meanwhile."""
    return (
        Entry(0, "started", "sim.started", 130, params={"number": 0}),
        Entry(3, "closing", "sim.started", 130, params={"number": 0}),
    )


def _product(chance: Random, entries: tuple[Entry, ...]) -> list[Action]:
    """A product's transactions, each with some starts of these definitions, whose keys come again."""
    names = ["0/started", "3/closing", *chance.sample([f"{one.org}/{one.name}" for one in entries], 2)]
    found = [Action(chance.uniform(60, LAST_FAULT), "close", "3/closing")]
    since = [chance.uniform(10, LAST_FAULT) for _ in range(4)]
    for number in range(10):
        # Some at once, for the same definitions.
        at = chance.choice(since) + chance.uniform(0, 2)
        starts = {
            (chance.choice(names), f"key-{chance.randrange(6)}"): chance.choice(("right", "right", "wrong"))
            for _ in range(chance.randint(1, 3))
        }
        # Keys in order, as a product must that does not want deadlocks.
        said = "; ".join(f"{name} {key} {what}" for (name, key), what in sorted(starts.items()))
        found.append(Action(at, f"product {chance.choice(COMMITS)}", said, chance.choice(OPEN), str(number)))
    return found


def _acts(chance: Random, entries: tuple[Entry, ...]) -> list[Action]:
    kinds = (
        *("run now", "run now", "cancel", "retry", "pause", "edit", "suspend", "pause org"),
        *("backfill", "raise", "bulk cancel", "flag", "rotate"),
    )
    found = []
    for _ in range(chance.randint(6, 14)):
        kind = chance.choice(kinds)
        entry = chance.choice(entries)
        at = chance.uniform(15, LAST_FAULT)
        found.append(Action(at, kind, f"{entry.org}/{entry.name}", chance.uniform(2, 20)))
    # A person answers what is asked, now and then twice.
    found += [Action(at, "answer", size=chance.random()) for at in range(20, int(END), 12)]
    return found


def _faults(chance: Random, on_file: bool, workers: int, hosts: int) -> tuple[Action, ...]:
    who = [f"w{number}" for number in range(1, workers + 1)]
    of_hosts = [f"h{number}" for number in range(1, hosts + 1)]
    kinds: list[str] = [
        *(
            "kill",
            "kill at",
            "kill at",
            "freeze",
            "freeze at",
            "freeze at",
            "freeze at",
            "kill run",
            "kill run",
            "kill zygote",
            "drain",
        ),
        *("cut issuer", "lose answer", "lose answer", "slow", "clock", "drift", "wrong token"),
        *("late admission", "lose admission"),
    ]
    if not on_file:
        kinds += ["cut database", "cut database", "outage", "outage"]
    if hosts:
        kinds += ["kill host", "freeze host", "freeze host at", "cut host", "cut host", "lose host answer"]
        kinds += ["freeze worker of host at"] * 2
    found = []
    for _ in range(chance.randint(4, 12)):
        kind, at = chance.choice(kinds), chance.uniform(15, LAST_FAULT)
        target = chance.choice(of_hosts if "host" in kind else who)
        where = chance.choice(POINTS) if kind.endswith(" at") else ""
        found.append(Action(at, kind, target, _size(kind, chance), where))
    return tuple(sorted(found, key=lambda fault: fault.at))


def _faults_of_calls(chance: Random, workers: int, hosts: int) -> list[Action]:
    """What befalls brokers and services while runs call them."""
    who = [f"w{number}" for number in range(1, workers + 1)]
    who += [f"h{number}" for number in range(1, hosts + 1)]
    kinds = (
        *("throttle", "throttle", "kill broker", "freeze broker"),
        *("freeze broker at", "freeze broker at", "freeze"),
    )
    found = []
    for _ in range(chance.randint(2, 4)):
        kind, target = chance.choice(kinds), chance.choice(who)
        at = CALLS_EVERY * chance.randint(1, 2) + chance.uniform(0, 15)
        size = chance.choice(LENGTHS) * LEASE
        where = "AskShare" if kind == "freeze broker at" else ""
        if kind == "throttle":
            target, size = chance.choice(("0", "1", "1")), chance.choice((2.0, 6.0, 15.0))
            where = chance.choice((LIMITED, FREE))
        found.append(Action(at, kind, target, size, where))
    return found


def _size(kind: str, chance: Random) -> float:
    match kind:
        case "freeze" | "freeze host" | "cut database" | "cut host" | "outage":
            return chance.choice(LENGTHS) * LEASE
        case "freeze at" | "freeze host at":
            return chance.choice(LENGTHS[2:]) * LEASE
        case "freeze worker of host at":
            return chance.choice(LENGTHS[1:3]) * LEASE
        case "clock":
            return chance.choice((-3600.0, -30.0, -5.0, 5.0, 30.0, 90.0))
        case "drift":
            return chance.choice((-0.01, 0.01, 0.1))
        case "cut issuer" | "slow" | "late admission":
            return chance.uniform(3, 25)
        case "wrong token":
            return chance.uniform(20, 60)
        case "kill run":
            return chance.random()
    return 0.0
