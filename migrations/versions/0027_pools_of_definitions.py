"""The pools of definitions whose handlers only hosts offer: written where a handler declared one until now.

What a host declares places no run any more. A definition without a pool of its own ran where its handler
said, or else in its org's pool, or in `default`; it is now in its spec, in the revision that is in force. No
run goes elsewhere than before, so nothing is settled. The audit has a row for each change, and `db upgrade`
prints them for review: the host that declared a pool may not have been honest.

Expand first: the workers of the previous release read the pool of a definition, too.

Revision ID: 0027
Revises: 0026
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = "0027"
down_revision = "0026"
# The oldest schema version whose workers run on this one: 0022 to 0027 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
DEFAULT = "default"
ACTOR = "db upgrade"
PAGE = 500

workers = sa.table("workers", sa.column("host_id", ID), sa.column("handlers", JSON))
catalogue = sa.table(
    "catalogue",
    *(sa.column(name) for name in ("name", "distribution", "pool", "error")),
    sa.column("of_worker", sa.Boolean),
)
handlers = sa.table("host_handlers", *(sa.column(name) for name in ("pool", "name", "error")))
orgs = sa.table("orgs", sa.column("id", ID), *(sa.column(name) for name in ("code", "pool", "state")))
definitions = sa.table(
    "definitions",
    *(sa.column(name, ID) for name in ("id", "org_id", "template_id")),
    *(sa.column(name) for name in ("name", "revision")),
    sa.column("closed_at", INSTANT),
)
revisions = sa.table(
    "definition_revisions", sa.column("definition_id", ID), sa.column("revision"), sa.column("spec", JSON)
)
templates = sa.table(
    "templates",
    sa.column("id", ID),
    sa.column("name"),
    sa.column("spec", JSON),
    sa.column("closed_at", INSTANT),
)
audit = sa.table(
    "audit",
    *(sa.column(name, ID) for name in ("id", "org_id")),
    sa.column("at", INSTANT),
    *(sa.column(name) for name in ("actor", "action", "subject")),
    sa.column("detail", JSON),
)


class Offered:
    """A handler that only hosts offer: the pools of these, and the pool that it declared."""

    def __init__(self) -> None:
        self.pools: set[str] = set()
        self.declared: str | None = None

    def pool_of(self, org_pool: str | None) -> str | None:
        """The pool to write, where the runs have been until now; None if there is nothing to write."""
        wanted = self.declared or (None if org_pool else DEFAULT)
        return wanted if wanted in self.pools else None


def upgrade() -> None:
    connection = op.get_bind()
    offered = offered_by_hosts(connection)
    if not offered:
        return
    of_templates: dict[str, str | None] = {}
    opened = sa.select(templates).where(templates.c.closed_at.is_(None)).order_by(templates.c.name)
    for template in connection.execute(opened).mappings().all():
        one = offered.get(template["spec"].get("handler"))
        if one is None or template["spec"].get("pool"):
            continue
        org_pools = pools_of_orgs(connection, template["id"])
        pools = {one.pool_of(pool) for pool in org_pools}
        pool = of_templates[template["id"]] = pools.pop() if len(pools) == 1 else None
        if pool is None:
            if None in org_pools:
                report(
                    f"template {template['name']}: only hosts of {in_words(one.pools)} offer "
                    f"{template['spec']['handler']}, and no pool is written: name one"
                )
            continue
        write(connection, templates, templates.c.id == template["id"], template["spec"], pool)
        record(connection, None, "template.pool_written", template["name"], template["spec"], pool, one)
    for row in without_pool(connection, offered):
        one = offered[row["spec"]["handler"]]
        pool = (
            of_templates[row["template_id"]]
            if row["template_id"] in of_templates
            else one.pool_of(row["pool"])
        )
        if pool is None:
            continue
        mine = (revisions.c.definition_id == row["id"]) & (revisions.c.revision == row["revision"])
        write(connection, revisions, mine, row["spec"], pool)
        subject = f"{row['code']} {row['name']}"
        record(connection, row["org_id"], "definition.pool_written", subject, row["spec"], pool, one)


def offered_by_hosts(connection: sa.Connection) -> dict[str, Offered]:
    """The handlers that hosts have declared and no worker has."""
    listed = connection.execute(sa.select(workers.c.handlers).where(workers.c.host_id.is_(None))).scalars()
    of_workers = {name for names in listed for name in names}
    read = sa.select(catalogue.c.name).where(catalogue.c.of_worker.is_(sa.true()))
    of_workers.update(connection.execute(read).scalars())
    found: dict[str, Offered] = {}
    usable = sa.select(handlers.c.name, handlers.c.pool).where(handlers.c.error.is_(None))
    for name, pool in connection.execute(usable):
        if name not in of_workers:
            found.setdefault(name, Offered()).pools.add(pool)
    # Of several distributions the first, as the previous release has it.
    declared = sa.select(catalogue.c.name, catalogue.c.pool).where(catalogue.c.error.is_(None))
    for name, pool in connection.execute(declared.order_by(catalogue.c.distribution.desc())):
        if name in found:
            found[name].declared = pool
    return found


def pools_of_orgs(connection: sa.Connection, template_id: str) -> set[str | None]:
    """The pools of the orgs that have a template's definition; None if one has none."""
    made = (definitions.c.template_id == template_id) & definitions.c.closed_at.is_(None)
    query = sa.select(orgs.c.pool).join(definitions, definitions.c.org_id == orgs.c.id).where(made).distinct()
    return set(connection.execute(query).scalars()) or {None}


