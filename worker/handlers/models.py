"""Validates params and properties with the handler's models; errors never show values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from worker.handlers.job import Job
from worker.handlers.json_text import to_json_text

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class HandlerMissing(Exception):
    """The module of an entry point, or the attribute that it names, does not exist."""


class ParamsInvalid(Exception):
    """The definition's params do not fit the handler's model."""


class SettingsInvalid(Exception):
    """A property of the token does not fit the handler's settings; `property` names it."""

    def __init__(self, property: str, message: str) -> None:
        super().__init__(message)
        self.property = property


class CheckpointInvalid(Exception):
    """A stored checkpoint does not fit the handler's model."""


def load(entry_point: str) -> Job:
    """Import the handler that `module:attribute` names; raises HandlerMissing. Runs the plug-in's code."""
    module, _, attribute = entry_point.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise HandlerMissing(f"there is no module {error.name}") from error
        raise
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, Job):
        raise HandlerMissing(f"{entry_point} is not a function declared with @job")
    return found


def read_params(job: Job, params: Mapping[str, Any]) -> Any:
    """The params as the handler's model, in strict mode; a plain mapping if it declares none.

    Raises ParamsInvalid with the param and the rule.
    """
    if job.params is None:
        return dict(params)
    unknown = _unknown(job.params, params)
    if unknown and job.params.model_config.get("extra") != "allow":
        raise ParamsInvalid(f"param {unknown[0]}: the handler has no such param")
    with _refusing(lambda name, rule: ParamsInvalid(f"param {name}: {rule}")):
        # Strict for JSON: text stays text, but a date may be written as text.
        return job.params.model_validate_json(json.dumps(dict(params)), strict=True)


def read_settings(job: Job, properties: Mapping[str, Any]) -> Any:
    """The token's properties over the model's defaults. Text is coerced, since providers store mostly text.

    Raises SettingsInvalid with the property and the rule, never the value.
    """
    if job.settings is None:
        return dict(properties)
    given = dict(properties)
    if job.settings.model_config.get("extra") == "forbid":
        # A token's properties are for every handler of the org, so those of others are expected.
        for name in _unknown(job.settings, properties):
            del given[name]
    with _refusing(lambda name, rule: SettingsInvalid(name, f"property {name}: {rule}")):
        return job.settings.model_validate(given)


def read_checkpoint(job: Job, stored: Any) -> Any:
    """A stored checkpoint as the handler's model; plain JSON data if it declares none.

    Raises CheckpointInvalid with the field and the rule, never the value.
    """
    if job.checkpoint is None or stored is None:
        return stored
    advice = (
        f"the stored checkpoint does not fit {job.checkpoint.__name__}: let the model accept it, or retry "
        "the run without --from-checkpoint to start over"
    )
    with _refusing(lambda name, rule: CheckpointInvalid(f"checkpoint field {name}: {rule}; {advice}")):
        return job.checkpoint.model_validate_json(json.dumps(stored), by_alias=True, by_name=True)


def checkpoint_text(job: Job | None, data: Any) -> str:
    """A checkpoint as JSON text; raises NotStorable, and TypeError for another type than declared."""
    model = None if job is None else job.checkpoint
    if model is not None and data is not None and not isinstance(data, model):
        raise TypeError(
            f"save() of {job and job.name} takes a {model.__name__}, as @job(checkpoint=) says, or None, "
            f"not a {type(data).__name__}"
        )
    return to_json_text(data, "checkpoint")


def _unknown(model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    known = set(model.model_fields)
    for field in model.model_fields.values():
        alias = field.validation_alias or field.alias
        choices = getattr(alias, "choices", [alias])
        known.update(getattr(choice, "path", [choice])[0] for choice in choices if choice is not None)
    return [name for name in given if name not in known]


@contextmanager
def _refusing(refusal: Callable[[str, str], Exception]) -> Iterator[None]:
    """Raise the refusal for a model's error, made of the field's name and the rule."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise refusal(*_first(error)) from None


def _first(error: ValidationError) -> tuple[str, str]:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # The message of the author's own validator may contain the value.
    custom = first["type"] in ("value_error", "assertion_error")
    rule = "refused by the handler's own check" if custom else first["msg"]
    name = ".".join(str(part) for part in first["loc"]) or "(all together)"
    return name, rule
