"""The OpenAPI 3.1 document, made from the endpoints and the rows of the lists."""

from __future__ import annotations

import types
from collections.abc import Mapping
from datetime import date, datetime
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from worker.features.console.api.endpoints import BASE, ENDPOINTS, Endpoint, Field
from worker.features.console.api.requests import object_of
from worker.kit.web.responses import PROBLEM, TITLES
from worker.store.lists.rows import AttemptRow, ChangeRow, DefinitionRow, LogRow, OrgRow, StepRow, WaitRow
from worker.store.redaction import rules_of

_SIMPLE: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    types.NoneType: {"type": "null"},
    Any: {},
}
# The published names of rows whose class is named differently; a published name never changes.
_NAMES: Mapping[type, str] = {
    AttemptRow: "Attempt",
    ChangeRow: "Change",
    DefinitionRow: "Definition",
    LogRow: "LogLine",
    OrgRow: "Org",
    StepRow: "Step",
    WaitRow: "Wait",
}
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "An error (RFC 9457). `error` has the same in the form of the command line.",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong."},
        "code": {"type": "string", "description": f"Such as {', '.join(sorted(TITLES))}."},
        "fix": {"type": "string", "description": "What to do about it."},
        "field": {"type": "string", "description": "The key of a definition that is invalid."},
        "candidates": {
            "type": "array",
            "description": "With the code `ambiguous`: runs that fit, the newest.",
            "items": {
                "type": "object",
                "properties": {
                    name: {"type": "string"} for name in ("id", "org", "definition", "scheduled_for")
                },
            },
        },
        "error": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("code", "message", "fix")},
            "required": ["code", "message", "fix"],
        },
    },
    "required": ["type", "title", "status", "detail", "code", "fix", "error"],
}


@cache
def document() -> dict[str, Any]:
    """The whole document; it never changes while a process runs."""
    schemas: dict[str, Any] = {"Problem": _PROBLEM}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, schemas)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    problem = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "orgworker",
            "version": version("orgworker"),
            "description": "Lists are arrays, newest first. Times are RFC 3339 UTC. What belongs to "
            "another org does not exist for an org. An org's rows lack what is not required here.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": BASE}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                str(status): {"description": HTTPStatus(status).phrase, "content": problem}
                for status in sorted(
                    {status for one in ENDPOINTS for status in one.statuses if status >= 400}
                )
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An operator's token, or an org's own access token.",
                }
            },
        },
    }


def _operation(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.answer is not None:
        schema = _schema(endpoint.answer, schemas)
        content["schema"] = {"type": "array", "items": schema} if endpoint.is_list else schema
    success: dict[str, Any] = {
        "description": HTTPStatus(endpoint.status).phrase,
        "content": {endpoint.media: content},
    }
    if endpoint.returns:
        success["headers"] = {
            name: {"description": about, "schema": {"type": "string"}}
            for name, about in endpoint.returns.items()
        }
    responses: dict[str, Any] = {str(endpoint.status): success}
    for status in endpoint.statuses:
        if status < 400:
            responses[str(status)] = {"description": HTTPStatus(status).phrase}
        else:
            responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
    found: dict[str, Any] = {
        "operationId": endpoint.operation,
        "summary": endpoint.about,
        "description": f"Operators need the role `{endpoint.role}`{' or `starter`' * endpoint.for_starters}.",
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in endpoint.path_names
            ),
            *(_parameter(one, "query") for one in endpoint.query),
            *(_parameter(one, "header") for one in endpoint.headers),
        ],
        "responses": dict(sorted(responses.items())),
    }
    if endpoint.body is not None:
        body = object_of(endpoint.body)
        found["requestBody"] = {
            "required": "required" in body,
            "content": {"application/json": {"schema": body}},
        }
    return found


def _parameter(one: Field, place: str) -> dict[str, Any]:
    return {
        "name": one.name,
        "in": place,
        "required": one.required,
        "description": one.about,
        "schema": dict(one.schema),
    }


def _schema(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type, or of a schema with types in it; classes of rows go to `schemas`."""
    if isinstance(kind, Mapping):
        branches = {"anyOf": [_schema(one, schemas) for one in kind["anyOf"]]} if "anyOf" in kind else {}
        return {**kind, **branches}
    origin = get_origin(kind)
    if origin is Annotated:
        return _schema(get_args(kind)[0], schemas)
    if origin in (Union, types.UnionType):
        return _union([_schema(one, schemas) for one in get_args(kind)])
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(kind))}
    if origin is list:
        return {"type": "array", "items": _schema(get_args(kind)[0], schemas)}
    if origin is dict:
        return {"type": "object"}
    if is_typeddict(kind):
        name = _NAMES.get(kind, kind.__name__)
        if name not in schemas:
            schemas[name] = {}
            schemas[name] = _row(kind, schemas)
        return {"$ref": f"#/components/schemas/{name}"}
    # A NewType is its base.
    return dict(_SIMPLE[getattr(kind, "__supertype__", kind)])


def _union(branches: list[dict[str, Any]]) -> dict[str, Any]:
    if {} in branches:
        return {}
    if all(branch.keys() <= {"type", "format"} for branch in branches):
        merged = {name: value for branch in branches for name, value in branch.items()}
        return merged | {"type": [branch["type"] for branch in branches]}
    return {"anyOf": branches}


def _row(kind: type, schemas: dict[str, Any]) -> dict[str, Any]:
    """A row; columns that orgs do not see are not required."""
    hints = get_type_hints(kind, include_extras=True)
    about = (kind.__doc__ or "").split("\n\n")[0].strip()
    return {
        "type": "object",
        **({"description": about} if about and not about.startswith("dict(") else {}),
        "properties": {name: _schema(hint, schemas) for name, hint in hints.items()},
        "required": [name for name in hints if name in rules_of(kind)],
        "additionalProperties": False,
    }
