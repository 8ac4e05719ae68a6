"""Definitions as a file has them: every key, its default, its spec, and what is refused where."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import utc
from worker.errors import DefinitionError, InvalidTrigger
from worker.model.definitions import MisfirePolicy, RetryPolicy
from worker.model.definitions.definition import (
    Definition,
    FlagCondition,
    Variant,
    from_spec,
    parse_definition,
    to_spec,
)

LEAST: dict[str, Any] = {
    "org": "org_acme",
    "name": "nightly-digest",
    "handler": "acme.digest",
    "schedule": "0 3 * * *",
}
FULL: dict[str, Any] = LEAST | {
    "timezone": "Europe/Berlin",
    "scopes": ["read:kb", "read:kb"],
    "audience": "https://api.acme.com",
    "params": {"collection": "faq", "deep": {"list": [1, 2.5, None, True]}},
    "params_by_hand": ["collection"],
    "requires_flag": {"flag": "model", "equals": "new"},
    "requires_properties": ["region"],
    "variants": [{"flag": "agent-v2", "handler": "acme.digest_v2"}],
    "overlap": "queue_one",
    "misfire": "all",
    "misfire_grace": "2m",
    "misfire_within": "6h",
    "misfire_limit": 5,
    "start_deadline": "30m",
    "timeout": "2h",
    "cancel_grace": "20s",
    "max_attempts": 4,
    "retry_backoff": "5s",
    "retry_backoff_max": "10m",
    "max_recoveries": 0,
    "isolation": "inline",
    "memory": "512MiB",
    "priority": -3,
    "max_concurrent": 2,
    "spread": "10m",
    "pause_after_failures": 7,
    "starts_at": "2027-01-01T08:00:00+01:00",
    "ends_at": utc("2028-01-01"),
    "max_claims_age": "60s",
    "api_origins": ["https://api.acme.com", "http://127.0.0.1:8080"],
    "api_base_url": "https://api.acme.com/v1",
    "egress": ["api", "https://*.example.com"],
    "audiences": ["https://mcp.example.com"],
    "reveal_token": True,
    "enabled": False,
}


def parse(**changes: Any) -> Definition:
    return parse_definition(LEAST | changes, entry="definition org_acme/nightly-digest")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("egress", "api", "expected a list of texts"),
        ("egress", ["api.example.com"], "'api.example.com' is not allowed here; write \"api\""),
        ("egress", [f"https://{n}.example" for n in range(101)], "more than 100 items"),
        ("egress", ["https://*.github.io"], "anyone can have a name below github.io"),
        ("audiences", ["x" * 301], "an audience is a text of 1 to 300"),
        ("reveal_token", "yes", "expected true or false"),
    ],
)
def test_what_a_definition_lists_of_the_network_is_checked(key: str, value: Any, message: str):
    with pytest.raises(DefinitionError, match=re.escape(message)) as refused:
        parse(**{key: value})

    assert refused.value.field == key


def test_to_list_nothing_is_kept():
    spec = to_spec(parse(egress=[], audiences=[], reveal_token=False))

    assert (spec["egress"], spec["audiences"]) == ([], [])
    assert "reveal_token" not in spec
    assert from_spec("o", "n", spec).egress == ()
    assert parse().egress is None


def test_a_stored_wildcard_is_read_whatever_the_list_of_suffixes_says_today():
    spec = to_spec(parse()) | {"egress": ["https://*.github.io"]}

    assert from_spec("o", "n", spec).egress == ("https://*.github.io",)


def test_a_definition_needs_four_keys_and_has_the_documented_defaults():
    definition = parse()

    assert definition == Definition("org_acme", "nightly-digest", "acme.digest", "0 3 * * *")
    assert definition.enabled
    assert definition.serial
    assert definition.overlap == "skip"
    assert definition.misfire_policy == MisfirePolicy("once", timedelta(seconds=60), None, 100)
    assert definition.retry_policy() == RetryPolicy(3, timedelta(seconds=10), timedelta(hours=1), 3)
    assert definition.timeout_or(None) == timedelta(hours=1)
    assert definition.cancel_grace == timedelta(seconds=10)
    assert to_spec(definition) == {"handler": "acme.digest", "schedule": "0 3 * * *"}


def test_every_key_is_read_and_survives_the_spec_as_json():
    definition = parse_definition(FULL, entry="definition 1")

    assert definition.requires_flag == FlagCondition("model", "new")
    assert definition.variants == (Variant(FlagCondition("agent-v2"), "acme.digest_v2"),)
    assert definition.handlers == ("acme.digest", "acme.digest_v2")
    assert definition.memory == 512 * 2**20
    assert definition.starts_at == utc("2027-01-01T07:00")
    assert definition.retry_policy(9).max_attempts == 4
    spec = json.loads(json.dumps(to_spec(definition)))
    assert set(spec) == set(FULL) - {"org", "name", "enabled"}
    assert from_spec("org_acme", "nightly-digest", spec, enabled=False) == definition
    assert to_spec(from_spec("org_acme", "nightly-digest", spec)) == spec


def test_a_value_equal_to_its_default_is_left_out_of_the_spec():
    assert to_spec(parse(overlap="skip", misfire_grace="1m", priority=0, params={})) == to_spec(parse())


def test_no_scopes_at_all_differ_from_the_handlers_scopes():
    assert parse().scopes is None
    assert parse(scopes=[]).scopes == frozenset()
    assert to_spec(parse(scopes=[]))["scopes"] == []


def test_the_handler_speaks_where_the_definition_is_silent():
    assert parse().retry_policy(7).max_attempts == 7
    assert parse().timeout_or(timedelta(minutes=5)) == timedelta(minutes=5)
    assert parse(timeout="2h").timeout_or(timedelta(minutes=5)) == timedelta(hours=2)


def test_the_zone_is_the_definitions_else_the_orgs_else_utc():
    midsummer = utc("2026-06-01")
    assert parse(timezone="Asia/Tokyo").trigger("Europe/Berlin").after(midsummer) == utc("2026-06-01T18:00")
    assert parse().trigger("Europe/Berlin").after(midsummer) == utc("2026-06-01T01:00")
    assert parse().trigger().after(midsummer) == utc("2026-06-01T03:00")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"org": None}, "org"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"handler": 5}, "handler"),
        ({"tiemout": "2h"}, "tiemout"),
        ({"timeout": 30}, "timeout"),
        ({"timeout": "0s"}, "timeout"),
        ({"scopes": "read:kb"}, "scopes"),
        ({"params": ["a"]}, "params"),
        ({"params": {"at": utc("2026-01-01")}}, "params"),
        ({"params": {"n": float("inf")}}, "params"),
        ({"params": {"text": "a\0b"}}, "params"),
        ({"params": {"deep": [{"a\0b": 1}]}}, "params"),
        ({"params": {"text": "\ud800"}}, "params"),
        ({"handler": "acme\0digest"}, "handler"),
        ({"requires_flag": ["a"]}, "requires_flag"),
        ({"requires_flag": {"equals": 1}}, "requires_flag"),
        ({"variants": [{"flag": "a"}]}, "variants"),
        ({"variants": [{"flag": "a", "handler": "b", "then": "c"}]}, "variants"),
        ({"overlap": "queue"}, "overlap"),
        ({"misfire": "never"}, "misfire"),
        ({"misfire_limit": 0}, "misfire_limit"),
        ({"max_attempts": True}, "max_attempts"),
        ({"max_attempts": "4"}, "max_attempts"),
        ({"isolation": "thread"}, "isolation"),
        ({"memory": "lots"}, "memory"),
        ({"spread": "wide"}, "spread"),
        ({"max_claims_age": "59s"}, "max_claims_age"),
        ({"api_origins": ["https://api.acme.com/v1"]}, "api_origins"),
        ({"api_origins": ["ftp://api.acme.com"]}, "api_origins"),
        ({"api_origins": ["https://user@api.acme.com"]}, "api_origins"),
        ({"api_base_url": "api.acme.com"}, "api_base_url"),
        ({"api_base_url": "https://ada:pw@api.acme.com"}, "api_base_url"),
        ({"api_base_url": "https://api.acme.com/?q=1"}, "api_base_url"),
        ({"starts_at": "2027-01-01T08:00:00"}, "starts_at"),
        ({"starts_at": "2027-01-01T00:00:00Z", "ends_at": "2027-01-01T00:00:00Z"}, "ends_at"),
        ({"enabled": "yes"}, "enabled"),
    ],
)
def test_what_does_not_fit_is_refused_naming_entry_and_field(changes, field):
    with pytest.raises(DefinitionError) as refused:
        parse(**changes)

    assert (refused.value.entry, refused.value.field) == ("definition org_acme/nightly-digest", field)
    assert refused.value.message.startswith(f"definition org_acme/nightly-digest, {field}: ")


@pytest.mark.parametrize("kind", ["table", "list"])
def test_params_nest_at_most_64_levels(kind):
    def nested(levels):
        value = "text"
        for _ in range(levels):
            value = {"a": value} if kind == "table" else [value]
        return value

    assert parse(params={"deep": nested(63)}).params == {"deep": nested(63)}
    for levels in (64, 200_000):
        with pytest.raises(DefinitionError) as refused:
            parse(params={"deep": nested(levels)})
        assert refused.value.field == "params"
        assert refused.value.message.endswith("params: it nests more than 64 levels")


def test_a_refusal_of_what_nests_deeply_does_not_show_it():
    value = []
    for _ in range(200_000):
        value = [value]

    with pytest.raises(DefinitionError, match="handler: expected text, not a value nested too deeply"):
        parse(handler=value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"schedule": "0 3 * *"}, "schedule"),
        ({"schedule": "0 0 30 2 *"}, "schedule"),
        ({"timezone": "Europe/Bonn"}, "timezone"),
    ],
)
def test_a_bad_schedule_or_zone_is_an_invalid_trigger_of_its_entry(changes, field):
    with pytest.raises(InvalidTrigger) as refused:
        parse(**changes)

    assert (refused.value.entry, refused.value.field) == ("definition org_acme/nightly-digest", field)
    assert refused.value.fix


def test_an_unknown_key_is_answered_with_the_one_it_resembles():
    with pytest.raises(DefinitionError) as refused:
        parse(tiemout="2h")

    assert refused.value.fix == "did you mean timeout?"


def test_a_spec_of_a_later_version_is_not_guessed_at():
    with pytest.raises(DefinitionError, match="unknown key 'colour'"):
        from_spec("org_acme", "n", {"handler": "h", "schedule": "@daily", "colour": "red"})
