"""How many token requests a day definitions imply."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.fakes.issuer import kinde_issuer
from worker.diagnosis.requirements import OrgDefinitions, TokenForecast, requests_a_day
from worker.ids import OrgId
from worker.model.definitions.definition import Definition
from worker.model.orgs import OrgRef
from worker.settings.sections import TokenSettings

DAY = 86_400.0
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("runs", "lifetime", "expected"),
    [
        ([(1440, None)], DAY, 2),  # a token of a day serves a day, renewed early
        ([(1440, None)], 3600.0, 33),
        ([(24, None)], 1200.0, 24),  # never more than runs
        ([(0, None)], DAY, 0),
        ([(1440, timedelta(minutes=5))], DAY, 290),
        ([(1440, timedelta(seconds=1))], DAY, 1440),  # a minute is the floor
        ([(1440, None), (24, MINUTE)], DAY, 26),  # they share a token; only the second asks for newer ones
    ],
)
def test_requests_follow_schedules_lifetimes_and_claims_age(runs, lifetime, expected):
    assert requests_a_day(runs, lifetime) == expected


def test_each_worker_has_a_cache_of_its_own():
    assert requests_a_day([(1440, None)], 3600.0, workers=3) == 99
    assert requests_a_day([(24, None)], 3600.0, workers=3) == 24


NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def forecast(
    orgs: int, *, lifetime: float = 3600, schedule: str = "0 9 * * *", ahead: str = "15m"
) -> dict[str, Any]:
    """The row of an issuer of ten requests a second, of orgs with one definition each."""
    one = TokenForecast("main", lifetimes=[lifetime])
    definition = Definition("org", "daily", "acme.note", schedule)
    settings = TokenSettings(ahead=ahead)
    for number in range(orgs):
        ref = OrgRef(OrgId(f"id-{number}"), f"org_{number}")
        org = OrgDefinitions(ref, "main", "active", None, 10, [definition])
        one.add(org, ISSUER, NoHandlers(), NOON, 1)
    one.add_up(NOON, settings.ahead)
    return one.as_row(ISSUER, NOON, settings)


class NoHandlers:
    def pool_of(self, definition: Definition, org_pool: str | None) -> str:
        return "default"

    def scopes_of(self, handler: str, pool: str) -> frozenset[str]:
        return frozenset()


ISSUER = kinde_issuer(max_requests_per_second=10.0)


def test_a_full_hour_that_can_be_prepared_needs_no_advice():
    row = forecast(8000)

    assert (row["tokens_at_once"], row["tokens_ahead"], row["advice"]) == (8000, 8400, None)
    assert row["tokens_at"] == datetime(2030, 1, 2, 9, tzinfo=UTC)


def test_more_tokens_than_can_be_prepared_get_an_advice():
    row = forecast(20_000)

    assert row["problem"] is None
    assert row["advice"] == (
        "20000 tokens are needed at 09:00 UTC and 8400 can be ready by then: some runs wait up to 19m20s for "
        'theirs. What helps: max_requests_per_second = 24; [tokens] ahead = "36m"; spread in the definitions'
    )


def test_tokens_that_live_too_shortly_get_an_advice():
    row = forecast(8000, lifetime=300)

    assert row["tokens_ahead"] == 2700
    assert "a longer lifetime of the tokens" in row["advice"]


def test_spread_definitions_need_fewer_at_once():
    assert forecast(8000, schedule="@hourly")["tokens_at_once"] < 8000 * 0.6
