"""Names: what people call the definitions that rows know by their ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Connection, select

from worker.ids import DefinitionId
from worker.store import tables
from worker.store.chunks import chunks


class Names(NamedTuple):
    """An org's code and a definition's name; None where its row is gone."""

    org: str | None = None
    definition: str | None = None


def names_for_all_orgs(
    connection: Connection, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """The names of each of the definitions."""
    orgs, definitions = tables.orgs, tables.definitions
    wanted = sorted(set(definition_ids))
    found = dict.fromkeys(wanted, Names())
    for part in chunks(wanted):
        query = (
            select(definitions.c.id, orgs.c.code, definitions.c.name)
            .join(orgs, orgs.c.id == definitions.c.org_id)
            .where(definitions.c.id.in_(part))
        )
        found |= {id_: Names(code, name) for id_, code, name in connection.execute(query)}
    return found
