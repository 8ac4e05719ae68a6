"""The hot statements: fixed text, in batches, one module per verb and one package per dialect.

Both packages offer exactly the `Statements` of `contract.py`.
"""

from __future__ import annotations

from sqlalchemy import Connection

from worker.store.sql import postgresql, sqlite
from worker.store.sql.contract import Statements


def statements(connection: Connection) -> Statements:
    """The hot statements in the dialect of this connection."""
    return postgresql if connection.dialect.name == "postgresql" else sqlite
