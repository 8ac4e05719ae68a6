"""Costs: what orgs' runs used of models and what that cost, by org, model, definition, day or month."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date, datetime
from typing import Any, Literal, TypedDict, cast, get_args

from sqlalchemy import BigInteger, ColumnElement, Connection, Text, literal_column, select

from worker.errors import UsageError
from worker.ids import AllOrgs, OrgId, OrgScope
from worker.model.money import DEFAULT_CURRENCY, money_text
from worker.model.prices import CALL_KINDS, TOKEN_KINDS
from worker.store import orgs, prices, tables
from worker.store.dialect import Row, all_rows, chunks, in_scope
from worker.store.lists import DEFAULT_LIMIT, Page
from worker.store.lists.usage import texts_of, window
from worker.store.redaction import Shown
from worker.store.sums import CappedSum

Part = Literal["org", "definition", "provider", "model", "kind", "tariff", "day", "month"]
PARTS: tuple[Part, ...] = get_args(Part)

_days, _orgs, _definitions = tables.model_days, tables.orgs, tables.definitions
# A day is text on SQLite, and its text is the same on PostgreSQL. Without parameters: it is a group, too.
_MONTH: ColumnElement[str] = literal_column("substr(CAST(model_days.day AS TEXT), 1, 7)", Text)
_CALLS = tuple(kind for kind in CALL_KINDS if kind != "request")


class ModelCost(TypedDict):
    """What an org used of models between two UTC days, both included.

    `money` is in nano-units of `currency`, `amount` the same as text; both without what has no price:
    `unpriced` are its tokens and calls.
    """

    org: Shown[str]
    definition: Shown[str | None]
    provider: Shown[str | None]
    model: Shown[str | None]
    kind: Shown[str | None]
    tariff: Shown[str | None]
    day: Shown[date | None]
    month: Shown[str | None]
    tokens: Shown[int]
    calls: Shown[int]
    money: Shown[int]
    amount: Shown[str]
    currency: Shown[str]
    unpriced: Shown[int]
    since: Shown[date]
    until: Shown[date]


def parts_of(by: str) -> tuple[Part, ...]:
    """The parts of a text such as `org,model,month`, in the order of columns; raises UsageError."""
    given = [part.strip() for part in by.split(",") if part.strip()]
    for part in given:
        if part not in PARTS:
            fix = f"use some of {','.join(PARTS)}; or meter alone"
            raise UsageError(f"{part!r:.60} is not a way to list costs", fix=fix)
    return tuple(part for part in PARTS if part in given)


def columns_of_costs(parts: Sequence[Part]) -> tuple[str, ...]:
    """The columns that say something, of costs by these parts."""
    named = tuple(part for part in PARTS if part in parts and part != "org")
    return ("org", *named, "tokens", "calls", "amount", "currency", "money", "unpriced", "since", "until")


def costs(
    connection: Connection,
    org: OrgScope,
    by: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> list[ModelCost]:
    """What models cost, a row for each org and each of the parts; orgs oldest first, then times, most first.

    A page has the rows of `limit` orgs; `after` is the code of the last org of the page before. Sums are
    those of the stored spends, to the nano-unit.

    Raises:
        NotFound: no such org.
        UsageError: an invalid value.
    """
    parts = parts_of(by)
    most = Page(limit=limit).limit or DEFAULT_LIMIT
    scope = orgs.scope_of(connection, org)
    first, last = window(connection, since, until)
    named = _page_of_orgs(connection, first, last, most, after) if isinstance(scope, AllOrgs) else [scope]
    codes = texts_of(connection, _orgs.c.code, named)
    columns = {part: _column(part) for part in parts if part != "org"}
    rows: list[Row] = []
    for some in chunks(named):
        query = (
            select(
                _days.c.org_id,
                *(column.label(part) for part, column in columns.items()),
                _units_of(TOKEN_KINDS).label("tokens"),
                _units_of(_CALLS).label("calls"),
                CappedSum(_days.c.money).label("money"),
                CappedSum(_days.c.unpriced).label("unpriced"),
            )
            .where(_days.c.org_id.in_(some), _days.c.day >= first, _days.c.day <= last)
            .group_by(_days.c.org_id, *columns.values())
        )
        rows += all_rows(connection, query)
    mine = in_scope(_definitions.c.org_id, scope)
    shown = {row["definition"] for row in rows} if "definition" in parts else set[str]()
    names = texts_of(connection, _definitions.c.name, shown, *mine)
    currency = prices.currency_of(connection) or DEFAULT_CURRENCY
    places = {org_id: place for place, org_id in enumerate(named)}
    rows.sort(key=lambda row: (places[row["org_id"]], *_order(row, parts)))
    return [_shown(row, parts, codes, names, currency, first, last) for row in rows]


def _shown(
    row: Row,
    parts: Collection[Part],
    codes: dict[str, str],
    names: dict[str, str],
    currency: str,
    first: date,
    last: date,
) -> ModelCost:
    given: dict[str, Any] = {part: row[part] if part in parts else None for part in PARTS if part != "org"}
    if "definition" in parts:
        given["definition"] = names.get(row["definition"])
    if "provider" in parts:
        given["provider"] = row["provider"] or None
    sums: dict[str, Any] = {name: int(row[name]) for name in ("tokens", "calls", "money", "unpriced")}
    amount = money_text(sums["money"]).replace(",", "")
    of = {"org": codes[row["org_id"]], "amount": amount, "currency": currency, "since": first, "until": last}
    return cast(ModelCost, {name: ({**given, **sums, **of})[name] for name in ModelCost.__annotations__})


def _column(part: Part) -> ColumnElement[Any]:
    if part == "definition":
        return _days.c.definition_id
    return _MONTH if part == "month" else _days.c[part]


def _units_of(kinds: Collection[str]) -> ColumnElement[int]:
    """The sum of the units of these kinds."""
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    return CappedSum(
        literal_column(
            f"CASE WHEN model_days.kind IN ({listed}) THEN model_days.units ELSE 0 END", BigInteger
        )
    )


def _order(row: Row, parts: Collection[Part]) -> tuple[int, ...]:
    """Newest first, then what cost most."""
    time = row["day"].toordinal() if "day" in parts else 0
    if "month" in parts and not time:
        time = int(row["month"].replace("-", ""))
    return -time, -int(row["money"]), -int(row["tokens"])


def _page_of_orgs(
    connection: Connection, first: date, last: date, most: int, after: str | None
) -> list[OrgId]:
    """The next orgs that used a model in these days."""
    query = select(_days.c.org_id).where(_days.c.day >= first, _days.c.day <= last)
    if after is not None:
        query = query.where(_days.c.org_id > orgs.require(connection, after)["id"])
    query = query.group_by(_days.c.org_id).order_by(_days.c.org_id).limit(most)
    return list(connection.execute(query).scalars())
