"""What the catalogue says of handlers, for checks before a definition is stored or run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import Definition
from worker.errors import DefinitionError, UnknownHandler
from worker.handlers.schema import Schema, check_schema
from worker.runs.run import Isolation
from worker.store import catalogue

Row = Mapping[str, Any]


class Handlers:
    """The catalogue as it stands, read once at first need."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: dict[str, list[Row]] | None = None
        self._schemas: dict[str, Schema | None] = {}

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

        What the schema leaves open, the run's own process refuses before it calls the handler.

        Raises:
            DefinitionError: names the param.
        """
        schema = self._schema(name)
        problem = None if schema is None else schema.problem(dict(params))
        if problem is not None:
            field = ".".join(["params", *problem.path])
            raise DefinitionError(
                f"{entry}, {field}: {problem.message}",
                entry=entry,
                field=field,
                fix=f"`handlers show {name}` has the params it takes",
            )

    def _check_params_by_hand(self, name: str, params: Collection[str], entry: str) -> None:
        """Refuse a name that the handler's schema does not know, such as a misspelt one."""
        schema = self._schema(name)
        for param in params:
            if schema is not None and not schema.knows(param):
                raise DefinitionError(
                    f"{entry}, params_by_hand: {name} takes no param {param}",
                    entry=entry,
                    field="params_by_hand",
                    fix=f"remove it; `handlers show {name}` has the params it takes",
                )

    def as_taken(self, name: str, params: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
        """Params read from a command line, as this handler takes them; see the function `as_taken`."""
        return as_taken(self._schema(name), params, typed)

    def _usable(self, name: str) -> Row | None:
        return next((row for row in self.named(name) if row["error"] is None), None)

    def _schema(self, name: str) -> Schema | None:
        if name not in self._schemas:
            row = self._usable(name)
            self._schemas[name] = None if row is None else schema_of(row["params_schema"])
        return self._schemas[name]

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


def schema_of(stored: object) -> Schema | None:
    """The schema of a handler's params, or None where it has none that can be used.

    A plug-in's mistake must not keep its definitions out; the run's own process checks with the model.
    """
    try:
        check_schema(stored, "schema")
    except ValueError:
        return None
    return Schema(stored) if isinstance(stored, Mapping) else None


def as_taken(schema: Schema | None, params: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
    """Params read from a command line, those as `typed` that a handler of this schema takes only so.

    `url=5` was read as a number; where the handler wants a text, it is one.
    """
    taken = dict(params)
    if schema is None:
        return taken
    for key, text in typed.items():
        if key in params and not schema.may_take(key, params[key]) and schema.may_take(key, text):
            taken[key] = text
    return taken
