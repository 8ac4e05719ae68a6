"""Rules of pools: which tokens may be used in a pool."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import TokenRefused
from worker.guard.claims import Claims, Flag
from worker.model.claims import PoolRules, pool_mismatch

AT = datetime(2030, 1, 1, tzinfo=UTC)


def claims(**properties: Any) -> Claims:
    return Claims("org_acme", "client", frozenset(), properties, {"region": Flag("string", "eu")}, AT, AT)


@pytest.mark.parametrize(
    ("expected", "value", "allowed"),
    [
        ("eu", "eu", True),
        ("eu", "EU", False),
        ("eu", " eu", False),
        ("eu", ["eu"], False),
        ("eu", None, False),
        ("", None, False),
        (True, "true", True),
        (True, True, True),
        (True, 1, False),
        (True, "1", False),
        (False, "false", True),
        (4, "4", True),
        (4, 4.0, True),
        (4, True, False),
        (4.5, "4.5", True),
        ("4", 4, True),
    ],
    ids=repr,
)
def test_a_property_has_exactly_the_value_of_the_rule(expected: Any, value: Any, allowed: bool) -> None:
    found = pool_mismatch("eu", claims(region=value), {"eu": {"region": expected}})

    assert found == (None if allowed else "region")


def test_a_property_that_is_missing_does_not_match_whatever_flag_has_its_name() -> None:
    assert pool_mismatch("eu", claims(), {"eu": {"region": "eu"}}) == "region"


def test_all_properties_of_the_pool_are_required_and_no_others() -> None:
    rules = {"eu": {"region": "eu", "tier": "gold"}, "us": {"region": "us"}}

    assert pool_mismatch("eu", claims(region="eu"), rules) == "tier"
    assert pool_mismatch("eu", claims(region="eu", tier="gold", more="x"), rules) is None
    assert pool_mismatch("default", claims(), rules) is None


def test_own_and_stored_rules_both_hold() -> None:
    rules = PoolRules(own={"eu": {"region": "eu"}}, stored={"eu": {"tier": "gold"}, "us": {"region": "us"}})

    for pool, token in (("eu", claims(region="eu")), ("eu", claims(tier="gold")), ("us", claims())):
        with pytest.raises(TokenRefused) as refused:
            rules.enforce(pool, token)
        assert refused.value.reason == "pool_mismatch"
    rules.enforce("eu", claims(region="eu", tier="gold"))


def test_a_pool_whose_stored_rules_differ_from_its_own_is_not_used() -> None:
    rules = PoolRules(own={"eu": {"copies": 2, "paid": True}, "us": {"region": "us"}})

    rules.stored = {"eu": {"copies": "2", "paid": "true"}, "us": {"region": "usa"}, "gpu": {"gpu": "yes"}}

    assert rules.differing == {"us"}
    assert rules.usable(["default", "eu", "us", "gpu"]) == ("default", "eu", "gpu")
