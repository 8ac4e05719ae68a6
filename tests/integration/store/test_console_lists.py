"""What the overview pages of the console read: causes, waits, what is broken, and the grid of an org."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo

from tests.fakes.clock import ManualClock
from tests.fakes.rows import reading
from tests.fakes.stock import Stock
from worker.ids import ALL_ORGS, DefinitionId, OrgId, RunId, new_id
from worker.model.definitions.budgets import period_of
from worker.model.runs.run import NewRun
from worker.store import tables
from worker.store.database import Database
from worker.store.lists import failures, morning
from worker.store.lists.grid import Grid, grid
from worker.store.lists.morning import timings
from worker.store.lists.usage import nearest

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


def end(stock: Stock, org: OrgId, definition: DefinitionId, state: str = "failed", **values: Any) -> RunId:
    """A run of the definition that has ended in this state."""
    return ended(stock, stock.run(org, definition), state, **values)


def ended(stock: Stock, run: NewRun, state: str, **values: Any) -> RunId:
    stock.put(run)
    worker = stock.worker()
    (admitted,) = stock.admit(worker)
    reason = {"failed": "error", "refused": "scope_missing"}.get(state)
    stock.finish(worker, stock.ended(admitted, state, reason=reason, **values))
    return run.id


def retry(stock: Stock, run: RunId, state: str = "succeeded") -> RunId:
    """A retry of the run, ended in this state."""
    old = stock.stored(run)
    new = stock.run(old["org_id"], old["definition_id"], origin="retry", retry_of=run)
    return ended(stock, new, state)


def blame(stock: Stock, run: RunId, cause: str) -> None:
    stock.change(tables.attempts, run, error_cause=cause)


def causes(database: Database, state: str = "failed") -> list[tuple[Any, ...]]:
    with database.autocommit() as connection:
        found, _ = failures.by_cause(connection, ALL_ORGS, state, database.now(connection) - DAY)
    return [(row["cause"], row["runs"], row["open_runs"], row["orgs"], row["open_orgs"]) for row in found]


def test_failures_are_counted_by_cause_and_a_retried_one_is_no_longer_open(database: Database, stock: Stock):
    first, second = stock.org(), stock.org()
    one, other = stock.definition(first), stock.definition(second)
    full = [end(stock, first, one), end(stock, first, one), end(stock, second, other)]
    for number, run in enumerate(full, 1):
        blame(stock, run, 'OSError: "disk" <n> is full')
        error = {"type": "OSError", "message": f'"disk" {number} is full'}
        stock.change(tables.attempts, run, error=error)
    gone = end(stock, second, other)
    retry(stock, full[2])

    assert causes(database) == [
        ('OSError: "disk" <n> is full', 3, 2, 2, 1),
        # Without an error: why it ended.
        ("error", 1, 1, 1, 1),
    ]
    with database.autocommit() as connection:
        found, more = failures.by_cause(connection, ALL_ORGS, "failed", database.now(connection) - DAY)
    assert (found[0]["run"], found[1]["run"], more) == (full[2], gone, False)
    assert [row["named"] for row in found] == [[stock.code(first)], [stock.code(second)]]
    # The newest error as it was; without one the cause.
    assert (found[0]["message"], found[1]["message"]) == ('OSError: "disk" 3 is full', "error")


def test_a_retry_that_failed_stands_for_the_run_that_it_retried(database: Database, stock: Stock):
    org = stock.org()
    run = end(stock, org, stock.definition(org))
    retry(stock, run, "failed")

    assert causes(database) == [("error", 2, 1, 1, 1)]


def test_refused_runs_are_grouped_by_reason_and_detail(database: Database, stock: Stock):
    org = stock.org()
    for detail in ("jobs:read", "jobs:read", "jobs:write"):
        end(stock, org, stock.definition(org), "refused", detail=detail)

    assert causes(database, "refused") == [
        ("scope_missing: jobs:read", 2, 2, 1, 1),
        ("scope_missing: jobs:write", 1, 1, 1, 1),
    ]


def test_failures_beyond_the_bound_are_reported_as_more(database: Database, stock: Stock, monkeypatch: Any):
    monkeypatch.setattr(failures, "MAX_RUNS", 2)
    org = stock.org()
    for _ in range(3):
        end(stock, org, stock.definition(org))

    with database.autocommit() as connection:
        found, more = failures.by_cause(connection, ALL_ORGS, "failed", database.now(connection) - DAY)
    assert (found[0]["runs"], more) == (2, True)


def test_waiting_runs_are_counted_by_reason(database: Database, stock: Stock):
    orgs = [stock.org(), stock.org()]
    codes = [stock.code(org) for org in orgs]
    runs = [stock.run(org, stock.definition(org)) for org in (*orgs, orgs[1], orgs[0])]
    stock.put(*runs)
    stock.change(tables.live_runs, runs[0].id, reason="no_token", detail="issuer_paused: issuer main rests")

    with database.autocommit() as connection:
        waiting = morning.waiting(connection, ALL_ORGS)
        tokens = morning.without_token(connection, ALL_ORGS)
        running = morning.running(connection, ALL_ORGS)
    # The org of most runs comes first.
    assert [(row.reason, row.runs, row.orgs, row.whats) for row in waiting] == [
        ("due", 3, (2, codes[::-1]), (0, [])),
        ("no_token", 1, (1, codes[:1]), (0, [])),
    ]
    assert (tokens, running) == ([("main", "issuer_paused", 1, (1, codes[:1]))], 0)


def test_a_child_without_a_token_is_not_counted(database: Database, stock: Stock):
    org = stock.org()
    run, child = stock.run(org, stock.definition(org)), stock.run(org, stock.definition(org), origin="child")
    stock.put(run, child)
    for each in (run, child):
        stock.change(tables.live_runs, each.id, reason="no_token", detail="throttled: later")

    assert [row.runs for row in reading(database, morning.waiting, ALL_ORGS)] == [1]
    assert [row.runs for row in reading(database, morning.without_token, ALL_ORGS)] == [1]


def test_what_waiting_runs_wait_for_is_named(database: Database, stock: Stock):
    """Three of five pools, those of most runs first; the orgs are counted apart."""
    org = stock.org()
    runs = [
        stock.run(org, stock.definition(org), pool=pool)
        for pool, count in (("a", 1), ("b", 3), ("c", 2), ("d", 1), ("e", 1))
        for _ in range(count)
    ]
    stock.put(*runs)
    for run in runs:
        stock.change(tables.live_runs, run.id, reason="no_pool", detail=run.pool)

    [wait] = reading(database, morning.waiting, ALL_ORGS)
    assert (wait.runs, wait.orgs, wait.whats) == (8, (1, [stock.code(org)]), (5, ["b", "c", "a"]))
    assert wait.since == runs[0].available_at


def test_what_is_broken_is_counted_with_examples(database: Database, stock: Stock, clock: ManualClock):
    org = stock.org()
    definition = stock.definition(org)
    stock.definition(org)
    lost = stock.worker()
    stock.worker()
    with database.transaction() as connection:
        at = database.now(connection)
        for number, error in enumerate((None, "invalid_client")):
            connection.execute(
                tables.credentials.insert().values(
                    id=new_id(), org_id=org, generation=number + 1, client_id=f"client-{number}",
                    reference="file:x", created_at=at, created_by="tester", last_error=error,
                )
            )  # fmt: skip
        for name, error in (("acme.good", None), ("acme.bad", "ImportError: gone")):
            connection.execute(
                tables.catalogue.insert().values(
                    name=name, distribution="acme", version="1", entry_point="a:b", scopes=[], error=error,
                    seen_at=at, of_worker=True,
                )
            )  # fmt: skip
    stock.change(tables.definitions, definition, paused_at=at, paused_by="ada")
    stock.let_lease_pass(lost)

    with database.autocommit() as connection:
        dead = morning.dead_credentials(connection, ALL_ORGS)
        paused = morning.paused_definitions(connection, ALL_ORGS)
        broken = morning.broken_handlers(connection)
        now = database.now(connection)
        up, late, missing = morning.workers(connection, ALL_ORGS, now)
        slow = morning.workers(connection, ALL_ORGS, now + timedelta(seconds=20))
        rejected = morning.credentials(connection, ALL_ORGS, "dead", after=None, limit=10)
        old = morning.credentials(connection, ALL_ORGS, "old", after=None, limit=10)
        every = morning.credentials(connection, ALL_ORGS, "all", after=None, limit=1)
        rest = morning.credentials(connection, ALL_ORGS, "all", after=every[0]["id"], limit=10)
    assert (dead.total, dead.examples[0]["last_error"]) == (1, "invalid_client")
    assert (paused.total, paused.examples[0]["paused_by"]) == (1, "ada")
    assert (broken.total, broken.examples[0]["name"]) == (1, "acme.bad")
    assert (up, late, [row["id"] for row in missing]) == (1, [], [lost])
    assert (slow.up, len(slow.late), len(slow.missing)) == (1, 1, 1)
    assert [row["client_id"] for row in (*rejected, *old)] == ["client-1", "client-0"]
    assert [row["client_id"] for row in (*every, *rest)] == ["client-0", "client-1"]


def test_ended_runs_are_counted_by_hour_and_state(database: Database, stock: Stock):
    org = stock.org()
    definition = stock.definition(org)
    end(stock, org, definition)
    end(stock, org, definition, "succeeded")
    hour = stock.now().replace(minute=0, second=0, microsecond=0)

    ended = reading(database, morning.ended_by_hour, ALL_ORGS, hour - HOUR, hour + HOUR)
    assert sum(ended.values()) == 2
    assert {state for _, state in ended} == {"failed", "succeeded"}


def test_timings_are_counted_page_by_page_in_the_zone_of_definition_or_org(database: Database, stock: Stock):
    org, abroad, now = stock.org(), stock.org(), stock.now()
    stock.change(tables.orgs, abroad, timezone="Asia/Tokyo")
    hourly = {"handler": "acme.note", "schedule": "0 * * * *"}
    for _ in range(2):
        stock.definition(org, due_at=now + HOUR, spec=hourly)
    stock.definition(abroad, due_at=now + HOUR, spec=hourly)
    stock.definition(abroad, due_at=now + HOUR, spec={**hourly, "timezone": "UTC"})
    stock.definition(org, due_at=now + 2 * DAY, spec=hourly)
    stock.definition(org, spec={"handler": "acme.note"})

    with database.autocommit() as connection:
        first = timings(connection, ALL_ORGS, now + DAY, None, 2)
        rest = timings(connection, ALL_ORGS, now + DAY, first.last, 20)
    counted = Counter(first.counted) + Counter(rest.counted)
    assert rest.last is None
    assert {timing.timezone: number for timing, number in counted.items()} == {"UTC": 3, "Asia/Tokyo": 1}


def seen(database: Database, org: OrgId) -> Grid:
    with database.autocommit() as connection:
        return grid(connection, org, database.now(connection))


def test_the_grid_shows_the_worst_of_each_day_and_a_recovered_failure_as_retried(
    database: Database, stock: Stock
):
    org, other = stock.org(), stock.org()
    failed, recovered, quiet = (stock.definition(org) for _ in range(3))
    end(stock, org, failed)
    end(stock, org, failed, "succeeded")
    retry(stock, end(stock, org, recovered))
    end(stock, other, stock.definition(other))
    stock.put(stock.run(org, quiet, scheduled_for=stock.now() - 2 * DAY))
    today = (stock.now() - timedelta(seconds=1)).date()

    found = seen(database, org)

    assert found.worst(failed, today) == "failed"
    assert dict(found.of(failed, today)) == {"failed": 1, "succeeded": 1}
    assert (found.said(failed, today), found.number(failed, today)) == ("1 failed, 1 succeeded", "")
    assert found.worst(recovered, today) == "retried"
    assert found.worst(quiet, today) == ""
    assert found.worst(quiet, (stock.now() - 2 * DAY).date()) == "waiting"
    assert (len(found.days), found.days[-1], found.since) == (30, stock.now().date(), None)


def test_the_grid_counts_a_skip_on_each_day_of_its_range(database: Database, stock: Stock):
    org = stock.org()
    definition = stock.definition(org)
    now = stock.now()
    with database.transaction() as connection:
        connection.execute(
            tables.skips.insert().values(
                id=new_id(), org_id=org, definition_id=definition, revision=1, skipped_from=now - 3 * DAY,
                skipped_until=now - DAY, count=3, reason="missed",
            )
        )  # fmt: skip

    found = seen(database, org)

    states = [found.worst(definition, (now - back * DAY).date()) for back in range(5)]
    assert states == ["", "skipped", "skipped", "skipped", ""]
    # How many on which of the days is not stored.
    yesterday = (now - DAY).date()
    assert (found.said(definition, yesterday), found.number(definition, yesterday)) == ("some skipped", "")


def test_a_grid_of_too_many_runs_says_since_when_it_is_complete(
    database: Database, stock: Stock, monkeypatch: Any
):
    monkeypatch.setattr("worker.store.lists.grid.MAX_RUNS", 2)
    org = stock.org()
    definition = stock.definition(org)
    for _ in range(3):
        end(stock, org, definition)

    found = seen(database, org)

    assert found.since is not None
    assert sum(sum(counts.values()) for counts in found.cells.values()) == 2


def budget(stock: Stock, meter: str, per: str, limit: int | None = None, **values: Any) -> None:
    row = {"id": new_id(), "target": new_id(), "meter": meter, "per": per, "limit": limit, "at_limit": "wait"}
    row |= {"warn_at": 0.8, "created_at": stock.now(), "updated_at": stock.now(), "updated_by": "ann"}
    with stock.database.transaction() as connection:
        connection.execute(tables.budgets.insert().values(**row | values))


def counted(
    stock: Stock, org: OrgId, meter: str, per: Any, used: int, zone: str = "UTC", ago: int = 0
) -> None:
    """A counter of the period of a zone that contains the time so many days ago."""
    start = period_of(per, ZoneInfo(zone), stock.now() - ago * DAY).start
    row = {"org_id": org, "meter": meter, "per": per, "starts_at": start, "used": used}
    with stock.database.transaction() as connection:
        connection.execute(tables.meters.insert().values(**row))


def near(stock: Stock, limit: int = 10) -> list[tuple[str, str, str, int | None, int | None]]:
    with stock.database.autocommit() as connection:
        rows = nearest(connection, ALL_ORGS, limit=limit)
    return [(row["org"], row["meter"], row["per"], row["used"], row["limit"]) for row in rows]


def test_the_budgets_of_which_most_is_used_come_first(database: Database, stock: Stock):
    one, two, three, gone = (stock.org() for _ in range(4))
    named = {org: stock.code(org) for org in (one, two, three)}
    stock.change(tables.orgs, three, tags=["pro"], timezone="Pacific/Kiritimati")
    stock.change(tables.orgs, gone, state="removed")
    budget(stock, "calls", "day", 1000, selector="all")
    budget(stock, "calls", "month", 10_000, org_id=two)
    budget(stock, "tokens", "day", selector={"tags": ["pro"]}, property="tokens")
    for org, used in ((one, 500), (two, 100), (gone, 1000)):
        counted(stock, org, "calls", "day", used)
    counted(stock, two, "calls", "month", 9_000)
    counted(stock, three, "tokens", "day", 80, zone="Pacific/Kiritimati")
    # Of no budget, of one that does not select the org, and of a period that is over.
    counted(stock, one, "letters", "day", 10**9)
    counted(stock, two, "tokens", "day", 10**9)
    counted(stock, three, "calls", "day", 999, zone="Pacific/Kiritimati", ago=3)
    with database.transaction() as connection:
        for org in (two, three):
            values = {"org_id": org, "name": "tokens", "value": 100, "issued_at": stock.now()}
            connection.execute(tables.org_properties.insert().values(**values))

    expected = [
        (named[two], "calls", "month", 9_000, 10_000),
        (named[three], "tokens", "day", 80, 100),
        (named[one], "calls", "day", 500, 1000),
    ]
    assert near(stock) == expected
    assert near(stock, limit=2) == expected[:2]


def test_a_raise_makes_a_budget_less_near(database: Database, stock: Stock):
    one, two = stock.org(), stock.org()
    budget(stock, "calls", "day", 100, selector="all")
    counted(stock, one, "calls", "day", 110)
    counted(stock, two, "calls", "day", 80)
    with database.transaction() as connection:
        raised = {"id": new_id(), "org_id": one, "meter": "calls", "per": "day", "amount": 100}
        raised |= {"until": stock.now() + DAY, "created_at": stock.now(), "created_by": "ann"}
        connection.execute(tables.budget_raises.insert().values(**raised))

    assert near(stock) == [
        (stock.code(two), "calls", "day", 80, 100),
        (stock.code(one), "calls", "day", 110, 200),
    ]


def test_without_budgets_nothing_is_near_a_limit(stock: Stock):
    counted(stock, stock.org(), "calls", "day", 90)

    assert near(stock) == []
