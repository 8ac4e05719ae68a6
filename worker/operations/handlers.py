"""Handlers as the catalogue has them, for checks before a definition is stored or run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, DefinitionError, NotFound, UnknownHandler, did_you_mean
from worker.guard.claims import Claims
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import allowed, clamped
from worker.handlers.schema import Schema, check_schema
from worker.model.definitions.definition import Definition
from worker.model.definitions.fields import refusal
from worker.model.definitions.pools import pool_of
from worker.model.egress import OPEN, effective, wider
from worker.model.runs.children import FamilyCap
from worker.model.runs.run import Declared, Isolation
from worker.store import audit, catalogue, host_grants, host_handlers, places
from worker.store.database import Database
from worker.store.dialect import Row


def forget(database: Database, name: str, *, actor: str) -> Row:
    """Forget the workers' rows of a handler that no live worker offers; hosts may then offer it alone.

    Raises:
        NotFound: no worker has or had it.
        Conflict: a live worker offers it.
    """
    with database.transaction() as connection:
        if machines := catalogue.offering(connection, name):
            raise Conflict(
                f"workers offer {name}: {', '.join(machines)}",
                fix="take the plug-in off them and restart them first",
            )
        rows = catalogue.entries(connection, name)
        if not rows:
            pools = places.pools_with(connection, name)
            of = f"; hosts of {', '.join(pools)} do" if pools else ""
            raise NotFound(
                f"no worker offers or offered {name}{of}", fix="`handlers list` lists the handlers"
            )
        catalogue.forget_name(connection, name)
        detail = {"distributions": [row["distribution"] for row in rows]}
        audit.note(connection, None, "handler.forget", name, detail, at=database.now(connection), actor=actor)
    return {"name": name, **detail}


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
    """The workers' catalogue, read once on first use, and what hosts declare besides.

    A handler that workers have is theirs, wherever it runs. For any other the hosts of the run's pool
    decide; what they declare beyond their ceiling is left out.
    """

    connection: Connection
    _rows: dict[str, list[Row]] | None = field(default=None, init=False)
    _isolations: Mapping[str, Mapping[str, Isolation]] | None = field(default=None, init=False)
    _of_hosts: dict[tuple[str, str], list[Row]] = field(default_factory=dict, init=False)
    _granted: dict[tuple[str, str], HandlerEntry | None] = field(default_factory=dict, init=False)
    _schemas: dict[tuple[str, str | None], Schema | None] = field(default_factory=dict, init=False)

    def named(self, name: str, pool: str | None = None) -> list[Row]:
        """Every row of that name, including broken ones: the workers', else those of hosts of the pool."""
        rows = self._of_workers().get(name)
        if rows is not None or pool is None:
            return rows or []
        if (name, pool) not in self._of_hosts:
            self._of_hosts[name, pool] = places.declared_in(self.connection, name, pool)
        return self._of_hosts[name, pool]

    def _of_workers(self) -> dict[str, list[Row]]:
        if self._rows is None:
            self._rows = {}
            for row in catalogue.entries(self.connection):
                self._rows.setdefault(row["name"], []).append(row)
        return self._rows

    def declared(self, name: str) -> Declared:
        """Where the handler asks to run, as workers declare it: what hosts declare places no run."""
        row = self._usable(name, None)
        if row is not None:
            return Declared("inline" if row["isolation"] == "inline" else "child", row["pool"])
        if self._isolations is None:
            self._isolations = host_handlers.isolations(self.connection)
        return Declared(on_hosts={} if name in self._of_workers() else self._isolations.get(name, {}))

    def place_of(self, definition: Definition, org_pool: str | None) -> str | None:
        """The pool of a definition's runs, None if nothing names one."""
        return definition.pool or self.declared(definition.handler).pool or org_pool

    def pool_of(self, definition: Definition, org_pool: str | None) -> str:
        """The pool of a definition's runs in an org with this pool."""
        return pool_of(self.place_of(definition, org_pool))

    def isolation_of(self, definition: Definition, pool: str) -> Isolation:
        """How a definition's runs in this pool are isolated."""
        return definition.isolation or self.declared(definition.handler).isolation_in(pool)

    def effective(self, name: str, pool: str) -> Mapping[str, Any] | None:
        """The handler's usable row, for a handler of hosts within what they may; None if it is unknown."""
        row, entry = self._usable(name, pool), self._within(name, pool)
        if row is None or entry is None:
            return row
        # Their pool is not the handler's to declare.
        return row | catalogue.as_row(entry) | {"pool": None}

    def is_offered(self, name: str, pool: str) -> bool:
        """Whether a handler loads, on workers or on hosts of the pool."""
        return self._usable(name, pool) is not None

    def scopes_of(self, name: str, pool: str) -> frozenset[str]:
        """The scopes that the handler needs; none for an unknown handler."""
        row = self.effective(name, pool)
        return frozenset() if row is None else frozenset(row["scopes"])

    def secrets_of(self, name: str, pool: str) -> frozenset[str]:
        """The names of the org's secrets that the handler gets; none for an unknown handler."""
        row = self.effective(name, pool)
        return frozenset() if row is None else frozenset(row["secrets"])

    def declared_secrets(self) -> set[str]:
        """The names of the secrets that any handler gets."""
        own = {name for rows in self._of_workers().values() for row in rows for name in row["secrets"]}
        return own | places.approved_secrets(self.connection)

    def _within(self, name: str, pool: str) -> HandlerEntry | None:
        """What hosts of the pool may do of what they declare; None for a handler of workers."""
        if name in self._of_workers():
            return None
        if (name, pool) not in self._granted:
            row = self._usable(name, pool)
            approved = host_grants.approved_in(self.connection, [pool]).get((pool, name))
            ceiling = allowed(approved=approved)
            self._granted[name, pool] = None if row is None else clamped(catalogue.entry_of(row), ceiling)
        return self._granted[name, pool]

    def readers(self, definitions: Iterable[Definition], org_pool: str | None) -> Readers:
        """What the handlers of these definitions of an org read of a token."""
        properties: set[str] = set()
        flags: set[str] = set()
        open_ended = False
        for definition in definitions:
            properties |= set(definition.requires_properties)
            conditions = [definition.requires_flag, *(variant.flag for variant in definition.variants)]
            flags |= {condition.name for condition in conditions if condition is not None}
            pool = self.pool_of(definition, org_pool)
            for name in definition.handlers:
                row = self._usable(name, pool)
                settings = None if row is None else row["settings_schema"]
                if isinstance(settings, Mapping):
                    properties |= set(settings.get("properties", {}))
                elif row is None:
                    open_ended = True
        return Readers(frozenset(properties), frozenset(flags), open_ended)

    def check(
        self,
        definition: Definition,
        entry: str,
        *,
        org_pools: Callable[[], Collection[str | None]],
        inline: Collection[str],
        allow_unknown: bool,
    ) -> None:
        """Check a definition against all of its handlers, including their params and state.

        `org_pools` are those of the orgs whose definition it is: a handler that only hosts offer is
        looked up in the pool of the runs.

        Raises:
            UnknownHandler: no distribution offers it, or it does not load (unless `allow_unknown`).
            DefinitionError: invalid params, inline although the operator has not allowed it, or with an
                egress that is not open, state with concurrent runs, egress or audiences that no handler
                declares, no pool although only hosts offer a handler, or a handler that starts others that
                declare more than it does.
        """
        rows: list[Row] = []
        for name in definition.handlers:
            field = "handler" if name == definition.handler else "variants"
            for pool in self._places(name, definition, org_pools):
                row = self._usable(name, pool)
                if row is None:
                    if not allow_unknown:
                        raise self._unknown(name, pool, entry, field)
                    continue
                rows.append(row)
                self._check_row(name, row, definition, entry, inline)
                self._check_children(row, definition, entry, pool)
                self.check_params(name, definition.params, entry, pool)
                self._check_params_by_hand(name, definition.params_by_hand, entry, pool)
        if len({row["name"] for row in rows}) == len(definition.handlers):
            _check_narrowing(definition, rows, entry)

    def _places(
        self, name: str, definition: Definition, org_pools: Callable[[], Collection[str | None]]
    ) -> Collection[str | None]:
        """The pools whose declarations of a handler count for a definition; None for those of workers."""
        if name in self._of_workers():
            return (None,)
        own = self.place_of(definition, None)
        if own is not None:
            return (own,)
        # Sorted, so that one file always gives one error; first an org without a pool.
        return sorted(set(org_pools()) or {None}, key=lambda pool: pool or "")

    def _check_row(
        self, name: str, row: Row, definition: Definition, entry: str, inline: Collection[str]
    ) -> None:
        if (definition.isolation or row["isolation"]) == "inline" and row["distribution"] not in inline:
            raise refusal(
                f"{name} would run inline, where it can read every org's secrets",
                entry,
                "isolation",
                fix=f'if you trust it, add "{row["distribution"]}" to execution.inline in worker.toml; '
                'else set isolation = "child"',
            )
        if (definition.isolation or row["isolation"]) == "inline":
            _check_open(name, row, definition, entry)
        if row["state"] and not definition.serial:
            raise refusal(
                f"{name} declares state, which concurrent runs would overwrite",
                entry,
                "overlap",
                fix="choose skip, queue_one or replace",
            )

    def _check_children(self, row: Row, definition: Definition, entry: str, pool: str | None) -> None:
        """Refuse a definition whose runs would wait for good, or start runs that are refused."""
        name = row["name"]
        if row["children"] and definition.parked_counts:
            raise refusal(
                f"{name} waits for runs that it starts, and would keep a slot that they need",
                entry,
                "parked_counts",
                fix="leave it out",
            )
        cap = _cap_of(row, definition)
        for child in row["children"]:
            its = self._usable(child, pool)
            if its is None:
                continue
            if its["state"]:
                raise refusal(
                    f"{name} starts {child}, which declares state that concurrent runs would overwrite",
                    entry,
                    "handler",
                    fix=f"remove {child} from children of {name}, or state from {child}",
                )
            if (more := cap.excess(_cap_of(its, definition))) is not None:
                raise refusal(
                    f"{name} starts {child}, which declares {more}: its runs are refused (child_exceeds)",
                    entry,
                    "handler",
                    fix=f"declare it in @job of {name} as well, or remove it from {child}",
                )

    def check_params(self, name: str, params: Mapping[str, Any], entry: str, pool: str | None) -> None:
        """Check params against the handler's schema in this pool, if it has one.

        The run's own process checks the rest before it calls the handler.

        Raises:
            DefinitionError: names the param.
        """
        schema = self.schema(name, pool)
        problem = None if schema is None else schema.problem(dict(params))
        if problem is not None:
            field = ".".join(["params", *problem.path])
            raise refusal(problem.message, entry, field, fix=f"`handlers show {name}` shows its params")

    def _check_params_by_hand(self, name: str, params: Collection[str], entry: str, pool: str | None) -> None:
        """Refuse names that the handler's schema does not have, such as misspelt ones."""
        schema = self.schema(name, pool)
        for param in params:
            if schema is not None and not schema.knows(param):
                fix = f"remove it; `handlers show {name}` shows its params"
                raise refusal(f"{name} has no param {param}", entry, "params_by_hand", fix=fix)

    def _usable(self, name: str, pool: str | None) -> Row | None:
        return next((row for row in self.named(name, pool) if row["error"] is None), None)

    def schema(self, name: str, pool: str | None) -> Schema | None:
        """The schema of the handler's params in this pool, if it has one that is valid."""
        if (name, pool) not in self._schemas:
            row = self._usable(name, pool)
            self._schemas[name, pool] = None if row is None else schema_of(row["params_schema"])
        return self._schemas[name, pool]

    def _unknown(self, name: str, pool: str | None, entry: str, field: str) -> DefinitionError:
        broken, close = self.named(name, pool), ""
        elsewhere = [] if name in self._of_workers() else places.pools_with(self.connection, name)
        if broken:
            row = broken[0]
            of = f"{row['distribution']} {row['version']}"
            where = f" on hosts of pool {pool}" if name not in self._of_workers() else ""
            problem = f"handler {name} of {of} does not load{where}: {row['error']}"
        elif elsewhere and pool is None:
            return refusal(
                f"only hosts offer {name}, and neither the definition nor its org names a pool",
                entry,
                "pool",
                fix=_name_a_pool(elsewhere),
            )
        elif elsewhere:
            problem = f"no worker and no host of pool {pool} offers a handler {name!r}"
            close = f"{_name_a_pool(elsewhere)};"
        else:
            problem = f"no installed distribution offers a handler {name!r}"
            known = [] if pool is None else places.names_in(self.connection, pool)
            close = did_you_mean(name, [*self._of_workers(), *known])
        return UnknownHandler(
            f"{entry}, {field}: {problem}",
            entry=entry,
            field=field,
            fix=f"{close} `handlers list` lists those there are; --allow-unknown-handlers stores it "
            "anyway".strip(),
        )


