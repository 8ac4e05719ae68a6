"""What `apply` changes of rollouts. It adds them planned: `rollouts advance` starts the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.model.definitions.fields import refusal
from worker.model.definitions.rollouts import COLUMNS, RolloutEntry
from worker.model.rollouts.rollout import OPEN
from worker.operations.changes import RolloutChange, differing
from worker.store import rollouts
from worker.store.dialect import Row

# What may change once its first step has begun.
LATER = frozenset({"auto", "watch"})


def rollout_changes(connection: Connection, entries: Sequence[RolloutEntry]) -> list[RolloutChange]:
    """What a file changes. The stored rollouts are locked until the transaction ends.

    Raises:
        DefinitionError: a rollout that has begun would become another one, or two are for the same runs.
    """
    stored = rollouts.every(connection, lock=True)
    changes = []
    open_ones: dict[tuple[str, str], str] = {
        (row["definitions"], row["from_handler"]): name
        for name, row in stored.items()
        if row["state"] in OPEN
    }
    for entry in entries:
        before, name = stored.get(entry.name), f"rollout {entry.name}"
        other = open_ones.setdefault((entry.definitions, entry.old), entry.name)
        if other != entry.name and (before is None or before["state"] in OPEN):
            fix = f"end it first: `rollouts finish {other}` or `rollouts undo {other}`"
            raise refusal(f"{other} is for the same definitions and handler", name, "definitions", fix=fix)
        changed = differing(_shown(before), entry.values) if before is not None else {}
        if before is None:
            changes.append(RolloutChange(entry.name, None, entry.values))
        elif changed:
            _check(before, changed, name)
            changes.append(RolloutChange(entry.name, before, entry.values))
    return changes


def _check(before: Row, changed: Mapping[str, Any], name: str) -> None:
    fixed = sorted(changed.keys() - LATER)
    if before["state"] not in OPEN:
        raise refusal(
            f"it is {before['state']}, and does not begin again", name, "name", fix="choose another name"
        )
    if before["state"] != "planned" and fixed:
        field = {"from_handler": "from", "to_handler": "to"}.get(fixed[0], fixed[0])
        fix = f"`rollouts undo {before['name']}`, and choose another name; auto and watch may change"
        raise refusal("it has begun, and orgs have moved by it", name, field, fix=fix)


def write_rollouts(
    connection: Connection, changes: Sequence[RolloutChange], *, actor: str, at: datetime
) -> None:
    """Write rollouts that are added or changed; workers follow within `poll`."""
    for change in changes:
        rollouts.put(connection, change.name, change.new, change.before, at=at, actor=actor)


def _shown(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in COLUMNS}
