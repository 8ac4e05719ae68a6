"""Whether anything waits for the chores of schedules; one look, so that to find nothing costs little."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

# The least by its index: whether any is less would be looked for in every org.
_LOOK = """
SELECT COALESCE((SELECT min(templates_seen) FROM orgs)
                < CAST((SELECT value FROM facts WHERE name = 'templates_change') AS BIGINT), false)
       OR EXISTS (SELECT 1 FROM templates WHERE materialised_at IS NULL),
       EXISTS (SELECT 1 FROM backfills WHERE finished_at IS NULL)
"""


@dataclass(frozen=True, slots=True)
class Pending:
    """Orgs that are behind the templates; backfills that have not ended."""

    templates: bool
    backfills: bool


def pending(connection: Connection) -> Pending:
    """What there is to do now."""
    templates, backfills = connection.execute(text(_LOOK)).one()
    return Pending(bool(templates), bool(backfills))
