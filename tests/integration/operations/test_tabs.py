"""The counts of tabs, against an oracle that reads every row; and that an org counts only its own."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import insert, update

from tests.conftest import on_either
from tests.fakes.site import definition, org_entry
from tests.integration.operations.conftest import whole_hour
from worker.ids import ALL_ORGS
from worker.model.orgs import OrgState
from worker.operations.runs import run_now
from worker.store import roles, tables
from worker.store.lists import DEFINITIONS, MAX_LIMIT, ORGS, TROUBLES, Page, tabs
from worker.store.lists import read as read_module
from worker.store.lists.read import page_of, read
from worker.store.lists.tabs import LONG_WAIT, OVERDUE, BoundedCount

pytestmark = on_either
ORG_STATES: tuple[OrgState, ...] = ("active", "paused", "suspended")
CODES = [f"org_{number}" for number in range(6)]
NAMES = [f"d{number}" for number in range(4)]


class World:
    """Orgs with definitions and runs in every state, drawn at random."""

    def __init__(self, database, rows):
        self.database, self.rows = database, rows
        self.now = rows.now()
        self.org_ids = {row["code"]: row["id"] for row in rows.orgs}

    def set(self, table, id_, key="id", **values):
        self.rows.insert(update(table).where(table.c[key] == id_).values(**values))

    def draw(self, dice):
        late, soon = self.now - LONG_WAIT - timedelta(1), self.now + timedelta(hours=1)
        codes = {id_: code for code, id_ in self.org_ids.items()}
        for row in self.rows.definitions:
            # A closed one has neither scheduled times nor unfinished runs.
            is_closed = dice.random() < 0.2
            due = None if is_closed else dice.choice((late, self.now - OVERDUE / 2, soon, None))
            self.set(tables.schedule, row["id"], "definition_id", next_scheduled_for=due, next_fire_at=due)
            for _ in range(0 if is_closed else dice.randrange(4)):
                self.run(dice, codes[row["org_id"]], row["name"], dice.choice((late, soon)))
            about = {"paused_at": dice.choice((None, None, self.now)), "enabled": dice.random() < 0.7}
            closed_at = self.now if is_closed else None
            self.set(tables.definitions, row["id"], **about, closed_at=closed_at)
        for row in self.rows.definitions:
            if row["closed_at"] is None and row["name"] in NAMES[:2] and row["org_id"] < max(codes):
                of = {"definition_id": row["id"], "org_id": row["org_id"]}
                at = {"scheduled_for": late, "late_at": self.now}
                self.rows.insert(insert(tables.late_definitions).values(**of, **at))
        for number, code in enumerate(CODES[:3]):
            self.set(tables.orgs, self.org_ids[code], state=ORG_STATES[number])
        for back in range(-1, 26):
            for state in tables.FINAL_STATES:
                self.ended(dice.choice(CODES), state, dice.randrange(100), whole_hour(self.now, ago=back))

    def run(self, dice, code, name, available_at):
        run = run_now(self.database, code, name, actor="tester")["id"]
        what = dice.choice(("waiting", "held", "parked", "running", "failed", "refused", "succeeded"))
        if what in tables.FINAL_STATES:
            self.rows.set_ended(run, what, None if what == "succeeded" else "error")
            return
        if what == "running":
            self.rows.set_running(run)
            return
        row = next(each for each in self.rows.live_runs if each["id"] == run)
        is_held = any(
            each["state"] == "held" and each["definition_id"] == row["definition_id"]
            for each in self.rows.live_runs
        )
        state = "waiting" if what == "held" and is_held else what
        self.set(tables.live_runs, run, state=state, reason="due", available_at=available_at)
        if state == "parked":
            wait = {"run_id": run, "name": "sleep", "org_id": row["org_id"], "kind": "sleep"}
            for occurrence in (1, 2):
                self.rows.insert(
                    insert(tables.waits).values(**wait, occurrence=occurrence, opened_at=self.now)
                )

    def ended(self, code, state, runs, hour):
        key = {"hour": hour, "org_id": self.org_ids[code], "state": state}
        self.rows.insert(insert(tables.rollup_hours).values(**key, runs=runs))

    def counted(self, what, *args, scope=roles.ALL_ORGS):
        with self.database.acting(scope).autocommit() as connection:
            return what(connection, *args)

    # The oracle, over all rows of all tables.
    def unfinished(self, codes):
        ids = {self.org_ids[code] for code in codes}
        states = [row["state"] for row in self.rows.live_runs if row["org_id"] in ids]
        running = states.count("running")
        return {"waiting": len(states) - running, "running": running}

    def definitions(self, codes):
        ids = {self.org_ids[code] for code in codes}
        every = [row for row in self.rows.definitions if row["org_id"] in ids]
        opened = [row for row in every if row["closed_at"] is None]
        due = {row["definition_id"]: row["next_fire_at"] for row in self.rows.schedule}
        waiting = {
            row["definition_id"]
            for row in self.rows.live_runs
            if row["state"] == "waiting" and row["available_at"] <= self.now - LONG_WAIT
        }
        undone = {row["definition_id"] for row in self.rows.late_definitions}
        overdue = [row for row in opened if (at := due.get(row["id"])) and at <= self.now - OVERDUE]
        return {
            "all": {row["id"] for row in opened},
            "closed": {row["id"] for row in every} - {row["id"] for row in opened},
            "paused": {row["id"] for row in opened if row["paused_at"]},
            "disabled": {row["id"] for row in opened if not row["paused_at"] and not row["enabled"]},
            "broken": {row["id"] for row in opened if self.newest_of(row["id"]) in ("failed", "refused")},
            "overdue": {row["id"] for row in overdue},
            "late": {row["id"] for row in opened if row["id"] in undone},
            "delayed": {row["id"] for row in opened if row["id"] in waiting},
        }

    def newest_of(self, definition_id):
        mine = [row for row in self.rows.runs if row["definition_id"] == definition_id and row["state"]]
        return max(mine, key=lambda row: row["id"])["state"] if mine else None


@pytest.fixture(params=(1, 2))
def world(request, apply, database, rows):
    for code in CODES:
        apply(
            org_entry(code) + "".join(definition(code, name, "acme.plain", overlap="allow") for name in NAMES)
        )
    made = World(database, rows)
    made.draw(random.Random(request.param))
    return made


def test_unfinished_runs_of_all_orgs_and_of_a_few(world):
    for codes in (CODES, CODES[:1], CODES[1:4]):
        ids = ALL_ORGS if codes == CODES else [world.org_ids[code] for code in codes]
        counts = world.counted(tabs.unfinished, ids)
        assert {name: count.total for name, count in counts.items()} == world.unfinished(codes)
        assert not any(count.at_least for count in counts.values())
    assert sum(world.unfinished(CODES).values()) > 10


def test_ended_runs_are_those_of_the_hours_that_are_asked_for(world):
    hours = [whole_hour(world.now, ago=ago) for ago in range(24)]
    for codes in (CODES[:1], CODES[2:5]):
        ids = [world.org_ids[code] for code in codes]
        wanted = Counter()
        for row in world.rows.rollup_hours:
            if row["hour"] in hours and row["org_id"] in ids:
                wanted[row["state"]] += row["runs"]
        assert wanted
        assert world.counted(tabs.ended, ids, hours) == dict(wanted)


def test_definitions_are_counted_and_listed_by_state(world):
    seen = Counter()
    for code in (None, *CODES):
        codes, scope = (CODES, ALL_ORGS) if code is None else ([code], world.org_ids[code])
        counts, wanted = world.counted(tabs.definitions, scope), world.definitions(codes)
        assert {name: count.total for name, count in counts.items()} == {
            name: len(ids) for name, ids in wanted.items()
        }
        for state in (*TROUBLES, "paused", "disabled", "closed"):
            page = Page(state=state, limit=MAX_LIMIT)
            rows = world.counted(read, DEFINITIONS, ALL_ORGS if code is None else code, page)
            assert {row["id"] for row in rows} == wanted[state], (code, state)
            seen[state] += len(rows)
        both = world.counted(
            read, DEFINITIONS, ALL_ORGS if code is None else code, Page(state="broken,paused")
        )
        assert {row["id"] for row in both} == wanted["broken"] | wanted["paused"]
    assert all(seen[state] for state in (*TROUBLES, "paused", "disabled", "closed"))


def test_a_definition_is_not_delayed_by_children_that_wait(world):
    delayed = world.definitions(CODES)["delayed"]
    world.rows.insert(update(tables.live_runs).values(origin="child"))

    assert delayed
    assert world.counted(tabs.definitions, ALL_ORGS)["delayed"].total == 0
    assert world.counted(read, DEFINITIONS, ALL_ORGS, Page(state="delayed")) == []


def test_orgs_are_counted_by_state(world):
    counts = world.counted(tabs.orgs, ALL_ORGS, ORGS.states)
    wanted = Counter(row["state"] for row in world.rows.orgs)
    broken = world.counted(read, ORGS, ALL_ORGS, Page(broken=True))

    assert {state: counts[state].total for state in ORGS.states} == {
        state: wanted[state] for state in ORGS.states
    }
    assert (counts["all"].total, counts["broken"].total) == (len(CODES), len(broken))
    assert broken
    late = world.counted(read, ORGS, ALL_ORGS, Page(late=True))
    assert {row["id"] for row in late} == {row["org_id"] for row in world.rows.late_definitions}
    assert len(CODES) > counts["late"].total == len(late) > 2


@pytest.mark.parametrize(
    ("listing", "state"),
    [(ORGS, "paused"), (ORGS, "active"), (DEFINITIONS, "disabled"), (DEFINITIONS, "closed")],
)
def test_pages_of_a_state_that_no_index_has_go_on_until_all_were_seen(world, monkeypatch, listing, state):
    whole = [row["id"] for row in world.counted(read, listing, ALL_ORGS, Page(state=state))]
    monkeypatch.setattr(read_module, "EXAMINED", 2)
    found, after, pages = [], None, 0
    while after is not None or not pages:
        page = world.counted(page_of, listing, ALL_ORGS, Page(state=state, limit=2, after=after))
        found += [row["id"] for row in page.rows]
        after, pages = page.next, pages + 1

    assert found == whole
    assert found
    assert pages > 1


def test_an_org_counts_only_its_own_rows_also_by_the_database_itself(world, database):
    """On PostgreSQL its role sees no others, whatever is asked for; the control is SQLite, without roles."""
    mine = world.org_ids[CODES[3]]
    own = roles.Scope.of_org(mine)

    assert world.counted(tabs.definitions, mine, scope=own) == world.counted(tabs.definitions, mine)
    assert world.counted(tabs.unfinished, [mine], scope=own) == world.counted(tabs.unfinished, [mine])
    assert world.counted(tabs.orgs, mine, ORGS.states, scope=own)["all"] == BoundedCount(1)
    of_all = world.counted(tabs.definitions, ALL_ORGS, scope=own)
    assert (of_all == world.counted(tabs.definitions, mine)) == (database.dialect == "postgresql")


def test_counts_stop_at_a_bound_and_say_so(world, monkeypatch):
    monkeypatch.setattr(tabs, "MAX_ROWS", 2)
    monkeypatch.setattr(tabs, "MAX_CHECKED", 1)

    definitions = world.counted(tabs.definitions, ALL_ORGS)
    orgs = world.counted(tabs.orgs, ALL_ORGS, ORGS.states)
    unfinished = world.counted(tabs.unfinished, ALL_ORGS)

    assert all(count.at_least for count in (*definitions.values(), *orgs.values(), *unfinished.values()))
    assert all(count.total <= 2 for count in (*definitions.values(), *orgs.values(), *unfinished.values()))
    assert [str(BoundedCount(*of)) for of in ((10_000, True), (1234,), (0,))] == ["10,000+", "1,234", "0"]
