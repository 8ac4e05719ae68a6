"""Usage: what orgs spent, by meter, definition or day; and their budgets, with what is used of each."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, TypedDict, get_args

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    func,
    literal_column,
    select,
    union_all,
)

from worker.errors import UsageError
from worker.ids import AllOrgs, OrgId, OrgScope
from worker.model.definitions.budgets import MONEY, amount_text, property_key, reaches_at
from worker.store import budgets, orgs, tables
from worker.store.dialect import Row, all_rows, below, chunks, database_now, in_scope, rows_as
from worker.store.lists import DEFAULT_LIMIT, Page
from worker.store.lists.rows import columns_of
from worker.store.redaction import Shown
from worker.store.sums import CappedSum

By = Literal["meter", "definition", "day"]
BYS: tuple[By, ...] = get_args(By)
# Days that are listed by default, and the most that one query sums up.
DAYS = 30
MAX_DAYS = 400
# Counters that are looked at to find those nearest to a limit.
MAX_READ = 1_000
# The parts of a limit of which one is used, of those near it, and of those that a forecast may be for.
HALF = 2
FORECAST = 10

_days, _definitions, _orgs = tables.meter_days, tables.definitions, tables.orgs
_meters = tables.meters


class Usage(TypedDict):
    """What an org spent of a meter between two UTC days, both included."""

    org: Shown[str]
    meter: Shown[str]
    definition: Shown[str | None]
    day: Shown[date | None]
    used: Shown[int]
    since: Shown[date]
    until: Shown[date]


class Raise(TypedDict):
    """A raise of an org's budgets; `limit` is the lowest of them with it. For operators only."""

    id: str
    org: str
    meter: str
    per: str
    amount: int
    until: datetime
    limit: int | None
    created_at: datetime
    created_by: str


class BudgetLevel(TypedDict):
    """A budget of an org in its current period; `used` and the times are null for a budget per run.

    Money is in nano-units. `reaches_at` is when the pace so far reaches the limit, if before the period ends.
    """

    id: Shown[str]
    org: Shown[str]
    meter: Shown[str]
    per: Shown[str]
    limit: Shown[int | None]
    used: Shown[int | None]
    left: Shown[int | None]
    resets_at: Shown[datetime | None]
    at_limit: Shown[str]
    property: Shown[str | None]
    reaches_at: Shown[datetime | None]


class BudgetRow(TypedDict):
    """A budget as it was applied: its org, or the orgs that it selects; for operators only."""

    id: str
    org: str | None
    orgs: Any
    meter: str
    limit: int | None
    limit_from: str | None
    per: str
    zone: str | None
    at_limit: str
    warn_at: float
    updated_at: datetime
    updated_by: str


def name_of(row: Mapping[str, Any]) -> str:
    """A budget in a few words: `llm_tokens per day`, with the orgs that it selects."""
    selector = row.get("selector")
    of = "" if selector is None else f" of {json.dumps(selector)}"
    return f"{row['meter']} per {row['per']}{of}"


def window(connection: Connection, since: datetime | None, until: datetime | None) -> tuple[date, date]:
    """The UTC days to sum up, both included: by default the last 30.

    Raises:
        UsageError: they are too many, or in the wrong order.
    """
    now = database_now(connection)
    last = (until or now).astimezone(UTC).date()
    first = since.astimezone(UTC).date() if since is not None else last - timedelta(days=DAYS - 1)
    if first > last:
        raise UsageError(f"since {first} is after until {last}", fix="swap them, or leave one out")
    if (last - first).days >= MAX_DAYS:
        raise UsageError(f"{first} to {last} is more than {MAX_DAYS} days", fix="ask for fewer days")
    return first, last


def usage(
    connection: Connection,
    org: OrgScope,
    by: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
    after: str | None = None,
    with_money: bool = True,
) -> list[Usage]:
    """What was spent, a row for each org, meter, and definition or day; days newest first, then most first.

    A page has the rows of `limit` orgs, oldest first; `after` is the code of the last org of the page before.

    Raises:
        NotFound: no such org.
        UsageError: an invalid value.
    """
    if by not in BYS:
        raise UsageError(f"{by!r} is not a way to list usage", fix=f"one of {', '.join(BYS)}")
    most = Page(limit=limit).limit or DEFAULT_LIMIT
    scope = orgs.scope_of(connection, org)
    first, last = window(connection, since, until)
    named = _page_of_orgs(connection, first, last, most, after) if isinstance(scope, AllOrgs) else [scope]
    codes = texts_of(connection, _orgs.c.code, named)
    part: list[ColumnElement[Any]] = []
    if by != "meter":
        part.append(_days.c.definition_id if by == "definition" else _days.c.day)
    used = CappedSum(_days.c.used).label("used")
    rows: list[Row] = []
    for some in chunks(named):
        query = (
            select(_days.c.org_id, _days.c.meter, used, *part)
            .where(_days.c.org_id.in_(some), _days.c.day >= first, _days.c.day <= last)
            .group_by(_days.c.org_id, _days.c.meter, *part)
        )
        if not with_money:
            query = query.where(_days.c.meter != MONEY)
        rows += all_rows(connection, query)
    shown = {row["definition_id"] for row in rows} if by == "definition" else set[str]()
    mine = in_scope(_definitions.c.org_id, scope)
    names = texts_of(connection, _definitions.c.name, shown, *mine)
    places = {org_id: place for place, org_id in enumerate(named)}
    newest_first = [
        (places[row["org_id"]], -row["day"].toordinal() if by == "day" else 0, -int(row["used"]), n)
        for n, row in enumerate(rows)
    ]
    return [
        Usage(
            org=codes[row["org_id"]],
            meter=row["meter"],
            definition=names.get(row["definition_id"]) if by == "definition" else None,
            day=row["day"] if by == "day" else None,
            used=int(row["used"]),
            since=first,
            until=last,
        )
        for row in (rows[n] for *_, n in sorted(newest_first))
    ]


