"""An installation with many orgs whose definitions are all due at one instant, filled directly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from sqlalchemy import select, text, update

from bench.history import put
from bench.installation import AUDIENCE, Installation
from bench.issuer import LIFETIME, RunningIssuer, issuer
from bench.server import own_server
from tests.fakes.plugins import make_plugin
from tests.fakes.postgres import Server
from worker.clock import SystemClock, to_text
from worker.demo.provider import Application
from worker.ids import OrgId, new_id
from worker.model.orgs import OrgRef
from worker.model.search import words_of
from worker.secret import Secret
from worker.store import schema, tables
from worker.store.database import Database
from worker.store.dialect import compact_json, driver
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import GrantedToken
from worker.tokens.sealing import KeyRing
from worker.tokens.shared import Found, SharedTokens, StoredToken, TokenRequest

ISSUER = "main"
SCOPES = ("read:kb",)
PROPERTIES = {"model_version": "gpt-4", "max_tokens": 1000}
FLAGS = {"agent-v2": True}
HANDLER = "bench.nine"
OTHER = "bench.other"
JOBS = """\
from worker import job


@job("{name}", isolation="inline", scopes={{"read:kb"}})
async def {attribute}(ctx):
    return None
"""
# Rows made before they are inserted.
PART = 20_000

ORGS = ("id", "code", "name", "issuer", "tags", "created_at", "updated_at")
CREDENTIALS = (
    *("id", "org_id", "generation", "client_id", "sealed", "key_id", "uses", "created_at", "created_by"),
)
DEFINITIONS = ("id", "org_id", "name", "revision", "enabled", "created_at", "updated_at")
REVISIONS = ("definition_id", "revision", "spec", "at", "by")
SCHEDULE = ("definition_id", "org_id", "next_scheduled_for", "next_fire_at")
TOKENS = (
    *("id", "org_id", "issuer", "version", "credential_id", "sealed", "key_id", "received_at", "expires_at"),
)
RUNS = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "created_at"),
    *("created_by", "idempotency_key"),
)
LIVE = (
    *("id", "org_id", "definition_id", "revision", "handler", "origin", "scheduled_for", "idempotency_key"),
    *("isolation", "serial", "state", "reason", "available_at"),
)


@dataclass(frozen=True, slots=True)
class Member:
    """An org of the crowd, with its credential and its definitions."""

    org: OrgRef
    credential: Credential
    definitions: tuple[str, ...]


class Crowd:
    """The installation, the issuer, and the orgs that were filled in."""

    def __init__(
        self, installation: Installation, issuer: RunningIssuer, ring: KeyRing, database: Database
    ) -> None:
        self.installation = installation
        self.issuer = issuer
        self.members: list[Member] = []
        self._ring = ring
        self.database = database
        self._texts: list[str] = []

    def add(self, orgs: int, per_org: int, *, others: int) -> None:
        """Add orgs with `per_org` definitions that are not due yet, and `others` with one each second."""
        now = datetime.now(UTC)
        apps = []
        for number in range(orgs + others):
            code, id_ = f"org_{number}", new_id()
            secret = Secret(f"secret-of-{number}")
            credential = Credential(new_id(), OrgId(id_), code, 1, f"client-{number}", secret)
            many = per_org if number < orgs else 1
            self.members.append(
                Member(OrgRef(OrgId(id_), code), credential, tuple(new_id() for _ in range(many)))
            )
            apps.append(
                Application(
                    code,
                    credential.client_id,
                    "",
                    scopes=SCOPES,
                    audiences=(AUDIENCE,),
                    properties=dict(PROPERTIES),
                    flags=dict(FLAGS),
                )
            )
        self._texts = self.issuer.issue(apps, audience=AUDIENCE)
        for start in range(0, len(self.members), PART):
            self._add_part(self.members[start : start + PART], to_text(now), self.members[orgs:])
        self.settle()

    def _add_part(self, members: Sequence[Member], now: str, others: Collection[Member]) -> None:
        orgs, words, credentials, definitions, revisions, schedule = [], [], [], [], [], []
        other_ids = {each.org.id for each in others}
        for org, credential, ids in ((each.org, each.credential, each.definitions) for each in members):
            name = f"Org {org.code[4:]}"
            orgs.append((org.id, org.code, name, ISSUER, "[]", now, now))
            words += [(word, org.id) for word in words_of(org.code, name)]
            place = {"org_id": org.id, "credential_id": credential.id}
            sealed = self._ring.seal(credential.secret.reveal(), **place)
            credentials.append((credential.id, org.id, 1, credential.client_id, *sealed, 0, now, "bench"))
            is_other = org.id in other_ids
            spec = spec_of(OTHER, "every 1s") if is_other else spec_of(HANDLER, "0 9 * * *")
            due = now if is_other else None
            for number, id_ in enumerate(ids):
                definitions.append((number, (id_, org.id, f"report-{number}", 1, True, now, now)))
                revisions.append((number, (id_, 1, spec, now, "bench")))
                schedule.append((number, (id_, org.id, due, due)))
        # Template by template, as they are materialised.
        for table, columns, rows in (
            ("orgs", ORGS, orgs),
            ("org_words", ("word", "org_id"), words),
            ("credentials", CREDENTIALS, credentials),
            ("definitions", DEFINITIONS, in_order(definitions)),
            ("definition_revisions", REVISIONS, in_order(revisions)),
            ("schedule", SCHEDULE, in_order(schedule)),
        ):
            self._put(table, columns, rows)

    def store_tokens(self) -> None:
        """Store a token for each org, as if a worker had requested it a moment ago."""
        now = datetime.now(UTC)
        store = _Stored()
        asyncio.run(self._seal_all(store))
        rows = []
        for request, each in store.tokens:
            received, left = now.timestamp() - each.age, now.timestamp() + each.left
            times = [to_text(datetime.fromtimestamp(at, UTC)) for at in (received, left)]
            row = (request.id, request.org.id, request.issuer, 1, each.credential_id)
            rows.append((*row, each.sealed, each.key_id, *times))
        self._put("access_tokens", TOKENS, rows)
        self.settle()

    async def _seal_all(self, store: _Stored) -> None:
        clock = SystemClock()
        shared = SharedTokens(store, lambda key_id: self._ring, clock)
        for member, token in zip(self.members, self._texts, strict=True):
            request = TokenRequest(ISSUER, member.org, AUDIENCE, frozenset(SCOPES))
            granted = GrantedToken(token, member.credential, clock.monotonic())
            await shared.put(request, granted, left=LIFETIME - 600)

    def add_backlog(self, handlers: Sequence[str]) -> int:
        """Add a waiting run of each of these handlers for every org, in turn; returns how many."""
        stamp, count = to_text(datetime.now(UTC)), 0
        for start in range(0, len(self.members), PART):
            runs, live = [], []
            for member in self.members[start : start + PART]:
                for handler in handlers:
                    id_ = new_id()
                    run = (id_, member.org.id, member.definitions[0], 1, handler, "manual", stamp)
                    runs.append((*run, stamp, "bench", id_))
                    live.append((*run, id_, "inline", False, "waiting", "due", stamp))
            self._put("runs", RUNS, runs)
            self._put("live_runs", LIVE, live)
            count += len(runs)
        return count

    def forget_history(self) -> None:
        """Delete all runs, which have ended."""
        with self.database.transaction() as connection:
            for table in ("attempts", "runs", "run_ends", "rollup_days", "rollup_hours"):
                if self.database.dialect == "postgresql":
                    connection.execute(text(f"TRUNCATE {table}"))
                elif table != "run_ends":
                    connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608
        self.settle()

    @contextlib.contextmanager
    def making_due(self, at: datetime) -> Iterator[None]:
        """Make every definition of the crowd due at this full second; it commits when the block ends."""
        spec = spec_of(HANDLER, f"{at.second} {at.minute} {at.hour} * * *")
        with self.database.transaction() as connection:
            if self.database.dialect == "postgresql":
                connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            revisions, schedule = tables.definition_revisions, tables.schedule
            ours = select(schedule.c.definition_id).where(schedule.c.next_fire_at.is_(None))
            connection.execute(
                update(revisions).where(revisions.c.definition_id.in_(ours)).values(spec=json.loads(spec))
            )
            connection.execute(
                update(schedule)
                .where(schedule.c.next_fire_at.is_(None))
                .values(next_scheduled_for=at, next_fire_at=at)
            )
            yield

    def settle(self) -> None:
        """Vacuum and checkpoint, as autovacuum would."""
        with self.database.autocommit() as connection:
            if self.database.dialect == "sqlite":
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
                connection.execute(text("ANALYZE"))
            else:
                # Without the tables of runs: analysed while empty, they would get plans for empty tables.
                filled = "orgs, org_words, credentials, access_tokens, definitions, definition_revisions"
                connection.execute(text(f"VACUUM ANALYZE {filled}, schedule"))
                connection.execute(text("VACUUM live_runs"))
                connection.execute(text("CHECKPOINT"))

    def _put(self, table: str, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
        with self.database.transaction() as connection:
            put(driver(connection), self.database.dialect, table, columns, rows)


def in_order(numbered: list[tuple[int, tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """The rows by their number."""
    return [row for _, row in sorted(numbered, key=itemgetter(0))]


class _Stored:
    """A token store that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[tuple[TokenRequest, StoredToken]] = []

    async def find(self, request: TokenRequest) -> Found:
        return Found()

    async def find_all(self, requests: Sequence[TokenRequest]) -> dict[TokenRequest, Found]:
        return {}

    async def lives(self, requests: Sequence[TokenRequest]) -> dict[TokenRequest, tuple[float, float]]:
        return {}

    async def reserve(self, request: TokenRequest, version: int, seconds: float) -> bool:
        return True

    async def renew(self, requests: Collection[TokenRequest], seconds: float) -> None: ...

    async def put(self, request: TokenRequest, token: StoredToken) -> None:
        self.tokens.append((request, token))

    async def release(self, request: TokenRequest) -> None: ...

    async def drop(self, request: TokenRequest) -> None: ...


