"""Budgets as rows: those that apply to an org, their limits now, and what of them is used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import (
    ColumnElement,
    Connection,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    tuple_,
    update,
)

from worker.guard.claims import Claims
from worker.ids import AllOrgs, OrgId, RunId, new_id
from worker.model.definitions.budgets import (
    MAX_SUM,
    MONEY,
    OWN_METERS,
    AtLimit,
    Per,
    Period,
    limit_in,
    period_of,
    property_key,
    reaches_at,
)
from worker.model.definitions.zones import parse_zone
from worker.model.orgs import parse_selector
from worker.model.runs.waits import BUDGET
from worker.store import tables
from worker.store.dialect import Row, all_rows, chunks, database_now, first_row, insert_into
from worker.store.sums import Capped, CappedSum

_budgets, _raises, _meters = tables.budgets, tables.budget_raises, tables.meters
_spends, _properties, _orgs, _live = tables.spends, tables.org_properties, tables.orgs, tables.live_runs

_waits, _trees = tables.waits, tables.tree_spends
# Conditions of a wait for a budget that is not over.
_PENDING = (
    _waits.c.kind == "budget",
    _waits.c.opened_at.is_not(None),
    _waits.c.answered_at.is_(None),
    _waits.c.timed_out_at.is_(None),
)

# The key of a row of `meters`.
Counter = tuple[OrgId, str, str, datetime]
# Rows of `meters` this old are of no period any more.
OLD = timedelta(days=40)


@dataclass(frozen=True, slots=True)
class OrgBudget:
    """A budget as it applies to one org: `limit` with its raises, None if the property is missing."""

    id: str
    org_id: OrgId
    org: str
    meter: str
    per: Per
    at_limit: AtLimit
    warn_at: float
    limit: int | None
    property_name: str | None
    period: Period | None
    """None of a budget per run."""
    zone: ZoneInfo

    @property
    def counter(self) -> Counter | None:
        return None if self.period is None else self._counter_of(self.period)

    def counters_of(self, at: datetime) -> Iterator[Counter]:
        """The counters that have counted a spend of this time, without those of periods that are over.

        The period may be a later one than that of now: the clock has gone back then, and what counts now
        began with all spends since its start.
        """
        if self.period is None or at < self.period.start:
            return
        yield self._counter_of(self.period)
        if at >= self.period.end:
            yield self._counter_of(period_of(self.per, self.zone, at))

    def _counter_of(self, period: Period) -> Counter:
        return self.org_id, self.meter, self.per, period.start


@dataclass(frozen=True, slots=True)
class Level:
    """A budget, and what of it is used in its period."""

    budget: OrgBudget
    used: int

    @property
    def left(self) -> int | None:
        return None if self.budget.limit is None else max(0, self.budget.limit - self.used)

    @property
    def reached(self) -> bool:
        return self.budget.limit is not None and self.used >= self.budget.limit

    def reaches_at(self, used: int, now: datetime) -> datetime | None:
        """When the pace of a month of money that has `used` so much reaches its limit, before it ends."""
        budget = self.budget
        if budget.meter != MONEY or budget.per != "month" or budget.period is None or budget.limit is None:
            return None
        return reaches_at(budget.period, used, budget.limit, now)

    def warned(self, before: int) -> bool:
        """Whether its use has passed the warning since it was `before`."""
        if not self.budget.limit:
            return False
        return before < self.budget.warn_at * self.budget.limit <= self.used


def of_orgs(
    connection: Connection,
    org_ids: Collection[OrgId],
    meters: Collection[str] | None,
    now: datetime,
    run_id: RunId | None = None,
) -> dict[OrgId, list[OrgBudget]]:
    """The budgets of each of these orgs, of these meters or of all; `run_id` adds raises for one run."""
    query = select(_budgets).where(_budgets.c.org_id.in_(org_ids) | _budgets.c.org_id.is_(None))
    if meters is not None:
        query = query.where(_budgets.c.meter.in_(meters))
    rows = all_rows(connection, query.order_by(_budgets.c.id))
    if not rows:
        return {}
    chosen = select(_orgs.c.id, _orgs.c.code, _orgs.c.tags, _orgs.c.issuer, _orgs.c.timezone)
    found: dict[OrgId, list[OrgBudget]] = {}
    matched: list[tuple[Row, Row]] = []
    for org in all_rows(connection, chosen.where(_orgs.c.id.in_(org_ids))):
        matched += [(row, org) for row in rows if applies(row, org)]
    raised = _raised(connection, {org["id"] for _, org in matched}, now, run_id)
    wanted = [(org["id"], _key_of(row)) for row, org in matched]
    properties = _stored_properties(connection, wanted)
    for row, org in matched:
        org_id, limit = org["id"], row["limit"]
        if limit is None:
            limit = properties.get((org_id, _key_of(row)))
        if limit is not None:
            limit += raised.get((org_id, row["meter"], row["per"]), 0)
        zone = parse_zone(row["zone"] or org["timezone"] or "UTC")
        period = None if row["per"] == "run" else period_of(row["per"], zone, now)
        found.setdefault(org_id, []).append(
            OrgBudget(
                org_id=org_id,
                org=org["code"],
                limit=limit,
                property_name=row["property"],
                period=period,
                zone=zone,
                **{name: row[name] for name in ("id", "meter", "per", "at_limit", "warn_at")},
            )
        )
    return found


def _key_of(row: Row) -> str | None:
    """The name under which the limit of a row of `budgets` is stored; None if the row has it."""
    return None if row["property"] is None else property_key(row["meter"], row["property"])


def applies(budget: Mapping[str, Any], org: Mapping[str, Any]) -> bool:
    """Whether a row of `budgets` is for this org (`id`, `tags`, `issuer`)."""
    if budget["org_id"] is not None:
        return bool(budget["org_id"] == org["id"])
    selector = parse_selector(budget["selector"], entry="budget")
    return selector.matches(tags=org["tags"], issuer=org["issuer"])


def _raised(
    connection: Connection, org_ids: Collection[OrgId], now: datetime, run_id: RunId | None
) -> dict[tuple[OrgId, str, str], int]:
    of_run: ColumnElement[bool] = _raises.c.run_id.is_(None)
    if run_id is not None:
        of_run = of_run | (_raises.c.run_id == run_id)
    query = (
        select(_raises.c.org_id, _raises.c.meter, _raises.c.per, func.sum(_raises.c.amount))
        .where(_raises.c.org_id.in_(org_ids), _raises.c.until > now, of_run)
        .group_by(_raises.c.org_id, _raises.c.meter, _raises.c.per)
    )
    return {(org_id, meter, per): int(total) for org_id, meter, per, total in connection.execute(query)}


def _stored_properties(
    connection: Connection, wanted: Sequence[tuple[OrgId, str | None]]
) -> dict[tuple[OrgId, str | None], int | None]:
    names = {name for _, name in wanted if name is not None}
    if not names:
        return {}
    query = select(_properties).where(
        _properties.c.org_id.in_({org_id for org_id, _ in wanted}), _properties.c.name.in_(names)
    )
    return {(row["org_id"], row["name"]): row["value"] for row in all_rows(connection, query)}


def levels(connection: Connection, budgets: Iterable[OrgBudget], run_id: RunId | None = None) -> list[Level]:
    """What is used of each of these budgets; of those per run by this run."""
    listed = list(budgets)
    counters = {counter for budget in listed if (counter := budget.counter) is not None}
    used = read_counters(connection, counters)
    missing = counters - used.keys()
    # What an org spent since the start of a period that has no counter yet.
    used |= {counter: int(connection.execute(_since(counter)).scalar_one()) for counter in missing}
    found = []
    for budget in listed:
        if budget.counter is not None:
            found.append(Level(budget, used[budget.counter]))
        elif run_id is not None:
            found.append(Level(budget, spent_in_tree(connection, run_id, budget.meter)))
    return found


def read_counters(
    connection: Connection, counters: Collection[Counter], *, lock: bool = False
) -> dict[Counter, int]:
    """The rows of `meters` that exist, by key; locked in the order of keys."""
    columns = (_meters.c.org_id, _meters.c.meter, _meters.c.per, _meters.c.starts_at)
    found: dict[Counter, int] = {}
    for part in chunks(sorted(counters)):
        query = select(*columns, _meters.c.used).where(tuple_(*columns).in_(part)).order_by(*columns)
        rows = connection.execute(query.with_for_update() if lock else query)
        found |= {(org_id, meter, per, start): used for org_id, meter, per, start, used in rows}
    return found


def spent_by(connection: Connection, run_id: RunId, meter: str) -> int:
    """What one run has spent of a meter."""
    query = select(CappedSum(_spends.c.amount)).where(_spends.c.run_id == run_id, _spends.c.meter == meter)
    return int(connection.execute(query).scalar_one())


def spent_in_tree(connection: Connection, root_id: RunId, meter: str) -> int:
    """What one run and those below it have spent of a meter."""
    below = select(_trees.c.used).where(_trees.c.run_id == root_id, _trees.c.meter == meter)
    used = connection.execute(below).scalar_one_or_none() or 0
    return min(used + spent_by(connection, root_id, meter), MAX_SUM)


def _since(counter: Counter) -> Any:
    """A query of all spends of a counter's period."""
    org_id, meter, _, start = counter
    return select(CappedSum(_spends.c.amount)).where(
        _spends.c.org_id == org_id, _spends.c.meter == meter, _spends.c.at >= start
    )