def _page_of_orgs(
    connection: Connection, first: date, last: date, most: int, after: str | None
) -> list[OrgId]:
    """The next orgs that spent anything in these days."""
    query = select(_days.c.org_id).where(_days.c.day >= first, _days.c.day <= last)
    if after is not None:
        query = query.where(_days.c.org_id > orgs.require(connection, after)["id"])
    query = query.group_by(_days.c.org_id).order_by(_days.c.org_id).limit(most)
    return list(connection.execute(query).scalars())


def texts_of(
    connection: Connection, column: Column[Any], ids: Collection[str], *mine: ColumnElement[bool]
) -> dict[str, str]:
    """A column of the rows with these ids."""
    found: dict[str, str] = {}
    for part in chunks(sorted(ids)):
        key = column.table.c.id
        found |= {
            id_: text for id_, text in connection.execute(select(key, column).where(key.in_(part), *mine))
        }
    return found


def budget_rows(connection: Connection, *, limit: int, after: str | None = None) -> list[BudgetRow]:
    """The budgets as they were applied, newest first."""
    stored = tables.budgets
    known = {"org": _orgs.c.code, "orgs": stored.c.selector, "limit_from": "property:" + stored.c.property}
    columns = (known[name] if name in known else stored.c[name] for name in columns_of(BudgetRow))
    query = select(*(column.label(name) for name, column in zip(columns_of(BudgetRow), columns, strict=True)))
    query = query.select_from(stored).outerjoin(_orgs, _orgs.c.id == stored.c.org_id)
    query = query.where(*below(stored.c.id, after)).order_by(stored.c.id.desc()).limit(limit)
    return rows_as(BudgetRow, connection, query)


def budgets_of(connection: Connection, org: str) -> list[BudgetLevel]:
    """The budgets of one org now, each with its limit, raises included, and what is used of it.

    Raises:
        NotFound: no such org.
    """
    org_id, now = OrgId(orgs.require(connection, org)["id"]), database_now(connection)
    found = budgets.of_orgs(connection, [org_id], None, now).get(org_id, [])
    known = {level.budget.id: level.used for level in budgets.levels(connection, found)}
    ordered = sorted(found, key=lambda one: (one.meter, one.per, one.id))
    return [_level(budget, known.get(budget.id), now) for budget in ordered]


def forecasts(connection: Connection, _: AllOrgs, *, limit: int) -> list[BudgetLevel]:
    """The budgets of money of a month whose pace reaches the limit before its end, soonest first.

    For operators only. Looked for among the MAX_READ of which most is used without raises.
    """
    now = database_now(connection)
    ids = _near(connection, now, MAX_READ, FORECAST, (_meters.c.meter == MONEY, _meters.c.per == "month"))
    found = [each for one in budgets.of_orgs(connection, ids, [MONEY], now).values() for each in one]
    counters = {budget.counter: budget for budget in found if budget.per == "month" and budget.counter}
    used = budgets.read_counters(connection, list(counters))
    levels = [_level(budget, used[key], now) for key, budget in counters.items() if key in used]
    ahead = [(level["reaches_at"], level) for level in levels if level["reaches_at"] is not None]
    return [level for _, level in sorted(ahead, key=lambda each: (each[0], each[1]["org"]))[:limit]]


def _level(budget: budgets.OrgBudget, used: int | None, now: datetime) -> BudgetLevel:
    ahead = None
    if None not in (budget.period, used, budget.limit):
        ahead = reaches_at(budget.period, used, budget.limit, now)  # type: ignore[arg-type]
    return BudgetLevel(
        id=budget.id,
        org=budget.org,
        meter=budget.meter,
        per=budget.per,
        limit=budget.limit,
        used=used,
        left=None if used is None else budgets.Level(budget, used).left,
        resets_at=None if budget.period is None else budget.period.end,
        at_limit=budget.at_limit,
        property=budget.property_name,
        reaches_at=ahead,
    )


