"""Templates, and the orgs to which their newest changes still apply.

Changes are numbered consecutively over all templates. An org stores the newest one applied to it, and
starts at 0 if it is new or its tags or issuer changed. Orgs with a smaller number come next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, case, func, insert, select, text, update

from worker.ids import ALL_ORGS, AllOrgs, DefinitionId, OrgId, Scope, TemplateId
from worker.store import tables
from worker.store.bulk import among
from worker.store.dialect import Row, above, all_rows, chunks, first_row, in_scope

_templates = tables.templates
_orgs = tables.orgs
_facts = tables.facts

# Definitions of a template that a list counts.
COUNTED = 10_000
_CHANGES = "templates_change"
# The row stays locked until the transaction ends, so numbers are committed in order.
_NEXT = """
INSERT INTO facts (name, value) VALUES (:name, '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(facts.value AS BIGINT) + 1 AS TEXT)
RETURNING value
"""


def find(connection: Connection, name: str) -> Row | None:
    """The template of that name, open or closed, locked against other changes."""
    query = select(_templates).where(_templates.c.name == name)
    return first_row(connection, query.with_for_update(key_share=True))


def definitions_of(
    connection: Connection, scope: Scope, template_id: TemplateId, *, after: DefinitionId | None, limit: int
) -> list[Row]:
    """The next open definitions that the template made: id, org, name, paused_at."""
    made = tables.definitions
    query = (
        select(made.c.id, _orgs.c.code.label("org"), made.c.name, made.c.paused_at)
        .join(_orgs, _orgs.c.id == made.c.org_id)
        .where(made.c.template_id == template_id, made.c.closed_at.is_(None), *above(made.c.id, after))
        .where(*in_scope(made.c.org_id, scope))
    )
    return all_rows(connection, query.order_by(made.c.id).limit(limit))


def count_definitions(connection: Connection, template_id: TemplateId, *, most: int) -> int:
    """The number of open definitions that the template made, up to `most`."""
    return reach(connection, ALL_ORGS, [template_id], most=most)[template_id]


def reach(
    connection: Connection, scope: Scope, ids: Sequence[TemplateId], *, most: int = COUNTED
) -> dict[TemplateId, int]:
    """How many open definitions each of these templates made, one an org; up to `most` each are counted."""
    made = tables.definitions
    some = (
        select(made.c.id)
        .where(made.c.template_id == _templates.c.id, made.c.closed_at.is_(None))
        .where(*in_scope(made.c.org_id, scope))
        .limit(most)
        .correlate(_templates)
        .subquery()
    )
    count = select(func.count()).select_from(some).scalar_subquery()
    rows = connection.execute(select(_templates.c.id, count).where(_templates.c.id.in_(ids)))
    return {row.id: row[1] for row in rows}


def every(connection: Connection) -> list[Row]:
    """All templates, open or closed, by name."""
    return all_rows(connection, select(_templates).order_by(_templates.c.name))


def write(connection: Connection, template_id: TemplateId, values: Mapping[str, Any], *, new: bool) -> None:
    """Insert or update a template; the change then applies to every org."""
    total = connection.execute(
        select(func.count()).select_from(_orgs).where(_orgs.c.state != "removed")
    ).scalar_one()
    change = int(connection.execute(text(_NEXT), {"name": _CHANGES}).scalar_one())
    progress = {"change": change, "orgs_total": total, "orgs_done": 0}
    row = {**values, **progress, "materialised_at": None}
    if new:
        connection.execute(insert(_templates).values(id=template_id, **row))
    else:
        connection.execute(update(_templates).where(_templates.c.id == template_id).values(**row))


def newest_change(connection: Connection) -> int:
    """The number of the newest committed change, or 0."""
    value = connection.execute(select(_facts.c.value).where(_facts.c.name == _CHANGES)).scalar_one_or_none()
    return 0 if value is None else int(value)


def lock_orgs_behind(connection: Connection, _: AllOrgs, change: int, limit: int) -> list[Row]:
    """Orgs behind this change, new ones first, locked; those that are locked already are left out."""
    query = (
        select(_orgs)
        .where(_orgs.c.templates_seen < change)
        .order_by(_orgs.c.templates_seen, _orgs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return all_rows(connection, query)


def is_any_org_behind(connection: Connection, change: int) -> bool:
    """Whether any org, locked or not, is behind this change."""
    least = connection.execute(select(func.min(_orgs.c.templates_seen))).scalar()
    return least is not None and least < change


def count_behind(connection: Connection, _: AllOrgs) -> int:
    """The number of orgs to which a change of a template still applies."""
    behind = _orgs.c.templates_seen < newest_change(connection)
    return connection.execute(select(func.count()).select_from(_orgs).where(behind)).scalar_one()


def take_up(connection: Connection, orgs: Sequence[Row], change: int) -> None:
    """Store that all changes up to this one are applied to these locked orgs."""
    for part in chunks([org["id"] for org in orgs]):
        connection.execute(
            update(_orgs).where(among(connection, _orgs.c.id, part)).values(templates_seen=change)
        )


def look_again(connection: Connection, names: Collection[tuple[OrgId, str]]) -> None:
    """Orgs closed these definitions: a template of the same name applies to them again."""
    open_names = select(_templates.c.name).where(_templates.c.closed_at.is_(None))
    hidden = set(connection.execute(open_names).scalars()) if names else set()
    again = sorted({org_id for org_id, name in names if name in hidden})
    if again:
        connection.execute(update(_orgs).where(_orgs.c.id.in_(again)).values(templates_seen=0))


def progress(connection: Connection, reached: Iterable[tuple[Row, int]]) -> None:
    """Count the orgs that the last change of each template has newly been applied to."""
    for template, orgs in reached:
        done = _templates.c.orgs_done + orgs
        connection.execute(
            update(_templates)
            .where(_templates.c.id == template["id"], _templates.c.change == template["change"])
            .values(orgs_done=case((done < _templates.c.orgs_total, done), else_=_templates.c.orgs_total))
        )


def unfinished(connection: Connection) -> list[Row]:
    """Templates whose last change may not be applied to all orgs yet."""
    query = select(_templates).where(_templates.c.materialised_at.is_(None)).order_by(_templates.c.name)
    return all_rows(connection, query)


def finish(connection: Connection, template: Row, *, at: datetime) -> None:
    """Store that this change of the template is applied to every org."""
    connection.execute(
        update(_templates)
        .where(_templates.c.id == template["id"], _templates.c.change == template["change"])
        .values(materialised_at=at, orgs_done=_templates.c.orgs_total)
    )
