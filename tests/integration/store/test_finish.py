"""Finish: an attempt's end is written once, by whoever owns the run, together with all it changes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from threading import Thread
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Connection, delete, select, text, update
from sqlalchemy.exc import DBAPIError

from tests.fakes.clock import ManualClock
from tests.fakes.stock import HANDLER, Stock, await_lock
from tests.faults.proxy import Proxy
from tests.faults.watches import muter
from worker.engine.loops.finisher import Finisher
from worker.ids import OrgId
from worker.model.runs.outcome import EndedAttempt, Trail
from worker.operations import orgs
from worker.store import credentials, edit_runs, tables
from worker.store.database import Database
from worker.store.sql import statements
from worker.store.sql.postgresql.finish import END
from worker.store.worker_store import WorkerStore


def test_a_run_that_ended_has_its_outcome_and_no_live_row(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)

    assert stock.finish(worker, stock.ended(run, detail="fine")) == {run.id}

    assert stock.live(run.id) is None
    row = stock.stored(run.id)
    assert (row["state"], row["reason"], row["detail"]) == ("succeeded", None, "fine")
    assert (row["attempt"], row["result_fencing_token"], row["worker_id"]) == (1, 1, worker)
    assert row["result"] == {"articles": 3}
    assert (row["available_at"], row["started_at"]) == (run.available_at, run.started_at)
    assert row["finished_at"] >= run.started_at


def test_an_end_is_found_by_how_and_when_until_the_run_is_forgotten(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    run, other = stock.running(worker, org), stock.running(worker, org)

    stock.finish(worker, stock.ended(run), stock.ended(other, "failed", reason="error"))

    ended = {run.id: stock.stored(run.id), other.id: stock.stored(other.id)}
    assert {row["run_id"]: row for row in stock.all(tables.run_ends)} == {
        id_: {"run_id": id_}
        | {name: row[name] for name in ("state", "finished_at", "org_id", "definition_id")}
        for id_, row in ended.items()
    }
    with stock.database.transaction() as connection:
        connection.execute(delete(tables.runs).where(tables.runs.c.id == run.id))
    assert [row["run_id"] for row in stock.all(tables.run_ends)] == [other.id]


def test_no_end_leaves_its_page_for_the_sake_of_an_index(postgres: Database) -> None:
    """PostgreSQL rewrites a row in every index as soon as one of them mentions a column that changed."""
    with postgres.autocommit() as connection:
        indexes = connection.execute(text("SELECT indexdef FROM pg_indexes WHERE tablename = 'runs'"))
        mentioned = set(re.findall(r"\w+", " ".join(indexes.scalars())))

    written = set(
        re.findall(r"(\w+) = ", END[END.index("UPDATE runs r SET") : END.index("FROM gone g\nWHERE")])
    )
    assert {"state", "finished_at", "attempt", "error"} <= written
    assert not written & mentioned


def test_an_attempt_keeps_what_it_left_behind(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    claims = {"org_code": "org_1", "properties": {"model": 'g"pt\\{4},'}}
    trail = Trail(
        handler="acme.note_v2",
        token_ready_at=run.started_at - timedelta(milliseconds=3),
        handler_started_at=run.started_at - timedelta(milliseconds=2),
        claims=json.dumps(claims),
        flags='{"agent-v2": true}',
        jti="a,b",
        claims_hash="00ff",
        progress={"done": 3, "total": 9, "note": None},
        peak_memory=12_345_678_901,
    )
    error = {"type": "ValueError", "message": 'it said "no"\nand {left}, \\'}
    end = stock.ended(run, "failed", reason="error", error=error, error_cause="ValueError: <text>")

    stock.finish(worker, replace(end, trail=trail, started_at=run.started_at - timedelta(seconds=1)))

    (attempt,) = stock.attempts(run.id)
    assert attempt["handler"] == "acme.note_v2"
    assert (attempt["fencing_token"], attempt["worker_id"]) == (1, worker)
    assert (attempt["token_ready_at"], attempt["handler_started_at"]) == (
        trail.token_ready_at,
        trail.handler_started_at,
    )
    assert (attempt["outcome"], attempt["error"]) == ("failed", error)
    assert attempt["error_cause"] == "ValueError: <text>"
    assert (attempt["claims"], attempt["flags"]) == (claims, {"agent-v2": True})
    assert (attempt["jti"], attempt["claims_hash"], attempt["peak_memory"]) == ("a,b", "00ff", 12_345_678_901)
    row = stock.stored(run.id)
    assert (row["error"], row["reason"], row["progress"]) == (error, "error", trail.progress)


def words_of(stock: Stock, *, shown: bool | None = None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in stock.all(tables.run_words):
        if shown is None or row["shown"] == shown:
            found.setdefault(row["run_id"], set()).add(row["word"])
    return found


def test_a_run_that_fails_is_refused_or_waits_has_its_words(stock: Stock) -> None:
    worker = stock.worker()
    runs = [stock.running(worker) for _ in range(7)]
    failed, refused, waiting, asleep, done, drained, cancelled = runs
    crm = {"type": "CrmError", "message": "CRM ответил 503: “null” {x}, Ärger"}

    stock.finish(
        worker,
        stock.ended(failed, "failed", reason="error", error=crm),
        stock.ended(refused, "refused", reason="scope_missing", detail="crm:read"),
        stock.ended(waiting, "waiting", reason="retry", error=crm),
        stock.ended(asleep, "waiting", reason="snoozed", detail="until the export is there"),
        stock.ended(done, detail="fine"),
        stock.ended(drained, "waiting", reason="handed_back", detail="the worker stops"),
        stock.ended(cancelled, "cancelled", reason="requested"),
    )

    names = {"acme", "note", "crm", "sync"}
    of_error = {"crmerror", "crm", "ответил", "503", "null", "x", "arger"}
    words = {run_id: found - names for run_id, found in words_of(stock).items()}
    assert words == {
        failed.id: of_error - names,
        refused.id: {"read"},
        waiting.id: of_error - names,
        asleep.id: {"until", "the", "export", "is", "there"},
    }
    assert all("acme" in found for found in words_of(stock).values())


def test_an_attempt_that_was_fenced_out_leaves_no_word(stock: Stock) -> None:
    worker, error = stock.worker(), {"type": "E", "message": "stale"}
    run, other = stock.running(worker), stock.running(worker)
    late = replace(stock.ended(run, "failed", reason="error", error=error), fencing_token=7)

    stock.finish(worker, late, stock.ended(other, "failed", reason="error", error=error))
    stock.finish(stock.worker(), stock.ended(run, "failed", reason="error", error=error))

    assert set(words_of(stock)) == {other.id}


def test_words_of_a_second_attempt_join_those_of_the_first(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    first = stock.ended(run, "waiting", reason="retry", error={"type": "E", "message": "503 again"})
    stock.finish(worker, first)
    stock.make_available(run.id)
    (again,) = stock.admit(worker)

    stock.finish(
        worker, stock.ended(again, "failed", reason="error", error={"type": "E", "message": "504 again"})
    )

    assert {"503", "504", "again"} <= words_of(stock)[run.id]


def test_what_an_org_may_not_read_is_no_word_of_its_search(stock: Stock) -> None:
    worker = stock.worker()
    other, path = stock.running(worker), stock.running(worker)
    message = {"type": "Refused", "message": "the token is for org_rival"}

    stock.finish(
        worker,
        stock.ended(other, "refused", reason="org_mismatch", detail="org_claim", error=message),
        stock.ended(path, "waiting", reason="no_token", detail="provider: no file /run/secrets/rival.key"),
    )

    shown, hidden = words_of(stock, shown=True), words_of(stock, shown=False)
    assert {"token", "another"} <= shown[other.id]
    assert "provider" in shown[path.id]
    assert {"rival"} <= hidden[other.id] & hidden[path.id]
    assert "rival" not in shown[other.id] | shown[path.id]


def test_writing_the_same_end_again_is_accepted_and_changes_nothing(stock: Stock) -> None:
    """The answer to COMMIT was cut: the worker writes again, and must not hear that it lost the run."""
    worker = stock.worker()
    run, other = stock.running(worker), stock.running(worker)
    stock.finish(worker, stock.ended(run))
    before = stock.stored(run.id), stock.all(tables.rollup_days), stock.all(tables.rollup_hours)

    assert stock.finish(worker, stock.ended(run), stock.ended(other)) == {run.id, other.id}
    assert stock.finish(worker, stock.ended(run)) == {run.id}

    assert stock.stored(run.id) == before[0]
    assert len(stock.attempts(run.id)) == 1
    assert sum(row["runs"] for row in stock.all(tables.rollup_days)) == 2


def test_a_retry_written_twice_is_accepted_even_when_the_run_is_on_again(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    retry = stock.ended(run, "waiting")
    assert stock.finish(worker, retry) == {run.id}
    assert stock.finish(worker, retry) == {run.id}
    stock.make_available(run.id)
    (again,) = stock.admit(worker)

    assert stock.finish(worker, retry) == {run.id}

    live = stock.unended(run.id)
    assert (live["state"], live["fencing_token"]) == ("running", again.fencing_token)


def test_a_late_end_under_an_older_fencing_token_changes_nothing(stock: Stock) -> None:
    worker, other = stock.worker(), stock.worker()
    run = stock.running(worker)
    stock.change(tables.live_runs, run.id, fencing_token=2, attempt=2, worker_id=other)

    assert stock.finish(worker, stock.ended(run)) == set()
    assert stock.finish(other, stock.ended(run)) == set()

    assert stock.stored(run.id)["state"] is None
    assert stock.attempts(run.id) == []
    assert stock.all(tables.rollup_days) == []


def test_of_a_batch_only_what_is_still_ours_is_written(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    mine, lost, waiting = (stock.running(worker, org) for _ in range(3))
    stock.change(tables.live_runs, lost.id, fencing_token=9)

    accepted = stock.finish(worker, stock.ended(waiting, "waiting"), stock.ended(lost), stock.ended(mine))

    assert accepted == {mine.id, waiting.id}
    assert stock.stored(mine.id)["state"] == "succeeded"
    assert stock.stored(lost.id)["state"] is None


def test_a_retry_waits_from_the_databases_time_of_the_write(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    before = stock.now()

    stock.finish(
        worker,
        stock.ended(run, "waiting", available_after=timedelta(minutes=5), failures=1, detail="busy"),
    )

    live = stock.unended(run.id)
    assert before <= live["available_at"] - timedelta(minutes=5) <= stock.now()
    assert (live["state"], live["reason"], live["detail"]) == ("waiting", "retry", "busy")
    assert (live["worker_id"], live["started_at"], live["failures"]) == (None, None, 1)
    assert stock.stored(run.id)["state"] is None
    assert stock.admit(worker) == []
    stock.make_available(run.id)
    (again,) = stock.admit(worker)
    assert (again.attempt, again.fencing_token, again.failures) == (2, 2, 1)


@pytest.mark.parametrize("started", [True, False])
def test_the_start_deadline_falls_once_the_handler_has_started(stock: Stock, started: bool) -> None:
    worker, start_by = stock.worker(), stock.now() + timedelta(hours=1)
    run = stock.running(worker, start_by=start_by)

    stock.finish(worker, stock.ended(run, "waiting", reason="no_token", keep_start_by=not started))

    live = stock.unended(run.id)
    assert live["start_by"] == (None if started else start_by)


def test_a_run_that_would_wait_although_it_was_cancelled_is_cancelled(stock: Stock) -> None:
    """The request came while a retry was on its way: it must not get lost."""
    worker = stock.worker()
    run = stock.running(worker)
    stock.change(tables.live_runs, run.id, cancel_requested_at=stock.now(), cancel_reason="suspended")

    assert stock.finish(worker, stock.ended(run, "waiting")) == {run.id}

    row = stock.stored(run.id)
    assert (row["state"], row["reason"]) == ("cancelled", "suspended")
    assert stock.attempts(run.id)[0]["outcome"] == "retry"
    assert stock.live(run.id) is None


def test_rollups_count_runs_attempts_and_handler_time(stock: Stock) -> None:
    worker, org, other = stock.worker(), stock.org(), stock.org()
    good, again, bad = (stock.running(worker, org) for _ in range(3))
    foreign = stock.running(worker, other)
    stock.finish(worker, stock.ended(good), stock.ended(again, "waiting"), stock.ended(foreign))
    stock.finish(worker, stock.ended(bad, "failed", reason="error"))

    days = {row["org_id"]: row for row in stock.all(tables.rollup_days)}
    hours = {(row["org_id"], row["state"]): row["runs"] for row in stock.all(tables.rollup_hours)}

    assert (days[org]["runs"], days[org]["attempts"], days[org]["handler_seconds"]) == (2, 3, 6)
    assert (days[other]["runs"], days[other]["attempts"], days[other]["handler_seconds"]) == (1, 1, 2)
    assert hours == {(org, "succeeded"): 1, (org, "failed"): 1, (other, "succeeded"): 1}


def test_an_end_lets_the_run_held_behind_it_wait(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    stock.put(stock.run(org, definition, serial=True))
    held = stock.run(org, definition, start_by=stock.now() + timedelta(hours=2))
    stock.hold(held)
    (run,) = stock.admit(worker)
    assert stock.admit(worker) == []

    stock.finish(worker, stock.ended(run))

    live = stock.unended(held.id)
    assert (live["state"], live["reason"]) == ("waiting", "due")
    # Its deadline counts from its promotion.
    assert held.start_by is not None
    assert live["start_by"] - live["available_at"] == held.start_by - held.available_at
    assert live["available_at"] > held.available_at
    assert [run.id for run in stock.admit(worker)] == [held.id]


def test_an_end_waits_for_nobody_who_has_the_held_run_locked(postgres: Database) -> None:
    """The sums of orgs are locked by then, which whoever ends a held run locks after it."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    run = stock.running(worker, org, definition, serial=True)
    held = stock.run(org, definition)
    stock.hold(held)

    with postgres.transaction() as other:
        other.execute(select(tables.live_runs).where(tables.live_runs.c.id == held.id).with_for_update())
        assert stock.finish(worker, stock.ended(run)) == {run.id}
        stays = stock.live(held.id)
    with postgres.transaction() as connection:
        assert statements(connection).promote(connection, None) == 1

    assert stays is not None
    assert stays["state"] == "held"


