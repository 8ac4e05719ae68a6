"""Closes one definition, as `apply --prune` does."""

from __future__ import annotations

from typing import Any

from worker.operations.changes import DefinitionChange, change_definitions
from worker.store import definitions, orgs
from worker.store.database import Database
from worker.store.lists import read as lists


def close_definition(database: Database, org: str, name: str, *, actor: str) -> dict[str, Any]:
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        change = DefinitionChange.close(row)
        change_definitions(connection, [change], actor=actor, at=database.now(connection))
        return lists.definition(connection, org, name)
