"""Params and settings: strict and lax, and errors that name the field and never the value."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field

from worker.handlers.job import Job, job
from worker.handlers.models import (
    HandlerMissing,
    ParamsInvalid,
    SettingsInvalid,
    load,
    read_params,
    read_settings,
)
from worker.handlers.schema import Schema


def refuse(value: str) -> str:
    raise ValueError(f"{value} is not to my taste")


class Settings(BaseModel):
    model_version: str = "gpt-4"
    max_tokens: int = Field(1000, ge=1)
    ratio: float = 0.5
    loud: bool = False
    level: Literal["low", "high"] = "low"
    seats: int = Field(1, validation_alias=AliasChoices("seat_count", "seats"))
    picky: Annotated[str, AfterValidator(refuse)] | None = None


class Strict(Settings):
    model_config = ConfigDict(extra="forbid")


class Params(BaseModel):
    collection: str
    count: int = 1
    day: date | None = None


def declared(**models: Any) -> Job:
    return job("x", **models)(lambda ctx: None)


def test_text_of_a_property_becomes_what_the_model_wants() -> None:
    settings = read_settings(
        declared(settings=Settings),
        {"max_tokens": "5", "ratio": "0.25", "loud": "true", "seat_count": "3", "of_another_handler": "x"},
    )

    assert (settings.max_tokens, settings.ratio, settings.loud, settings.seats) == (5, 0.25, True, 3)
    assert settings.model_version == "gpt-4"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        (
            "max_tokens",
            "many-secret",
            "Input should be a valid integer, unable to parse string as an integer",
        ),
        ("max_tokens", "0", "Input should be greater than or equal to 1"),
        ("level", "secret", "Input should be 'low' or 'high'"),
        ("picky", "secret", "refused by the handler's own check"),
    ],
)
def test_a_property_that_does_not_fit_is_named_with_the_rule_and_without_the_value(
    name: str, value: str, rule: str
) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        read_settings(declared(settings=Settings), {name: value})

    assert caught.value.property == name
    assert str(caught.value) == f"property {name}: {rule}"
    assert "secret" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_a_model_that_forbids_extras_is_not_upset_by_other_handlers_properties() -> None:
    settings = read_settings(declared(settings=Strict), {"max_tokens": "5", "other": "x"})

    assert settings.max_tokens == 5


def test_without_a_model_the_properties_are_a_plain_mapping() -> None:
    assert read_settings(declared(), {"a": "1"}) == {"a": "1"}
    assert read_params(declared(), {"a": 1}) == {"a": 1}


def test_params_are_strict_as_json_is() -> None:
    params = read_params(declared(params=Params), {"collection": "faq", "day": "2030-01-01"})

    assert params == Params(collection="faq", day=date(2030, 1, 1))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"collection": "faq", "count": "5"}, "param count: Input should be a valid integer"),
        ({}, "param collection: Field required"),
        ({"collection": "faq", "cuont": 5}, "param cuont: the handler has no such param"),
    ],
)
def test_params_that_do_not_fit_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsInvalid, match=message):
        read_params(declared(params=Params), params)


class Backtracking(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")

    mail: str = Field(pattern="^(?!root@)[a-z]+@acme$")


def test_a_pattern_that_the_worker_leaves_open_is_refused_before_the_handler_is_called() -> None:
    handler = declared(params=Backtracking, settings=Backtracking)
    schema = handler.params_schema()
    assert schema is not None

    assert Schema(schema).problem({"mail": "root@acme"}) is None
    with pytest.raises(ParamsInvalid, match="param mail: String should match pattern"):
        read_params(handler, {"mail": "root@acme"})
    with pytest.raises(SettingsInvalid, match="property mail: String should match pattern"):
        read_settings(handler, {"mail": "root@acme"})


def test_a_handler_is_found_by_module_and_attribute() -> None:
    assert load("jobs.http_request:http_request").name == "http.request"

    for missing in ("jobs.nowhere:x", "nowhere_at_all:x", "jobs.http_request:nothing", "json:dumps"):
        with pytest.raises(HandlerMissing):
            load(missing)