async def test_an_end_beside_a_held_run_keeps_its_result_while_its_definition_fires(
    postgres: Database, clock: ManualClock
) -> None:
    """Of a child or a backfill. That the held run may wait is decided just before the new one is seen."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    run = stock.running(worker, org, definition)
    stock.hold(stock.run(org, definition))
    next_ = stock.run(org, definition, serial=True)
    store, written = WorkerStore(postgres, worker, timedelta(seconds=30)), list[bool]()
    unstorable = list[Exception]()
    finisher = Finisher(
        store, clock, lambda end, accepted: written.append(accepted), lambda end, why: unstorable.append(why)
    )
    writing = asyncio.create_task(finisher.run())

    with postgres.transaction() as fires:
        statements(fires).fire_write(fires, [next_], [])
        finisher.put(stock.ended(run, result='"good"'))
        await asyncio.to_thread(await_lock, postgres)
    await finisher.flushed()
    writing.cancel()

    assert (written, unstorable) == ([True], [])
    assert stock.stored(run.id)["result"] == "good"


def test_a_retry_keeps_the_run_behind_it_held(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    stock.put(stock.run(org, definition, serial=True))
    held = stock.run(org, definition)
    stock.hold(held)
    (run,) = stock.admit(worker)

    stock.finish(worker, stock.ended(run, "waiting"))

    live = stock.unended(held.id)
    assert live["state"] == "held"


def test_a_run_that_has_ended_never_changes(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)
    stock.finish(worker, stock.ended(run))

    with pytest.raises(DBAPIError, match="a run that has ended never changes"):
        stock.change(tables.runs, run.id, state="failed")


def test_a_result_that_the_database_does_not_take_fails_the_whole_batch(stock: Stock) -> None:
    """The finisher then writes row by row; nothing of the batch may be there already."""
    worker = stock.worker()
    good, bad = stock.running(worker), stock.running(worker)
    batch: list[EndedAttempt] = [stock.ended(good), replace(stock.ended(bad), state="nonsense")]

    with pytest.raises(Exception, match="(?i)check"):
        stock.finish(worker, *batch)

    assert stock.stored(good.id)["state"] is None
    assert stock.finish(worker, batch[0]) == {good.id}


def test_an_end_given_twice_in_one_batch_is_written_once(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)

    assert stock.finish(worker, stock.ended(run), stock.ended(run)) == {run.id}
    assert len(stock.attempts(run.id)) == 1


def test_a_clock_of_the_worker_that_is_wrong_bends_no_attempt(stock: Stock) -> None:
    worker = stock.worker()
    run = stock.running(worker)

    stock.finish(worker, stock.ended(run, ended_at=run.started_at + timedelta(days=1)))

    (attempt,) = stock.attempts(run.id)
    assert attempt["started_at"] <= attempt["ended_at"] <= stock.stored(run.id)["finished_at"]


def test_batches_that_share_runs_in_opposite_orders_do_not_deadlock(postgres: Database) -> None:
    """Both lock in the order of ids; the second finds what the first has written."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org(limit=50)
    stock.put(*(stock.run(org) for _ in range(20)))
    runs = stock.admit(worker)
    ends = [stock.ended(run) for run in runs]
    with postgres.transaction() as first:
        mine = statements(first).finish(first, worker, ends[:10])
    assert stock.finish(worker, *reversed(ends)) == {run.id for run in runs}
    assert len(mine) == 10


