"""Fire: what is due becomes runs, once, and an instant that does not run becomes a skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.fakes.stock import Stock
from worker.ids import DefinitionId, OrgId
from worker.model.runs.run import Decision, DueDefinition, FireReport, NewRun, NewSkip, NextFire
from worker.store import firing, tables
from worker.store.database import Database
from worker.store.sql import statements

HOUR = timedelta(hours=1)


def fire(stock: Stock, decide: firing.Decide, *, limit: int = 100) -> FireReport:
    return stock.within(firing.fire, decide, limit=limit, specs={})


def scheduled(stock: Stock, due: DueDefinition, *instants: datetime, serial: bool = True) -> list[NewRun]:
    return [
        stock.run(
            due.org_id, due.definition_id, origin="schedule", scheduled_for=at, available_at=at, serial=serial
        )
        for at in instants or (due.next_scheduled_for,)
    ]


def once(stock: Stock) -> firing.Decide:
    """Each due definition runs for its instant and is due again an hour later."""

    def decide(due: DueDefinition, now: datetime) -> Decision:
        later = due.next_scheduled_for + HOUR
        return Decision(scheduled(stock, due), [], NextFire(due.definition_id, later, later))

    return decide


def skip(stock: Stock, org: OrgId, definition: DefinitionId, *skips: NewSkip) -> None:
    stock.within(firing.write, [], skips)


def missed(
    org: OrgId, definition: DefinitionId, since: datetime, until: datetime, count: int, revision: int = 1
) -> NewSkip:
    return NewSkip(org, definition, revision, since, until, count, "missed")


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2030, 1, day, hour, minute, tzinfo=UTC)


def written(stock: Stock) -> list[tuple[datetime, datetime, int, str, int]]:
    return [
        (row["skipped_from"], row["skipped_until"], row["count"], row["reason"], row["revision"])
        for row in sorted(stock.all(tables.skips), key=lambda row: row["skipped_from"])
    ]


def test_a_due_definition_becomes_a_run_and_is_due_again_later(stock: Stock) -> None:
    org = stock.org()
    due_at = stock.now() - timedelta(seconds=2)
    definition = stock.definition(org, due_at=due_at, spec={"handler": "acme.note", "params": {"n": 1}})
    seen: list[DueDefinition] = []

    def decide(due: DueDefinition, now: datetime) -> Decision:
        seen.append(due)
        return once(stock)(due, now)

    report = fire(stock, decide)

    assert [(due.definition_id, due.revision, due.next_scheduled_for) for due in seen] == [
        (definition, 1, due_at)
    ]
    assert seen[0].spec == {"handler": "acme.note", "params": {"n": 1}}
    assert seen[0].org_code.startswith("org_")
    (run,) = report.inserted
    live, row = stock.live(run.id), stock.stored(run.id)
    assert live is not None
    assert (live["state"], live["reason"], live["attempt"]) == ("waiting", "due", 0)
    assert (row["origin"], row["scheduled_for"], row["state"]) == ("schedule", due_at, None)
    assert report.next_fire_at == due_at + HOUR
    assert not report.more


def test_what_is_not_due_is_left_alone(stock: Stock) -> None:
    later = stock.now() + timedelta(seconds=30)
    stock.definition(stock.org(), due_at=later)
    stock.definition(stock.org(), due_at=None)

    report = fire(stock, once(stock))

    assert report.inserted == []
    assert report.next_fire_at == later


def test_the_limit_takes_those_due_longest_and_says_that_there_are_more(stock: Stock) -> None:
    org, now = stock.org(), stock.now()
    late, later, latest = (
        stock.definition(org, due_at=now - timedelta(minutes=minutes)) for minutes in (1, 3, 2)
    )

    report = fire(stock, once(stock), limit=2)

    assert [run.definition_id for run in report.inserted] == [later, latest]
    assert report.more
    assert stock.all(tables.schedule, tables.schedule.c.definition_id == late)[0]["next_fire_at"] < now


def test_an_instant_that_ran_already_does_not_run_again(stock: Stock) -> None:
    """Firing twice is harmless: the second run is neither inserted nor counted as a skip."""
    definition = stock.definition(stock.org(), due_at=stock.now() - HOUR)
    first = fire(stock, once(stock))
    stock.change(
        tables.schedule,
        definition,
        next_scheduled_for=first.inserted[0].scheduled_for,
        next_fire_at=first.inserted[0].scheduled_for,
    )

    second = fire(stock, once(stock))

    assert (second.inserted, second.overlapped, second.skips) == ([], [], [])
    assert len(stock.all(tables.runs)) == len(stock.all(tables.live_runs)) == 1


def test_a_serial_definition_that_is_still_on_skips_and_one_that_may_overlap_does_not(stock: Stock) -> None:
    now = stock.now()
    serial = stock.definition(stock.org(), due_at=now - HOUR)
    fire(stock, once(stock))
    later = fire(stock, once(stock))

    assert [run.definition_id for run in later.overlapped] == [serial]
    assert later.inserted == []
    assert [row[2:4] for row in written(stock)] == [(1, "overlap")]

    stock.change(tables.schedule, serial, next_scheduled_for=now, next_fire_at=now)

    def overlapping(due: DueDefinition, now: datetime) -> Decision:
        return Decision(
            scheduled(stock, due, now - timedelta(seconds=1), serial=False),
            [],
            NextFire(due.definition_id, None, None),
        )

    assert len(fire(stock, overlapping).inserted) == 1


def test_of_two_runs_of_a_serial_definition_in_one_batch_the_first_runs(stock: Stock) -> None:
    now = stock.now()
    stock.definition(stock.org(), due_at=now - HOUR)

    def both(due: DueDefinition, now: datetime) -> Decision:
        two = scheduled(stock, due, now - timedelta(minutes=2), now - timedelta(minutes=1))
        return Decision(two, [], NextFire(due.definition_id, None, None))

    report = fire(stock, both)

    assert [run.scheduled_for for run in report.inserted] == [report.now - timedelta(minutes=2)]  # type: ignore[operator]
    assert [run.scheduled_for for run in report.overlapped] == [report.now - timedelta(minutes=1)]  # type: ignore[operator]
    assert {row["id"] for row in stock.all(tables.runs)} == {report.inserted[0].id}


def test_a_run_by_hand_that_overlaps_is_reported_and_no_skip(stock: Stock) -> None:
    org = stock.org()
    definition = stock.definition(org)
    first = stock.run(org, definition, serial=True)
    second = stock.run(org, definition, serial=True)

    report = stock.put(first, second)

    assert (report.inserted, report.overlapped, report.skips) == ([first], [second], [])
    assert stock.all(tables.skips) == []


def test_the_same_request_key_makes_one_run(stock: Stock) -> None:
    org = stock.org()
    definition = stock.definition(org)

    first = stock.put(stock.run(org, definition, request_key="k"))
    again = stock.put(stock.run(org, definition, request_key="k"))

    assert len(first.inserted) == 1
    assert (again.inserted, again.overlapped) == ([], [])
    assert len(stock.all(tables.live_runs)) == 1


def test_all_that_a_run_carries_is_kept(stock: Stock) -> None:
    org = stock.org()
    run = stock.run(
        org,
        handler='acme."odd\\{name},',
        params={"text": 'a "quoted" \\ {text}, é 😀', "none": None, "list": [1, 2.5, True]},
        variant_handlers=("acme.one", "acme.two"),
        isolation="inline",
        priority=-7,
        max_concurrent=3,
        start_by=stock.now() + HOUR,
        created_by='Ann O\'Nym, "ops"',
        request_key="key NULL",
    )

    stock.put(run)

    live, row = stock.live(run.id), stock.stored(run.id)
    assert live is not None
    assert live["params"] == row["params"] == run.params
    assert live["handler"] == row["handler"] == run.handler
    assert live["variant_handlers"] == ["acme.one", "acme.two"]
    assert (live["isolation"], live["priority"], live["max_concurrent"]) == ("inline", -7, 3)
    assert live["start_by"] == run.start_by
    assert (row["created_by"], row["request_key"]) == (run.created_by, "key NULL")


def test_what_a_calendar_skips_has_a_row_of_its_own(stock: Stock) -> None:
    org = stock.org()
    definition = stock.definition(org)
    on_calendar = replace(missed(org, definition, at(1, 2), at(1, 4), 3), reason="calendar")
    skip(stock, org, definition, missed(org, definition, at(1, 1), at(1, 1), 1))
    skip(stock, org, definition, on_calendar)
    skip(stock, org, definition, replace(on_calendar, skipped_from=at(1, 5), skipped_until=at(1, 5), count=1))

    assert written(stock) == [(at(1, 1), at(1, 1), 1, "missed", 1), (at(1, 2), at(1, 5), 4, "calendar", 1)]


def test_consecutive_missed_instants_grow_one_row(stock: Stock) -> None:
    org = stock.org()
    definition = stock.definition(org)

    skip(stock, org, definition, missed(org, definition, at(1, 1), at(1, 3), 3))
    skip(stock, org, definition, missed(org, definition, at(1, 4), at(1, 4), 1))
    skip(stock, org, definition, missed(org, definition, at(1, 5), at(1, 6), 2))

    assert written(stock) == [(at(1, 1), at(1, 6), 6, "missed", 1)]


@pytest.mark.parametrize("why", ["reason", "revision", "day", "run between"])
def test_a_skip_row_grows_no_further_than_it_may(stock: Stock, why: str) -> None:
    org = stock.org()
    definition = stock.definition(org)
    first = missed(org, definition, at(1, 1), at(1, 2), 2)
    second = missed(org, definition, at(1, 4), at(1, 4), 1)
    match why:
        case "reason":
            second = replace(second, reason="overlap")
        case "revision":
            second = replace(second, revision=2)
        case "day":
            second = replace(second, skipped_from=at(2, 0), skipped_until=at(2, 0))
        case "run between":
            stock.put(stock.run(org, definition, origin="schedule", scheduled_for=at(1, 3), serial=True))

    skip(stock, org, definition, first)
    skip(stock, org, definition, second)

    assert [row[2] for row in written(stock)] == [2, 1]


def test_a_second_long_job_of_each_second_makes_one_growing_skip_row(stock: Stock) -> None:
    org = stock.org()
    definition = stock.definition(org)
    seconds = [at(1, 12) + timedelta(seconds=n) for n in range(50)]

    def fired(instants: Sequence[datetime]) -> FireReport:
        return stock.put(
            *(
                stock.run(org, definition, origin="schedule", scheduled_for=instant, serial=True)
                for instant in instants
            )
        )

    assert len(fired(seconds[:10]).inserted) == 1
    fired(seconds[10:11])
    fired(seconds[11:])

    assert written(stock) == [(seconds[1], seconds[-1], 49, "overlap", 1)]
    assert len(stock.all(tables.runs)) == 1


def test_skips_of_both_reasons_around_a_run_in_one_batch(stock: Stock) -> None:
    """Two missed, one that runs, two that overlap: every instant is in exactly one place."""
    now = stock.now()
    definition = stock.definition(stock.org(), due_at=now - HOUR)
    day = at(3, 12)

    def decide(due: DueDefinition, now: datetime) -> Decision:
        runs_ = scheduled(stock, due, *(day + timedelta(minutes=n) for n in (2, 3, 4)))
        lost = missed(due.org_id, due.definition_id, day, day + timedelta(minutes=1), 2)
        return Decision(runs_, [lost], NextFire(definition, None, None))

    report = fire(stock, decide)

    assert [run.scheduled_for for run in report.inserted] == [day + timedelta(minutes=2)]
    assert written(stock) == [
        (day, day + timedelta(minutes=1), 2, "missed", 1),
        (day + timedelta(minutes=3), day + timedelta(minutes=4), 2, "overlap", 1),
    ]
    assert report.next_fire_at is None


def test_a_failed_fire_leaves_nothing(stock: Stock) -> None:
    stock.definition(stock.org(), due_at=stock.now() - HOUR)

    def broken(due: DueDefinition, now: datetime) -> Decision:
        raise RuntimeError("no decision")

    with pytest.raises(RuntimeError):
        fire(stock, broken)

    assert stock.all(tables.runs) == []
    assert len(fire(stock, once(stock)).inserted) == 1


def test_two_workers_that_fire_at_once_never_share_a_definition(postgres: Database) -> None:
    """The second passes over what the first has locked, and does not wait for it."""
    stock = Stock(postgres)
    for _ in range(3):
        stock.definition(stock.org(), due_at=stock.now() - HOUR)
    with postgres.transaction() as first, postgres.transaction() as second:
        _, taken = statements(first).fire_lock(first, limit=2, specs={})
        _, rest = statements(second).fire_lock(second, limit=100, specs={})

    assert (len(taken), len(rest)) == (2, 1)
    assert not {due.definition_id for due in taken} & {due.definition_id for due in rest}


def test_what_became_due_last_does_not_wait_for_thousands(stock: Stock) -> None:
    """A tenth of each fire goes to the newest; the others go in order, and each fires once."""
    org, at = stock.org(limit=1000), stock.now() - HOUR
    crowd = [stock.definition(org, due_at=at) for _ in range(60)]
    newest = [stock.definition(org, due_at=at + timedelta(minutes=n)) for n in (1, 2)]

    fired = [fire(stock, once(stock), limit=20)]
    assert {run.definition_id for run in fired[0].inserted} >= set(newest)
    assert len(fired[0].inserted) == 20
    while fired[-1].more:
        fired.append(fire(stock, once(stock), limit=20))

    assert sorted(run.definition_id for report in fired for run in report.inserted) == sorted(crowd + newest)
