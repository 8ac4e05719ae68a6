"""The templates, and which orgs have not taken up their newest changes.

Every change of a template has a number, one after the other over all templates.
An org remembers the newest it has taken up; one that is new, or whose tags or
issuer changed, starts again at 0. Orgs with a smaller number are looked at next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, case, func, insert, select, text, update

from worker.ids import OrgId, TemplateId
from worker.store import tables
from worker.store.dialect import chunks

Row = dict[str, Any]

_templates = tables.templates
_orgs = tables.orgs
_facts = tables.facts

_CHANGES = "templates_change"
# The row stays locked until the transaction ends: numbers are committed in their order.
_NEXT = """
INSERT INTO facts (name, value) VALUES (:name, '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(facts.value AS BIGINT) + 1 AS TEXT)
RETURNING value
"""


def find(connection: Connection, name: str) -> Row | None:
    """The template of that name, closed or not, locked against other changes."""
    row = (
        connection.execute(
            select(_templates).where(_templates.c.name == name).with_for_update(key_share=True)
        )
        .mappings()
        .first()
    )
    return None if row is None else dict(row)


def every(connection: Connection) -> list[Row]:
    """All templates, closed ones too, in the order of their names."""
    return [
        dict(row) for row in connection.execute(select(_templates).order_by(_templates.c.name)).mappings()
    ]


def write(connection: Connection, template_id: TemplateId, values: Mapping[str, Any], *, new: bool) -> None:
    """Write a template that was added or changed; every org has to look at it again."""
    total = connection.execute(
        select(func.count()).select_from(_orgs).where(_orgs.c.state != "removed")
    ).scalar_one()
    progress = {"change": _next_change(connection), "orgs_total": total, "orgs_done": 0}
    row = {**values, **progress, "materialised_at": None}
    if new:
        connection.execute(insert(_templates).values(id=template_id, **row))
    else:
        connection.execute(update(_templates).where(_templates.c.id == template_id).values(**row))


def newest_change(connection: Connection) -> int:
    """The number of the newest change that is committed; 0 while there never was a template."""
    value = connection.execute(select(_facts.c.value).where(_facts.c.name == _CHANGES)).scalar_one_or_none()
    return 0 if value is None else int(value)


def lock_orgs_behind_for_all_orgs(connection: Connection, change: int, limit: int) -> list[Row]:
    """Orgs that have not taken up this change, new ones first; those that others hold are left out."""
    query = (
        select(_orgs)
        .where(_orgs.c.templates_seen < change)
        .order_by(_orgs.c.templates_seen, _orgs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def is_any_org_behind(connection: Connection, change: int) -> bool:
    """Whether some org, locked or not, has not taken up this change."""
    least = connection.execute(select(func.min(_orgs.c.templates_seen))).scalar()
    return least is not None and least < change


def take_up_for_all_orgs(connection: Connection, orgs: Sequence[Row], change: int) -> None:
    """Remember that these orgs, locked, have taken up everything until this change."""
    for part in chunks([org["id"] for org in orgs]):
        connection.execute(update(_orgs).where(_orgs.c.id.in_(part)).values(templates_seen=change))


def look_again_for_all_orgs(connection: Connection, names: Collection[tuple[OrgId, str]]) -> None:
    """Orgs lost a definition of their own: where a template has that name, its own takes the place."""
    open_names = select(_templates.c.name).where(_templates.c.closed_at.is_(None))
    hidden = set(connection.execute(open_names).scalars()) if names else set()
    again = sorted({org_id for org_id, name in names if name in hidden})
    if again:
        connection.execute(update(_orgs).where(_orgs.c.id.in_(again)).values(templates_seen=0))


def progress(connection: Connection, reached: Iterable[tuple[Row, int]]) -> None:
    """Count how many more orgs have taken up the last change of each template."""
    for template, orgs in reached:
        done = _templates.c.orgs_done + orgs
        connection.execute(
            update(_templates)
            .where(_templates.c.id == template["id"], _templates.c.change == template["change"])
            .values(orgs_done=case((done < _templates.c.orgs_total, done), else_=_templates.c.orgs_total))
        )


def unfinished(connection: Connection) -> list[Row]:
    """Templates whose last change some org may not have taken up yet."""
    query = select(_templates).where(_templates.c.materialised_at.is_(None)).order_by(_templates.c.name)
    return [dict(row) for row in connection.execute(query).mappings()]


def finish(connection: Connection, template: Row, *, at: datetime) -> None:
    """Remember that every org has taken up this change of the template."""
    connection.execute(
        update(_templates)
        .where(_templates.c.id == template["id"], _templates.c.change == template["change"])
        .values(materialised_at=at, orgs_done=_templates.c.orgs_total)
    )


def _next_change(connection: Connection) -> int:
    return int(connection.execute(text(_NEXT), {"name": _CHANGES}).scalar_one())
