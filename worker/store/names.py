"""Names: what people call the definitions that rows know by their ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Connection, select

from worker.ids import DefinitionId, OrgId
from worker.store import tables
from worker.store.chunks import chunks


class Names(NamedTuple):
    """An org's code and a definition's name; None where its row is gone."""

    org: str | None = None
    definition: str | None = None


def names_of(
    connection: Connection, org_id: OrgId, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """The names of each of these definitions of one org."""
    return _names(connection, definition_ids, org_id)


def names_for_all_orgs(
    connection: Connection, definition_ids: Iterable[DefinitionId]
) -> dict[DefinitionId, Names]:
    """As `names_of`, of every org."""
    return _names(connection, definition_ids, None)


def _names(
    connection: Connection, definition_ids: Iterable[DefinitionId], org_id: OrgId | None
) -> dict[DefinitionId, Names]:
    orgs, definitions = tables.orgs, tables.definitions
    wanted = sorted(set(definition_ids))
    found = dict.fromkeys(wanted, Names())
    for part in chunks(wanted):
        query = (
            select(definitions.c.id, orgs.c.code, definitions.c.name)
            .join(orgs, orgs.c.id == definitions.c.org_id)
            .where(definitions.c.id.in_(part))
        )
        if org_id is not None:
            query = query.where(definitions.c.org_id == org_id)
        found |= {id_: Names(code, name) for id_, code, name in connection.execute(query)}
    return found
