"""Budgets of a file, and the days and months that they are for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as some

from worker.errors import DefinitionError
from worker.model.definitions.budgets import MAX_AMOUNT, BudgetEntry, limit_of_property, period_of
from worker.model.definitions.file import parse_file
from worker.model.orgs import Selector

RIGHT = {"org": '"org_acme"', "meter": '"llm_tokens"', "limit": "1000", "per": '"day"'}
# Zones whose midnight does not exist on some days, or comes twice, or that have lost a whole day.
ZONES = (
    *("UTC", "Europe/Berlin", "America/Sao_Paulo", "America/Havana", "Asia/Beirut", "Africa/Cairo"),
    *("Pacific/Apia", "Australia/Lord_Howe", "Pacific/Chatham", "America/Asuncion"),
)


def budget(**keys: str | None) -> str:
    values = RIGHT | keys
    return "[[budget]]\n" + "".join(f"{key} = {value}\n" for key, value in values.items() if value)


def test_a_budget_is_for_an_org_or_for_those_that_it_selects():
    file = parse_file(
        budget(at_limit='"ask"', warn_at="0.5", zone='"Europe/Berlin"')
        + budget(org=None, orgs='{ tags = ["pro"] }', limit=None, limit_from='"property:daily_tokens"')
    )

    one, many = file.budgets
    assert one == BudgetEntry(
        "llm_tokens", "day", org="org_acme", limit=1000, at_limit="ask", warn_at=0.5, zone="Europe/Berlin"
    )
    assert (many.orgs, many.property_name) == (Selector(tags=frozenset({"pro"})), "daily_tokens")
    assert (many.at_limit, many.warn_at, many.zone) == ("wait", 0.8, None)


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"org": None}, "org"),
        ({"orgs": '"all"'}, "orgs"),
        ({"limit": None}, "limit"),
        ({"limit_from": '"property:x"'}, "limit_from"),
        ({"limit": None, "limit_from": '"daily_tokens"'}, "limit_from"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "1.5"}, "limit"),
        ({"limit": str(MAX_AMOUNT + 1)}, "limit"),
        ({"meter": None}, "meter"),
        ({"meter": '"two words"'}, "meter"),
        ({"per": None}, "per"),
        ({"per": '"week"'}, "per"),
        ({"per": '"run"'}, "at_limit"),
        ({"per": '"run"', "at_limit": '"fail"', "zone": '"UTC"'}, "zone"),
        ({"zone": '"Mars/Olympus"'}, "zone"),
        ({"at_limit": '"stop"'}, "at_limit"),
        ({"warn_at": "0"}, "warn_at"),
        ({"warn_at": "1.1"}, "warn_at"),
        ({"meter": '"runs"', "at_limit": '"fail"'}, "at_limit"),
        ({"meter": '"run_seconds"', "per": '"run"', "at_limit": '"fail"'}, "per"),
        ({"meter": '"egress_requests"'}, "meter"),
        ({"meter": '"egress_wait_seconds"', "per": '"month"'}, "meter"),
        ({"limits": "1"}, "limits"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(keys: dict[str, str | None], field: str):
    with pytest.raises(DefinitionError) as refused:
        parse_file(budget(**keys))

    assert refused.value.field == field
    assert refused.value.entry.startswith("budget number 1")


def test_the_same_orgs_have_one_budget_of_a_meter_and_a_period():
    with pytest.raises(DefinitionError, match="twice"):
        parse_file(budget() + budget(limit="2000"))
    parse_file(budget() + budget(per='"month"') + budget(meter='"calls"') + budget(org='"org_beta"'))


@given(
    some.sampled_from(ZONES),
    some.sampled_from(("day", "month")),
    some.datetimes(datetime(2005, 1, 1), datetime(2035, 1, 1)),
)
def test_every_moment_is_in_one_period_that_the_next_one_follows(zone: str, per: str, at: datetime):
    moment = at.replace(tzinfo=UTC)

    start, end = period_of(per, ZoneInfo(zone), moment)  # type: ignore[arg-type]

    assert start <= moment < end
    assert period_of(per, ZoneInfo(zone), end).start == end  # type: ignore[arg-type]
    assert period_of(per, ZoneInfo(zone), end - timedelta(microseconds=1)) == (start, end)  # type: ignore[arg-type]


def test_a_day_is_as_long_as_its_zone_makes_it():
    berlin = ZoneInfo("Europe/Berlin")
    spring = period_of("day", berlin, datetime(2026, 3, 29, 12, tzinfo=UTC))
    autumn = period_of("day", berlin, datetime(2026, 10, 25, 12, tzinfo=UTC))

    assert (spring.end - spring.start, autumn.end - autumn.start) == (
        timedelta(hours=23),
        timedelta(hours=25),
    )
    assert period_of("month", berlin, datetime(2026, 12, 31, 23, 30, tzinfo=UTC)).start == datetime(
        2026, 12, 31, 23, tzinfo=UTC
    )


def test_a_property_is_a_limit_if_it_is_a_whole_number():
    assert [limit_of_property(value) for value in (7, "7", " 70 ", 7.0, 0)] == [7, 7, 70, 7, 0]
    assert [limit_of_property(value) for value in (None, "many", 1.5, True, -1, "-1", [7])] == [None] * 7
    assert limit_of_property("9" * 30) == MAX_AMOUNT
