"""Alembic's environment: migrates the given connection, or the database of WORKER_DATABASE__URL.

As in `worker.toml`, WORKER_DATABASE__OWNER_URL names the role that owns the tables, if that is another one.
"""

from __future__ import annotations

import os
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationInfo
from sqlalchemy import Connection

from worker.store import schema
from worker.store.tables import metadata


def migrate(connection: Connection) -> None:
    """Run the migrations, and what belongs to each upgrade, in the transaction that the caller has begun."""
    steps: list[MigrationInfo] = []

    def applied(*, step: MigrationInfo, **_: Any) -> None:
        steps.append(step)

    context.configure(
        connection=connection,
        target_metadata=metadata,
        # Both databases have transactional DDL; Alembic assumes so for PostgreSQL only.
        transactional_ddl=True,
        transaction_per_migration=False,
        on_version_apply=applied,
    )
    with context.begin_transaction():
        context.run_migrations()
        if has_destination() and not any(step.is_stamp for step in steps):
            schema.complete(connection, context.script)


def has_destination() -> bool:
    """Whether the command moves to a revision, as `upgrade` does; `current` and `check` only read."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


if context.is_offline_mode():
    raise SystemExit("the migrations read the database: run them without --sql")

given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    url = os.environ.get("WORKER_DATABASE__OWNER_URL") or os.environ.get("WORKER_DATABASE__URL")
    with schema.migrating(url or "sqlite:///var/worker.db") as connection:
        migrate(connection)
