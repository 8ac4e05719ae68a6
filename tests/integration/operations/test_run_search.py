"""A page of runs is the same however few of them are looked at for it."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest

from tests.conftest import on_either
from tests.fakes.stock import Stock
from worker.ids import ALL_ORGS
from worker.store import tables
from worker.store.lists import Page
from worker.store.lists import runs as run_lists

pytestmark = on_either

NAMES = ("digest", "export", "rare")
STATES = (None, "succeeded", "failed", "refused")


@pytest.fixture
def stock(database):
    return Stock(database)


@pytest.fixture
def history(database, stock):
    """Sixty runs of two orgs and three names, most of them ended; newest first, as (org, name, state)."""
    orgs = [stock.org() for _ in range(2)]
    named = {}
    for org, name in itertools.product(orgs, NAMES):
        id_ = named[org, name] = stock.definition(org)
        stock.change(tables.definitions, id_, name=name)
    made = []
    for number in range(60):
        org = orgs[number % 7 % 2]
        name = "rare" if number in (3, 4) else NAMES[number // 3 % 2]
        run = stock.run(org, named[org, name])
        stock.put(run)
        state = "waiting" if number > 55 else STATES[1 + (number * 5 % 11 > 7) + (number in (1, 3, 20))]
        if state != "waiting":
            with database.transaction() as connection:
                live, runs = tables.live_runs, tables.runs
                connection.execute(live.delete().where(live.c.id == run.id))
                ended = {"state": state, "finished_at": stock.now(), "attempt": 1}
                connection.execute(runs.update().where(runs.c.id == run.id).values(**ended))
        made.append((run.id, org, name, state))
    return made[::-1]


@pytest.mark.parametrize("window", [1, 5, 20, 1000])
def test_a_page_is_the_newest_that_meet_every_condition(database, history, monkeypatch, window):
    monkeypatch.setattr(run_lists, "WINDOW", window)
    orgs = {org for _, org, _, _ in history}
    after = history[10][0]
    with database.autocommit() as connection:
        for org, name, state, start in itertools.product(
            (None, *orgs), (None, *NAMES, "nothing"), (*STATES, "waiting"), (None, after)
        ):
            page = Page(definition=name, state=state, after=start)
            found = run_lists.find(connection, ALL_ORGS if org is None else org, page, 4)
            meets = [
                id_
                for id_, of, called, ended in history
                if (org in (None, of)) and name in (None, called) and state in (None, ended)
            ]
            assert found == [id_ for id_ in meets if start is None or id_ < start][:4]


def test_runs_made_before_since_are_left_out(database, history, rows):
    with database.autocommit() as connection:
        for state in ("waiting", "succeeded"):
            soon, long_ago = rows.now() + timedelta(hours=1), rows.now() - timedelta(hours=1)
            find = run_lists.find
            page = Page(state=state, definition="digest", since=soon)
            assert find(connection, ALL_ORGS, page, 50) == []
            assert find(connection, ALL_ORGS, Page(state=state, definition="digest", since=long_ago), 50)
