"""Alembic's environment: migrates the connection it is handed, or the database of WORKER_DATABASE__URL."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection

from worker.store import schema
from worker.store.tables import metadata


def migrate(connection: Connection) -> None:
    """Run the migrations in the transaction that the caller has begun."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # Both databases have transactional DDL; Alembic believes it of one only.
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("the migrations look at the database; --sql is not supported")

handed = context.config.attributes.get("connection")
if handed is not None:
    migrate(handed)
else:
    with schema.migrating(os.environ.get("WORKER_DATABASE__URL", "sqlite:///var/worker.db")) as connection:
        migrate(connection)
