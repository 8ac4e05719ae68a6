"""Limits of calls to other services: shares of one rate over many workers, and pauses that all learn of."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from random import Random

import pytest
from sqlalchemy import func, select, text

from tests.fakes.clock import ManualClock
from tests.fakes.rows import reading, within
from tests.fakes.stock import Stock
from worker.ids import ALL_ORGS, OrgId
from worker.model.limits import LIFE, MAX_PAUSE, SLOT_LIFE, Ask, BucketKey, Share
from worker.store import limits, tables
from worker.store.database import Database
from worker.store.limits import Pause

ORIGIN = "https://api.example.com"


def add_limit(database: Database, *, per: str = "org", origin: str = ORIGIN, **values) -> str:
    row = {"origin": origin, "per": per, "rate": "10/s", "burst": 10, "concurrent": None, "max_wait": "10s"}
    with database.transaction() as connection:
        at = database.now(connection)
        limits.put(connection, row | values, None, at=at, actor="tester")
    return reading(database, limits.every)[origin, per]["id"]


def share(database: Database, worker: str, ask: Ask) -> Share:
    """As a worker does it: a key without a row gets one in a transaction of its own."""
    [found] = within(database, limits.share, [(worker, ask)])
    if found is None:
        within(database, limits.add_rows, [ask.key])
        [found] = within(database, limits.share, [(worker, ask)])
    assert found is not None
    return found


def rows(database: Database) -> int:
    with database.autocommit() as connection:
        return connection.execute(select(func.count()).select_from(tables.limit_shares)).scalar_one()


def test_workers_share_one_bucket_of_an_org_and_another_org_has_its_own(database: Database, stock: Stock):
    limit_id, one, other = add_limit(database), stock.org(), stock.org()

    first = share(database, "a", Ask(BucketKey(limit_id, one), 100))
    second = share(database, "b", Ask(BucketKey(limit_id, one), 100))
    elsewhere = share(database, "b", Ask(BucketKey(limit_id, other), 100))

    assert (first.tokens, second.tokens, elsewhere.tokens) == (14, 0, 14)
    assert second.wait > 0


def test_the_bucket_fills_by_the_database_clock(database: Database, stock: Stock, clock: ManualClock):
    key = BucketKey(add_limit(database), stock.org())
    share(database, "a", Ask(key, 100))

    clock.advance(0.5)

    assert share(database, "b", Ask(key, 100)).tokens in (2, 3, 5)
    assert share(database, "a", Ask(key, 100)).tokens in (2, 3, 0)


def test_a_limit_of_all_orgs_has_one_bucket(database: Database, stock: Stock):
    key = BucketKey(add_limit(database, per="all"), None)

    assert share(database, "a", Ask(key, 14)).tokens == 14
    assert share(database, "b", Ask(key, 1)).tokens == 0


def test_slots_are_leased_and_end_unless_they_are_renewed(
    database: Database, stock: Stock, clock: ManualClock
):
    key = BucketKey(add_limit(database, rate=None, burst=None, concurrent=2), stock.org())

    assert share(database, "a", Ask(key, slots=2)).slots == 2
    assert share(database, "b", Ask(key, slots=1)).slots == 0
    clock.advance(SLOT_LIFE + 0.001)
    assert share(database, "b", Ask(key, slots=2)).slots == 2


def test_a_key_has_a_row_only_while_it_is_in_use(database: Database, stock: Stock, clock: ManualClock):
    limit_id = add_limit(database)
    for _ in range(3):
        share(database, "a", Ask(BucketKey(limit_id, stock.org()), 5))
    assert within(database, limits.forget_idle) == 0

    clock.advance(SLOT_LIFE + limits.KEPT + 1)

    assert within(database, limits.forget_idle) == 3
    assert rows(database) == 0


def test_a_limit_that_was_removed_limits_nothing(database: Database, stock: Stock):
    limit_id = add_limit(database)
    ask = Ask(BucketKey(limit_id, stock.org()), 1000)
    assert share(database, "a", ask).tokens == 14

    within(database, limits.remove, limit_id)

    assert share(database, "a", ask).tokens == 1000
    assert rows(database) == 0


def test_a_changed_rate_holds_from_the_next_question_on(database: Database, stock: Stock, clock: ManualClock):
    limit_id, org_id = add_limit(database, rate="1000/s", burst=1000), stock.org()
    ask = Ask(BucketKey(limit_id, org_id), 10_000)
    assert share(database, "a", ask).tokens == 1400
    before = reading(database, limits.every)[ORIGIN, "org"]

    with database.transaction() as connection:
        values = {"rate": "1/s", "burst": 1}
        limits.put(connection, values, before, at=database.now(connection), actor="tester")
    clock.advance(100)

    assert share(database, "a", ask).tokens == 1


def test_one_batch_has_the_questions_of_many_keys_and_holders(database: Database, stock: Stock):
    limit_id = add_limit(database)
    orgs = [stock.org() for _ in range(30)]
    keys = [BucketKey(limit_id, org_id) for org_id in orgs]
    within(database, limits.add_rows, keys)

    asked = [("a", Ask(key, 10)) for key in keys] + [("host", Ask(keys[0], 10))]
    found = within(database, limits.share, asked)

    assert [each.tokens for each in found if each is not None] == [10] * 30 + [4]


def test_what_an_org_uses_goes_with_it(database: Database, stock: Stock):
    gone, stays = stock.org(), stock.org()
    limit_id = add_limit(database)
    for org_id in (gone, stays):
        share(database, "a", Ask(BucketKey(limit_id, org_id), 1))
        within(database, limits.pause, [Pause(org_id, ORIGIN, 60)])

    within(database, limits.forget_org, gone)

    assert rows(database) == 1
    assert [each.org_id for each in reading(database, limits.pauses, ALL_ORGS)] == [stays]


def test_pauses_last_as_long_as_the_longest_that_was_asked_for(
    database: Database, stock: Stock, clock: ManualClock
):
    org_id = stock.org()
    within(database, limits.pause, [Pause(org_id, ORIGIN, 10), Pause(org_id, ORIGIN, 30)])
    within(database, limits.pause, [Pause(org_id, ORIGIN, 5)])

    [pause] = reading(database, limits.pauses, ALL_ORGS)
    assert pause.seconds == pytest.approx(30, abs=0.1)
    clock.advance(31)
    assert reading(database, limits.pauses, ALL_ORGS) == []
    assert within(database, limits.forget_idle) == 1


def test_a_pause_has_a_ceiling(database: Database, stock: Stock):
    """What a response says is a claim of that service."""
    within(database, limits.pause, [Pause(stock.org(), ORIGIN, 1e12)])

    [pause] = reading(database, limits.pauses, ALL_ORGS)

    assert pause.seconds <= MAX_PAUSE


def test_workers_at_once_take_no_token_twice(postgres: Database):
    """Four connections ask for keys in any order: no deadlock, and never more than the bucket has."""
    limit_id = add_limit(postgres, rate="1/h", burst=100)
    keys = [BucketKey(limit_id, str(OrgId(f"00000000-0000-7000-8000-{number:012}"))) for number in range(20)]
    got = dict.fromkeys(keys, 0)
    lock = threading.Lock()

    def worker(name: int) -> None:
        random = Random(name)
        for _ in range(25):
            mine = random.sample(keys, 8)
            asked = [(str(name), Ask(key, 3)) for key in mine]
            found = within(postgres, limits.share, asked)
            if missing := [key for key, each in zip(mine, found, strict=True) if each is None]:
                within(postgres, limits.add_rows, missing)
            within(postgres, limits.forget_idle)
            with lock:
                for key, each in zip(mine, found, strict=True):
                    got[key] += each.tokens if each is not None else 0

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(worker, range(4)))

    assert max(got.values()) <= 100
    assert min(got.values()) > 20


def test_a_question_waits_for_no_row_of_firing_and_admission(postgres: Database):
    """It goes on while another transaction holds all of those rows."""
    limit_id = add_limit(postgres)
    key = BucketKey(limit_id, "00000000-0000-7000-8000-000000000001")
    with postgres.transaction() as held:
        locked = "orgs, definitions, schedule, runs, live_runs, workers"
        held.execute(text(f"LOCK TABLE {locked} IN ACCESS EXCLUSIVE MODE"))
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(share, postgres, "a", Ask(key, 1)).result(timeout=20)
            thread.submit(within, postgres, limits.pause, [Pause(key.org_id, ORIGIN, 1)]).result(timeout=20)
            thread.submit(within, postgres, limits.forget_idle).result(timeout=20)

    assert found.tokens == 1
    assert timedelta(seconds=LIFE) < timedelta(seconds=1)
