"""The values in force of a definition, and where each comes from."""

from __future__ import annotations

from typing import Any

import pytest

from worker.model.definitions.definition import EDITABLE
from worker.model.definitions.effective import GROUPS, effective

SPEC = {"handler": "acme.note", "schedule": "@hourly"}
HANDLER = {
    "scopes": ["read:kb"],
    "timeout": "5m",
    "max_attempts": 7,
    "isolation": "inline",
    "memory": "1GiB",
    "pool": "gpu",
    "egress": ["api"],
    "audiences": ["mcp"],
}


def found(spec: dict[str, Any], key: str, **given: Any) -> tuple[Any, str]:
    values = {"enabled": True, **given}
    [one] = [one for group in effective(spec, **values).values() for one in group if one.key == key]
    return one.value, one.source


@pytest.mark.parametrize(
    ("key", "own", "of_handler", "without"),
    [
        ("timeout", "90s", "5m", "1h"),
        ("max_attempts", 2, 7, 3),
        ("scopes", ["a"], ["read:kb"], []),
        ("isolation", "child", "inline", "child"),
        ("memory", "64MiB", "1GiB", None),
        ("pool", "eu-gpu", "gpu", "default"),
        ("egress", ["public"], ["api"], "not listed"),
        ("audiences", ["kb"], ["mcp"], []),
    ],
)
def test_the_definition_wins_over_its_handler_and_that_over_the_default(
    key: str, own: Any, of_handler: Any, without: Any
):
    shown = "1m30s" if own == "90s" else own
    assert found({**SPEC, key: own}, key, handler=HANDLER) == (shown, "definition")
    assert found(SPEC, key, handler=HANDLER) == (of_handler, "handler")
    assert found(SPEC, key) == (without, "default")
    assert found(SPEC, key, handler=dict.fromkeys(HANDLER)) == (without, "default")


def test_a_handler_that_reaches_nothing_says_something():
    assert found(SPEC, "egress", handler=HANDLER | {"egress": []}) == ([], "handler")
    assert found(SPEC, "audiences", handler=HANDLER | {"audiences": []}) == ([], "default")


def test_a_zone_is_the_orgs_if_the_definition_names_none():
    assert found(SPEC, "timezone", org_timezone="Asia/Tokyo") == ("Asia/Tokyo", "org")
    assert found({**SPEC, "timezone": "UTC"}, "timezone", org_timezone="Asia/Tokyo") == ("UTC", "definition")
    assert found(SPEC, "timezone") == ("UTC", "default")


def test_a_pool_is_the_orgs_if_neither_definition_nor_handler_name_one():
    assert found(SPEC, "pool", org_pool="eu") == ("eu", "org")
    assert found(SPEC, "pool", handler=HANDLER, org_pool="eu") == ("gpu", "handler")
    assert found({**SPEC, "pool": "us"}, "pool", handler=HANDLER, org_pool="eu") == ("us", "definition")


def test_what_a_template_made_comes_from_it():
    assert found(SPEC, "schedule", is_of_template=True) == ("@hourly", "template")
    assert found(SPEC, "overlap", is_of_template=True) == ("skip", "default")


def test_disabled_is_a_choice_and_enabled_the_default():
    assert found(SPEC, "enabled") == (True, "default")
    assert found(SPEC, "enabled", enabled=False) == (False, "definition")


def test_every_key_of_a_definition_is_in_one_group():
    grouped = [key for keys in GROUPS.values() for key in keys]

    assert sorted(grouped) == sorted(EDITABLE)
