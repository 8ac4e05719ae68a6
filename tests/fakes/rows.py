"""Calls of the store in a transaction of their own, and rows written past the operations."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Insert, insert

from worker.ids import new_id
from worker.store import tables

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[Concatenate[Connection, P], T]


def within(database: Any, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns in a transaction of its own."""
    with database.transaction() as connection:
        return work(connection, *args, **kwargs)


def reading(database: Any, work: Work[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns on a connection in autocommit mode."""
    with database.autocommit() as connection:
        return work(connection, *args, **kwargs)


def attempt_row(run_id: str, org_id: str, at: datetime, **values: Any) -> Insert:
    """The first attempt of a run, which failed at `at`, but for `values`."""
    ended = {"started_at": at, "ended_at": at, "outcome": "failed", "handler": "acme.plain"}
    by = {"worker_id": new_id(), "fencing_token": 1, "attempt": 1}
    return insert(tables.attempts).values(**{"run_id": run_id, "org_id": org_id} | by | ended | values)


def checkpoint_row(run_id: str, org_id: str, at: datetime, data: Any) -> Insert:
    values = {"run_id": run_id, "org_id": org_id, "attempt": 1, "fencing_token": 1, "saved_at": at}
    return insert(tables.checkpoints).values(**values, data=data)


def worker_row(at: datetime, **values: Any) -> Insert:
    """A worker that started and renewed its lease at `at`."""
    times = {"started_at": at, "renewed_at": at, "lease_until": at}
    process = {"id": new_id(), "host": "a", "pid": 1, "version": "1"}
    offered = {"handlers": [], "capacity": {"children": 1, "inline": 1}}
    return insert(tables.workers).values(**process | times | offered | values)
