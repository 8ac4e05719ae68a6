"""States of definitions: committed with a success, fenced, loaded after every change by hand."""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

import pytest
from psycopg import DataError

from tests.fakes.stock import Stock, await_lock
from worker.ids import DefinitionId, OrgId, WorkerId
from worker.model.runs.run import AdmittedRun, LoadedState
from worker.store import definitions, states, tables, workers
from worker.store.database import Database


def admitted(stock: Stock, worker: WorkerId, org: OrgId, definition: DefinitionId, **run: Any) -> AdmittedRun:
    return stock.running(worker, org, definition, serial=True, **run)


def loaded(stock: Stock, run: AdmittedRun) -> LoadedState:
    return stock.within(states.load, run)


def state_of(stock: Stock, definition: DefinitionId) -> dict[str, Any] | None:
    rows = stock.all(tables.definition_states, tables.definition_states.c.definition_id == definition)
    return rows[0] if rows else None


def test_a_success_commits_the_state_and_the_next_attempt_loads_it(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    first = admitted(stock, worker, org, definition)
    assert loaded(stock, first) == LoadedState({}, commits=True)

    stock.finish(worker, stock.ended(first, definition_state='{"cursor":5}'))

    second = admitted(stock, worker, org, definition)
    assert loaded(stock, second).value == {"cursor": 5}
    stock.finish(worker, stock.ended(second, definition_state='{"cursor":"é"}'))
    row = state_of(stock, definition)
    assert row is not None
    assert (row["data"], row["version"], row["org_id"]) == ({"cursor": "é"}, 2, org)
    assert (row["run_id"], row["updated_by"]) == (second.id, "worker")
    assert row["updated_at"] == stock.stored(second.id)["finished_at"]


def test_a_success_that_changes_nothing_leaves_the_row_alone(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    for state in ('{"n":1}', None):
        stock.finish(worker, stock.ended(admitted(stock, worker, org, definition), definition_state=state))

    row = state_of(stock, definition)
    assert row is not None and (row["data"], row["version"]) == ({"n": 1}, 1)


def test_a_batch_commits_the_states_of_its_successes_only(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    made = [stock.definition(org) for _ in range(5)]
    runs = [admitted(stock, worker, org, definition) for definition in made]
    ends = [
        stock.ended(runs[0], definition_state='{"n":0}'),
        stock.ended(runs[1], "failed", reason="error", definition_state='{"n":1}'),
        stock.ended(runs[2]),
        stock.ended(runs[3], definition_state='{"n":3}'),
        stock.ended(runs[4], "waiting", definition_state='{"n":4}'),
    ]

    assert stock.finish(worker, *ends) == {run.id for run in runs}

    found = [state_of(stock, definition) for definition in made]
    assert [row and row["data"] for row in found] == [{"n": 0}, None, None, {"n": 3}, None]


def test_a_worker_that_lost_the_run_commits_nothing(stock: Stock) -> None:
    """Also not beside others that it still owns, nor when it writes an end again."""
    late, worker, org = stock.worker(), stock.worker(), stock.org()
    definition, other = stock.definition(org), stock.definition(org)
    lost = admitted(stock, late, org, definition)
    with stock.database.transaction() as connection:
        workers.unregister(connection, late)
        workers.recover(connection, max_recoveries=3)
    stock.make_available(lost.id)
    (taken,) = stock.admit(worker)
    mine = admitted(stock, worker, org, other)

    assert stock.finish(late, stock.ended(lost, definition_state='{"by":"late"}')) == set()
    ends = [stock.ended(mine, definition_state='{"n":1}'), stock.ended(taken, definition_state='{"n":2}')]
    assert stock.finish(worker, *ends) == {mine.id, taken.id}
    third = admitted(stock, worker, org, definition)
    stock.finish(worker, stock.ended(third, definition_state='{"n":3}'))
    assert stock.finish(worker, *ends) == {mine.id, taken.id}

    row, beside = state_of(stock, definition), state_of(stock, other)
    assert row is not None and (row["data"], row["version"]) == ({"n": 3}, 2)
    assert beside is not None and beside["data"] == {"n": 1}


def test_a_backfill_and_a_retry_of_its_run_only_read(stock: Stock) -> None:
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    stock.finish(
        worker, stock.ended(admitted(stock, worker, org, definition), definition_state='{"cursor":5}')
    )

    def end(**run: Any) -> AdmittedRun:
        one = admitted(stock, worker, org, definition, **run)
        assert loaded(stock, one).value == {"cursor": 5}
        stock.finish(worker, stock.ended(one))
        return one

    past = end(origin="backfill")
    again = end(origin="retry", retry_of=past.id)
    thrice = end(origin="retry", retry_of=again.id)
    plain = end(origin="manual")
    retried = end(origin="retry", retry_of=plain.id)
    assert [loaded(stock, run).commits for run in (past, again, thrice, plain, retried)] == [
        *(False, False, False),
        *(True, True),
    ]


def test_what_the_database_refuses_commits_nothing(postgres: Database) -> None:
    """The finisher then writes the end as failed(result_unstorable), without a state."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    run = admitted(stock, worker, org, definition)

    with pytest.raises(DataError, match="unsupported Unicode escape"):
        stock.finish(worker, stock.ended(run, definition_state='{"a":"\\u0000"}'))

    assert state_of(stock, definition) is None
    assert stock.live(run.id) is not None


def test_an_attempt_that_starts_beside_a_change_by_hand_loads_what_it_set(postgres: Database) -> None:
    """The change has found nothing running; the attempt would commit over it if it loaded the old state."""
    stock = Stock(postgres)
    worker, org = stock.worker(), stock.org()
    definition = stock.definition(org)
    run = admitted(stock, worker, org, definition)
    found: list[LoadedState] = []
    began = Event()

    def load() -> None:
        began.set()
        found.append(loaded(stock, run))

    with postgres.transaction() as connection:
        definitions.require_by_id(connection, org, definition)
        reader = Thread(target=load)
        reader.start()
        assert began.wait(10)
        await_lock(postgres)
        assert not found
        states.put(connection, org, definition, {"set": "by hand"}, at=stock.now(), by="ada")
    reader.join(10)

    assert found == [LoadedState({"set": "by hand"}, commits=True)]