def _suspend(connection: Connection, org: OrgId, at: datetime) -> None:
    edit_runs.ask_to_stop(connection, org, reason="suspended", at=at)


def _has_new_secret(connection: Connection, org: OrgId, at: datetime) -> None:
    credentials.try_again(connection, [org], at=at)


@pytest.mark.parametrize("change", [_suspend, _has_new_secret])
def test_a_change_of_many_runs_locks_them_in_the_order_of_ids(
    postgres: Database, change: Callable[[Connection, OrgId, datetime], None]
) -> None:
    """Whatever order they lie in: here the second one was written first."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    stock.put(stock.run(org), stock.run(org, priority=5))
    second, first = (stock.admit(worker, 1)[0] for _ in range(2))
    assert first.id < second.id
    if change is _has_new_secret:
        for run in (second, first):
            stock.finish(
                worker, stock.ended(run, "waiting", reason="no_token", available_after=timedelta(hours=1))
            )
    row = select(tables.live_runs.c.id).with_for_update(nowait=True)

    def changed() -> None:
        with postgres.transaction() as connection:
            change(connection, org, stock.now())

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as batch:
            batch.execute(row.where(tables.live_runs.c.id == first.id)).one()
            done = pool.submit(changed)
            await_lock(postgres)
            batch.execute(row.where(tables.live_runs.c.id == second.id)).one()
        done.result()


def test_an_org_is_suspended_while_its_runs_end(postgres: Database) -> None:
    """Who counts the runs that it ends, as a batch does at last, waits for no other run after that."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    stock.put(stock.run(org), stock.run(org))
    [run] = stock.admit(worker, 1)
    [code] = (row["code"] for row in stock.all(tables.orgs))
    row = select(tables.live_runs.c.id).where(tables.live_runs.c.id == run.id).with_for_update()

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as batch:
            batch.execute(row).one()
            suspended = pool.submit(orgs.set_org_state, postgres, code, "suspended", actor="ada")
            await_lock(postgres)
            ended = stock.ended(run, "cancelled", reason="requested", result=None)
            assert statements(batch).finish(batch, worker, [ended]) == {run.id}
        suspended.result()

    assert stock.all(tables.live_runs) == []


