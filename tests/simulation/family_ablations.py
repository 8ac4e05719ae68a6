"""Defences of children, starts and deadlines, taken out one at a time: see `ablations`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import psycopg
from sqlalchemy import select

from tests.simulation.ablations import ablation, without
from worker.model.runs.children import PlacedChild
from worker.operations import starts as start_operations
from worker.operations.chores import Chores
from worker.store import children, deadlines, families, starts, tables

# Of children.


@ablation("a key of a run has one child")
def child_key(stack: ExitStack, url: str) -> None:
    """A run's children are not found once, and the unique constraint does not see that they come again."""
    forgotten, again = set[Any](), []

    def known(connection: Any, parent_id: Any, new: Any) -> Any:
        again[:] = [] if parent_id in forgotten else ["~"]
        forgotten.add(parent_id)
        return {} if again else real(connection, parent_id, new)

    def row(**given: Any) -> Any:
        return real_row(**given | {"key": given["key"] + "".join(again)})

    real, real_row = children._known, children.ChildRow
    stack.enter_context(patch.object(children, "_known", known))
    stack.enter_context(patch.object(children, "ChildRow", row))


@ablation("the fencing comparison in what a run stores of its children", "postgresql")
def child_fence(stack: ExitStack, url: str) -> None:
    def lock(connection: Any, run: Any) -> Any:
        live = tables.live_runs
        return connection.execute(select(live).where(live.c.id == run.id).with_for_update()).first()

    stack.enter_context(patch.object(families, "lock", lock))


@ablation("a parent goes on when its last child ends")
def child_wakes(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(families, "settle", lambda *args: 0))


@ablation("a worker looks for the families of one that died")
def families_look(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(families, "look", lambda *args: families.Looked(0, None)))


@ablation("at most `concurrency` children of `ctx.map_runs` are unfinished")
def map_window(stack: ExitStack, url: str) -> None:
    def row(**given: Any) -> Any:
        return real(**given | {"held": False})

    real = children.ChildRow
    stack.enter_context(patch.object(children, "ChildRow", row))


@ablation("those below a run that was cancelled, or has failed, end with it")
def orphans(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(families, "_cancel", lambda *args, **keys: 0))


@ablation("a budget of a run counts those below it")
def tree_budget(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(children, "root_of", lambda connection, run_id: run_id))


@ablation("a result is that of the child in its place")
def child_places(stack: ExitStack, url: str) -> None:
    """Children that are there already are given in the order of their ends."""

    def known(connection: Any, parent_id: Any, new: Any) -> Any:
        found = real(connection, parent_id, new)
        placed = sorted(found.values(), key=lambda each: each.run_id, reverse=True)
        return dict(zip(found, (PlacedChild(*each) for each in _fields(placed)), strict=True))

    real = children._known
    stack.enter_context(patch.object(children, "_known", known))


def _fields(placed: list[PlacedChild]) -> list[tuple[int, Any]]:
    return [(each.place, each.run_id) for each in placed]


@ablation("the rows of a tree are locked in the order of ids", "postgresql")
def tree_order(stack: ExitStack, url: str) -> None:
    """The newest first, as before this was found."""

    def parent(connection: Any, run: Any, live: Any, cap: Any, *, keep: bool) -> Any:
        row = tables.parents
        connection.execute(select(row).where(row.c.run_id == run.id).with_for_update()).first()
        return real(connection, run, live, cap, keep=keep)

    real = children._parent
    stack.enter_context(patch.object(children, "_parent", parent))


# Of starts.


@ablation("the unique key of a start", "postgresql")
def start_key(stack: ExitStack, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as server:
        [definition] = server.execute(
            "SELECT pg_get_functiondef('public.orgworker_start_many(jsonb)'::regprocedure)"
        ).fetchone() or ("",)
        clause = "ON CONFLICT (org_id, definition_id, key) DO NOTHING"
        assert clause in definition
        server.execute(definition.replace(clause, "").encode())
        [name] = server.execute(
            "SELECT conname FROM pg_constraint WHERE conrelid = 'public.starts'::regclass AND contype = 'u'"
        ).fetchone() or ("",)
        server.execute(f"ALTER TABLE public.starts DROP CONSTRAINT {name}".encode())


@ablation("starts become runs in their order", "postgresql")
def start_order(stack: ExitStack, url: str) -> None:
    without(stack, starts, "_TAKE", "ORDER BY id LIMIT", "ORDER BY id DESC LIMIT")


@ablation("a closed definition and a suspended org start no runs of a product", "postgresql")
def start_refused(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(start_operations, "_require_startable", lambda row: None))


# Of deadlines.


@ablation("what is not done by its deadline is noted")
def late_noted(stack: ExitStack, url: str) -> None:
    async def nothing(self: Any) -> None:
        return

    stack.enter_context(patch.object(Chores, "pass_deadlines", nothing))


@ablation("what is late is forgotten once it is done")
def late_forgotten(stack: ExitStack, url: str) -> None:
    async def nothing(self: Any, *args: Any) -> None:
        return

    for name in ("end_done", "check_late"):
        stack.enter_context(patch.object(Chores, name, nothing))


@ablation("what is done by its deadline is not late")
def done_in_time(stack: ExitStack, url: str) -> None:
    stack.enter_context(patch.object(deadlines, "_is_done", lambda each, done: False))
