"""Handlers as the catalogue has them, for checks before a definition is stored or run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import Definition
from worker.definitions.fields import refusal
from worker.errors import UnknownHandler, did_you_mean
from worker.guard.claims import Claims
from worker.handlers.schema import Schema, check_schema
from worker.runs.run import Declared
from worker.store import catalogue
from worker.store.dialect import Row


@dataclass(frozen=True, slots=True)
class Readers:
    """Properties that settings take or definitions require, and flags that definitions depend on.

    A handler can also read claims in its code, which cannot be seen from outside. `is_open`: one of the
    handlers is unknown.
    """

    properties: frozenset[str]
    flags: frozenset[str]
    is_open: bool = False

    def unread(self, claims: Claims) -> list[str]:
        """The properties and flags that are not declared anywhere; none if one of the handlers is unknown."""
        if self.is_open:
            return []
        # A property of a flag's name takes its place, and a flag can be a setting.
        read = self.properties | self.flags
        properties = [f"property {name}" for name in sorted(claims.properties.keys() - read)]
        return properties + [f"flag {name}" for name in sorted(claims.flags.keys() - read)]


@dataclass(slots=True)
class Handlers:
    """The catalogue, read once on first use."""

    connection: Connection
    _rows: dict[str, list[Row]] | None = field(default=None, init=False)
    _schemas: dict[str, Schema | None] = field(default_factory=dict, init=False)

    def named(self, name: str) -> list[Row]:
        """Every distribution's row of that name, including broken ones."""
        if self._rows is None:
            self._rows = {}
            for row in catalogue.entries(self.connection):
                self._rows.setdefault(row["name"], []).append(row)
        return self._rows.get(name, [])

    def declared(self, name: str) -> Declared:
        """Where the handler asks to run."""
        row = self._usable(name)
        if row is None:
            return Declared()
        return Declared("inline" if row["isolation"] == "inline" else "child", row["pool"])

    def scopes_of(self, name: str) -> frozenset[str]:
        """The scopes that the handler needs; none for an unknown handler."""
        row = self._usable(name)
        return frozenset() if row is None else frozenset(row["scopes"])

    def secrets_of(self, name: str) -> frozenset[str]:
        """The names of the org's secrets that the handler gets; none for an unknown handler."""
        row = self._usable(name)
        return frozenset() if row is None else frozenset(row["secrets"])

    def declare_secrets(self) -> bool:
        """Whether any handler gets secrets."""
        self.named("")
        return any(row["secrets"] for rows in (self._rows or {}).values() for row in rows)

    def readers(self, definitions: Iterable[Definition]) -> Readers:
        """What the handlers of these definitions read of a token."""
        properties: set[str] = set()
        flags: set[str] = set()
        open_ended = False
        for definition in definitions:
            properties |= set(definition.requires_properties)
            conditions = [definition.requires_flag, *(variant.flag for variant in definition.variants)]
            flags |= {condition.name for condition in conditions if condition is not None}
            for name in definition.handlers:
                row = self._usable(name)
                settings = None if row is None else row["settings_schema"]
                if isinstance(settings, Mapping):
                    properties |= set(settings.get("properties", {}))
                elif row is None:
                    open_ended = True
        return Readers(frozenset(properties), frozenset(flags), open_ended)

    def check(
        self, definition: Definition, entry: str, *, inline: Collection[str], allow_unknown: bool
    ) -> None:
        """Check a definition against all of its handlers, including their params and state.

        Raises:
            UnknownHandler: no distribution offers it, or it does not load (unless `allow_unknown`).
            DefinitionError: invalid params, inline although the operator has not allowed it, or state
                with concurrent runs.
        """
        for name in definition.handlers:
            field = "handler" if name == definition.handler else "variants"
            row = self._usable(name)
            if row is None:
                if not allow_unknown:
                    raise self._unknown(name, entry, field)
                continue
            if (definition.isolation or row["isolation"]) == "inline" and row["distribution"] not in inline:
                raise refusal(
                    f"{name} would run inline, where it can read every org's secrets",
                    entry,
                    "isolation",
                    fix=f'if you trust it, add "{row["distribution"]}" to execution.inline in worker.toml; '
                    'else set isolation = "child"',
                )
            if row["state"] and not definition.serial:
                raise refusal(
                    f"{name} declares state, which concurrent runs would overwrite",
                    entry,
                    "overlap",
                    fix="choose skip, queue_one or replace",
                )
            self.check_params(name, definition.params, entry)
            self._check_params_by_hand(name, definition.params_by_hand, entry)

    def check_params(self, name: str, params: Mapping[str, Any], entry: str) -> None:
        """Check params against the handler's schema, if it has one.

        The run's own process checks the rest before it calls the handler.

        Raises:
            DefinitionError: names the param.
        """
        schema = self.schema(name)
        problem = None if schema is None else schema.problem(dict(params))
        if problem is not None:
            field = ".".join(["params", *problem.path])
            raise refusal(problem.message, entry, field, fix=f"`handlers show {name}` shows its params")

    def _check_params_by_hand(self, name: str, params: Collection[str], entry: str) -> None:
        """Refuse names that the handler's schema does not have, such as misspelt ones."""
        schema = self.schema(name)
        for param in params:
            if schema is not None and not schema.knows(param):
                fix = f"remove it; `handlers show {name}` shows its params"
                raise refusal(f"{name} has no param {param}", entry, "params_by_hand", fix=fix)

    def _usable(self, name: str) -> Row | None:
        return next((row for row in self.named(name) if row["error"] is None), None)

    def schema(self, name: str) -> Schema | None:
        """The schema of the handler's params, if it has one that is valid."""
        if name not in self._schemas:
            row = self._usable(name)
            self._schemas[name] = None if row is None else schema_of(row["params_schema"])
        return self._schemas[name]

    def _unknown(self, name: str, entry: str, field: str) -> UnknownHandler:
        broken, close = self.named(name), ""
        if broken:
            row = broken[0]
            problem = (
                f"handler {name} of {row['distribution']} {row['version']} does not load: {row['error']}"
            )
        else:
            problem = f"no installed distribution offers a handler {name!r}"
            close = did_you_mean(name, self._rows or ())
        return UnknownHandler(
            f"{entry}, {field}: {problem}",
            entry=entry,
            field=field,
            fix=f"{close} `handlers list` lists those there are; --allow-unknown-handlers stores it "
            "anyway".strip(),
        )


def schema_of(stored: object) -> Schema | None:
    """The schema of a handler's params; None if it has none that is valid.

    A plug-in with an invalid schema can still be used; the run's own process checks the params.
    """
    try:
        check_schema(stored, "schema")
    except ValueError:
        return None
    return Schema(stored) if isinstance(stored, Mapping) else None


def as_taken(schema: Schema | None, params: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
    """Params from a command line, with the typed text where the schema accepts only that.

    `url=5` was read as a number; if the handler accepts a string, it is one.
    """
    taken = dict(params)
    if schema is None:
        return taken
    for key, text in typed.items():
        if key in params and not schema.may_take(key, params[key]) and schema.may_take(key, text):
            taken[key] = text
    return taken