def count(connection: Connection, added: Mapping[Counter, int]) -> dict[Counter, int]:
    """Add to counters, and return what is used then; the spends themselves are stored already.

    A counter that does not exist yet starts with all spends of its period.
    """
    used = read_counters(connection, added.keys(), lock=True)
    existing = [counter for counter in sorted(added) if counter in used]
    if existing:
        connection.execute(
            update(_meters)
            .where(*(_meters.c[name] == _parameter(name) for name in ("org_id", "meter", "per", "starts_at")))
            .values(used=Capped(_meters.c.used + _parameter("added"))),
            [dict(zip(_COUNTER, (*counter, added[counter]), strict=True)) for counter in existing],
        )
    for counter in existing:
        used[counter] = min(used[counter] + added[counter], MAX_SUM)
    for counter in sorted(added.keys() - used.keys()):
        org_id, meter, per, start = counter
        statement = insert_into(connection, _meters).values(
            org_id=org_id, meter=meter, per=per, starts_at=start, used=_since(counter).scalar_subquery()
        )
        # Another worker may have made it meanwhile, without these spends.
        statement = statement.on_conflict_do_update(
            index_elements=["org_id", "meter", "per", "starts_at"],
            set_={"used": Capped(_meters.c.used + added[counter])},
        )
        used[counter] = connection.execute(statement.returning(_meters.c.used)).scalar_one()
    return used


