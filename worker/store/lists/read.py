"""The SQL of the lists: one query each, narrowed and cut into pages in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    Table,
    Text,
    case,
    func,
    literal,
    null,
    or_,
    select,
    true,
)
from sqlalchemy import cast as sql_cast

from worker.errors import DefinitionError, InvalidTrigger, NotFound, UsageError
from worker.ids import ALL_ORGS, AllOrgs, OrgId, OrgScope, RunId, Scope, lowest_id
from worker.model.definitions import CALENDAR_DATES
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.definitions.words import in_words
from worker.model.search import Query, states_of
from worker.store import calendars, orgs, redaction, states, tables, templates
from worker.store import definitions as definition_rows
from worker.store.catalogue import OF_WORKERS
from worker.store.dialect import Row, all_rows, below, first_row
from worker.store.lists import (
    AUDIT,
    BACKFILLS,
    BATCHES,
    CALENDARS,
    CREDENTIALS,
    DEFINITIONS,
    FIRST_PAGE,
    HANDLERS,
    LIMITS,
    MAX_LIMIT,
    ORGS,
    ROLLOUTS,
    RUNS,
    SECRETS,
    SKIPS,
    TEMPLATES,
    TROUBLES,
    FoundRows,
    Listing,
    Page,
    handlers,
    run_ids,
    runs,
    search,
    tabs,
)
from worker.store.lists.rows import (
    Backfill,
    CalendarDetail,
    DefinitionDetail,
    OrgDetail,
    SecretRow,
    TemplateDetail,
    columns_of,
)
from worker.store.redaction import Shown

R = TypeVar("R")
Condition = ColumnElement[bool]

# Rows of one page that are examined for a state that no index has.
EXAMINED = 10_000
_IN_FORCE = definition_rows.in_force(tables.definitions)
_orgs, _audit, _skips, _credentials = tables.orgs, tables.audit, tables.skips, tables.credentials
_definitions, _revisions, _schedule = tables.definitions, tables.definition_revisions, tables.schedule
_templates, _backfills, _catalogue = tables.templates, tables.backfills, tables.catalogue


def read(connection: Connection, listing: Listing[R], org: OrgScope, page: Page = FIRST_PAGE) -> list[R]:
    """The rows of `page_of`."""
    return page_of(connection, listing, org, page).rows


def page_of(
    connection: Connection, listing: Listing[R], org: OrgScope, page: Page = FIRST_PAGE
) -> FoundRows[R]:
    """A page of a list for one org or for all, newest first.

    One of a search, or of orgs or definitions in a state, may have fewer rows than fit.

    Raises:
        NotFound: there is no such org.
        UsageError: the list has no such state.
    """
    if page.state is not None:
        states_of(page.state, listing.states, what=listing.name)
    if listing is RUNS and page.query is not None:
        return cast(FoundRows[R], search.runs_of(connection, org, page.query, page))
    limit = listing.limit_of(org, page)
    stop = _stop_of(connection, listing, org, page)
    rows: Any = _rows_of(connection, listing, org, page, limit, stop)
    if "limit" in listing.parameters and len(rows) == limit:
        return FoundRows(rows, rows[-1]["id"])
    return FoundRows(rows, stop.id if stop is not None and stop.is_before_end else None)


def place_of(connection: Connection, listing: Listing[Any], org: OrgScope, after: str | None) -> str | None:
    """The row to continue after; that of runs by anything that names a run.

    Raises:
        NotFound: there is no such org or run.
        UsageError: several runs fit.
    """
    if after is None or listing is not RUNS:
        return after
    return run_ids.id_of(connection, orgs.scope_of(connection, org), after)


def _rows_of(
    connection: Connection, listing: Listing[R], org: OrgScope, page: Page, limit: int, stop: _Stop | None
) -> list[R]:
    scope = orgs.scope_of(connection, org)
    if listing is RUNS:
        return cast(list[R], runs.page_of(connection, scope, page, limit))
    if listing is ORGS and (page.query is not None or page.broken or page.late):
        query = page.query or Query()
        if query.is_of_runs:
            raise UsageError("orgs have no such keys", fix="search for orgs by words, or by org:NAME")
        return cast(list[R], search.orgs_of(connection, org, query, page))
    if listing is HANDLERS:
        return cast(list[R], handlers.listed(connection, scope, most=MAX_LIMIT))
    source = _SOURCES[listing]
    statement = source.query
    if not isinstance(scope, AllOrgs):
        statement = statement.where(source.of_org(scope))
    if page.definition is not None:
        statement = statement.where(source.columns["definition"] == page.definition)
    if stop is not None:
        statement = statement.where(source.key >= stop.id)
    if page.states:
        statement = statement.where(_in_states(connection, listing, scope, page.states))
        if listing is DEFINITIONS and page.states == ("paused",):
            # The condition of their index: there are few of them.
            statement = statement.where(
                _definitions.c.paused_at.is_not(None), _definitions.c.closed_at.is_(None)
            )
    if page.state is None and (source.by_default_of_org or isinstance(scope, AllOrgs)):
        statement = statement.where(source.by_default)
    if page.since is not None and source.since is not None:
        statement = statement.where(source.since >= page.since)
        if source.since_bounds_key:
            statement = statement.where(source.key >= lowest_id(page.since))
    statement = statement.where(*below(source.key, page.after))
    rows = all_rows(connection, statement.order_by(source.key.desc()).limit(limit))
    if listing is TEMPLATES and isinstance(scope, AllOrgs):
        _add_reach(connection, rows)
    return cast(list[R], rows)


class _Stop(NamedTuple):
    """The last row that is examined."""

    id: str
    is_before_end: bool


def _stop_of(connection: Connection, listing: Listing[Any], org: OrgScope, page: Page) -> _Stop | None:
    """Where a list of orgs or definitions of all orgs by a state stops that no index has, if it has rows."""
    found_by_others = {*TROUBLES, "paused"} if listing is DEFINITIONS else set()
    is_searched = page.query is not None or page.broken or page.late or page.definition is not None
    if listing not in (ORGS, DEFINITIONS) or org is not ALL_ORGS or is_searched:
        return None
    if not set(page.states) - found_by_others:
        return None
    key = _SOURCES[listing].key
    some = select(key).where(*below(key, page.after)).order_by(key.desc()).limit(EXAMINED + 1).subquery()
    # PostgreSQL has no min(uuid) before version 18.
    last = select(func.min(sql_cast(some.c.id, Text)).label("id"), func.count().label("size"))
    [row] = all_rows(connection, last.limit(1))
    return None if row["id"] is None else _Stop(row["id"], row["size"] > EXAMINED)


def _in_states(
    connection: Connection, listing: Listing[Any], scope: Scope, states: Sequence[str]
) -> Condition:
    """The condition that a row has one of the states, or of definitions also that it is in such trouble."""
    either = [tabs.troubled(connection, scope, state) for state in states if state in TROUBLES]
    if plain := [state for state in states if state not in TROUBLES]:
        either.append(_SOURCES[listing].columns["state"].in_(plain))
    return or_(*either)


def org(connection: Connection, code: str) -> OrgDetail:
    """One org with its credentials, without secrets; raises NotFound."""
    [row] = read(connection, ORGS, code)
    return {**row, "credentials": read(connection, CREDENTIALS, code)}


def secret(connection: Connection, org_id: OrgId, name: str) -> SecretRow:
    """One secret of an org, without its value."""
    of, query = tables.org_secrets.c, _SOURCES[SECRETS].query
    row: Any = first_row(connection, query.where(of.org_id == org_id, of.name == name))
    return cast(SecretRow, row)


def definition(connection: Connection, org: str, name: str) -> DefinitionDetail:
    """One definition, closed or not, with its whole spec; raises NotFound."""
    org_id = orgs.require(connection, org)["id"]
    definition_rows.require(connection, org_id, org, name)
    query = _SOURCES[DEFINITIONS].query.add_columns(_revisions.c.spec)
    query = query.where(_definitions.c.org_id == org_id, _definitions.c.name == name)
    row: Any = first_row(connection, query)
    more = {
        "next_run_for": _next_run_for(row),
        "schedule_in_words": in_words(row["schedule"], row["timezone"]),
        "spec": row.pop("spec"),
    }
    return cast(DefinitionDetail, {**row, **more})


def _next_run_for(row: Mapping[str, Any]) -> datetime | None:
    following: datetime | None = row["next_scheduled_for"]
    if following is None or not row["spec"].get(CALENDAR_DATES):
        return following
    # Only for such a definition: it loads the triggers, which takes longer than most commands.
    from worker.model.definitions.definition import from_spec

    try:
        trigger = from_spec(row["org"], row["name"], row["spec"]).trigger(row["timezone"])
    except (DefinitionError, InvalidTrigger):
        # Of another release.
        return following
    return trigger.after(following, inclusive=True)


class DefinitionState(TypedDict):
    """What a definition remembers between its runs; version 0 and empty if it has no state."""

    org: Shown[str]
    definition: Shown[str]
    data: Shown[dict[str, Any]]
    version: Shown[int]
    updated_at: Shown[datetime | None]
    updated_by: Annotated[str | None, redaction.actor]
    run: Shown[RunId | None]


def state(connection: Connection, org: str, name: str) -> DefinitionState:
    """The state of one definition, closed or not; raises NotFound."""
    org_id = orgs.require(connection, org)["id"]
    definition_id = definition_rows.require(connection, org_id, org, name)["id"]
    row = states.find(connection, org_id, definition_id) or {}
    return {
        "org": org,
        "definition": name,
        "data": row.get("data", {}),
        "version": row.get("version", 0),
        "updated_at": row.get("updated_at"),
        "updated_by": row.get("updated_by"),
        "run": row.get("run_id"),
    }


def template(connection: Connection, org: OrgScope, name: str) -> TemplateDetail:
    """One template, closed or not, with its whole spec; raises NotFound.

    For an org it exists only if it made one of the org's definitions.
    """
    source, scope = _SOURCES[TEMPLATES], orgs.scope_of(connection, org)
    query = source.query.add_columns(_templates.c.spec).where(_templates.c.name == name)
    if not isinstance(scope, AllOrgs):
        query = query.where(source.of_org(scope))
    row = first_row(connection, query)
    if row is None:
        raise NotFound(
            f"there is no template {name}",
            fix="`templates list` shows the templates",
            sought=("template", name, None),
        )
    if isinstance(scope, AllOrgs):
        _add_reach(connection, [row])
    return cast(TemplateDetail, row)


def _add_reach(connection: Connection, rows: Sequence[Row]) -> None:
    """Add how many definitions each template has. An org does not see it, and its requests do not count."""
    reach = templates.reach(connection, ALL_ORGS, [row["id"] for row in rows])
    for row in rows:
        row["definitions"] = reach[row["id"]]


def calendar(connection: Connection, name: str) -> CalendarDetail:
    """One calendar with its dates, and what names it; raises NotFound."""
    source = _SOURCES[CALENDARS]
    query = source.query.add_columns(tables.calendars.c.dates).where(tables.calendars.c.name == name)
    row = first_row(connection, query)
    if row is None:
        raise NotFound(
            f"there is no calendar {name}",
            fix="`calendars list` lists the calendars, `apply` of a file with a [[calendar]] makes one",
            sought=("calendar", name, None),
        )
    definitions, templates = calendars.uses(connection, ALL_ORGS, name)
    return cast(CalendarDetail, {**row, "definitions": definitions, "templates": templates})


def backfill(connection: Connection, org_id: OrgId, backfill_id: str) -> Backfill:
    """One existing backfill, as the list shows it."""
    query = _SOURCES[BACKFILLS].query
    query = query.where(_backfills.c.org_id == org_id, _backfills.c.id == backfill_id)
    return cast(Backfill, first_row(connection, query))


class _Source:
    """The query of a list, and what narrows it.

    A column is computed, the code of the org, the name of the definition, or the table's own.
    `since_bounds_key`: a row that counts as newer than `since` was also created after it.
    `by_default` narrows the list if no state is asked for, `by_default_of_org` also one org's.
    """

    def __init__(
        self,
        listing: Listing[Any],
        table: Table,
        *joined: tuple[Table, Condition],
        of_org: Callable[[OrgId], Condition] | None = None,
        since: str = "created_at",
        since_bounds_key: bool = True,
        by_default: Condition | None = None,
        by_default_of_org: bool = True,
        **computed: ColumnElement[Any],
    ) -> None:
        known = {"org": _orgs.c.code, "definition": _definitions.c.name} | computed
        columns = {name: known[name] if name in known else table.c[name] for name in columns_of(listing.row)}
        self.query = select(*(column.label(name) for name, column in columns.items())).select_from(table)
        if "org" in columns:
            is_optional = bool(table.c.org_id.nullable)
            self.query = self.query.join(_orgs, _orgs.c.id == table.c.org_id, isouter=is_optional)
        if "definition" in columns:
            self.query = self.query.join(_definitions, _definitions.c.id == table.c.definition_id)
        for other, condition in joined:
            self.query = self.query.outerjoin(other, condition)
        self.columns = columns | ({"definition": _definitions.c.name} if listing is DEFINITIONS else {})
        # A UUIDv7, so newer rows have greater keys.
        self.key = table.c["id"]
        self.of_org = of_org or (lambda org_id: table.c.org_id == org_id)
        self.since = table.c.get(since)
        self.since_bounds_key = since_bounds_key
        self.by_default = true() if by_default is None else by_default
        self.by_default_of_org = by_default_of_org


def _of_spec(key: str, table: Table = _revisions) -> ColumnElement[Any]:
    return cast(ColumnElement[Any], table.c.spec[key].as_string())


_POOL_OF_HANDLER = (
    select(_catalogue.c.pool)
    .where(_catalogue.c.name == _of_spec("handler"), _catalogue.c.error.is_(None), OF_WORKERS)
    .order_by(_catalogue.c.distribution)
    .limit(1)
    .correlate(_revisions)
    .scalar_subquery()
)


def unfinished_runs() -> ScalarSelect[int]:
    """How many runs of a backfill in the outer query have not ended."""
    return (
        select(func.count())
        .select_from(tables.live_runs)
        .where(tables.live_runs.c.backfill_id == _backfills.c.id)
        .correlate(_backfills)
        .scalar_subquery()
    )


_SOURCES: Mapping[Listing[Any], _Source] = {
    ORGS: _Source(ORGS, _orgs, of_org=_orgs.c.id.__eq__),
    DEFINITIONS: _Source(
        DEFINITIONS,
        _definitions,
        (_revisions, _IN_FORCE),
        (_schedule, _schedule.c.definition_id == _definitions.c.id),
        (_templates, _templates.c.id == _definitions.c.template_id),
        by_default=_definitions.c.closed_at.is_(None),
        handler=_of_spec("handler"),
        schedule=_of_spec("schedule"),
        timezone=func.coalesce(func.nullif(_of_spec("timezone"), ""), _orgs.c.timezone, "UTC"),
        pool=func.coalesce(
            func.nullif(_of_spec("pool"), ""), _POOL_OF_HANDLER, _orgs.c.pool, literal(DEFAULT_POOL)
        ),
        state=case(
            (_definitions.c.closed_at.is_not(None), literal("closed")),
            (_definitions.c.paused_at.is_not(None), literal("paused")),
            (_definitions.c.enabled, literal("active")),
            else_=literal("disabled"),
        ),
        reveal_token=definition_rows.reveals_token(),
        org_state=_orgs.c.state,
        next_scheduled_for=_schedule.c.next_scheduled_for,
        next_fire_at=_schedule.c.next_fire_at,
        late_since=select(tables.late_definitions.c.late_at)
        .where(tables.late_definitions.c.definition_id == _definitions.c.id)
        .limit(1)
        .scalar_subquery(),
        template=_templates.c.name,
    ),
    TEMPLATES: _Source(
        TEMPLATES,
        _templates,
        of_org=lambda org_id: _templates.c.id.in_(
            select(_definitions.c.template_id).where(
                _definitions.c.org_id == org_id, _definitions.c.closed_at.is_(None)
            )
        ),
        by_default=_templates.c.closed_at.is_(None),
        by_default_of_org=False,
        orgs=_templates.c.selector,
        definitions=null(),
        handler=_of_spec("handler", _templates),
        schedule=_of_spec("schedule", _templates),
        state=case((_templates.c.closed_at.is_(None), literal("open")), else_=literal("closed")),
    ),
    SKIPS: _Source(SKIPS, _skips, since="skipped_until", since_bounds_key=False),
    CREDENTIALS: _Source(CREDENTIALS, _credentials),
    SECRETS: _Source(SECRETS, tables.org_secrets),
    AUDIT: _Source(AUDIT, _audit, since="at"),
    CALENDARS: _Source(CALENDARS, tables.calendars),
    LIMITS: _Source(LIMITS, tables.limits),
    BATCHES: _Source(BATCHES, tables.batches),
    ROLLOUTS: _Source(ROLLOUTS, tables.rollouts),
    BACKFILLS: _Source(
        BACKFILLS,
        _backfills,
        state=case(
            (_backfills.c.cancelled_at.is_not(None), literal("cancelled")),
            (_backfills.c.finished_at.is_(None), literal("running")),
            else_=literal("done"),
        ),
        ended=_backfills.c.made - unfinished_runs(),
        limit=_backfills.c.max_concurrent,
    ),
}
