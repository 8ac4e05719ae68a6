"""Bundle: what whoever is asked for help needs to know of an installation, and no secret of anybody's.

What may say something of a customer is not masked but left out: params, results,
claims, checkpoints, logs, notes, the messages of errors. Orgs, definitions and
machines are numbered; a run keeps its id, by which its owner finds it again.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel

from worker.operations.capacity import capacity
from worker.operations.demand import demand
from worker.operations.doctor import examine
from worker.operations.machine import Machine
from worker.settings import Settings
from worker.settings.sections import OperatorSettings
from worker.store import catalogue, listing, overview, run_listing, schema
from worker.store.database import Database
from worker.telemetry.secret_forms import shown_url
from worker.tokens.issuer import Issuer

Row = dict[str, Any]

DISTRIBUTIONS = (
    *("orgworker", "apscheduler", "cronsim", "sqlalchemy", "psycopg", "alembic", "httpx", "pyjwt"),
    *("cryptography", "pydantic", "typer", "starlette", "uvicorn"),
)
# Of these reasons `detail` is a word of ours, not a handler's or a customer's.
OWN_DETAIL = frozenset({"token_invalid", "handler_exited", "no_token"})
# Measures of `check` that name neither org nor definition.
OF_ALL = frozenset({"starts", "children", "inline", "memory"})
RUN = (
    *("id", "handler", "revision", "origin", "scheduled_for", "state", "reason", "available_at"),
    *("attempt", "fencing_token", "started_at", "finished_at"),
)


class Numbers:
    """A number in the place of each name, the same wherever the name stands in the bundle."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        return self._known.setdefault(name, f"{self._kind}-{len(self._known) + 1}")


def gather(database: Database, settings: Settings, issuers: Mapping[str, Issuer]) -> Row:
    """The bundle, section by section.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    machine = Machine.here()
    orgs, definitions, hosts = Numbers("org"), Numbers("definition"), Numbers("machine")
    room = capacity(database, settings.execution, machine)
    with database.autocommit() as connection:
        now = database.now(connection)
        failures = [
            row
            for state in ("failed", "refused")
            for row in run_listing.runs_for_all_orgs(connection, state=state, limit=overview.NEWEST)
        ]
        return {
            "made_at": now,
            "versions": _versions(),
            "machine": {"processors": machine.processors, "memory_bytes": machine.memory},
            "settings": shareable(settings),
            "database": overview.server(connection)
            | {"schema": schema.current(connection), "needs_schema": schema.head()},
            "sizes": overview.sizes(connection),
            "doctor": [finding.as_row() for finding in examine(database, settings)],
            "issuers": [one.as_row(issuers.get(one.issuer)) for one in demand(database, issuers)],
            "capacity": [measure.as_row() for measure in room.measures if measure.what in OF_ALL],
            "workers": [row | {"host": hosts.of(row["host"])} for row in overview.workers(connection)],
            "handlers": [_handler(row) for row in catalogue.entries(connection)],
            "unfinished": overview.unfinished_for_all_orgs(connection),
            "ended_by_hour": overview.ended_for_all_orgs(connection, now),
            "failures": [_run(row, orgs, definitions) for row in failures],
            "changes": [
                {"at": row["at"], "action": row["action"]}
                for row in listing.audit_for_all_orgs(connection, limit=overview.NEWEST)
            ],
        }


def shareable(section: BaseModel) -> Row:
    """Settings without what their own repr keeps back, and of URLs only where they lead to."""
    shown: Row = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        shown[name] = _place(value) if field.repr is not False else "***" if value else value
    return shown


def _place(value: Any) -> Any:
    if isinstance(value, OperatorSettings):
        return {"role": value.role}
    if isinstance(value, BaseModel):
        return shareable(value)
    if isinstance(value, Mapping):
        return {key: _place(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_place(entry) for entry in value]
    if isinstance(value, str) and "://" in value:
        scheme, parted, place = shown_url(value, path=False).partition("://")
        return f"{scheme}{parted}{place.rpartition('@')[2].removesuffix('/***')}"
    return value


def _versions() -> Row:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **{name: found for name, found in _installed(DISTRIBUTIONS)},
    }


def _installed(names: Iterable[str]) -> Iterable[tuple[str, str | None]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            # An extra that is not installed here.
            yield name, None


def _handler(row: Row) -> Row:
    # Of the error its kind: its message is whatever the plug-in's import said.
    error = None if row["error"] is None else str(row["error"]).partition(":")[0][:80]
    return {name: row[name] for name in ("name", "distribution", "version", "isolation")} | {"error": error}


def _run(row: Row, orgs: Numbers, definitions: Numbers) -> Row:
    kept = {name: row[name] for name in RUN}
    kept["org"] = orgs.of(row["org"])
    kept["definition"] = definitions.of(f"{row['org']}/{row['definition']}")
    kept["detail"] = row["detail"] if row["reason"] in OWN_DETAIL else None
    kept["error_type"] = (row["error"] or {}).get("type")
    return kept