_COUNTER = ("b_org_id", "b_meter", "b_per", "b_starts_at", "b_added")


def _parameter(name: str) -> Any:
    type_ = _meters.c.used.type if name == "added" else _meters.c[name].type
    return bindparam(f"b_{name}", type_=type_)


def put(connection: Connection, values: Mapping[str, Any], before: Row | None) -> None:
    """Insert a budget, or change the one that is there."""
    if before is None:
        connection.execute(insert(_budgets).values(**values))
    else:
        connection.execute(update(_budgets).where(_budgets.c.id == before["id"]).values(**values))


def by_target(connection: Connection, *, lock: bool = False) -> dict[tuple[str, str, str], Row]:
    """All budgets, by target, meter and period."""
    query = select(_budgets).order_by(_budgets.c.id)
    rows = all_rows(connection, query.with_for_update() if lock else query)
    return {(row["target"], row["meter"], row["per"]): row for row in rows}


def find(connection: Connection, budget_id: str) -> Row | None:
    """The budget of that id, locked."""
    return first_row(connection, select(_budgets).where(_budgets.c.id == budget_id).with_for_update())


def remove(connection: Connection, budget_ids: Collection[str]) -> None:
    """Delete budgets; what was spent stays."""
    connection.execute(delete(_budgets).where(_budgets.c.id.in_(budget_ids)))


def raise_limit(
    connection: Connection,
    org_id: OrgId,
    *,
    meter: str,
    per: str,
    amount: int,
    until: datetime,
    actor: str,
    at: datetime,
    run_id: RunId | None = None,
) -> Row:
    """Store a raise, and return its row."""
    what = {"meter": meter, "per": per, "run_id": run_id, "amount": amount, "until": until}
    values = {"id": new_id(), "org_id": org_id, **what, "created_at": at, "created_by": actor}
    connection.execute(insert(_raises).values(**values))
    return values


def wake(connection: Connection, org_ids: Collection[OrgId] | None, now: datetime) -> int:
    """Let runs that wait for a budget go on now, to look at it again; None means those of all orgs.

    The others than parked ones are held back before they start, or are about to park.
    """
    mine = () if org_ids is None else (_live.c.org_id.in_(org_ids),)
    return _let_go(connection, (*mine, or_(_live.c.reason == "budget", _is_asked())), now)


def wake_free(connection: Connection, _: AllOrgs) -> int:
    """Let runs go on that wait for budgets below their limits; returns how many.

    So they do after a settlement, which is another transaction: it has locked other runs.
    """
    if connection.execute(select(_budgets.c.id).limit(1)).first() is None:
        return 0
    columns = (_waits.c.run_id, _waits.c.org_id, _waits.c.name, _waits.c.ask.is_not(None))
    query = select(*columns).where(text(tables.OPEN), *_PENDING)
    waiting: dict[tuple[OrgId, str, bool], list[RunId]] = {}
    for run_id, org_id, name, asks in connection.execute(query.join(_live, _live.c.id == _waits.c.run_id)):
        waiting.setdefault((org_id, name.removeprefix(BUDGET), bool(asks)), []).append(run_id)
    if not waiting:
        return 0
    now = database_now(connection)
    found = of_orgs(connection, {org for org, _, _ in waiting}, {meter for _, meter, _ in waiting}, now)
    listed = [budget for of_org in found.values() for budget in of_org]
    reached = [level.budget for level in levels(connection, listed) if level.reached]
    full = {(budget.org_id, budget.meter, asks) for budget in reached for asks in (False, True)}
    # A run that asks may have reached its own budget: it would only ask again.
    full |= {(budget.org_id, budget.meter, True) for budget in listed if budget.counter is None}
    ids = sorted(run_id for key, run_ids in waiting.items() if key not in full for run_id in run_ids)
    return sum(_let_go(connection, (_live.c.id.in_(part), _is_asked()), now) for part in chunks(ids))


