"""Doctor: finds slow or silent faults and says how to fix them; writes a support bundle."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel

from worker.errors import ConfigurationError
from worker.operations.capacity import Machine, capacity
from worker.operations.confinement import OFF, confinement_of, in_words
from worker.operations.requirements import forecast_tokens
from worker.settings import Settings
from worker.settings.sections import OperatorSettings
from worker.store import catalogue, health, roles, schema
from worker.store.database import Database
from worker.store.lists import orgs as org_lists
from worker.store.lists import runs as run_lists
from worker.telemetry.masking import shown_url
from worker.tokens.issuer import Issuer

# Seconds after which a held snapshot makes the hot tables grow: transactions of ours last milliseconds.
SNAPSHOT_SECONDS = 60.0
# Transactions that a replica, a slot or a prepared transaction may lie back.
SNAPSHOT_TRANSACTIONS = 100_000


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `fix` is empty where all is well. With a `fix`, one that is `ok` is a warning."""

    check: str
    ok: bool
    detail: str
    fix: str = ""

    def as_row(self) -> dict[str, object]:
        return {"check": self.check, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def examine(database: Database, settings: Settings) -> list[Finding]:
    """Every check, in the order in which to read them.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    return [check(database) for check in CHECKS] + [check(settings) for check in SETTINGS_CHECKS]


def held_snapshots(database: Database) -> Finding:
    """A snapshot that is held keeps every row that ended since: admission slows down with each."""
    name = "held_snapshots"
    if database.dialect == "sqlite":
        return Finding(name, True, "SQLite: nothing to hold")
    with database.autocommit() as connection:
        holders = health.snapshot_holders(connection)
    old = [holder for holder in holders if too_old(holder)]
    if not old:
        oldest = max((holder.seconds or 0.0 for holder in holders), default=0.0)
        return Finding(name, True, f"the oldest is {oldest:.0f} s old")
    first = old[0]
    lasting = "" if first.seconds is None else f", for {first.seconds:.0f} s"
    return Finding(
        name,
        False,
        f"{len(old)} held; the oldest by {first.kind} {first.name} "
        f"({first.application or 'unnamed'}, {first.state}){lasting}, {first.transactions} transactions back",
        _FIXES[first.kind],
    )


def live_rows(database: Database) -> Finding:
    """A run has a live row exactly as long as it has not ended."""
    with database.autocommit() as connection:
        strayed = health.strayed(connection)
    if not strayed:
        return Finding("live_rows", True, "every unfinished run has its live row, and no other has one")
    run_id, fault = strayed[0]
    return Finding(
        "live_rows",
        False,
        f"{len(strayed)} or more disagree, such as run {run_id}: {fault}",
        "something else than orgworker has written to runs or live_runs, or a backup was restored in part; "
        "report it with the output of `runs show`",
    )


def insecure_origins(settings: Settings) -> Finding:
    """Whoever is on the way to such an origin can read each org's token and act as that org."""
    name = "insecure_origins"
    listed = ", ".join(settings.execution.insecure_origins)
    if not listed:
        return Finding(name, True, "tokens leave this machine encrypted only")
    return Finding(
        name,
        True,
        f"tokens may go unencrypted to {listed}",
        "serve it by https and take it out of [execution] insecure_origins",
    )


def web_roles(database: Database) -> Finding:
    """The web side acts in two roles of its own; a login that may not take them answers 503."""
    name = "web_roles"
    if database.dialect == "sqlite":
        return Finding(name, True, "SQLite: there are no roles")
    with database.autocommit() as connection:
        missing = roles.missing(connection)
    if not missing:
        return Finding(name, True, f"the login may act as {roles.WEB} and {roles.OPERATOR}")
    return Finding(name, False, *missing.split(": ", 1))


def file_modes(database: Database) -> Finding:
    """New files are their owner's only; those of an older release may be open to others on the machine."""
    name = "file_modes"
    if database.dialect != "sqlite":
        return Finding(name, True, "PostgreSQL: no file of the database is here")
    with database.autocommit() as connection:
        file = health.sqlite_file(connection)
    folder = file.parent
    searched = folder.stat().st_mode
    found = [path for path in (*sorted(folder.glob(f"{file.name}*")), folder / "keyring") if path.is_file()]
    # A file is as open as its folder lets others come to it: r of the file, x of the folder.
    open_to = [path for path in found if path.stat().st_mode >> 2 & searched & 0o011]
    if not open_to:
        return Finding(name, True, f"only their owner reads the files in {folder}")
    names = " ".join(path.name for path in open_to)
    return Finding(name, True, f"others may read in {folder}: {names}", f"there: chmod go= {names}")


def sandbox(settings: Settings) -> Finding:
    """How far handlers are confined, as a worker that starts here and now would confine them."""
    name = "sandbox"
    try:
        confinement = confinement_of(settings)
    except ConfigurationError as error:
        return Finding(name, False, error.message, error.fix)
    if confinement.narrowed:
        detail = f"{confinement.level}; {in_words(confinement.narrowed[0])}"
        return Finding(name, False, detail, "move it elsewhere, or let handlers use a smaller folder")
    if confinement.level == OFF:
        return Finding(name, True, OFF, "every handler can read what the worker's user can; set it to auto")
    if confinement.rules is None:
        return Finding(name, False, confinement.level, "use Linux 6.12 or newer with Landlock turned on")
    return Finding(name, True, confinement.level)


def trusted_code(settings: Settings) -> Finding:
    """Code of plug-ins that no sandbox confines: inline handlers, and what the zygote imports."""
    execution = settings.execution
    trusted = {"preload": execution.preload, "inline": execution.inline}
    named = [f"{setting}: {', '.join(names)}" for setting, names in trusted.items() if names]
    return Finding("trusted_code", True, "; ".join(named) or "none: each handler has a process of its own")


def database_password(settings: Settings) -> Finding:
    """No sandbox keeps a handler from the network: the database has to ask for a password."""
    name = "database_password"
    database = settings.database
    if database.sqlite_file is not None:
        return Finding(name, True, "SQLite: a file, not a server")
    urls = [url for url in (database.url, database.owner_url) if url]
    open_to = [user for url in urls for user in health.users_without_password(url)]
    if not open_to:
        return Finding(name, True, "the database asks for a password")
    return Finding(
        name,
        False,
        f"the database lets in without a password: {', '.join(dict.fromkeys(open_to))}",
        "in pg_hba.conf use scram-sha-256 for this user, not trust, peer or ident",
    )


def too_old(holder: health.Holder) -> bool:
    """Whether vacuum has waited for it too long: by time where it has a transaction, else by distance."""
    if holder.seconds is not None and holder.kind == "session":
        return holder.seconds > SNAPSHOT_SECONDS
    return holder.transactions > SNAPSHOT_TRANSACTIONS


_FIXES = {
    "session": "end it: SELECT pg_terminate_backend(PID); a dump or report belongs on a replica",
    "prepared": "ROLLBACK PREPARED it, or finish it, where it was prepared",
    "slot": "drop the replication slot if nobody reads it any more",
}

CHECKS: Sequence[Callable[[Database], Finding]] = (held_snapshots, live_rows, web_roles, file_modes)
SETTINGS_CHECKS: Sequence[Callable[[Settings], Finding]] = (
    insecure_origins,
    sandbox,
    trusted_code,
    database_password,
)


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
            for row in run_lists.runs_for_all_orgs(connection, state=state, limit=health.NEWEST)
        ]
        return {
            "made_at": now,
            "versions": _versions(),
            "machine": {"processors": machine.processors, "memory_bytes": machine.memory},
            "settings": shareable(settings),
            "database": health.server(connection)
            | {"schema": schema.current(connection), "needs_schema": schema.head()},
            "sizes": health.sizes(connection),
            "doctor": [finding.as_row() for finding in examine(database, settings)],
            "issuers": [one.as_row(issuers.get(one.issuer)) for one in forecast_tokens(database, issuers)],
            "capacity": [measure.as_row() for measure in room.measures if measure.what in OF_ALL],
            "workers": [row | {"host": hosts.of(row["host"])} for row in health.workers(connection)],
            "handlers": [_handler(row) for row in catalogue.entries(connection)],
            "unfinished": health.unfinished_for_all_orgs(connection),
            "ended_by_hour": health.ended_for_all_orgs(connection, now),
            "failures": [_run(row, orgs, definitions) for row in failures],
            "changes": [
                {"at": row["at"], "action": row["action"]}
                for row in org_lists.audit_for_all_orgs(connection, limit=health.NEWEST)
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
