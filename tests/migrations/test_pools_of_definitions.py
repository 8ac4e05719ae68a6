"""Handlers of hosts of the release before: under their pools, and definitions that relied on one name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from alembic import command
from sqlalchemy import Connection, insert, select

from tests.fakes.clock import ManualClock
from tests.migrations.test_schema import alembic, connected
from worker.ids import new_id
from worker.operations.approvals import approve, list_approvals
from worker.operations.templates import materialise
from worker.store import schema, tables
from worker.store.database import Database

AT = datetime(2030, 1, 1, tzinfo=UTC)
BEFORE = "0025"


class Old:
    """Writes rows as the release before did."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._orgs: dict[str, str] = {}

    def _put(self, table: str, **values: Any) -> None:
        self._connection.execute(insert(tables.metadata.tables[table]).values(**values))

    def org(self, code: str, *tags: str, pool: str | None = None) -> None:
        self._orgs[code] = new_id()
        self._put(
            "orgs",
            **{"id": self._orgs[code], "code": code, "name": code, "issuer": "main", "state": "active"},
            **{"tags": tags, "pool": pool, "created_at": AT, "updated_at": AT},
        )

    def definition(
        self, org: str, name: str, handler: str, *, template: str | None = None, **keys: Any
    ) -> str:
        """A definition at its second revision."""
        id_ = new_id()
        self._put(
            "definitions",
            **{"id": id_, "org_id": self._orgs[org], "name": name, "revision": 2, "enabled": True},
            **{"template_id": template, "created_at": AT, "updated_at": AT},
        )
        for revision in (1, 2):
            spec = {"handler": handler, "schedule": f"{revision} 0 * * *", **keys}
            row = {"definition_id": id_, "revision": revision, "spec": spec, "at": AT, "by": "ana"}
            self._put("definition_revisions", **row)
        return id_

    def template(self, name: str, handler: str, selector: Any = "all") -> str:
        id_ = new_id()
        self._put(
            "templates",
            **{"id": id_, "name": name, "revision": 1, "selector": selector, "change": 1},
            **{"spec": {"handler": handler, "schedule": "2 0 * * *"}, "orgs_total": 1, "orgs_done": 1},
            **{"created_at": AT, "updated_at": AT, "updated_by": "ana"},
        )
        fact = {"name": "templates_change", "value": "1"}
        if not self._connection.execute(
            select(tables.facts).where(tables.facts.c.name == fact["name"])
        ).all():
            self._put("facts", **fact)
        return id_

    def serves(self, pool: str, *handlers: str, is_host: bool = True, removed: bool = False) -> None:
        """A host of a pool, or a worker, that has registered these handlers."""
        host = new_id() if is_host else None
        if is_host:
            named = {"id": host, "name": f"h-{new_id()[-12:]}", "pool": pool, "token_sha256": new_id()}
            removed_at = AT if removed else None
            self._put("hosts", **named, created_at=AT, created_by="ana", removed_at=removed_at)
        self._put(
            "workers",
            **{"id": new_id(), "host": "box", "pid": 1, "version": "1", "handlers": list(handlers)},
            **{"capacity": {}, "pools": [pool], "host_id": host, "started_at": AT, "renewed_at": AT},
            lease_until=AT + timedelta(days=3650),
        )

    def reported(self, name: str, pool: str | None = None, **values: Any) -> None:
        """What the catalogue has of a handler, whoever reported it."""
        key = {"name": name, "distribution": "gpu", "version": "1", "entry_point": "gpu:x"}
        self._put("catalogue", **{**key, "scopes": [], "secrets": [], "pool": pool, "seen_at": AT} | values)


@contextmanager
def before(url: str) -> Iterator[Old]:
    alembic(url, command.upgrade, BEFORE)
    with connected(url) as connection:
        yield Old(connection)


def rows_of(url: str, table: str) -> list[Mapping[str, Any]]:
    with connected(url) as connection:
        rows = connection.execute(select(tables.metadata.tables[table])).mappings().all()
        return [dict(row) for row in rows]


def pools_of(url: str) -> dict[str, Any]:
    """The pool that each definition names, by org and name; its first revision must be as it was."""
    orgs = {row["id"]: row["code"] for row in rows_of(url, "orgs")}
    names = {row["id"]: f"{orgs[row['org_id']]} {row['name']}" for row in rows_of(url, "definitions")}
    specs = rows_of(url, "definition_revisions")
    assert {row["spec"].get("pool") for row in specs if row["revision"] == 1} <= {None, "own"}
    assert {row["revision"] for row in rows_of(url, "definitions")} <= {2}
    return {names[row["definition_id"]]: row["spec"].get("pool") for row in specs if row["revision"] == 2}


def upgraded(url: str) -> list[str]:
    lines: list[str] = []
    schema.upgrade(url, report=lines.append)
    return lines


