"""Params and settings of the built-in handlers, from the fields of their models."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generate.tables import code, sentence, table
from jobs import assistant_digest, http_request

HEAD = ("", "default", "meaning")


def http_request_params() -> str:
    return _fields(http_request.Params)


def assistant_params() -> str:
    return _fields(assistant_digest.Params)


def assistant_settings() -> str:
    return _fields(assistant_digest.Settings)


def _fields(model: type[BaseModel]) -> str:
    fields = model.model_fields.items()
    return table(HEAD, [(code(name), _default(info), sentence(info.description)) for name, info in fields])


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "none" if value is None or value in ({}, []) else code(repr(value).replace("'", '"'))