def _check_open(name: str, row: Row, definition: Definition, entry: str) -> None:
    """Refuse an inline run whose egress is not open: the worker's own process cannot be sealed."""
    if definition.egress is not None and OPEN not in definition.egress:
        raise refusal(
            f"{name} would run inline, in the worker's process, which cannot be sealed",
            entry,
            "egress",
            fix='set isolation = "child", or leave egress out',
        )
    if row["egress"] is not None and OPEN not in row["egress"]:
        raise refusal(
            f"{name} declares egress, and would run inline, in the worker's process, which cannot be sealed",
            entry,
            "isolation",
            fix='set isolation = "child"',
        )


def _check_narrowing(definition: Definition, rows: Sequence[Row], entry: str) -> None:
    """Refuse what a definition lists and no handler declares, unless one of them declares no list."""
    for key, own, too_much in (
        ("egress", definition.egress, wider),
        ("audiences", definition.audiences, _missing),
    ):
        lists = [row[key] for row in rows]
        if own is None or any(listed is None or (key == "audiences" and not listed) for listed in lists):
            continue
        declared = sorted({item for listed in lists for item in listed})
        for item in too_much(own, declared):
            names = ", ".join(sorted({row["name"] for row in rows}))
            raise refusal(
                f"{names} does not declare {item!r}, and a definition can only narrow what its handler "
                f"declares: {', '.join(declared) or 'nothing'}",
                entry,
                key,
                fix=f"remove it, or add it to {key} of @job",
            )


def _cap_of(row: Row, definition: Definition) -> FamilyCap:
    """What a handler declares that those have to keep to that it starts."""
    scopes = row["scopes"] if definition.scopes is None else definition.scopes
    lists = tuple(effective(row["egress"], definition.egress, None, required=False).values())
    secrets, audiences = frozenset(row["secrets"]), frozenset(row["audiences"])
    return FamilyCap(row["name"], frozenset(scopes), secrets, lists, audiences)


def _missing(items: Collection[str], declared: Collection[str]) -> list[str]:
    return [item for item in items if item not in declared]


def _name_a_pool(pools: Sequence[str]) -> str:
    """How a definition names the pool of a handler that only hosts offer."""
    if len(pools) == 1:
        return f'write pool = "{pools[0]}", whose hosts offer it'
    return f'write pool = "{pools[0]}", or another whose hosts offer it: {", ".join(pools[1:])}'


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
