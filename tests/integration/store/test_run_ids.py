"""A run by what people give of its id: found in the index, alone, and only in the caller's scope."""

from __future__ import annotations

import pytest

from bench.console import Recorder
from tests.fakes.rows import reading
from tests.fakes.stock import Stock
from worker.errors import AmbiguousRun, NotFound, UsageError
from worker.ids import ALL_ORGS, OrgId, RunId, Scope, given_id, short_id, short_ids
from worker.model.search import Query
from worker.operations.runs import require_run
from worker.store.database import Database
from worker.store.lists import RUNS, Page, run_ids, search
from worker.store.lists import runs as run_lists
from worker.store.lists.read import place_of

TIME = "01a22a45-2bd0"


def made(stock: Stock, org: OrgId, *tails: str, time: str = TIME) -> list[RunId]:
    """Runs of an org that were due together, whose ids end so."""
    ids = [RunId(f"{time}-7000-8000-{tail:0>12}") for tail in tails]
    definition = stock.definition(org)
    stock.put(*(stock.run(org, definition, id=id_) for id_ in ids))
    return ids


def id_of(database: Database, scope: Scope, text: str) -> RunId:
    return reading(database, run_ids.id_of, scope, text)


def test_a_short_id_names_one_run_among_many_that_are_due_together(database: Database, stock: Stock):
    org = stock.org()
    runs = made(stock, org, *(f"{number:x}c8fb{number:03x}" for number in range(300)))

    for id_, short in short_ids(runs).items():
        for scope in (ALL_ORGS, org):
            assert id_of(database, scope, short) == id_
    for text in ("01a22a45..c8fb011", "01A22A45-2BD0...C8FB011", "01a22a452bd0…8000-00011c8fb011"):
        assert id_of(database, org, text) == runs[17]


def test_every_reader_of_a_run_takes_it(database: Database, stock: Stock):
    org = stock.org()
    [run, other] = made(stock, org, "1", "2")
    short, code = short_id(run), stock.code(org)

    with database.autocommit() as connection:
        assert run_lists.run(connection, code, short)["id"] == run
        assert run_lists.with_org(connection, ALL_ORGS, short)[0]["id"] == run
        assert require_run(connection, short, code)["id"] == run
        assert require_run(connection, run[:-1] + "2", None)["id"] == other
        assert place_of(connection, RUNS, code, short) == run
        found = search.runs_of(connection, code, Query(words=(short,)))
    assert [row["id"] for row in found.rows] == [run]


def test_several_that_fit_are_listed_newest_first(database: Database, stock: Stock):
    org, other = stock.org(), stock.org()
    first, second = made(stock, org, "1c8fb", "2c8fb")
    made(stock, other, *(f"3{number}000" for number in range(9)))

    with pytest.raises(AmbiguousRun) as caught:
        id_of(database, ALL_ORGS, f"{TIME}…c8fb")
    rows = caught.value.candidates
    assert [list(row) for row in rows] == [["id", "org", "definition", "scheduled_for"]] * 2
    assert [row["id"] for row in rows] == [second, first]
    assert {row["org"] for row in rows} == {stock.code(org)}
    assert caught.value.message == f"several runs fit {TIME}…c8fb"

    # Of many, some.
    with pytest.raises(AmbiguousRun, match="the newest of them") as caught:
        id_of(database, ALL_ORGS, TIME)
    assert len(caught.value.candidates) == run_ids.CANDIDATES
    found = reading(database, search.runs_of, ALL_ORGS, Query(words=(f"{TIME}..c8fb",)), Page(limit=1))
    assert ([row["id"] for row in found.rows], found.next) == ([second], second)
    rest = reading(
        database, search.runs_of, ALL_ORGS, Query(words=(f"{TIME}..c8fb",)), Page(limit=1, after=second)
    )
    assert [row["id"] for row in rest.rows] == [first]


def test_an_org_finds_only_its_own(database: Database, stock: Stock):
    """Another org's run has the same time and the same tail."""
    org, other = stock.org(), stock.org()
    [mine] = made(stock, org, "1c8fb")
    [theirs] = made(stock, other, "2c8fb")
    short = short_id(mine)

    assert id_of(database, org, short) == mine
    assert id_of(database, other, short) == theirs
    assert id_of(database, org, TIME) == mine
    for text in (f"{TIME}…2c8fb", theirs[:-4]):
        with pytest.raises(NotFound):
            id_of(database, org, text)
    # The control: for all orgs it is not alone.
    with pytest.raises(AmbiguousRun):
        id_of(database, ALL_ORGS, short)


def test_what_fits_none_is_not_found(database: Database, stock: Stock):
    made(stock, stock.org(), "1c8fb")

    for text in (f"{TIME}…c8fc", "01a22a46", "01a22a44…c8fb", "acme", f"{TIME}…", "01a22a4", f"{TIME}…%"):
        with pytest.raises(NotFound):
            id_of(database, ALL_ORGS, text)


def test_a_tail_is_not_looked_for_among_too_many(
    database: Database, stock: Stock, monkeypatch: pytest.MonkeyPatch
):
    runs = made(stock, stock.org(), "1c8fb", "2", "3")
    assert id_of(database, ALL_ORGS, "01a22a45…c8fb") == runs[0]

    monkeypatch.setattr(run_ids, "EXAMINED", 2)
    for tail in ("c8fb", "0003"):
        with pytest.raises(UsageError, match="too many ids begin with 01a22a45"):
            id_of(database, ALL_ORGS, f"01a22a45-2bd…{tail}")
    # Those of one millisecond are few enough, and a beginning alone is not compared.
    assert id_of(database, ALL_ORGS, f"{TIME}…c8fb") == runs[0]
    with pytest.raises(AmbiguousRun):
        id_of(database, ALL_ORGS, "01a22a45")


@pytest.mark.parametrize("text", [f"{TIME}…c8fb", "01a22a45", "01a22a45..fb"])
def test_it_is_found_in_an_index_and_with_a_limit(database: Database, stock: Stock, text: str):
    org, given = stock.org(), given_id(text)
    made(stock, org, "1c8fb")
    assert given is not None
    recorder = Recorder(strict=True)

    with database.autocommit() as connection, recorder.on() as statements:
        for scope in (ALL_ORGS, org):
            run_ids.fitting(connection, scope, given, 6)

    assert len(statements) >= 2
    assert [fault for statement in statements for fault in statement.faults] == []
