"""What definitions imply, against the slots of workers, the machine and the limits that are set."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.rows import worker_row
from tests.fakes.site import definition
from worker.diagnosis.capacity import MEMORY, SECONDS, Capacity, Machine, Measure, capacity
from worker.operations.definitions import pause_definition
from worker.operations.runs import run_now
from worker.settings.sections import ExecutionSettings

MIB = 2**20
SMALL = Machine(processors=2.0, memory=1024 * MIB)
ORG = '[[org]]\ncode = "{org}"\nissuer = "main"\nmax_concurrent_runs = {most}\n'
DEFINITION = definition("{org}", "{name}", "acme.plain", "{schedule}", overlap="{overlap}")


@pytest.fixture
def ask(database) -> Callable[..., Capacity]:
    def ask_capacity(machine: Machine = SMALL, **execution: int) -> Capacity:
        return capacity(database, ExecutionSettings(**execution), machine)

    return ask_capacity


@pytest.fixture
def nightly(apply):
    """Ten orgs, each with one definition at the same instant."""
    apply(
        "".join(
            ORG.format(org=f"org_{n}", most=10)
            + DEFINITION.format(org=f"org_{n}", name="night", schedule="0 3 * * *", overlap="skip")
            for n in range(10)
        )
    )


@pytest.fixture
def ran(database, rows):
    """As if a definition had run once, for so long and with so much memory."""

    def run(
        org: str, name: str, *, seconds: float, memory: int | None = None, handler: str = "acme.plain"
    ) -> None:
        made = run_now(database, org, name, actor="kim")
        at = rows.now()
        times = {"at": at, "started_at": at - timedelta(seconds=seconds)}
        rows.add_attempt(made["id"], **times, handler=handler, outcome="succeeded", peak_memory=memory)
        rows.set_ended(made["id"], "succeeded", None)

    return run


@pytest.fixture
def worker_up(rows):
    def start(host: str, children: int, *, ago: timedelta = timedelta()) -> None:
        now = rows.now() - ago
        slots = {"children": children, "inline": 100}
        rows.insert(worker_row(now, host=host, lease_until=now + timedelta(seconds=30), capacity=slots))

    return start


def of(found: Capacity, what: str) -> Measure:
    [measure] = [each for each in found.measures if each.what == what]
    return measure


def test_without_a_history_it_says_what_is_assumed(nightly, ask):
    found = ask(max_children=50)

    assert of(found, "children").needs == 10
    assert of(found, "children").mean == pytest.approx(10 * SECONDS / 86_400)
    assert of(found, "memory").needs == 10 * MEMORY / MIB
    assert of(found, "starts").needs == pytest.approx(10 / 60)
    assert of(found, "starts").has == pytest.approx(2 / 0.011)
    assert of(found, "children").at.strftime("%H:%M") == "03:00"
    assert all(measure.ok and measure.change is None for measure in found.measures)
    assert [line for line in found.assumed if line.startswith("acme.plain: no run is known yet")]
    assert [line for line in found.assumed if line.startswith("no worker is up")]


def test_nothing_fails_for_what_is_assumed(nightly, apply, ask):
    apply(DEFINITION.format(org="org_0", name="busy", schedule="every 2s", overlap="allow"))
    found = ask(Machine(processors=2.0, memory=16 * MIB), max_children=1)

    assert of(found, "children").mean > 1
    assert of(found, "memory").needs > of(found, "memory").has
    assert all(measure.ok for measure in found.measures)
    assert "raise execution.max_children" in of(found, "children").change
    assert of(found, "memory").change


def test_more_at_once_than_there_are_slots_wait_and_it_says_what_to_change(nightly, ran, ask):
    ran("org_0", "night", seconds=600.0, memory=100 * MIB)
    found = ask(max_children=4)

    children, memory = of(found, "children"), of(found, "memory")
    assert (children.needs, children.has, children.ok) == (10, 4, True)
    assert "runs wait for a while at " in children.change
    assert "the memory here has room for 10" in children.change
    assert "acme.plain" not in " ".join(found.assumed)
    # No more are on than there are slots.
    assert (memory.needs, memory.ok) == (400.0, True)


def test_a_history_counts_whichever_org_has_it_and_a_long_wait_is_not_ok(apply, ran, ask):
    """Of 40 orgs only the last has run, and by a variant of the handler."""
    apply(
        "".join(
            ORG.format(org=f"org_{n}", most=10)
            + DEFINITION.format(org=f"org_{n}", name="night", schedule="0 3 * * *", overlap="skip")
            for n in range(40)
        )
    )
    ran("org_39", "night", seconds=600.0, handler="acme.variant")
    found = ask(max_children=4)

    assert not [line for line in found.assumed if "no run is known" in line]
    children = of(found, "children")
    assert (children.needs, children.has, children.ok) == (40, 4, False)
    assert children.wait == timedelta(minutes=90)
    assert "runs wait for a while at " in children.change
    assert ", up to 1h30m; " in children.change
    assert of(ask(max_children=40), "children").ok


@on_either
def test_memory_that_does_not_suffice_fails_and_names_how_many_children_fit(nightly, ran, ask):
    ran("org_0", "night", seconds=600.0, memory=300 * MIB)
    memory = of(ask(max_children=10), "memory")

    assert (memory.needs, memory.has, memory.ok) == (pytest.approx(3000.0), 1024.0, False)
    assert "lower execution.max_children to 3 in all" in memory.change


def test_what_is_never_enough_fails(apply, ran, ask):
    apply(
        ORG.format(org="org_0", most=1)
        + DEFINITION.format(org="org_0", name="busy", schedule="*/5 * * * *", overlap="allow")
    )
    ran("org_0", "busy", seconds=1500.0)
    found = ask(max_children=3)

    assert of(found, "children").mean == pytest.approx(5.0)
    assert not of(found, "children").ok
    assert "never enough" in of(found, "children").change
    limited = of(found, "org org_0")
    assert (limited.needs, limited.has, limited.ok) == (pytest.approx(5.0), 1, False)
    assert "max_concurrent_runs" in limited.change


def test_a_definition_that_is_due_again_before_it_has_ended_is_named(apply, ran, ask):
    apply(
        ORG.format(org="org_0", most=10)
        + DEFINITION.format(org="org_0", name="slow", schedule="*/10 * * * *", overlap="skip")
    )
    ran("org_0", "slow", seconds=1200.0)
    slow = of(ask(), "definition org_0 slow")

    assert slow.needs == pytest.approx(2.0)
    assert "a run takes 20m and is due every 10m" in slow.change
    assert of(ask(), "children").needs == 1


def test_the_workers_that_are_up_are_what_there_is(nightly, ask, worker_up):
    worker_up("a", 3)
    worker_up("a", 3)
    worker_up("b", 3)
    worker_up("gone", 90, ago=timedelta(hours=1))
    found = ask(max_children=50)

    assert of(found, "children").has == 9
    assert of(found, "memory").has == 2048
    assert of(found, "starts").has == pytest.approx(4 / 0.011)
    assert [line for line in found.assumed if "2 machines" in line]


@pytest.mark.feature("calendars")
def test_what_a_calendar_skips_implies_nothing(nightly, apply, ask, rows):
    days = [(rows.now() + timedelta(days=days)).date() for days in range(3)]
    dates = [day.isoformat() for day in days]
    named = 'calendar = "holidays"\n'
    apply(
        f'[[calendar]]\nname = "holidays"\ndates = {dates}\n'
        + "".join(
            DEFINITION.format(org=f"org_{n}", name="night", schedule="0 3 * * *", overlap="skip") + named
            for n in range(8)
        )
    )

    assert of(ask(max_children=50), "children").needs == 2


def test_what_is_paused_implies_nothing(nightly, database, ask):
    for n in range(9):
        pause_definition(database, f"org_{n}", "night", actor="kim")

    assert of(ask(), "children").needs == 1


def test_this_machine_has_processors_and_memory():
    here = Machine.here()

    assert here.processors > 0
    assert here.memory > 64 * MIB
