"""Skips: as few rows as tell the truth."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.clock import utc
from worker.ids import DefinitionId, OrgId
from worker.model.runs.run import NewSkip, StoredSkip, fold

DEFINITION = DefinitionId("d")
MIDNIGHT = utc("2030-01-02T00:00")


def skip(since: datetime, until: datetime | None = None, count: int = 1) -> NewSkip:
    return NewSkip(OrgId("o"), DEFINITION, 1, since, until or since, count, "overlap")


def test_what_follows_on_grows_the_stored_row() -> None:
    stored = StoredSkip("s", skip(utc("2030-01-01T01:00"), utc("2030-01-01T02:00"), 2))

    grown, new = fold(
        [skip(utc("2030-01-01T04:00")), skip(utc("2030-01-01T03:00"))], {DEFINITION: stored}, {}
    )

    assert new == []
    (row,) = grown
    assert (row.id, row.skip.skipped_until, row.skip.count) == ("s", utc("2030-01-01T04:00"), 4)


def test_a_run_in_between_begins_a_new_row() -> None:
    first, second = skip(utc("2030-01-01T01:00")), skip(utc("2030-01-01T03:00"))
    ran = {(DEFINITION, second.skipped_from): utc("2030-01-01T02:00")}

    assert fold([first, second], {}, ran)[1] == [first, second]


def test_a_row_ends_at_midnight() -> None:
    before, after = skip(MIDNIGHT - timedelta(seconds=1)), skip(MIDNIGHT)

    assert fold([before, after], {}, {})[1] == [before, after]


def test_definitions_do_not_mix() -> None:
    mine = skip(utc("2030-01-01T01:00"))
    other = replace(skip(utc("2030-01-01T02:00")), definition_id=DefinitionId("e"))

    assert fold([mine, other], {}, {})[1] == [mine, other]


@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(("missed", "overlap")), st.integers(1, 2)),
        unique_by=lambda item: item[0],
    ),
    st.sets(st.integers(0, 200)),
)
def test_no_instant_is_lost_or_counted_twice(items: list[tuple[int, str, int]], ran: set[int]) -> None:
    """Whatever comes in, the counts add up, no row holds a run, and each lies within one day."""
    start = MIDNIGHT - timedelta(minutes=100)
    skips = [
        replace(skip(start + timedelta(minutes=n)), reason=reason, revision=revision)
        for n, reason, revision in items
        if n not in ran
    ]
    runs = sorted(start + timedelta(minutes=n) for n in ran)
    before = {
        (DEFINITION, each.skipped_from): max((at for at in runs if at < each.skipped_from), default=None)
        for each in skips
    }

    _, new = fold(skips, {}, before)

    assert sum(row.count for row in new) == len(skips)
    for row in new:
        assert row.skipped_from.date() == row.skipped_until.date()
        assert not any(row.skipped_from < at < row.skipped_until for at in runs)
        inside = [s for s in skips if row.skipped_from <= s.skipped_from <= row.skipped_until]
        assert {(s.reason, s.revision) for s in inside} == {(row.reason, row.revision)}
        assert len(inside) == row.count