def without_pool(connection: sa.Connection, offered: Mapping[str, Offered]) -> Iterator[dict[str, Any]]:
    """The open definitions of these handlers that name no pool, by id."""
    its = (revisions.c.definition_id == definitions.c.id) & (revisions.c.revision == definitions.c.revision)
    columns = (definitions.c[name] for name in ("id", "org_id", "template_id", "name", "revision"))
    query = (
        sa.select(*columns, orgs.c.code, orgs.c.pool, revisions.c.spec)
        .join(orgs, orgs.c.id == definitions.c.org_id)
        .join(revisions, its)
        .where(definitions.c.closed_at.is_(None), orgs.c.state != "removed")
        .order_by(definitions.c.id)
        .limit(PAGE)
    )
    rows = connection.execute(query).mappings().all()
    while rows:
        for row in rows:
            if row["spec"].get("handler") in offered and not row["spec"].get("pool"):
                yield dict(row)
        rows = connection.execute(query.where(definitions.c.id > rows[-1]["id"])).mappings().all()


def write(
    connection: sa.Connection,
    table: sa.TableClause,
    which: sa.ColumnElement[bool],
    spec: Mapping[str, Any],
    pool: str,
) -> None:
    connection.execute(table.update().where(which).values(spec={**spec, "pool": pool}))


def record(
    connection: sa.Connection,
    org_id: str | None,
    action: str,
    subject: str,
    spec: Mapping[str, Any],
    pool: str,
    one: Offered,
) -> None:
    """Write the row of the audit, and report the change."""
    others = one.pools - {pool}
    detail = {
        "pool": {"before": None, "after": pool},
        "handler": spec["handler"],
        "offered": sorted(one.pools),
    }
    now = datetime.now(UTC)
    at: Any = now if connection.dialect.name == "postgresql" else f"{now:%Y-%m-%dT%H:%M:%S.%f}Z"
    values = {
        "id": new_id(),
        "at": at,
        "actor": ACTOR,
        "action": action,
        "org_id": org_id,
        "subject": subject,
    }
    connection.execute(audit.insert().values(**values, detail=detail))
    doubt = f"; hosts of {in_words(others)} offer it, too" if others else ""
    kind, handler = action.partition(".")[0], spec["handler"]
    report(f'{kind} {subject}: pool = "{pool}" is written, where {handler} has run so far{doubt}')


def report(line: str) -> None:
    """Give a line to the caller of the upgrade, if it takes any."""
    given: Callable[[str], None] | None = context.config.attributes.get("report")
    if given is not None:
        given(line)


def in_words(pools: set[str]) -> str:
    return f"pool{'' if len(pools) == 1 else 's'} {', '.join(sorted(pools))}"


def new_id() -> str:
    """A UUIDv7."""
    head = time.time_ns() // 1_000_000 << 16 | 0x7000 | secrets.randbits(12)
    return str(uuid.UUID(int=head << 64 | 0b10 << 62 | secrets.randbits(62)))


def downgrade() -> None:
    """The pools stay: the previous release reads them, too."""