def _is_asked() -> Any:
    """Whether a run has a wait for a budget that is not over."""
    return exists().where(_waits.c.run_id == _live.c.id, *_PENDING)


def _let_go(connection: Connection, which: Sequence[Any], now: datetime) -> int:
    query = select(_live.c.id).where(*which)
    ids = connection.execute(query.order_by(_live.c.id).with_for_update()).scalars().all()
    for part in chunks(ids):
        end_waits(connection, part, now)
        some = _live.c.id.in_(part)
        held = (some, _live.c.state == "waiting", _live.c.reason == "budget")
        connection.execute(update(_live).where(*held).values(available_at=now))
        parked = {"state": "waiting", "reason": "resumed", "available_at": now, "started_at": None}
        connection.execute(update(_live).where(some, _live.c.state == "parked").values(**parked))
    return len(ids)


def end_waits(connection: Connection, run_ids: Collection[RunId], now: datetime) -> None:
    """End what these runs store of waits for budgets: a run that is about to park goes on at once."""
    connection.execute(update(_waits).where(_waits.c.run_id.in_(run_ids), *_PENDING).values(until=now))


@dataclass(frozen=True, slots=True)
class WatchedBudgets:
    """What workers keep of the budgets: whom they hold back, whose runs they limit, properties to store."""

    holding: frozenset[OrgId] = frozenset()
    """Orgs with a budget of `runs` or `run_seconds`."""
    limiting: frozenset[OrgId] = frozenset()
    """Orgs with a budget of another meter."""
    properties: frozenset[str] = frozenset()
    """The names under which the properties that are limits of budgets are stored."""
    version: tuple[tuple[str, datetime], ...] = ()
    """The budgets that this was made of."""


def watched(connection: Connection, _: AllOrgs, known: WatchedBudgets | None = None) -> WatchedBudgets:
    """What workers keep of the budgets of all orgs; `known` if the budgets are as they were."""
    rows = all_rows(connection, select(_budgets).order_by(_budgets.c.id))
    version = tuple((row["id"], row["updated_at"]) for row in rows)
    if known is not None and version == known.version:
        return known
    selecting = [row for row in rows if row["org_id"] is None]
    found: dict[bool, set[OrgId]] = {True: set(), False: set()}
    for row in rows:
        if row["org_id"] is not None:
            found[row["meter"] in OWN_METERS].add(row["org_id"])
    if selecting:
        chosen = select(_orgs.c.id, _orgs.c.tags, _orgs.c.issuer).where(_orgs.c.state != "removed")
        for org in all_rows(connection, chosen):
            for row in selecting:
                if applies(row, org):
                    found[row["meter"] in OWN_METERS].add(org["id"])
    properties = frozenset(key for row in rows if (key := _key_of(row)) is not None)
    return WatchedBudgets(frozenset(found[True]), frozenset(found[False]), properties, version)


def store_properties(connection: Connection, org_id: OrgId, claims: Claims, names: Iterable[str]) -> None:
    """Store the limits that a token has, if it is the newest; a higher one wakes the org's runs."""
    values = {name: limit_in(claims.properties, name) for name in sorted(names)}
    before = _stored_properties(connection, [(org_id, name) for name in values])
    for name, value in values.items():
        statement = insert_into(connection, _properties).values(
            org_id=org_id, name=name, value=value, issued_at=claims.issued_at
        )
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["org_id", "name"],
                set_={"value": statement.excluded.value, "issued_at": statement.excluded.issued_at},
                where=_properties.c.issued_at <= statement.excluded.issued_at,
            )
        )
    if any((value or 0) > (before.get((org_id, name)) or 0) for name, value in values.items()):
        wake(connection, [org_id], database_now(connection))


def forget_counters(connection: Connection) -> int:
    """Delete counters of periods that are over, and raises that have ended."""
    before = database_now(connection) - OLD
    connection.execute(delete(_raises).where(_raises.c.until < before))
    return connection.execute(delete(_meters).where(_meters.c.starts_at < before)).rowcount
