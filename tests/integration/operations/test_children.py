"""Trees of runs as people end, retry and read them, on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conftest import on_either
from tests.fakes.rows import reading
from tests.fakes.site import one_definition
from tests.fakes.stock import Stock
from worker.diagnosis.why import why
from worker.errors import Conflict, UsageError
from worker.ids import ALL_ORGS
from worker.model.runs.children import ChildrenWait, FamilyCap, NewChild
from worker.model.runs.clauses import sentence
from worker.model.runs.waits import NewWait
from worker.model.search import parsed
from worker.operations.runs import cancel, retry, retry_children, run_now
from worker.store import children, families, roles, tables
from worker.store.lists import RUNS, Page, morning, search, tabs
from worker.store.lists import runs as run_lists
from worker.store.lists.read import read
from worker.store.lists.search import runs_of

FILE = one_definition(handler="acme.starts") + 'overlap = "allow"'
OFFERED = {"acme.starts": None, "acme.plain": None}


@pytest.fixture
def tree(apply, database):
    """A run that waits for three children, of which the first succeeded, and the second runs."""

    class Tree:
        def __init__(self):
            apply(FILE)
            self.stock = stock = Stock(database)
            self.worker = stock.worker(handlers=list(OFFERED))
            run_now(database, "org_acme", "digest", actor="tester")
            [self.parent] = stock.admit(self.worker, offered=OFFERED)
            new = [NewChild("acme.plain", f"k{n}", 1, f'{{"n":{n}}}') for n in range(3)]
            cap = FamilyCap("acme.starts")
            placed = stock.within(
                children.start, self.parent, new, cap=cap, keep=False, isolations={"acme.plain": "child"}
            )
            self.ids = [child.run_id for child in placed]
            wait = NewWait("children:gather", 1, "children", children=ChildrenWait(((1, 3),)))
            stock.within(families.open_wait, self.parent, wait)
            parked = stock.ended(self.parent, "parked", outcome="parked", reason="children")
            stock.finish(self.worker, replace(parked, has_children=True))
            one, self.running = stock.admit(self.worker, 2, offered=OFFERED)
            self.end(one)

        def end(self, run, state="succeeded"):
            self.stock.finish(self.worker, replace(self.stock.ended(run, state), is_child=True))
            self.stock.within(families.settle, [run.id])

        def states(self):
            return [reading(database, run_lists.run, ALL_ORGS, id_)["state"] for id_ in self.ids]

    return Tree()


@on_either
def test_cancelling_a_run_cancels_what_it_started(tree, database):
    cancel(database, tree.parent.id, actor="tester")

    assert tree.states() == ["succeeded", "running", "cancelled"]
    assert tree.stock.unended(tree.running.id)["cancel_reason"] == "parent"
    row = reading(database, run_lists.run, ALL_ORGS, tree.ids[2])
    assert (row["reason"], row["parent"]) == ("parent", tree.parent.id)


@on_either
def test_a_run_goes_on_as_its_last_child_is_cancelled(tree, database):
    """Not at the next look of a worker: that may be seconds later, and there may be none.

    An org may do it by the API, with its own rights.
    """
    tree.end(tree.running)

    cancel(database.acting(roles.Scope.of_org(tree.parent.org_id)), tree.ids[2], actor="tester")

    row = reading(database, run_lists.run, ALL_ORGS, tree.parent.id)
    assert (row["state"], row["reason"]) == ("waiting", "resumed")


@on_either
def test_a_run_shows_how_far_its_children_are(tree, database):
    row = reading(database, run_lists.run, "org_acme", tree.parent.id)

    states = {"succeeded": 1, "running": 1, "waiting": 1}
    assert row["children"] == {"total": 3, "ended": 1, "failed": 0, "states": states, "failed_runs": []}
    assert "1 of 3 have ended" in sentence(reading(database, why, tree.parent.id))
    tree.end(tree.running, "failed")
    row = reading(database, run_lists.run, "org_acme", tree.parent.id)
    assert (row["children"]["failed"], row["children"]["failed_runs"]) == (1, [tree.ids[1]])


@on_either
def test_lists_have_children_only_if_they_are_asked_for(tree, database, clock):
    def found(text, **narrowed):
        query = parsed(text, now=clock.now())
        return {row["id"] for row in reading(database, runs_of, ALL_ORGS, query, Page(**narrowed)).rows}

    parent, ids = tree.parent.id, set(tree.ids)
    for page in (Page(), Page(state="waiting"), Page(definition="digest"), Page(state="succeeded")):
        listed = {row["id"] for row in reading(database, read, RUNS, "org_acme", page)}
        assert listed <= {parent}
    assert found("definition:digest") == found("org:org_acme") == found("state:waiting") == {parent}
    assert found(f"parent:{parent}") == ids
    assert found(f"parent:{parent} state:running") == {tree.ids[1]}
    assert found("children:yes") == found("org:org_acme children:yes") == {parent, *ids}
    assert found("children:yes state:succeeded") == found("origin:child state:succeeded") == {tree.ids[0]}
    assert found(tree.ids[2]) == {tree.ids[2]}
    with pytest.raises(UsageError, match="not the whole id of a run"):
        found("parent:0192")


@on_either
def test_a_search_passes_over_a_large_tree(tree, database, clock, monkeypatch):
    """Its windows hold only runs that are listed; else a page would be empty and say where to go on."""
    older = tree.parent.id
    monkeypatch.setattr(search, "WINDOWS", (2,))

    for text in ("", "org:org_acme", "definition:digest", "state:waiting"):
        found = reading(database, runs_of, ALL_ORGS, parsed(text, now=clock.now()), Page(limit=1))
        assert [row["id"] for row in found.rows] == [older], text


@on_either
def test_the_morning_page_counts_parents(tree, database):
    tree.end(tree.running)
    tree.stock.within(families.end_waiting, ALL_ORGS, tree.ids)
    [org_id] = {row["id"] for row in tree.stock.all(tables.orgs)}

    [waiting] = reading(database, morning.waiting, ALL_ORGS)
    assert (waiting.reason, waiting.runs) == ("children", 1)
    assert reading(database, tabs.unfinished, [org_id])["waiting"].total == 1
    assert tree.stock.all(tables.rollup_hours) == []
    # What an org used counts all.
    assert [row["runs"] for row in tree.stock.all(tables.rollup_days)] == [3]
    tree.stock.within(families.settle, tree.ids)
    [again] = tree.stock.admit(tree.worker, offered=OFFERED)
    assert reading(database, morning.running, ALL_ORGS) == 1
    tree.stock.finish(tree.worker, tree.stock.ended(again))
    assert [row["runs"] for row in tree.stock.all(tables.rollup_hours)] == [1]


@on_either
def test_the_morning_page_counts_no_running_child(tree, database):
    assert reading(database, morning.running, ALL_ORGS) == 0
    assert reading(database, morning.running, ALL_ORGS, children=True) == 1


@on_either
def test_a_retry_from_the_checkpoint_starts_only_what_did_not_succeed(tree, database):
    with pytest.raises(Conflict, match="is a child of run"):
        retry(database, tree.ids[0], actor="tester")
    cancel(database, tree.parent.id, actor="tester")

    new = retry(database, tree.parent.id, actor="tester", from_checkpoint=True)

    rows = tree.stock.all(tables.children, tables.children.c.parent_id == new["id"])
    # The one that still runs was asked to stop: it is started again.
    assert [(row["place"], row["run_id"]) for row in rows] == [(1, tree.ids[0])]


@on_either
def test_the_children_that_failed_are_retried_in_one_action(tree, database):
    with pytest.raises(Conflict, match="no child that did not succeed"):
        retry_children(database, tree.parent.id, actor="tester")
    tree.end(tree.running, "failed")

    row, count = retry_children(database, tree.parent.id, actor="tester", org="org_acme")

    assert (row["id"], row["state"], count) == (tree.parent.id, "waiting", 1)
    [link] = tree.stock.all(tables.children, tables.children.c.place == 2)
    assert tree.stock.stored(link["run_id"])["retry_of"] == tree.ids[1]
    counts = reading(database, children.counts, ALL_ORGS, tree.parent.id)
    assert (counts.total, counts.failed, counts.by_state["waiting"]) == (3, 0, 2)


@on_either
def test_the_children_of_a_run_that_failed_are_retried_by_a_new_run(tree, database):
    tree.end(tree.running, "failed")
    [third] = tree.stock.admit(tree.worker, offered=OFFERED)
    tree.end(third)
    [again] = tree.stock.admit(tree.worker, offered=OFFERED)
    tree.stock.finish(tree.worker, tree.stock.ended(again, "failed", reason="error", has_children=True))

    row, count = retry_children(database, tree.parent.id, actor="tester")

    assert (row["origin"], row["retry_of"], count) == ("retry", tree.parent.id, 1)
    taken = tree.stock.all(tables.children, tables.children.c.parent_id == row["id"])
    assert [link["run_id"] for link in taken] == [tree.ids[0], tree.ids[2]]
    cancel(database, row["id"], actor="tester")
    with pytest.raises(Conflict, match="was retried already"):
        retry_children(database, tree.parent.id, actor="tester")
    assert retry_children(database, tree.parent.id, actor="tester", again=True)[0]["id"] != row["id"]


@on_either
def test_what_is_below_a_child_is_in_the_tree_of_the_retry_that_takes_it_up(tree, database):
    new = [NewChild("acme.plain", "below", 1, "{}")]
    tree.stock.within(
        children.start,
        tree.running,
        new,
        cap=FamilyCap("acme.plain"),
        keep=False,
        isolations={"acme.plain": "child"},
    )
    tree.stock.change(
        tables.live_runs, tree.parent.id, available_at=tree.stock.now(), reason="resumed", state="waiting"
    )
    again = next(run for run in tree.stock.admit(tree.worker, offered=OFFERED) if run.id == tree.parent.id)
    tree.stock.finish(tree.worker, tree.stock.ended(again, "failed", reason="error", has_children=True))

    scope = roles.Scope.of_org(tree.parent.org_id)
    row = retry(database.acting(scope), tree.parent.id, actor="tester", from_checkpoint=True)

    below = tree.stock.all(tables.children, tables.children.c.parent_id == tree.running.id)
    assert [link["root_id"] for link in below] == [row["id"]]
    trees = {each["run_id"]: each["root_id"] for each in tree.stock.all(tables.parents)}
    assert trees[tree.running.id] == row["id"]
