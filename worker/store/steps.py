"""Steps: read the stored results of a run, and copy them to the run that continues it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, cast, func, insert, literal, select

from worker.ids import OrgId, RunId
from worker.model.runs.run import StepPage, StoredStep
from worker.store import tables

_steps = tables.steps

# Steps of one page, and bytes of results after which it ends.
PAGE = 500
PAGE_BYTES = 1024 * 1024


def load_steps(connection: Connection, run_id: RunId, after: int) -> StepPage:
    """The next page of a run's steps, in the order of `seq`."""
    text = cast(_steps.c.result, Text).label("result")
    columns = (_steps.c.seq, _steps.c.name, _steps.c.key, _steps.c.occurrence, _steps.c.size, text)
    before = (func.sum(_steps.c.size).over(order_by=_steps.c.seq) - _steps.c.size).label("before")
    window = (
        select(*columns, before)
        .where(_steps.c.run_id == run_id, _steps.c.seq > after)
        .order_by(_steps.c.seq)
        .limit(PAGE)
        .subquery()
    )
    count = select(func.count()).select_from(window).scalar_subquery()
    names = [window.c[column.name] for column in columns]
    rows = connection.execute(
        select(*names, count).where(window.c.before < PAGE_BYTES).order_by(window.c.seq)
    ).all()
    steps = [StoredStep(*row[:-1]) for row in rows]
    return StepPage(steps, more=bool(rows) and (rows[0][-1] > len(rows) or rows[0][-1] == PAGE))


def step_totals(connection: Connection, run_id: RunId) -> tuple[int, int]:
    """The last place of a run's steps, and the bytes of their results."""
    last, size = func.coalesce(func.max(_steps.c.seq), 0), func.coalesce(func.sum(_steps.c.size), 0)
    row = connection.execute(select(last, size).where(_steps.c.run_id == run_id)).one()
    return int(row[0]), int(row[1])


def first_handler(connection: Connection, run_id: RunId) -> str | None:
    """The handler that stored the first checkpoint or step of a run; None if nothing is stored."""
    handler: str | None = connection.execute(select(handler_of_progress(run_id))).scalar_one()
    return handler


def handler_of_progress(run_id: RunId) -> ColumnElement[str | None]:
    """The same as part of a query. A run keeps its handler: checkpoint and steps have the same one."""
    saved = select(tables.checkpoints.c.handler).where(tables.checkpoints.c.run_id == run_id)
    first = select(_steps.c.handler).where(_steps.c.run_id == run_id).order_by(_steps.c.seq).limit(1)
    return func.coalesce(saved.scalar_subquery(), first.scalar_subquery())


def copy_steps(connection: Connection, org_id: OrgId, of: RunId, to: RunId) -> int:
    """Give a new run the steps of an older one, as they are; returns how many."""
    kept: list[Any] = [column for column in _steps.c if column.name not in ("run_id", "fencing_token")]
    rows = select(literal(to, _steps.c.run_id.type), literal(0), *kept).where(
        _steps.c.run_id == of, _steps.c.org_id == org_id
    )
    names = ["run_id", "fencing_token", *(column.name for column in kept)]
    copy = insert(_steps).from_select(names, rows).execution_options(preserve_rowcount=True)
    return connection.execute(copy).rowcount
