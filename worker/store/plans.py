"""Plans: changes that an operator's MCP client has planned, until the operator confirms them.

The caller passes the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from worker.store import tables
from worker.store.dialect import Row, first_row

# Expired rows that one new plan removes.
SWEPT = 500

_plans = tables.plans
_operators = tables.operators


def add(connection: Connection, row: Mapping[str, Any], *, most: int) -> None:
    """Insert a plan. Its operator keeps the newest `most`, this one included; removes expired ones."""
    mine = _plans.c.operator == row["operator"]
    expired = select(_plans.c.id).where(_plans.c.until <= row["created_at"]).limit(SWEPT)
    connection.execute(delete(_plans).where(_plans.c.id.in_(expired)))
    kept = select(_plans.c.id).where(mine).order_by(_plans.c.created_at.desc(), _plans.c.id).limit(most - 1)
    connection.execute(delete(_plans).where(mine, _plans.c.id.not_in(kept)))
    connection.execute(insert(_plans), dict(row))


def find(connection: Connection, plan_id: str, *, operator: str, at: datetime) -> Row | None:
    """The plan of this operator that has not expired and was not used."""
    return first_row(connection, select(_plans).where(*_open(plan_id, operator, at)))


def use(connection: Connection, plan_id: str, *, operator: str, at: datetime) -> Row | None:
    """As `find`, and delete it: of two calls at once one gets the row."""
    return first_row(connection, delete(_plans).where(*_open(plan_id, operator, at)).returning(_plans))


def _open(plan_id: str, operator: str, at: datetime) -> tuple[Any, ...]:
    # A token that was replaced or removed takes its plans with it.
    is_valid = select(_operators.c.id).where(_operators.c.mcp_token_sha256 == _plans.c.token_sha256).exists()
    return _plans.c.id == plan_id, _plans.c.operator == operator, _plans.c.until > at, is_valid