def spec_of(handler: str, schedule: str) -> str:
    """The JSON of a definition; one that is due each second lets its runs overlap."""
    spec: dict[str, Any] = {"handler": handler, "schedule": schedule, "isolation": "inline"}
    return compact_json(spec | ({} if handler == HANDLER else {"overlap": "allow", "spread": "off"}))


def warm_handler(number: int) -> str:
    """The handler that only the worker with this number offers."""
    return f"bench.warm_{number}"


@contextlib.contextmanager
def crowd(
    dialect: str, *, workers: int, slots: int, rate: float, ahead: float
) -> Iterator[tuple[Crowd, list[Path]]]:
    """An installation without orgs, and a folder of plug-ins for each worker."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orgworker-bench-")))
        server: Server | None = stack.enter_context(own_server()) if dialect == "postgresql" else None
        url = server.url() if server else f"sqlite:///{folder / 'worker.db'}"
        schema.upgrade(url)
        running = stack.enter_context(issuer(folder / "issuer", rate=rate))
        installation = Installation(folder, url, running.url, server)
        stack.callback(installation.database.close)
        installation.configure(
            slots=slots, requests_per_second=rate or 10_000, extra=f'[tokens]\nahead = "{ahead:.0f}s"'
        )
        secrets = folder / "secrets"
        secrets.mkdir(mode=0o700)
        ring = KeyRing.load_or_generate(secrets / "keyring")
        # Filling the tables has no deadline.
        database = Database.open(url, clock=SystemClock(), role="bench", threads=1, deadline=600)
        stack.callback(database.close)
        yield (
            Crowd(installation, running, ring, database),
            [_plugins(folder, number) for number in range(workers)],
        )


def _plugins(folder: Path, number: int) -> Path:
    names = {HANDLER: "nine", OTHER: "other", warm_handler(number): "warm"}
    source = "\n".join(JOBS.format(name=name, attribute=attribute) for name, attribute in names.items())
    return make_plugin(
        folder / f"plugins-{number}",
        dist="orgworker-bench",
        modules={f"bench_jobs_{number}": source},
        entry_points={name: f"bench_jobs_{number}:{attribute}" for name, attribute in names.items()},
    )