def test_an_org_is_suspended_while_a_run_is_admitted(postgres: Database) -> None:
    """It has run since, and is asked to stop: it does not wait for another attempt."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    run = stock.run(org)
    stock.put(run)
    mine = tables.live_runs.c.id == run.id

    with ThreadPoolExecutor(1) as pool:
        with postgres.transaction() as admission:
            admitted = {"state": "running", "worker_id": worker, "attempt": 1, "fencing_token": 1}
            started = admitted | {"started_at": stock.now(), "reason": None}
            admission.execute(update(tables.live_runs).where(mine).values(**started))
            suspended = pool.submit(orgs.set_org_state, postgres, stock.code(org), "suspended", actor="ada")
            await_lock(postgres)
        suspended.result()

    assert stock.unended(run.id)["cancel_reason"] == "suspended"


def test_the_live_row_exists_exactly_while_the_run_has_no_final_state(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org(limit=30)
    stock.put(*(stock.run(org) for _ in range(12)))
    runs = stock.admit(worker, 9)
    states = ("succeeded", "waiting", "failed")
    stock.finish(worker, *(stock.ended(run, states[n % 3]) for n, run in enumerate(runs)))

    live = {row["id"] for row in stock.all(tables.live_runs)}
    unfinished = {row["id"] for row in stock.all(tables.runs) if row["state"] is None}

    assert live == unfinished
    assert len(live) == 6


def test_the_fence_is_seen_to_matter(stock: Stock) -> None:
    """With a live row that is nobody's, not even its own worker's old token ends it."""
    worker = stock.worker()
    run = stock.running(worker)
    with stock.database.transaction() as connection:
        connection.execute(
            update(tables.live_runs)
            .where(tables.live_runs.c.id == run.id)
            .values(state="waiting", reason="recovered", worker_id=None, started_at=None)
        )

    assert stock.finish(worker, stock.ended(run)) == set()
    assert stock.finish(worker, stock.ended(run, "waiting", trail=Trail(HANDLER))) == set()


def test_a_worker_that_falls_silent_while_it_finishes_keeps_no_other_waiting(
    postgres: Database, migrated_postgres_url: str, clock: ManualClock
) -> None:
    """The sums of an org are one row that all workers add to."""
    stock = Stock(postgres)
    org, worker, silent_worker = stock.org(), stock.worker(), stock.worker()
    stock.put(stock.run(org), stock.run(org))
    (one,), (other,) = stock.admit(silent_worker, free=1), stock.admit(worker, free=1)
    with Proxy(urlsplit(migrated_postgres_url).port or 5432) as proxy:
        proxy.watch = muted = muter(b"INSERT INTO rollup_")
        url = urlsplit(migrated_postgres_url)._replace(netloc=f"postgres@127.0.0.1:{proxy.port}").geturl()
        silent = Database.open(url, clock=clock)
        waiting = Thread(target=lambda: Stock(silent).finish(silent_worker, stock.ended(one)))
        waiting.start()
        muted.sent.wait()

        assert stock.finish(worker, stock.ended(other)) == {other.id}

        assert waiting.is_alive()
        proxy.let_go()
        waiting.join()
        silent.close()
    assert {stock.stored(run.id)["state"] for run in (one, other)} == {"succeeded"}
    assert stock.all(tables.rollup_days)[0]["runs"] == 2
