"""The bundle of `doctor --bundle`: what a supporter asks first, without names, secrets or handlers' texts."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from worker import release
from worker.diagnosis.doctor import run_checks, type_of
from worker.ids import ALL_ORGS
from worker.settings import Settings
from worker.settings.sections import OperatorSettings
from worker.store import catalogue, health, schema
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import AUDIT, RUNS, Page, morning
from worker.store.lists.read import read
from worker.telemetry.masking import shown_url

if TYPE_CHECKING:
    from worker.guard.issuer import Issuer
    from worker.tokens.sealing import KeyRing

DISTRIBUTIONS = (
    *("orgworker", "apscheduler", "cronsim", "sqlalchemy", "psycopg", "alembic", "httpx", "pyjwt"),
    *("cryptography", "pydantic", "typer", "starlette", "uvicorn"),
)
# Reasons whose `detail` is the worker's own text, not a handler's or a customer's.
OWN_DETAIL = frozenset({"token_invalid", "handler_exited", "no_token"})
# Measures of `check` that name no org and no definition.
OF_ALL = frozenset({"starts", "children", "inline", "memory"})
RUN = (
    *("id", "handler", "revision", "origin", "scheduled_for", "state", "reason", "available_at"),
    *("attempt", "fencing_token", "started_at", "finished_at"),
)


def _numbers(kind: str) -> Callable[[str], str]:
    """Replaces each name with a number, the same everywhere in the bundle."""
    known: dict[str, str] = {}
    return lambda name: known.setdefault(name, f"{kind}-{len(known) + 1}")


def gather(
    database: Database, settings: Settings, issuers: Mapping[str, Issuer], ring: KeyRing | None
) -> Row:
    """The bundle, section by section.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    # The checks do not need these, which take 0.1 s to import.
    from worker.diagnosis.capacity import Machine, capacity
    from worker.diagnosis.requirements import forecast_tokens

    machine = Machine.here()
    orgs, definitions, hosts = map(_numbers, ("org", "definition", "machine"))
    measures = capacity(database, settings.execution, machine).measures
    checks = run_checks(database, settings, ring, org=orgs)
    forecasts, forecast_at = forecast_tokens(database, issuers, settings.tokens)
    with database.autocommit() as connection:
        now = database.now(connection)
        since = (now - timedelta(hours=23)).replace(minute=0, second=0, microsecond=0)
        ended = morning.ended_by_hour(connection, ALL_ORGS, since, now + timedelta(hours=1))
        failures = [
            row
            for state in ("failed", "refused")
            for row in read(connection, RUNS, ALL_ORGS, Page(state=state, limit=health.NEWEST))
        ]
        return {
            "made_at": now,
            "versions": _versions(),
            "machine": {"processors": machine.processors, "memory_bytes": machine.memory},
            "settings": shareable(settings),
            "database": health.server(connection)
            | {"schema": schema.current(connection), "needs_schema": schema.head()},
            "sizes": health.sizes(connection),
            "doctor": [asdict(found) for found in checks],
            "issuers": [
                each.as_row(issuers.get(each.issuer), forecast_at, settings.tokens) for each in forecasts
            ],
            "capacity": [measure.as_row() for measure in measures if measure.what in OF_ALL],
            "workers": [
                row | {"host": hosts(row["host"]), "of_host": row["of_host"] and hosts(row["of_host"])}
                for row in health.workers(connection)
            ],
            "handlers": [_handler(row) for row in catalogue.entries(connection)],
            "unfinished": health.unfinished(connection, ALL_ORGS),
            "ended_by_hour": [
                {"hour": hour, "state": state, "runs": runs} for (hour, state), runs in sorted(ended.items())
            ],
            "failures": [_run(row, orgs, definitions) for row in failures],
            "changes": [
                {"at": row["at"], "action": row["action"]}
                for row in read(connection, AUDIT, ALL_ORGS, Page(limit=health.NEWEST))
            ],
        }


def shareable(section: BaseModel) -> Row:
    """Settings without those that their repr hides, and only the origin of URLs."""
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
        "commit": release.commit(),
        **{name: _version(name) for name in DISTRIBUTIONS},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # An extra that is not installed here.
        return None


def _handler(row: Row) -> Row:
    error = None if row["error"] is None else type_of(row["error"])
    return {name: row[name] for name in ("name", "distribution", "version", "isolation")} | {"error": error}


def _run(row: Mapping[str, Any], orgs: Callable[[str], str], definitions: Callable[[str], str]) -> Row:
    kept = {name: row[name] for name in RUN}
    kept["org"] = orgs(row["org"])
    kept["definition"] = definitions(f"{row['org']}/{row['definition']}")
    kept["detail"] = row["detail"] if row["reason"] in OWN_DETAIL else None
    kept["error_type"] = (row["error"] or {}).get("type")
    return kept
