"""Checks requests and responses against the published OpenAPI document of Kinde's management API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import yaml
from jsonschema import Draft4Validator

DOCUMENT = Path(__file__).with_name("openapi.yaml")
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as the server got it, and the response that it made."""

    method: str
    path: str
    query: str
    body: bytes
    status: int
    response: bytes


class Document:
    """The document, read for checks: what it does not name is wrong."""

    def __init__(self, text: str) -> None:
        self.content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self._routes = [
            (method.upper(), re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path)
            for path, item in self.content["paths"].items()
            for method in item
            if method in ("get", "post", "put", "patch", "delete")
        ]

    def route(self, method: str, path: str) -> str | None:
        """The template of a path that the document has with this method."""
        fits = (
            route for known, pattern, route in self._routes if known == method and pattern.fullmatch(path)
        )
        return next(fits, None)

    def faults(self, exchange: Exchange) -> Iterator[str]:
        """What of an exchange the document does not allow."""
        route = self.route(exchange.method, exchange.path)
        what = f"{exchange.method} {exchange.path}"
        if route is None:
            yield f"{what}: no such route"
            return
        item = self.content["paths"][route]
        operation = item[exchange.method.lower()]
        named = [self._at(each) for each in (*item.get("parameters", ()), *operation.get("parameters", ()))]
        known = {each["name"]: each for each in named if each["in"] == "query"}
        given = dict(parse_qsl(exchange.query, keep_blank_values=True))
        yield from (f"{what}: unknown parameter {name}" for name in given.keys() - known.keys())
        for name, parameter in known.items():
            if name in given:
                value: Any = given[name]
                if parameter["schema"].get("type") == "integer":
                    value = int(value)
                yield from self._wrong(value, parameter["schema"], f"{what}: {name}")
            elif parameter.get("required"):
                yield f"{what}: {name} is missing"
        yield from self._body_faults(exchange, operation, what)
        yield from self._response_faults(exchange, operation, what)

    def _body_faults(self, exchange: Exchange, operation: dict[str, Any], what: str) -> Iterator[str]:
        wanted = operation.get("requestBody")
        if wanted is None:
            if exchange.body:
                yield f"{what}: takes no body"
        elif exchange.body:
            schema = wanted["content"][JSON]["schema"]
            yield from self._wrong(json.loads(exchange.body), schema, f"{what}: body")
        elif wanted.get("required"):
            yield f"{what}: needs a body"

    def _response_faults(self, exchange: Exchange, operation: dict[str, Any], what: str) -> Iterator[str]:
        response = operation["responses"].get(str(exchange.status))
        if response is None:
            yield f"{what}: status {exchange.status} is not documented"
            return
        content = self._at(response).get("content")
        if content is None:
            if exchange.response:
                yield f"{what}: status {exchange.status} has no body"
            return
        schema = content[JSON]["schema"]
        yield from self._wrong(json.loads(exchange.response), schema, f"{what}: {exchange.status}")

    def _wrong(self, value: Any, schema: dict[str, Any], what: str) -> Iterator[str]:
        for error in Draft4Validator(self._strict(schema)).iter_errors(value):
            yield f"{what}: {error.message}"

    def _at(self, node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            target: Any = self.content
            for key in node["$ref"].removeprefix("#/").split("/"):
                target = target[unquote(key)]
            node = target
        return node

    def _strict(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema as JSON Schema, without members that it does not name."""
        schema = self._at(schema)
        made = {key: schema[key] for key in ("type", "enum", "required") if key in schema}
        if "oneOf" in schema:
            made["oneOf"] = [self._strict(each) for each in schema["oneOf"]]
        if "items" in schema:
            made["items"] = self._strict(schema["items"])
        if "properties" in schema:
            made["properties"] = {name: self._strict(each) for name, each in schema["properties"].items()}
            made["additionalProperties"] = False
        return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@cache
def document() -> Document:
    return Document(DOCUMENT.read_text(encoding="utf-8"))
