"""Model requests for batches: what runs ask, reserve and get.

What changes a run locks its row in `live_runs` first, as an answer to a wait does, in the order of ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, and_, func, insert, literal_column, select, text, tuple_, update

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.batches import (
    KNOWN_BATCHES,
    KNOWN_RUNS,
    Experience,
    Fallback,
    Pool,
    percentile,
    wait_name,
)
from worker.model.definitions.budgets import MONEY
from worker.model.prices import ModelUsage, Prices
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait, WaitState
from worker.store import budgets, spending, tables
from worker.store import prices as model_prices
from worker.store.bulk import among, update_many
from worker.store.dialect import Row, all_rows, chunks, database_now, first_row, hint
from worker.store.prices import ModelUse
from worker.store.spending import CountedSpends, Spend
from worker.store.sql import statements

_items, _batches = tables.batch_items, tables.batches
_live, _runs, _waits = tables.live_runs, tables.runs, tables.waits

# Rows that one transaction changes, and runs of a definition among which the last of a handler are.
CHANGED = 100
LOOKED_AT = 10_000
# Who answers the wait for a batch, and the first part of the keys of what its requests spend.
BY = "batch"
NOTHING = CountedSpends((), {})


def new_item_id() -> str:
    """A random id: a provider sees it, so it says neither when nor for whom the request was made."""
    return str(uuid4())


@dataclass(frozen=True, slots=True)
class NewItem:
    """A request of a run, to be stored; with a `fallback` it is sent on its own."""

    id: str
    name: str
    key: str
    occurrence: int
    pool: Pool
    size: int
    body: bytes | None
    meter: str | None
    most: ModelUsage | None
    """What it is expected to use at most; it is reserved."""
    fall_back_at: datetime | None = None
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """How a request stands: its row, and the state of the wait for it."""

    wait: WaitState
    item: Row | None = None
    spends: CountedSpends = NOTHING


# --- What a run asks. ---


def open_item(
    connection: Connection, run: AdmittedRun, wait: NewWait, new: NewItem, prices: Prices
) -> Opened | None:
    """Store a request and the wait for it, fenced, or find it; None if the run is no longer ours.

    The same step of the same run is one request, however often it is opened. Reserves its tokens, and what
    they cost in a batch if its org has a budget of money.
    """
    state = statements(connection).open_wait(
        connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
    )
    if state is None or state.state == "too_many" or state.kind != "batch":
        return None if state is None else Opened(state)
    item, spends = find_item(connection, run.id, new.name, new.key, new.occurrence), NOTHING
    if item is None:
        item, spends = _insert(connection, run, new, prices)
    if item["state"] not in ("pending", "sent") and state.state == "pending":
        _answer(connection, [(run.id, wait.name, wait.occurrence)], database_now(connection))
    return Opened(state, item, spends)


def find_item(connection: Connection, run_id: RunId, name: str, key: str, occurrence: int) -> Row | None:
    """The request of a step."""
    return first_row(
        connection, select(_items).filter_by(run_id=run_id, name=name, key=key, occurrence=occurrence)
    )


def _insert(
    connection: Connection, run: AdmittedRun, new: NewItem, prices: Prices
) -> tuple[Row, CountedSpends]:
    now, is_sync = database_now(connection), new.fallback is not None
    most = None if is_sync or new.meter is None else new.most
    values = {
        **{"id": new.id, "org_id": run.org_id, "run_id": run.id, "definition_id": run.definition_id},
        **{"pool": run.pool, "name": new.name, "key": new.key, "occurrence": new.occurrence},
        **{"api": new.pool.api, "own_key": new.pool.account is not None, "path": new.pool.path},
        **{"model": new.pool.model, "betas": new.pool.betas, "size": new.size, "meter": new.meter},
        **{"state": "sync" if is_sync else "pending", "reason": new.fallback, "apart": False},
        **{"opened_at": now, "ended_at": now if is_sync else None, "fall_back_at": new.fall_back_at},
        **{"body": None if is_sync else new.body, "reserved": 0 if most is None else most.tokens},
    }
    item = all_rows(connection, insert(_items).values(**values).returning(_items))[0]
    if most is None:
        return item, NOTHING
    spend = _spend(values | {"tokens": most.tokens}, is_child=run.origin == "child")
    reserved = [spend, *_money(connection, spend, most, prices, now)]
    # What it has spent is known with its result.
    return item, replace(spending.record(connection, reserved, now), spent={})


def _money(
    connection: Connection, spend: Spend, most: ModelUsage, prices: Prices, now: datetime
) -> list[Spend]:
    """What a request costs at most, if its org has a budget of money and its model a price."""
    if not budgets.of_orgs(connection, [spend.org_id], [MONEY], now):
        return []
    [costed] = model_prices.cost(connection, [_use(spend, most)], prices, now)
    money = costed.priced.money
    return [] if money is None else [replace(spend, meter=MONEY, amount=money)]


def experience(
    connection: Connection, definition_id: DefinitionId, handler: str, api: str, model: str
) -> Experience:
    """The requests of the last runs of a definition's handler, and how long the last batches of a model took.

    A run and the children that it starts have other handlers, and other numbers of requests.
    """
    columns = (_runs.c.id, _runs.c.handler, _runs.c.state)
    newest = select(*columns).where(_runs.c.definition_id == definition_id).order_by(_runs.c.id.desc())
    runs = newest.limit(LOOKED_AT).subquery()
    ended = (runs.c.handler == handler, runs.c.state == literal_column("'succeeded'"))
    last = select(runs.c.id).where(*ended).order_by(runs.c.id.desc()).limit(KNOWN_RUNS)
    ids = connection.execute(last).scalars().all()
    of_runs = select(func.count()).where(among(connection, _items.c.run_id, ids)).group_by(_items.c.run_id)
    turns = connection.execute(of_runs).scalars().all() if ids else ()
    return Experience(tuple(turns), _times(connection, api, model))


def _times(connection: Connection, api: str, model: str) -> tuple[float, ...]:
    """How long the last batches of a model took, in seconds."""
    of_model = (_batches.c.api == api, _batches.c.model == model, _batches.c.ended_at.is_not(None))
    took = select(_batches.c.created_at, _batches.c.ended_at).where(*of_model)
    rows = connection.execute(took.order_by(_batches.c.ended_at.desc()).limit(KNOWN_BATCHES)).all()
    return tuple((ended - began).total_seconds() for began, ended in rows)


def turns_of(connection: Connection, run_id: RunId) -> int:
    """The requests of a run so far."""
    return connection.execute(select(func.count()).where(_items.c.run_id == run_id)).scalar_one()


@dataclass(frozen=True, slots=True)
class Standing:
    """How the oldest open request of a run stands; `usual` is the median of the last batches, in seconds."""

    opened_at: datetime
    sent_at: datetime | None
    fall_back_at: datetime | None
    usual: float | None


def standing(connection: Connection, run_id: RunId) -> Standing | None:
    """How the oldest open request of a run stands; None without one."""
    open_ = (_items.c.run_id == run_id, _items.c.state.in_(("pending", "sent")))
    # Not its body, which the web side may not read.
    columns = (_items.c.opened_at, _items.c.sent_at, _items.c.fall_back_at, _items.c.api, _items.c.model)
    row = first_row(connection, select(*columns).where(*open_).order_by(_items.c.opened_at))
    if row is None:
        return None
    seconds = _times(connection, row["api"], row["model"])
    return Standing(row["opened_at"], row["sent_at"], row["fall_back_at"], percentile(seconds, 0.5))


def end_orphans(connection: Connection, pool: str) -> int:
    """End the pending requests whose run has ended; returns how many."""
    query = (
        select(_items)
        .where(text("batch_items.state = 'pending'"), _items.c.pool == pool)
        .where(~select(_live.c.id).where(_live.c.id == _items.c.run_id).exists())
        .order_by(_items.c.id)
        .limit(CHANGED)
        .with_for_update()
    )
    rows = all_rows(connection, query)
    if rows:
        now = database_now(connection)
        ids = [row["id"] for row in rows]
        values = {"state": "over", "reason": "run_ended", "ended_at": now, "body": None}
        connection.execute(update(_items).where(among(connection, _items.c.id, ids)).values(**values))
        spending.settle(connection, _spends(connection, rows))
    return len(rows)


def is_item_id(text_: str) -> bool:
    return len(text_) == 36 and text_.count("-") == 4 and not set(text_) - set("0123456789abcdef-")


# --- Results. ---


@dataclass(frozen=True, slots=True)
class StoredResult:
    """The result of a request: sealed, with what it used; or why the request is sent on its own."""

    id: str
    result: bytes | None = None
    used: ModelUsage | None = None
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """What became of results: `stored` woke their runs, of which `failed` send their request on their own;
    `late` were of no use any more.
    """

    stored: int = 0
    late: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    spends: CountedSpends = NOTHING


_CHANGED_BY_RESULT = ("seen", "tokens", "state", "reason", "result", "late", "ended_at", "body")


def places_of(connection: Connection, batch_id: str, ids: Sequence[str]) -> dict[str, tuple[OrgId, RunId]]:
    """The org and run of those of these ids that are requests of this batch."""
    listed = [id_ for id_ in ids if is_item_id(id_)]
    query = select(_items.c.id, _items.c.org_id, _items.c.run_id)
    query = query.where(among(connection, _items.c.id, listed), _items.c.batch_id == batch_id)
    return {id_: (org_id, run_id) for id_, org_id, run_id in connection.execute(query)} if listed else {}


def store_results(
    connection: Connection, batch_id: str, provider_id: str, results: Sequence[StoredResult], prices: Prices
) -> Counted:
    """Store the results of requests of a batch, each once, and let their runs go on.

    A result whose request is not in the state `sent` any more, or whose run has ended, changes no run: its
    tokens are charged. Results of one provider's batch count once, however often they are read.
    """
    given = {one.id: one for one in results}
    of = and_(among(connection, _items.c.id, sorted(given)), _items.c.batch_id == batch_id)
    runs = connection.execute(select(_items.c.run_id).where(of)).scalars().all()
    live = _lock_runs(connection, runs)
    rows = all_rows(connection, select(_items).where(of).order_by(_items.c.id).with_for_update())
    now, ended, charged, late = database_now(connection), [], [], 0
    used: dict[str, tuple[int, ModelUsage]] = {}
    for row in rows:
        one, seen = given[row["id"]], list(filter(None, row["seen"].split(",")))
        if provider_id in seen:
            continue
        values: dict[str, Any] = {name: row[name] for name in _CHANGED_BY_RESULT}
        values["seen"] = ",".join((*seen, provider_id))
        if one.used is not None:
            values["tokens"] = row["tokens"] + one.used.tokens
            used[row["id"]] = len(seen), one.used
        if _is_awaited(row, live):
            state = "done" if one.fallback is None else "sync"
            values |= {"state": state, "reason": one.fallback, "result": one.result}
            ended.append(row)
        else:
            values["late"] = row["late"] + (one.fallback is None)
            late += one.fallback is None
            if row["state"] == "sent":
                values |= {"state": "over", "reason": "run_ended"}
        if row["state"] == "sent":
            values |= {"ended_at": now, "body": None}
        charged.append(row | values)
    update_many(connection, _items, charged, key=["id"], changed=_CHANGED_BY_RESULT)
    spends = _spends(connection, charged)
    uses = [_use(spend, *used[id_][::-1]) for spend in spends if (id_ := _item_of(spend)) in used]
    counted = spending.settle(connection, spends, uses, prices)
    _end_waits(connection, ended, live, now)
    failed = Counter[str](filter(None, (given[row["id"]].fallback for row in ended)))
    return Counted(len(ended), late, failed, counted)


def _is_awaited(row: Row, live: Mapping[RunId, Any]) -> bool:
    """Whether the run of a request, locked with it, still waits for its result."""
    return row["state"] == "sent" and row["run_id"] in live


def fall_back_due(connection: Connection, pool: str) -> int:
    """Let requests of a pool be sent on their own whose time has come; returns how many."""
    due_at = _items.c.fall_back_at <= database_now(connection)
    query = select(_items.c.id).where(text(f"batch_items.{tables.OPEN_ITEM}"), due_at, _items.c.pool == pool)
    ids = connection.execute(query.order_by(_items.c.fall_back_at).limit(CHANGED)).scalars().all()
    return fall_back(connection, ids, "deadline") if ids else 0


def fall_back(connection: Connection, ids: Sequence[str], reason: Fallback) -> int:
    """Let these requests be sent on their own if they are not over; returns how many.

    At most `CHANGED` in one call.
    """
    open_ = text(f"batch_items.{tables.OPEN_ITEM}")
    query = select(_items.c.id, _items.c.run_id).where(open_)
    found = connection.execute(query.where(among(connection, _items.c.id, sorted(ids)[:CHANGED]))).all()
    live = _lock_runs(connection, [run_id for _, run_id in found])
    listed = among(connection, _items.c.id, sorted(id_ for id_, _ in found))
    locked = select(_items).where(listed, open_).order_by(_items.c.id).with_for_update()
    rows = all_rows(connection, locked) if found else []
    if not rows:
        return 0
    now = database_now(connection)
    values = {"state": "sync", "reason": reason, "ended_at": now, "body": None}
    changed = among(connection, _items.c.id, [row["id"] for row in rows])
    connection.execute(update(_items).where(changed).values(**values))
    spending.settle(connection, _spends(connection, rows))
    _end_waits(connection, rows, live, now)
    return len(rows)


def forget_org(connection: Connection, org_id: OrgId) -> None:
    """Drop the requests and results of an org that is removed; late results are still recognised."""
    values = {"state": "over", "reason": "org_removed", "ended_at": database_now(connection)}
    open_ = text(f"batch_items.{tables.OPEN_ITEM}")
    connection.execute(update(_items).where(_items.c.org_id == org_id, open_).values(**values))
    connection.execute(update(_items).where(_items.c.org_id == org_id).values(body=None, result=None))


def _lock_runs(connection: Connection, run_ids: Collection[RunId]) -> Mapping[RunId, Any]:
    """Those of these runs that are unfinished, locked in the order of ids."""
    columns = (_live.c.id, _live.c.state, _live.c.attempt)
    found = select(*columns).where(among(connection, _live.c.id, sorted(set(run_ids))))
    rows = connection.execute(found.order_by(_live.c.id).with_for_update()).all() if run_ids else []
    return {row.id: row for row in rows}


def _end_waits(connection: Connection, rows: Sequence[Row], live: Mapping[RunId, Any], now: datetime) -> None:
    """End the waits of these requests, whose runs are locked, and wake those that are parked for them."""
    places = [(row["run_id"], wait_name(row["name"], row["key"]), row["occurrence"]) for row in rows]
    waited = _answer(connection, places, now)
    woken = [
        run_id
        for run_id, attempt in sorted(waited)
        if run_id in live and live[run_id].state == "parked" and live[run_id].attempt == attempt
    ]
    for part in chunks(sorted(set(woken))):
        values = {"state": "waiting", "reason": "resumed", "available_at": now, "started_at": None}
        parked = (among(connection, _live.c.id, part), _live.c.state == "parked")
        connection.execute(update(_live).where(*parked).values(**values))
    if woken:
        hint(connection)


def _answer(
    connection: Connection, places: Sequence[tuple[RunId, str, int]], now: datetime
) -> set[tuple[RunId, int]]:
    """Answer these waits; returns the runs that wait for them, each with its attempt."""
    of = tuple_(_waits.c.run_id, _waits.c.name, _waits.c.occurrence).in_(sorted(places))
    ended = update(_waits).where(of, _waits.c.answered_at.is_(None)).values(answered_at=now, answered_by=BY)
    rows = connection.execute(ended.returning(_waits.c.run_id, _waits.c.pending_attempt)) if places else ()
    return {(run_id, attempt) for run_id, attempt in rows if attempt is not None}


def _spends(connection: Connection, rows: Sequence[Row]) -> list[Spend]:
    """What these requests have spent: the tokens of their results, nothing while they have none."""
    metered = [row for row in rows if row["meter"] is not None]
    of = tables.children.c.run_id
    query = select(of).where(among(connection, of, sorted({row["run_id"] for row in metered})))
    below = set(connection.execute(query).scalars()) if metered else set()
    return [_spend(row, is_child=row["run_id"] in below) for row in metered]


def _spend(row: Mapping[str, Any], *, is_child: bool) -> Spend:
    of_run = RunId(row["run_id"]), OrgId(row["org_id"]), DefinitionId(row["definition_id"])
    return Spend(*of_run, row["meter"], f"{BY}:{row['id']}", row["tokens"], is_child)


def _item_of(spend: Spend) -> str:
    return spend.key.removeprefix(f"{BY}:")


def _use(spend: Spend, usage: ModelUsage, place: int = 0) -> ModelUse:
    """What a request used of a model; `place` counts the results that were paid for it."""
    of_run = spend.run_id, spend.org_id, spend.definition_id
    return ModelUse(*of_run, spend.key, usage, place, tariff="batch", is_child=spend.is_child)
