"""Batches: which requests share one, when it is due, and when a request is sent on its own."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta

import pytest

from tests.fakes.clock import utc
from worker.errors import DefinitionError
from worker.ids import OrgId
from worker.model.batches import (
    BatchLimits,
    Experience,
    ModelApi,
    PendingRequest,
    Pool,
    Provider,
    Result,
    forecast,
    most_usage,
    path_of,
    percentile,
    pooled,
    usage_of,
    wait_name,
)
from worker.model.definitions.definition import parse_definition

NOW = utc("2030-01-01T01:00")
POOL = Pool("openai", None, "/v1/responses", "gpt-5-mini", "")
LIMITS = {"openai": BatchLimits(timedelta(minutes=10), 4, 1000)}
NUMBERS = itertools.count()


def pending(
    org: str, *, pool: Pool = POOL, ago: int = 0, size: int = 10, apart: bool = False
) -> PendingRequest:
    at = NOW - timedelta(minutes=ago)
    return PendingRequest(f"{next(NUMBERS):03}", OrgId(org), pool, size, at, apart)


def orgs(batches: list[list[PendingRequest]]) -> list[list[str]]:
    return [[one.org_id for one in batch] for batch in batches]


def test_a_pool_is_due_once_its_oldest_request_has_waited() -> None:
    young, old = pending("a", ago=9), pending("b", ago=10)

    assert pooled([young], LIMITS, NOW) == []
    assert pooled([young, old], LIMITS, NOW) == [[old, young]]


def test_a_full_batch_does_not_wait_and_the_rest_does() -> None:
    listed = [pending("a") for _ in range(5)]

    assert pooled(listed, LIMITS, NOW) == [listed[:4]]


def test_orgs_take_turns() -> None:
    listed = [*(pending("loud", ago=11) for _ in range(6)), pending("b"), pending("c")]

    assert orgs(pooled(listed, LIMITS, NOW)) == [["loud", "b", "c", "loud"], ["loud"] * 4]


def test_a_batch_is_full_by_bytes_as_well() -> None:
    listed = [pending("a", ago=10, size=600), pending("b", ago=10, size=600), pending("c", ago=10, size=300)]

    assert orgs(pooled(listed, LIMITS, NOW)) == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    "other",
    [
        POOL._replace(account=OrgId("a")),
        POOL._replace(path="/v1/chat/completions"),
        POOL._replace(model="gpt-5-nano"),
        POOL._replace(betas="files-1"),
    ],
)
def test_what_differs_in_key_endpoint_model_or_flags_shares_no_batch(other: Pool) -> None:
    listed = [pending("a", ago=10), pending("a", ago=10, pool=other)]

    assert [len(batch) for batch in pooled(listed, LIMITS, NOW)] == [1, 1]


def test_after_a_refusal_requests_share_a_batch_with_those_of_their_org() -> None:
    listed = [pending(org, ago=10, apart=True) for org in ("a", "b", "a")]

    assert orgs(pooled(listed, LIMITS, NOW)) == [["a", "a"], ["b"]]


def test_requests_of_an_api_that_is_not_configured_wait() -> None:
    assert pooled([pending("a", ago=100, pool=POOL._replace(api="gone"))], LIMITS, NOW) == []


def test_without_a_deadline_nothing_is_late() -> None:
    found = forecast(NOW, None, 99, Experience([5], [1e9]))

    assert (found.fall_back_at, found.late) == (None, False)


@pytest.mark.parametrize(
    ("hours", "turns", "late"),
    [(5.1, 0, False), (4.9, 0, True), (1.1, 4, False), (0.9, 4, True), (1.1, 9, False)],
)
def test_a_request_is_late_if_the_rest_of_its_run_would_be(hours: float, turns: int, late: bool) -> None:
    """Nine of ten runs take up to five requests, and nine of ten batches up to an hour."""
    known = Experience([5] * 9 + [50], [3600.0] * 9 + [86_400.0])

    assert forecast(NOW, NOW + timedelta(hours=hours), turns, known).late is late


def test_each_turn_that_is_left_has_a_minute_of_its_own() -> None:
    until = NOW + timedelta(hours=8)

    found = forecast(NOW, until, 1, Experience([5] * 10, []))

    assert found.fall_back_at == until - timedelta(minutes=4)
    assert forecast(until - timedelta(seconds=50), until, 0, Experience()).late


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([], 0.9) is None
    assert percentile([3.0], 0.9) == 3.0
    assert percentile([float(n) for n in range(1, 11)], 0.9) == 9.0
    assert percentile([1.0, 2.0], 0.5) == 1.0


OPENAI_USAGE = {
    "usage": {
        **{"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}},
        **{"output_tokens": 30, "output_tokens_details": {"reasoning_tokens": 10}},
    },
    "output": [{"type": "web_search_call"}, {"type": "message"}],
}
ANTHROPIC_USAGE = {
    "usage": {
        **{"input_tokens": 1, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 9},
        **{"cache_creation": {"ephemeral_1h_input_tokens": 4}, "output_tokens": 2},
        "server_tool_use": {"web_search_requests": 3},
    }
}


@pytest.mark.parametrize(
    ("provider", "response", "kinds"),
    [
        (
            *("openai", OPENAI_USAGE),
            {"input": 40, "cache_read": 60, "output": 20, "reasoning": 10, "web_search": 1},
        ),
        ("openai", {"usage": {"prompt_tokens": 10, "completion_tokens": 5}}, {"input": 10, "output": 5}),
        (
            *("anthropic", ANTHROPIC_USAGE),
            {
                "input": 1,
                "cache_read": 20,
                "cache_write": 5,
                "cache_write_1h": 4,
                "output": 2,
                "web_search": 3,
            },
        ),
        # Parts that are more than the whole count as none.
        (
            "openai",
            {"usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 9}}, "output": 3},
            {"input": 5},
        ),
    ],
)
def test_what_a_response_reports_is_counted_by_kind(
    provider: Provider, response: object, kinds: dict[str, int]
) -> None:
    used = usage_of(provider, "asked", response)

    assert used is not None and dict(used.kinds) == {**kinds, "request": 1}
    assert (used.provider, used.model) == (provider, "asked")


@pytest.mark.parametrize(
    "response", [{"usage": {"input_tokens": -5, "output_tokens": True}}, {"usage": [1]}, "text", None]
)
def test_a_response_without_usage_has_used_nothing(response: object) -> None:
    assert usage_of("openai", "asked", response) is None


def test_the_model_is_the_one_that_answered_if_it_has_a_name() -> None:
    usage = {"usage": {"input_tokens": 1}}
    for said, model in (("gpt-5-mini-2025-08-07", "gpt-5-mini-2025-08-07"), ("a b", "asked"), (7, "asked")):
        used = usage_of("openai", "asked", {**usage, "model": said})
        assert used is not None and used.model == model


def test_what_is_reserved_is_the_input_and_the_most_output() -> None:
    most = most_usage("openai", "m", {"max_tokens": 500}, 300)
    assert dict(most.kinds) == {"input": 100, "output": 500, "request": 1}
    assert most_usage("openai", "m", {"max_output_tokens": "many"}, 300).tokens == 100 + 4096


def test_a_result_of_anthropic_has_its_message_inside() -> None:
    message = {"usage": {"input_tokens": 1, "output_tokens": 1}}
    body = json.dumps({"type": "succeeded", "message": message})

    assert Result("a", "succeeded", body).response("anthropic") == message
    assert Result("a", "errored", body).response("anthropic") is None


def test_paths_follow_from_the_body() -> None:
    assert path_of("openai", {"input": "x"}) == "/v1/responses"
    assert path_of("openai", {"messages": []}) == "/v1/chat/completions"
    assert path_of("anthropic", {"messages": []}) == "/v1/messages"


def test_waits_of_different_steps_have_different_names() -> None:
    names = {wait_name(*step) for step in (("a", ""), ("a", "b"), ("ab", ""), ("b", "a"))}

    assert len(names) == 4 and all(len(name) < 64 for name in names)


def test_an_api_answers_clients_of_its_url_with_or_without_the_version() -> None:
    api = ModelApi("openai", "openai", "https://api.openai.com")

    assert api.answers("openai", "https://api.openai.com/v1/")
    assert not api.answers("openai", "https://api.openai.com.evil.example/v1")
    assert not api.answers("anthropic", "https://api.openai.com/v1")


ENTRY = {"org": "a", "name": "n", "handler": "h", "schedule": "0 22 * * *", "timezone": "Europe/Berlin"}


def test_a_deadline_is_the_next_time_of_day_in_the_definitions_zone() -> None:
    keys = {"model_requests": "batch", "batch_until": "06:00", "batch_within": "12h"}
    definition = parse_definition(ENTRY | keys, "definition")

    assert definition.batch_deadline(utc("2030-01-01T21:00")) == utc("2030-01-02T05:00")


def test_a_deadline_without_batches_is_refused() -> None:
    with pytest.raises(DefinitionError, match="batch_until") as raised:
        parse_definition(ENTRY | {"batch_until": "06:00"}, "definition")
    assert raised.value.fix == 'add model_requests = "batch", or remove batch_until'
