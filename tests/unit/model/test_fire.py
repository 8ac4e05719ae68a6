"""Fire, the pure part: a due definition and the time -> runs, skips, and what is next."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import utc
from worker.errors import DefinitionError
from worker.ids import DefinitionId, OrgId
from worker.model.definitions.triggers import parse_schedule
from worker.model.definitions.zones import parse_zone
from worker.model.runs.fire import decide, spread_of
from worker.model.runs.run import Decision, Declared, DueDefinition, Isolation, NextFire

HOUR = timedelta(hours=1)


def fire(
    first: str, now: str, *, wants: Isolation = "child", zone: str | None = None, **spec: Any
) -> Decision:
    due = DueDefinition(
        DefinitionId("d"),
        OrgId("o"),
        "org_acme",
        zone,
        "digest",
        3,
        utc(first),
        {"handler": "acme.digest", "schedule": "0 * * * *"} | spec,
    )
    return decide(due, utc(now), lambda handler: Declared(wants))


def test_a_due_instant_becomes_a_run_of_its_revision():
    decision = fire("2030-01-01T01:00", "2030-01-01T01:00:01", priority=4, max_concurrent=2, overlap="allow")

    (run,) = decision.runs
    assert (run.scheduled_for, run.available_at) == (utc("2030-01-01T01:00"), utc("2030-01-01T01:00"))
    assert (run.origin, run.revision, run.serial, run.priority, run.max_concurrent) == (
        "schedule",
        3,
        False,
        4,
        2,
    )
    assert run.idempotency_key == run.id
    assert decision.skips == []
    assert decision.next == NextFire(DefinitionId("d"), utc("2030-01-01T02:00"), utc("2030-01-01T02:00"))


def test_missed_instants_become_skips_of_its_revision():
    decision = fire("2030-01-01T01:00", "2030-01-01T04:30")

    (skip,) = decision.skips
    assert (skip.skipped_from, skip.skipped_until) == (utc("2030-01-01T01:00"), utc("2030-01-01T03:00"))
    assert (skip.count, skip.reason, skip.revision) == (3, "missed", 3)
    assert [run.scheduled_for for run in decision.runs] == [utc("2030-01-01T04:00")]


def test_spread_moves_the_firing_and_never_the_instant():
    spread = spread_of("org_acme", "digest", "@hourly", parse_schedule("@hourly", parse_zone("UTC")))
    fires_at = utc("2030-01-01T01:00") + spread

    early = fire("2030-01-01T01:00", (fires_at - timedelta(microseconds=1)).isoformat(), schedule="@hourly")
    due = fire("2030-01-01T01:00", fires_at.isoformat(), schedule="@hourly")

    assert timedelta(0) < spread < HOUR
    assert early.runs == []
    assert early.next.next_fire_at == fires_at
    assert due.runs[0].scheduled_for == utc("2030-01-01T01:00")
    assert due.runs[0].available_at == fires_at
    assert due.next == NextFire(DefinitionId("d"), utc("2030-01-01T02:00"), fires_at + HOUR)


def test_the_start_deadline_counts_from_when_the_run_could_first_start():
    on_time = fire("2030-01-01T01:00", "2030-01-01T01:00:01").runs[0]
    missed = fire("2030-01-01T01:00", "2030-01-01T01:45").runs[0]
    set_by_hand = fire("2030-01-01T01:00", "2030-01-01T01:00", start_deadline="5m").runs[0]

    assert on_time.start_by == utc("2030-01-01T02:00:01")
    assert missed.start_by == utc("2030-01-01T02:45")
    assert set_by_hand.start_by == utc("2030-01-01T01:05")


def test_the_definition_decides_on_isolation_before_its_handler_does():
    assert fire("2030-01-01T01:00", "2030-01-01T01:00", wants="inline").runs[0].isolation == "inline"
    assert (
        fire("2030-01-01T01:00", "2030-01-01T01:00", wants="inline", isolation="child").runs[0].isolation
        == "child"
    )


def test_a_run_with_variants_names_every_handler_it_may_need():
    variants = [{"flag": "agent-v2", "handler": "acme.digest_v2"}]

    assert fire("2030-01-01T01:00", "2030-01-01T01:00").runs[0].variant_handlers == ()
    assert fire("2030-01-01T01:00", "2030-01-01T01:00", variants=variants).runs[0].variant_handlers == (
        "acme.digest",
        "acme.digest_v2",
    )


def test_the_orgs_zone_holds_where_the_definition_names_none():
    decision = fire("2030-01-01T02:00", "2030-01-01T02:00", schedule="0 3 * * *", zone="Europe/Berlin")

    assert decision.runs[0].scheduled_for == utc("2030-01-01T02:00")


def test_a_spec_that_is_not_understood_is_an_error_and_not_a_guess():
    with pytest.raises(DefinitionError):
        fire("2030-01-01T01:00", "2030-01-01T01:00", colour="red")