def test_what_relied_on_a_hosts_pool_names_it_and_the_rest_stays(database_url: str) -> None:
    with before(database_url) as old:
        old.org("org_a")
        old.org("org_p", pool="eu")
        old.serves("eu-gpu", "gpu.placed", "gpu.elsewhere")
        old.serves("default", "gpu.plain", "acme.both")
        old.serves("gone", "gpu.removed", removed=True)
        old.serves("default", "acme.note", "acme.both", is_host=False)
        old.reported("gpu.placed", "eu-gpu")
        old.reported("gpu.elsewhere", "us")
        old.reported("gpu.plain")
        old.reported("gpu.removed", "gone")
        old.reported("acme.note", "default")
        old.reported("acme.both", "default")
        for name, handler in (
            ("placed", "gpu.placed"),
            ("elsewhere", "gpu.elsewhere"),
            ("plain", "gpu.plain"),
            ("removed", "gpu.removed"),
            ("of_workers", "acme.note"),
            ("of_both", "acme.both"),
            ("unknown", "gpu.unknown"),
        ):
            old.definition("org_a", name, handler)
        old.definition("org_a", "own", "gpu.placed", pool="own")
        old.definition("org_p", "placed_too", "gpu.placed")
        old.definition("org_p", "of_org", "gpu.plain")

    lines = upgraded(database_url)

    assert pools_of(database_url) == {
        "org_a placed": "eu-gpu",
        "org_a plain": "default",
        # The handler's pool came before the org's.
        "org_p placed_too": "eu-gpu",
        "org_a own": "own",
        "org_p of_org": None,
        **{f"org_a {name}": None for name in ("elsewhere", "removed", "of_workers", "of_both", "unknown")},
    }
    audited = [row for row in rows_of(database_url, "audit") if row["action"] == "definition.pool_written"]
    assert {(row["actor"], row["subject"], row["detail"]["pool"]["after"]) for row in audited} == {
        ("db upgrade", "org_a placed", "eu-gpu"),
        ("db upgrade", "org_a plain", "default"),
        ("db upgrade", "org_p placed_too", "eu-gpu"),
    }
    assert lines == [
        'definition org_a placed: pool = "eu-gpu" is written, where gpu.placed has run so far',
        'definition org_a plain: pool = "default" is written, where gpu.plain has run so far',
        'definition org_p placed_too: pool = "eu-gpu" is written, where gpu.placed has run so far',
    ]
    assert upgraded(database_url) == []


def test_a_pool_that_hosts_of_others_may_have_chosen_is_named_for_review(database_url: str) -> None:
    """A host of pool `pa` could declare pool `pa` for the handler of another: nobody knows which is right."""
    with before(database_url) as old:
        old.org("org_a")
        old.serves("pb", "gpu.render")
        old.serves("pa", "gpu.render")
        old.reported("gpu.render", "pb")
        old.reported("gpu.render", "pa", distribution="aaa")
        old.definition("org_a", "nightly", "gpu.render")

    lines = upgraded(database_url)

    assert pools_of(database_url) == {"org_a nightly": "pa"}
    assert [line.partition("; ")[2] for line in lines] == ["hosts of pool pb offer it, too"]


def test_templates_and_what_they_made_name_the_same_pool(database_url: str, clock: ManualClock) -> None:
    with before(database_url) as old:
        old.org("org_a", "a")
        old.org("org_p", pool="eu")
        old.serves("eu-gpu", "gpu.placed")
        old.serves("default", "gpu.plain")
        old.reported("gpu.placed", "eu-gpu")
        old.reported("gpu.plain")
        placed, mixed = old.template("placed", "gpu.placed"), old.template("mixed", "gpu.plain")
        plain = old.template("plain", "gpu.plain", {"tags": ["a"]})
        for org in ("org_a", "org_p"):
            old.definition(org, "placed", "gpu.placed", template=placed)
            old.definition(org, "mixed", "gpu.plain", template=mixed)
        old.definition("org_a", "plain", "gpu.plain", template=plain)

    lines = upgraded(database_url)

    assert {row["name"]: row["spec"].get("pool") for row in rows_of(database_url, "templates")} == {
        "placed": "eu-gpu",
        "plain": "default",
        # Its orgs are in different pools: one pool for all would move runs.
        "mixed": None,
    }
    assert pools_of(database_url) == {
        **{"org_a placed": "eu-gpu", "org_p placed": "eu-gpu", "org_a plain": "default"},
        **{"org_a mixed": None, "org_p mixed": None},
    }
    assert lines[0] == (
        "template mixed: only hosts of pool default offer gpu.plain, and no pool is written: name one"
    )
    # The templates have nothing to make again.
    with clock.moves(database_url):
        database = Database.open(database_url, clock=clock)
        try:
            done = materialise(database)
            assert (done.orgs, done.definitions) == (2, 0)
        finally:
            database.close()


def test_an_administrator_approves_after_the_upgrade_and_before_workers_restart(
    database_url: str, clock: ManualClock
) -> None:
    """What a host has reported to a worker of the release before is there to be approved."""
    with before(database_url) as old:
        old.org("org_a")
        old.serves("eu", "gpu.keyed", "acme.note")
        old.serves("default", "acme.note", is_host=False)
        old.reported("gpu.keyed", secrets=["openai"], scopes=["read:gpu"], timeout="2h")
        old.reported("acme.note", secrets=["stripe"])
    upgraded(database_url)

    with clock.moves(database_url):
        database = Database.open(database_url, clock=clock)
        try:
            [row] = list_approvals(database)
            assert (row["pool"], row["handler"], row["secrets"]) == ("eu", "gpu.keyed", ["openai"])
            assert (row["scopes"], row["timeout"], row["approved"]) == (["read:gpu"], "2h", False)
            approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
            assert [row["approved"] for row in list_approvals(database)] == [True]
        finally:
            database.close()
