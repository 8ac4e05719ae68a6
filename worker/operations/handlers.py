"""What the catalogue says of handlers, for checks before a definition is stored or run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from sqlalchemy import Connection

from worker.definitions.definition import Definition
from worker.errors import DefinitionError, UnknownHandler
from worker.runs.run import Isolation
from worker.store import catalogue

Row = Mapping[str, Any]


class Handlers:
    """The catalogue as it stands, read once at first need."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: dict[str, list[Row]] | None = None
        self._validators: dict[str, Draft202012Validator | None] = {}

    def named(self, name: str) -> list[Row]:
        """Every distribution's row of that name, the broken ones too."""
        if self._rows is None:
            self._rows = {}
            for row in catalogue.entries(self._connection):
                self._rows.setdefault(row["name"], []).append(row)
        return self._rows.get(name, [])

    def isolation_of(self, name: str) -> Isolation:
        """Where the handler wants to run; in a child process where nothing is known of it."""
        row = self._usable(name)
        return "inline" if row is not None and row["isolation"] == "inline" else "child"

    def scopes_of(self, name: str) -> frozenset[str]:
        """The scopes that the handler says it needs; none where nothing is known of it."""
        row = self._usable(name)
        return frozenset() if row is None else frozenset(row["scopes"])

    def check(
        self, definition: Definition, entry: str, *, inline: Collection[str], allow_unknown: bool
    ) -> None:
        """Refuse a definition whose handlers are unknown, broken, or want what the operator did not allow.

        Params are checked against the schema of every handler that may be chosen.

        Raises:
            UnknownHandler: no distribution offers it, or it does not load (unless `allow_unknown`).
            DefinitionError: params that do not fit, or inline without the operator's word.
        """
        for name in definition.handlers:
            field = "handler" if name == definition.handler else "variants"
            row = self._usable(name)
            if row is None:
                if not allow_unknown:
                    raise self._unknown(name, entry, field)
                continue
            if (definition.isolation or row["isolation"]) == "inline" and row["distribution"] not in inline:
                raise DefinitionError(
                    f"{entry}, isolation: {name} would run inline, where it could read every org's secrets",
                    entry=entry,
                    field="isolation",
                    fix=f'if you trust it, add "{row["distribution"]}" to execution.inline in worker.toml; '
                    'else set isolation = "child"',
                )
            self.check_params(name, definition.params, entry)
            self._check_params_by_hand(name, definition.params_by_hand, entry)

    def check_params(self, name: str, params: Mapping[str, Any], entry: str) -> None:
        """Refuse params that do not fit the handler's schema; without a schema everything does.

        Raises:
            DefinitionError: names the param.
        """
        validator = self._validator(name)
        problem = None if validator is None else best_match(validator.iter_errors(dict(params)))
        if problem is not None:
            field = ".".join(["params", *_place(problem)])
            raise DefinitionError(
                f"{entry}, {field}: {_words(problem)}",
                entry=entry,
                field=field,
                fix=f"`handlers show {name}` has the params it takes",
            )

    def _check_params_by_hand(self, name: str, params: Collection[str], entry: str) -> None:
        """Refuse a name that the handler's schema does not know, such as a misspelt one."""
        validator = self._validator(name)
        schema = None if validator is None else validator.schema
        if not isinstance(schema, Mapping) or schema.get("additionalProperties") is not False:
            return
        known = schema.get("properties", {})
        for param in params:
            if param not in known:
                raise DefinitionError(
                    f"{entry}, params_by_hand: {name} takes no param {param}",
                    entry=entry,
                    field="params_by_hand",
                    fix=f"remove it; `handlers show {name}` has the params it takes",
                )

    def as_taken(self, name: str, params: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
        """Params read from a command line, as this handler takes them; see the function `as_taken`."""
        validator = self._validator(name)
        return as_taken(None if validator is None else validator.schema, params, typed)

    def _usable(self, name: str) -> Row | None:
        return next((row for row in self.named(name) if row["error"] is None), None)

    def _validator(self, name: str) -> Draft202012Validator | None:
        if name not in self._validators:
            row = self._usable(name)
            schema = None if row is None else row["params_schema"]
            self._validators[name] = None if schema is None else _validator(schema)
        return self._validators[name]

    def _unknown(self, name: str, entry: str, field: str) -> UnknownHandler:
        broken = self.named(name)
        if broken:
            row = broken[0]
            problem = (
                f"handler {name} of {row['distribution']} {row['version']} does not load: {row['error']}"
            )
        else:
            problem = f"no installed distribution offers a handler {name!r}"
        return UnknownHandler(
            f"{entry}, {field}: {problem}",
            entry=entry,
            field=field,
            fix="`handlers list` names what there is; --allow-unknown-handlers stores it anyway",
        )


def as_taken(schema: object, params: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
    """Params read from a command line, those as `typed` that a handler of this schema takes only so.

    `url=5` was read as a number; where the handler wants a text, it is one.
    """
    taken = dict(params)
    if not isinstance(schema, Mapping):
        return taken
    for key, text in typed.items():
        wanted = {"$defs": schema.get("$defs", {}), "allOf": [schema.get("properties", {}).get(key, True)]}
        takes = Draft202012Validator(wanted).is_valid
        if key in params and not takes(params[key]) and takes(text):
            taken[key] = text
    return taken


def _validator(schema: Mapping[str, Any]) -> Draft202012Validator | None:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError:
        # A plug-in's mistake must not keep its definitions out; the child validates with the model.
        return None
    return Draft202012Validator(schema)


def _place(problem: ValidationError) -> list[str]:
    path = [str(part) for part in problem.absolute_path]
    if problem.validator == "required":
        missing = [name for name in problem.validator_value if name not in problem.instance]
        path.extend(missing[:1])
    elif problem.validator == "additionalProperties":
        known = problem.schema.get("properties", {})
        path.extend(sorted(name for name in problem.instance if name not in known)[:1])
    return path


def _words(problem: ValidationError) -> str:
    if problem.validator == "required":
        return "is missing"
    if problem.validator == "additionalProperties":
        return "the handler takes no such param"
    if problem.validator == "type":
        return f"{problem.instance!r} is not of type {problem.validator_value}"
    return str(problem.message)
