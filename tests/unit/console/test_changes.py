"""What a list shows of what has happened, and how much of it is new to a page: none twice, none lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.features.console import changes
from worker.features.console.changes import ChangedLists, ListFilter, matches
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.search import KEYS, parsed
from worker.store.lists.live import ChangedRun, Changes, LiveChange

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SECOND = 1_000_000
ACME, OTHER = OrgId("acme"), OrgId("other")


def a_run(**given: Any) -> ChangedRun:
    row: Any = {
        "id": RunId("1"), "org_id": ACME, "definition_id": DefinitionId("d"), "definition": "sync",
        "handler": "crm.sync", "origin": "schedule", "pool": "default", "created_at": NOW,
        "state": "failed", "reason": None,
    }  # fmt: skip
    return row | given


def change(run: str, at: int, what: str = "made", **given: Any) -> LiveChange:
    return LiveChange(run, what, at * SECOND, a_run(id=run, **given))


@pytest.mark.parametrize(
    ("text", "given", "found"),
    [
        ("", {}, True),
        ("definition:sync", {}, True),
        ("definition:other", {}, False),
        ("handler:crm.sync origin:schedule pool:default", {}, True),
        ("handler:crm.other", {}, False),
        ("origin:manual", {}, False),
        ("pool:gpu", {}, False),
        ("since:1h", {}, True),
        ("since:2030-01-01T13:00", {}, False),
        ("until:2030-01-01T13:00", {}, True),
        ("until:2030-01-01T12:00", {}, False),
        ("state:failed,refused", {}, True),
        ("state:succeeded", {}, False),
        # Made, and not ended: it is not on this page yet.
        ("state:failed", {"state": "waiting"}, False),
        ("state:waiting", {"state": "waiting"}, True),
        # It may have left the page, or come to it later.
        ("state:waiting", {"state": "succeeded"}, None),
        ("state:running", {"state": "waiting"}, None),
        ("state:failed,running", {"state": "failed"}, True),
        ("reason:timed_out", {"reason": "timed_out", "revision": "7"}, True),
        ("reason:timed_out", {"reason": "error"}, False),
        ("reason:no_token", {"state": "waiting", "reason": "due"}, None),
        # Words are of orgs, ids and errors, and a cause is of an attempt.
        ("acme", {}, None),
        ("acme state:succeeded", {}, False),
        ("", {"origin": "child"}, False),
        ("children:yes", {"origin": "child"}, True),
        ("children:yes", {}, True),
        ("parent:00000000-0000-0000-0000-000000000000", {"origin": "child"}, None),
        ("cause:disk", {}, None),
        ("cause:disk origin:manual", {}, False),
    ],
)
def test_a_query_is_compared_with_the_row_of_a_run(text: str, given: dict[str, Any], found: bool | None):
    assert matches(parsed(text, now=NOW + timedelta(minutes=30)), a_run(**given)) is found


def test_each_key_of_the_search_is_compared_or_may_find_more():
    """So is a key that is added later: no page says that nothing is new because nobody knew of it."""
    values = {
        "state": "running",
        "since": "2031-01-01",
        "until": "2029-01-01",
        "reason": "timed_out",
        "revision": "7",
        "parent": "00000000-0000-0000-0000-000000000000",
    }
    for key in KEYS.keys() - {"org", "children"}:
        value = values.get(key, "manual" if key == "origin" else "other")
        assert matches(parsed(f"{key}:{value}", now=NOW), a_run()) is not True, key


def test_a_filter_is_of_orgs_and_of_a_definition():
    mine = ListFilter(org_ids=frozenset({ACME}), definition_id=DefinitionId("d"))
    worker = LiveChange("w", "started", 0)

    assert mine.shows(change("1", 0)) is True
    assert mine.shows(change("1", 0, org_id=OTHER)) is False
    assert mine.shows(change("1", 0, definition_id="e")) is False
    assert mine.shows(worker) is False
    assert [ListFilter(of_workers=True).shows(one) for one in (worker, change("1", 0))] == [True, False]


def test_words_of_many_orgs_may_find_more_but_never_in_another_org_than_the_callers():
    query = parsed("org:a", now=NOW)

    assert ListFilter(query).shows(change("1", 0)) is None
    assert ListFilter(query, frozenset({ACME})).shows(change("1", 0)) is True
    assert ListFilter(query, frozenset({ACME})).shows(change("1", 0, org_id=OTHER)) is False


class Reads:
    """The reads of one process, over changes that a test commits when it likes."""

    def __init__(self) -> None:
        self.lists = ChangedLists()
        self.committed: list[LiveChange] = []
        self.most = 1_000
        self.since: list[float] = []

    def read(self, at: float) -> None:
        window = self.lists.window()
        assert window is not None
        since = window.next_since()
        self.since.append(since / SECOND)
        new = sorted((one for one in self.committed if one.at > since), key=lambda one: -one.at)
        begins = new[self.most - 1].at if len(new) >= self.most else since
        found = [one for one in new[: self.most] if one.key not in window]
        self.lists.take(window, since, Changes(found, begins, int(at * SECOND)))


@pytest.fixture
def reads() -> Reads:
    return Reads()


def data(count: int, *, more: bool = False) -> bytes:
    return changes.news(count, more)


def test_a_run_that_was_made_and_has_ended_counts_once(reads: Reads):
    with reads.lists.watching(ListFilter(), 10 * SECOND) as page:
        assert reads.lists.news(page, 10 * SECOND) is None, "before the first read nothing is known"
        reads.read(11)
        assert reads.lists.news(page, 10 * SECOND) == data(0)
        reads.committed += [change("1", 11), change("2", 11)]
        reads.read(12)
        assert reads.lists.news(page, 10 * SECOND) == data(2)
        reads.committed.append(change("1", 12, "ended"))
        reads.read(13)

        assert reads.lists.news(page, 10 * SECOND) == data(2)


def test_pages_of_one_list_share_its_count_each_from_its_own_time(reads: Reads):
    reads.committed = [change("1", 5), change("2", 15), change("1", 25, "ended")]
    with reads.lists.watching(ListFilter(), 20 * SECOND) as late:
        reads.read(30)
        with reads.lists.watching(ListFilter(), 4 * SECOND) as early:
            assert early is late
            assert reads.lists.news(early, 4 * SECOND) is None
            reads.read(31)

            assert reads.lists.news(early, 4 * SECOND) == data(2)
            assert reads.lists.news(late, 20 * SECOND) == data(1)
    assert reads.since == [20, 4]


def test_a_change_that_is_committed_late_is_new_to_the_page_that_did_not_show_it(reads: Reads):
    with reads.lists.watching(ListFilter(), 10 * SECOND) as page:
        reads.read(10)
        reads.read(11)
        # They were not there at 11.
        reads.committed.append(change("1", 9))
        reads.committed.append(change("2", 10))
        reads.read(11.5)

        assert reads.lists.news(page, 10 * SECOND) == data(2)
        reads.read(12.5)
        assert reads.lists.news(page, 10 * SECOND) == data(2)


def test_a_client_that_connects_again_gets_the_same_number(reads: Reads):
    reads.committed = [change(str(number), 10 + number) for number in range(5)]
    place = 12 * SECOND
    with reads.lists.watching(ListFilter(), place) as page:
        reads.read(20)
        before = reads.lists.news(page, place)
    with reads.lists.watching(ListFilter(), place) as page:
        assert reads.lists.news(page, place) is None
        reads.read(60)

        assert reads.lists.news(page, place) == before == data(2)


def test_what_a_read_leaves_out_makes_the_number_a_least_one(reads: Reads):
    reads.most = 3
    reads.committed = [change(str(number), number) for number in range(1, 10)]
    with reads.lists.watching(ListFilter(), 0) as page:
        reads.read(10)

        assert reads.lists.news(page, 0) == data(3, more=True)
        assert reads.lists.news(page, 8 * SECOND) == data(1)
        # It does not help to ask again.
        with reads.lists.watching(ListFilter(), 0):
            reads.read(11)
        assert reads.since == [0, 7]


def test_a_gap_between_reads_makes_the_number_a_least_one(reads: Reads):
    reads.most = 3
    with reads.lists.watching(ListFilter(), 0) as page:
        reads.read(1)
        reads.committed = [change(str(number), 10 + number) for number in range(9)]
        reads.read(20)

        assert reads.lists.news(page, 0) == data(3, more=True)
        assert reads.lists.news(page, 17 * SECOND) == data(1)


def test_what_is_kept_is_bounded(reads: Reads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "MAX_CHANGES", 20)
    monkeypatch.setattr(changes, "MAX_COUNTED", 5)
    with reads.lists.watching(ListFilter(), 0) as page:
        reads.read(0)
        for second in range(1, 11):
            reads.committed += [change(f"{second}-{number}", second) for number in range(3)]
            reads.read(second + 0.5)

        window = reads.lists.window()
        assert window is not None
        assert len(list(window)) == 20
        assert reads.lists.news(page, 0) == data(5, more=True)
        assert reads.lists.news(page, 9 * SECOND) == data(3)


def test_another_list_begins_with_what_is_known(reads: Reads):
    reads.committed = [change("1", 5), change("2", 6, org_id=OTHER)]
    other = ListFilter(org_ids=frozenset({OTHER}))
    with reads.lists.watching(ListFilter(), 0) as every:
        reads.read(10)
        with reads.lists.watching(other, SECOND) as theirs:
            assert reads.lists.news(theirs, SECOND) == data(1)
            reads.committed.append(change("3", 10))
            reads.read(11)

            assert reads.lists.news(theirs, SECOND) == data(1)
            assert reads.lists.news(every, 0) == data(3)
    assert reads.lists.window() is None
