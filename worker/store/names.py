"""Names of orgs, definitions, templates, calendars and handlers, by their beginning or near a wrong one.

For an operator's command line only: they are names of all orgs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, select, union

from worker.store import host_handlers, tables

Kind = Literal["org", "definition", "template", "calendar", "handler"]

# Names that are offered, and those on either side that a misspelt one is compared with.
OFFERED = 50
NEIGHBOURS = 500
# Definitions that are read for their names, if no org is given.
READ = 2_000


def beginning_with(connection: Connection, kind: Kind, text: str, org: str | None = None) -> list[str]:
    """The first names that begin with `text`; those of definitions of one org, or of all."""
    query, name = _names(kind, org)
    found = query.where(name.startswith(text, autoescape=True)).order_by(name).limit(OFFERED)
    # SQLite compares without case.
    return [one for one in connection.execute(found).scalars() if one.startswith(text)]


def around(connection: Connection, kind: Kind, text: str, org: str | None = None) -> Iterator[str]:
    """The names on either side of `text` in the alphabet, which are all of them if there are few."""
    query, name = _names(kind, org)
    yield from connection.execute(query.where(name >= text).order_by(name).limit(NEIGHBOURS)).scalars()
    yield from connection.execute(query.where(name < text).order_by(name.desc()).limit(NEIGHBOURS)).scalars()


def _names(kind: Kind, org: str | None) -> tuple[Select[Any], ColumnElement[str]]:
    """A query of the names of a kind, and their column."""
    orgs, definitions, templates = tables.orgs, tables.definitions, tables.templates
    match kind:
        case "org":
            return select(orgs.c.code).where(orgs.c.state != "removed"), orgs.c.code
        case "definition" if org is not None:
            its = select(orgs.c.id).where(orgs.c.code == org).scalar_subquery()
            query = select(definitions.c.name).where(definitions.c.org_id == its)
            return query.where(definitions.c.closed_at.is_(None)), definitions.c.name
        case "definition":
            # No index has them for all orgs: templates' names, and those of the newest definitions.
            some = select(definitions.c.name).order_by(definitions.c.id.desc()).limit(READ).subquery()
            all_names = union(select(templates.c.name), select(some.c.name)).subquery()
            return select(all_names.c.name), all_names.c.name
        case "template":
            return select(templates.c.name), templates.c.name
        case "calendar":
            return select(tables.calendars.c.name), tables.calendars.c.name
        case "handler":
            known = host_handlers.names_with_workers().subquery()
            return select(known.c.name), known.c.name