def forecast_text(level: Mapping[str, Any], currency: str) -> str | None:
    """What the pace of a budget comes to, for people; None if it stays below the limit."""
    if level["reaches_at"] is None:
        return None
    limit = amount_text(level["meter"], level["limit"], currency)
    return (
        f"at this pace {level['org']} reaches {limit} of {level['meter']} per {level['per']} "
        f"on {level['reaches_at']:%Y-%m-%d}"
    )


def nearest(connection: Connection, _: AllOrgs, *, limit: int) -> list[BudgetLevel]:
    """The budgets of a day or month of which half or more is used, most first; for operators only.

    Looked for among the MAX_READ that are nearest without raises.
    """
    now = database_now(connection)
    ids = _near(connection, now, limit)
    found = [each for one in budgets.of_orgs(connection, ids, None, now).values() for each in one]
    counters = {budget.counter: budget for budget in found if budget.counter and budget.limit}
    used = budgets.read_counters(connection, list(counters))
    levels = [
        (used[budget.counter] / budget.limit, budget)
        for budget in found
        if budget.counter in used and budget.limit and _is_near(used[budget.counter], budget.limit)
    ]
    levels.sort(key=lambda each: (-each[0], each[1].org, each[1].meter, each[1].per, each[1].id))
    return [_level(budget, used[budget.counter], now) for _, budget in levels[:limit] if budget.counter]


def _is_near(used: Any, limit: Any, parts: int = HALF) -> Any:
    """Whether half of a limit is used, or another part, of numbers or of columns."""
    return used * parts >= limit


def _near(
    connection: Connection,
    now: datetime,
    most: int,
    near: int = HALF,
    which: Sequence[ColumnElement[bool]] = (),
) -> list[OrgId]:
    """The orgs with the counters that are nearest to a limit, without raises; at most `most`."""
    windows = [(*window, *which) for window in _windows(now)]
    parts = [_counters(window, near, of_orgs=own) for window in windows for own in (True, False)]
    each = union_all(*parts).order_by(literal_column("part").desc()).limit(MAX_READ).subquery("each")
    query = (
        select(each, _orgs.c.tags, _orgs.c.issuer)
        # Outer, so that SQLite does not begin with all orgs.
        .outerjoin(_orgs, _orgs.c.id == each.c.id)
        .where(func.coalesce(_orgs.c.state, "removed") != "removed")
        .order_by(each.c.part.desc(), each.c.id)
    )
    found: dict[OrgId, None] = {}
    for row in all_rows(connection, query):
        if len(found) < most and budgets.applies(row, row):
            found[OrgId(row["id"])] = None
    return list(found)


def _windows(now: datetime) -> list[tuple[ColumnElement[bool], ...]]:
    """Where the counters of today and of this month are, whatever the zone of each."""
    starts_at = _meters.c.starts_at
    first = {(now + timedelta(hours=ahead)).date().replace(day=1) for ahead in (14, -12)}
    months = (datetime.combine(day, time(), UTC) for day in sorted(first))
    return [
        (_meters.c.per == "day", starts_at > now - timedelta(hours=26)),
        *(
            (
                _meters.c.per == "month",
                starts_at.between(start - timedelta(hours=15), start + timedelta(hours=13)),
            )
            for start in months
        ),
    ]


def _counters(window: Sequence[ColumnElement[bool]], near: int, *, of_orgs: bool) -> Select[Any]:
    """Counters with each budget that may be theirs: those of single orgs, or those that select orgs."""
    stored, properties = tables.budgets, tables.org_properties
    limit = func.coalesce(stored.c.limit, properties.c.value)
    of_money = stored.c.meter == MONEY, property_key(MONEY, "") + stored.c.property
    key = case(of_money, else_=stored.c.property)
    whose = stored.c.org_id == _meters.c.org_id if of_orgs else stored.c.org_id.is_(None)
    return (
        select(
            *(_meters.c.org_id.label("id"), stored.c.org_id, stored.c.selector),
            (_meters.c.used * 1.0 / limit).label("part"),
        )
        .select_from(_meters)
        .join(stored, and_(stored.c.meter == _meters.c.meter, stored.c.per == _meters.c.per, whose))
        .outerjoin(
            properties,
            and_(properties.c.org_id == _meters.c.org_id, properties.c.name == key),
        )
        .where(*window, limit > 0, _is_near(_meters.c.used, limit, near))
    )


def columns_by(by: str) -> tuple[str, ...]:
    """The columns that say something, of a list by this."""
    part = () if by == "meter" else (by,)
    return ("org", "meter", *part, "used", "since", "until")
