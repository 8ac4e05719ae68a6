"""Broken orgs: those whose newest runs failed without a retry that succeeded, or whose credential is dead.

Triggers on `runs` add a definition to `failing_definitions` when a run of it fails. Whether it still is
broken is decided when it is read; `check` and `remove` drop those that work again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    and_,
    case,
    delete,
    or_,
    select,
    text,
    union_all,
)

from worker.ids import DefinitionId, RunId, Scope
from worker.store import tables
from worker.store.dialect import above, in_scope

_failing, _credentials, _orgs = tables.failing_definitions, tables.credentials, tables.orgs

# Definitions that one call of `check` examines.
CHECKED = 500

# A definition's newest run of its own that succeeded, failed or was refused: cancelled and skipped runs
# say nothing about it, and a backfill or a retry is about an older time. Retries of retries share its key.
NEWEST = """
SELECT r.id FROM runs r WHERE r.definition_id = failing_definitions.definition_id
AND r.origin IN ('schedule', 'manual') AND r.state IN ('succeeded', 'failed', 'refused')
ORDER BY r.id DESC LIMIT 1
"""
_IS_BROKEN = f"""
EXISTS (SELECT 1 FROM definitions d WHERE d.id = failing_definitions.definition_id AND d.closed_at IS NULL)
AND EXISTS (
  SELECT 1 FROM runs n WHERE n.id = ({NEWEST}) AND n.state <> 'succeeded'
  AND NOT EXISTS (
    SELECT 1 FROM runs t WHERE t.definition_id = n.definition_id AND t.id > n.id AND t.origin = 'retry'
    AND t.idempotency_key = n.idempotency_key AND t.state = 'succeeded'
  )
)
"""


# As the index of these credentials says it: with a parameter, SQLite would not use it.
REJECTED = "credentials.last_error IS NOT NULL AND credentials.state = 'active'"


def is_broken(of: str = _failing.name) -> ColumnElement[bool]:
    """A condition on `failing_definitions`, or on rows of it with the name `of`: the definition is open and
    its newest run needs a fix.
    """
    return and_(text(f"({_IS_BROKEN})".replace(f"{_failing.name}.", f"{of}.")))


def is_sound() -> ColumnElement[bool]:
    """The opposite of `is_broken`."""
    return and_(text(f"(NOT ({_IS_BROKEN}))"))


def is_dead() -> ColumnElement[bool]:
    """A condition on `orgs`: its issuer rejected each of its active credentials when it was last used."""
    mine = _credentials.alias("mine")
    active = and_(mine.c.org_id == _orgs.c.id, mine.c.state == "active")
    # Not `SELECT *`: the web side may not read every column.
    # Looked up org by org: for EXISTS, PostgreSQL may read the credentials of all.
    rejected, works = (
        select(mine.c.id).where(active, condition).limit(1).scalar_subquery()
        for condition in (mine.c.last_error.is_not(None), mine.c.last_error.is_(None))
    )
    return and_(rejected.is_not(None), works.is_(None))


def broken_orgs(scope: Scope) -> ColumnElement[bool]:
    """A condition on `orgs`: it is not removed and it is broken."""
    return and_(_orgs.c.id.in_(candidates(scope)), needs_fix())


def candidates(scope: Scope) -> CompoundSelect[Any]:
    """The ids of the orgs that may be broken, some of them more than once."""
    failing = select(_failing.c.org_id).where(*in_scope(_failing.c.org_id, scope))
    rejected = select(_credentials.c.org_id).where(text(REJECTED), *in_scope(_credentials.c.org_id, scope))
    return union_all(failing, rejected)


def needs_fix() -> ColumnElement[bool]:
    """A condition on `orgs` that are candidates: it is not removed and it is broken."""
    # Looked up one by one: PostgreSQL would otherwise read all runs for all of them.
    of_org = select(_failing.c.run_id).where(_failing.c.org_id == _orgs.c.id, case((is_broken(), 1)) == 1)
    return and_(_orgs.c.state != "removed", or_(of_org.limit(1).scalar_subquery().is_not(None), is_dead()))


class Checked(NamedTuple):
    """The definitions of a page that are not broken, each with the run that failed last."""

    sound: Sequence[tuple[DefinitionId, RunId]]
    next: DefinitionId | None
    """Where to continue; None at the end."""


def check(connection: Connection, after: DefinitionId | None = None) -> Checked:
    """Check the next `CHECKED` definitions after `after`."""
    page = select(_failing.c.definition_id).where(*above(_failing.c.definition_id, after))
    page = page.order_by(_failing.c.definition_id).limit(CHECKED)
    ids = connection.execute(page).scalars().all()
    sound = select(_failing.c.definition_id, _failing.c.run_id).where(
        _failing.c.definition_id.in_(ids), is_sound()
    )
    found = [(DefinitionId(definition), RunId(run)) for definition, run in connection.execute(sound)]
    return Checked(found, DefinitionId(ids[-1]) if len(ids) == CHECKED else None)


def remove(connection: Connection, sound: Sequence[tuple[DefinitionId, RunId]]) -> None:
    """Remove these definitions, unless another run of one has failed meanwhile."""
    for definition_id, run_id in sorted(sound):
        connection.execute(
            delete(_failing).where(_failing.c.definition_id == definition_id, _failing.c.run_id == run_id)
        )
