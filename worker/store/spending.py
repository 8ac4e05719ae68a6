"""Spending: what runs spend, counted once and fenced, and the runs that a budget holds back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, Text, cast, insert, literal, select, tuple_, update

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions.budgets import MAX_SUM, MONEY, OWN_METERS, RUN_SECONDS, RUNS
from worker.model.prices import ModelUsage, Prices
from worker.model.runs.budgets import BudgetState, OrgBudgets, decisive
from worker.model.runs.outcome import EndedAttempt
from worker.model.runs.run import AdmittedRun, RunStep
from worker.model.runs.waits import BUDGET, NewWait
from worker.store import budgets, children, placements, tables
from worker.store import prices as model_prices
from worker.store.budgets import Counter, Level, OrgBudget
from worker.store.bulk import update_many
from worker.store.dialect import database_now, insert_into
from worker.store.prices import Costed, ModelUse, Unpriced
from worker.store.sql import statements
from worker.store.sums import Capped, CappedSum

_live, _spends, _days = tables.live_runs, tables.spends, tables.meter_days
_trees, _items = tables.tree_spends, tables.batch_items
_MODEL_SPEND = tuple(tables.model_spends.c[name] for name in ("run_id", "key", "money"))

# How long a run that a budget holds back waits at most before it is looked at again.
LOOK_AGAIN = timedelta(days=1)
# Prices of an installation that has none.
UNPRICED = Prices()
# Waiting runs of an org that one admission moves to the end of the period.
MOVED = 1000


@dataclass(frozen=True, slots=True)
class Spend:
    """What a run spent of a meter; the same key of the same run counts once.

    That of a child counts for its tree, too.
    """

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    meter: str
    key: str
    amount: int
    is_child: bool = False


@dataclass(frozen=True, slots=True)
class CountedSpends:
    """Budgets whose warning was just passed, and what was counted of meters that have a budget."""

    warned: Sequence[Level]
    spent: Mapping[str, int]
    unpriced: Sequence[Unpriced] = ()
    costed: Sequence[Costed] = ()
    ahead: Sequence[tuple[Level, datetime]] = ()
    """Budgets of money whose pace reaches their limit since these spends, and when it will."""


def lock_running(connection: Connection, fencing_tokens: Mapping[RunId, int]) -> set[RunId]:
    """Those of these runs that still run under their fencing token, locked in the order of ids."""
    rows = connection.execute(
        # By the primary key: a condition on the state could choose one of the other indexes.
        select(_live.c.id, _live.c.fencing_token, _live.c.state)
        .where(_live.c.id.in_(fencing_tokens))
        .order_by(_live.c.id)
        .with_for_update()
    )
    return {id_ for id_, token, state in rows if state == "running" and fencing_tokens[id_] == token}


def record(
    connection: Connection,
    spends: Sequence[Spend],
    now: datetime,
    used: Sequence[ModelUse] = (),
    prices: Prices = UNPRICED,
) -> CountedSpends:
    """Count spends of runs that this transaction has locked; those that are stored already do not count.

    `used` is what they used of models. What it costs by these prices counts for the meter `money`. Rows are
    locked in one order: `spends` by key, `model_spends`, `model_days`, `meter_days`, `tree_spends`, `meters`.
    """
    once = {(each.run_id, each.key, each.place): each for each in used}
    costed = model_prices.cost(connection, list(once.values()), prices, now)
    spends = [*spends, *_money(costed)]
    fresh = _insert(connection, spends, now)
    unpriced = model_prices.store(connection, costed, now)
    days: dict[tuple[date, OrgId, str, DefinitionId], int] = defaultdict(int)
    added: dict[tuple[OrgId, str], int] = defaultdict(int)
    today = now.astimezone(UTC).date()
    for spend in fresh:
        days[today, spend.org_id, spend.meter, spend.definition_id] += spend.amount
        added[spend.org_id, spend.meter] += spend.amount
    _add_days(connection, days)
    _add_trees(connection, [spend for spend in fresh if spend.is_child])
    meters = {spend.meter for spend in spends}
    found = budgets.of_orgs(connection, {spend.org_id for spend in spends}, meters, now)
    limits = [budget for of_org in found.values() for budget in of_org]
    counters: dict[Counter, int] = {}
    for budget in limits:
        if budget.counter is not None and (amount := added.get((budget.org_id, budget.meter))):
            counters[budget.counter] = min(amount, MAX_SUM)
    warned, ahead = _count(connection, limits, counters, now)
    return CountedSpends(warned, _limited(limits, added), unpriced, costed, ahead)


def _count(
    connection: Connection, limits: Sequence[OrgBudget], counters: Mapping[Counter, int], now: datetime
) -> tuple[list[Level], list[tuple[Level, datetime]]]:
    """Add to the counters of budgets; returns those that pass their warning, and those whose pace is new."""
    counts = budgets.count(connection, counters) if counters else {}
    warned, ahead = [], []
    for budget in limits:
        if budget.counter is not None and budget.counter in counts:
            level = Level(budget, counts[budget.counter])
            before = level.used - counters[budget.counter]
            if level.warned(before):
                warned.append(level)
            at = level.reaches_at(level.used, now)
            if at is not None and level.reaches_at(before, now) is None:
                ahead.append((level, at))
    return warned, ahead


def _limited(limits: Sequence[OrgBudget], added: Mapping[tuple[OrgId, str], int]) -> dict[str, int]:
    """What was spent of meters of which its org has a budget."""
    limited = {(budget.org_id, budget.meter) for budget in limits}
    spent: dict[str, int] = defaultdict(int)
    for (org_id, meter), amount in added.items():
        if (org_id, meter) in limited:
            spent[meter] += amount
    return spent


def _money(costed: Sequence[Costed]) -> list[Spend]:
    """What these cost, as spends of the meter `money`: one for each key of a run."""
    total: dict[tuple[RunId, str], int] = defaultdict(int)
    whose: dict[tuple[RunId, str], ModelUse] = {}
    for each in costed:
        if (money := each.priced.money) is not None:
            key = each.used.run_id, each.used.key
            total[key] += money
            whose[key] = each.used
    return [
        Spend(
            each.run_id,
            each.org_id,
            each.definition_id,
            MONEY,
            each.key,
            min(total[key], MAX_SUM),
            each.is_child,
        )
        for key, each in whose.items()
    ]


def _insert(connection: Connection, spends: Sequence[Spend], now: datetime) -> list[Spend]:
    """Store spends; returns those that are new."""
    if not spends:
        return []
    by_key = {(spend.run_id, spend.meter, spend.key): spend for spend in spends}
    ordered = [by_key[key] for key in sorted(by_key)]
    names = [column.name for column in _spends.c if column.name != "at"]
    rows = [{name: getattr(spend, name) for name in names} | {"at": now} for spend in ordered]
    statement = insert_into(connection, _spends).on_conflict_do_nothing()
    new = connection.execute(statement.returning(_spends.c.run_id, _spends.c.meter, _spends.c.key), rows)
    stored = {(run_id, meter, key) for run_id, meter, key in new}
    return [spend for spend in ordered if (spend.run_id, spend.meter, spend.key) in stored]


def _add_days(connection: Connection, days: Mapping[tuple[date, OrgId, str, DefinitionId], int]) -> None:
    if not days:
        return
    statement = insert_into(connection, _days)
    statement = statement.on_conflict_do_update(
        index_elements=["day", "org_id", "meter", "definition_id"],
        set_={"used": Capped(_days.c.used + statement.excluded.used)},
    )
    names = ("day", "org_id", "meter", "definition_id", "used")
    rows = [dict(zip(names, (*key, min(days[key], MAX_SUM)), strict=True)) for key in sorted(days)]
    connection.execute(statement, rows)


def _add_trees(connection: Connection, spends: Sequence[Spend]) -> None:
    """Add what children spent to the counters of their trees."""
    if not spends:
        return
    roots = children.roots_of(connection, {spend.run_id for spend in spends})
    added: dict[tuple[RunId, str, OrgId], int] = defaultdict(int)
    for spend in spends:
        added[roots[spend.run_id], spend.meter, spend.org_id] += spend.amount
    statement = insert_into(connection, _trees)
    statement = statement.on_conflict_do_update(
        index_elements=["run_id", "meter"], set_={"used": Capped(_trees.c.used + statement.excluded.used)}
    )
    names = ("run_id", "meter", "org_id", "used")
    rows = [dict(zip(names, (*key, min(added[key], MAX_SUM)), strict=True)) for key in sorted(added)]
    connection.execute(statement, rows)


def settle(
    connection: Connection,
    spends: Sequence[Spend],
    used: Sequence[ModelUse] = (),
    prices: Prices = UNPRICED,
) -> CountedSpends:
    """Set what was spent under keys that are stored already, such as a reservation: counters follow.

    There is one spend for a key of a run. `used` is added to what is stored of models under these keys, and
    the meter `money` is set to what that costs. A period that is over stays as it is, and a spend that is not
    stored, other than money, is not counted.
    """
    if not spends:
        return CountedSpends((), {})
    now = database_now(connection)
    costed = model_prices.cost(connection, used, prices, now)
    unpriced = model_prices.store(connection, costed, now)
    paid = _paid(connection, spends)
    _insert(connection, [replace(spend, amount=0) for spend in paid if spend.amount], now)
    by_key = {(spend.run_id, spend.meter, spend.key): spend for spend in (*spends, *paid)}
    key = (_spends.c.run_id, _spends.c.meter, _spends.c.key)
    query = select(*key, _spends.c.amount, _spends.c.at).where(tuple_(*key).in_(sorted(by_key)))
    days: dict[tuple[date, OrgId, str, DefinitionId], int] = defaultdict(int)
    changed: list[tuple[Spend, int, datetime]] = []
    for run_id, meter, name, before, at in connection.execute(query.order_by(*key).with_for_update()):
        spend = by_key[run_id, meter, name]
        if (delta := spend.amount - before) != 0:
            changed.append((spend, delta, at))
            days[at.astimezone(UTC).date(), spend.org_id, meter, spend.definition_id] += delta
    rows = [asdict(spend) for spend, _, _ in changed]
    update_many(connection, _spends, rows, key=["run_id", "meter", "key"], changed=["amount"])
    _add_days(connection, days)
    _add_trees(connection, [replace(spend, amount=delta) for spend, delta, _ in changed if spend.is_child])
    orgs, meters = {spend.org_id for spend in by_key.values()}, {meter for _, meter, _ in by_key}
    found = budgets.of_orgs(connection, orgs, meters, now)
    limits = [budget for of_org in found.values() for budget in of_org]
    counters: dict[Counter, int] = defaultdict(int)
    for spend, delta, at in changed:
        mine = [budget for budget in found.get(spend.org_id, ()) if budget.meter == spend.meter]
        # Once each: several budgets may share one.
        for counter in {counter for budget in mine for counter in budget.counters_of(at)}:
            counters[counter] += delta
    warned, ahead = _count(connection, limits, counters, now)
    return CountedSpends(warned, _limited(limits, _added(spends, costed)), unpriced, costed, ahead)


def _paid(connection: Connection, spends: Sequence[Spend]) -> list[Spend]:
    """What is stored of models under the keys of these, as spends of the meter `money`."""
    keys, (run_id, key, money) = sorted({(spend.run_id, spend.key) for spend in spends}), _MODEL_SPEND
    priced = tuple_(run_id, key).in_(keys), money.is_not(None)
    rows = connection.execute(select(run_id, key, CappedSum(money)).where(*priced).group_by(run_id, key))
    stored = {(of, name): amount for of, name, amount in rows}
    paid = ((spend, stored.get((spend.run_id, spend.key), 0)) for spend in spends)
    return [replace(spend, meter=MONEY, amount=min(money, MAX_SUM)) for spend, money in paid]


def _added(spends: Sequence[Spend], costed: Sequence[Costed]) -> Mapping[tuple[OrgId, str], int]:
    """What these uses add to the meters of the spends that they belong to."""
    meters = {(spend.run_id, spend.key): spend.meter for spend in spends}
    added: dict[tuple[OrgId, str], int] = defaultdict(int)
    for each in costed:
        used = each.used
        added[used.org_id, meters[used.run_id, used.key]] += used.usage.amount
        added[used.org_id, MONEY] += each.priced.money or 0
    return added


def uses(connection: Connection, definition_id: DefinitionId, meters: Collection[str]) -> set[str]:
    """Those of the meters of which runs of this definition have spent before."""
    query = select(_days.c.meter).where(_days.c.definition_id == definition_id, _days.c.meter.in_(meters))
    return set(connection.execute(query.distinct()).scalars())


@dataclass(frozen=True, slots=True)
class RunBudgets(OrgBudgets):
    """The budgets of a run's org, and what a spend counted."""

    counted: CountedSpends | None = None


def states_of(connection: Connection, run: AdmittedRun) -> RunBudgets:
    """The budgets of a run's org that its runs check, as they are now."""
    return _states(connection, run, database_now(connection))


def _states(connection: Connection, run: AdmittedRun, now: datetime) -> RunBudgets:
    # A budget per run is one of the whole tree.
    top = children.root_of(connection, run.id) if run.origin == "child" else run.id
    found = budgets.of_orgs(connection, [run.org_id], None, now, top).get(run.org_id, [])
    found = [budget for budget in found if budget.meter not in OWN_METERS]
    if not found:
        return RunBudgets(())
    used = uses(connection, run.definition_id, {budget.meter for budget in found})
    states, missing = [], None
    for level in budgets.levels(connection, found, top):
        budget = level.budget
        if budget.limit is None:
            missing = budget.property_name if budget.meter in used else missing
            continue
        resets_at = None if budget.period is None else budget.period.end
        states.append(
            BudgetState(
                budget.meter,
                budget.per,
                budget.limit,
                level.used,
                resets_at,
                budget.at_limit,
                uses=budget.meter in used,
            )
        )
    return RunBudgets(states, missing)


def spend(
    connection: Connection,
    run: AdmittedRun,
    meter: str,
    amount: int,
    key: str,
    usage: ModelUsage | None = None,
    prices: Prices = UNPRICED,
) -> RunBudgets | None:
    """Count a spend, fenced; returns the budgets after it, or None if the run is no longer ours."""
    if not lock_running(connection, {run.id: run.fencing_token}):
        return None
    now = database_now(connection)
    is_child = run.origin == "child"
    given = Spend(run.id, run.org_id, run.definition_id, meter, key, amount, is_child)
    used = [] if usage is None else [_use(run, key, usage)]
    counted = record(connection, [given], now, used, prices)
    return replace(_states(connection, run, now), counted=counted)


def end_raised(connection: Connection, run: AdmittedRun, wait: NewWait) -> bool:
    """End the stored wait for a budget that does not stop the run now; returns whether it was ended.

    The run has looked at the budget before it stored the wait: who raised it in between found no wait.
    """
    now = database_now(connection)
    states = _states(connection, run, now).states
    if decisive([state for state in states if wait.name == f"{BUDGET}{state.meter}"]) is not None:
        return False
    budgets.end_waits(connection, [run.id], now)
    return True


def store_steps(
    connection: Connection, rows: Sequence[RunStep], prices: Prices = UNPRICED
) -> tuple[set[tuple[RunId, int]], CountedSpends]:
    """Store steps with their spends in one transaction, fenced; returns the runs that still run."""
    ours = statements(connection).store_steps(connection, rows, commit=False)
    totals: dict[tuple[int, str], int] = defaultdict(int)
    mine = [row for row in rows if (row.run.id, row.run.fencing_token) in ours]
    for place, row in enumerate(mine):
        for meter, amount in row.step.spends:
            totals[place, meter] += amount
    spends = []
    for (place, meter), total in totals.items():
        row = mine[place]
        run, key = row.run, f"step:{row.step.seq}"
        is_child = run.origin == "child"
        spends.append(Spend(run.id, run.org_id, run.definition_id, meter, key, total, is_child))
    used = [
        _use(row.run, f"step:{row.step.seq}", usage, place)
        for row in mine
        for place, usage in enumerate(row.step.used)
    ]
    return ours, record(connection, spends, database_now(connection), used, prices)


def _use(run: AdmittedRun, key: str, usage: ModelUsage, place: int = 0) -> ModelUse:
    return ModelUse(run.id, run.org_id, run.definition_id, key, usage, place, is_child=run.origin == "child")


def take_up(connection: Connection, org_id: OrgId, to: RunId) -> None:
    """Count what the children spent that a new run has taken up, with those below them."""
    links = tables.children
    taken = select(links.c.run_id).where(links.c.root_id == to, links.c.org_id == org_id)
    rows = (
        select(
            literal(to, _trees.c.run_id.type), _spends.c.meter, _spends.c.org_id, CappedSum(_spends.c.amount)
        )
        .where(_spends.c.run_id.in_(taken), _spends.c.org_id == org_id)
        .group_by(_spends.c.meter, _spends.c.org_id)
    )
    connection.execute(insert(_trees).from_select(["run_id", "meter", "org_id", "used"], rows))


def copy(connection: Connection, org_id: OrgId, of: RunId, to: RunId) -> int:
    """Give a new run the spends of the steps that it continues with; they are not counted again."""
    kept = [column for column in _spends.c if column.name != "run_id"]
    # That of a step whose model request was in a batch is under the key of the request.
    batched = select(literal("batch:") + cast(_items.c.id, Text)).where(
        _items.c.run_id == of, _items.c.state == "done"
    )
    of_step = _spends.c.key.like("step:%") | _spends.c.key.in_(batched)
    rows = select(literal(to, _spends.c.run_id.type), *kept).where(
        _spends.c.run_id == of, _spends.c.org_id == org_id, of_step
    )
    statement = insert(_spends).from_select(["run_id", *(column.name for column in kept)], rows)
    return connection.execute(statement.execution_options(preserve_rowcount=True)).rowcount


# --- Meters that orgworker fills itself: they hold admission. ---


def hold_back(connection: Connection, runs: Sequence[AdmittedRun]) -> tuple[list[AdmittedRun], CountedSpends]:
    """Count runs that were just admitted, and let those wait again that are above a budget of their org.

    The runs belong to orgs with a budget of `runs` or `run_seconds`, in the order of admission. Returns
    those that may start, and what was counted. A run is counted once, however often it is admitted.
    """
    ours = lock_running(connection, {run.id: run.fencing_token for run in runs})
    now = database_now(connection)
    found = budgets.of_orgs(connection, {run.org_id for run in runs}, OWN_METERS, now)
    room = _lock_levels(connection, [each for of_org in found.values() for each in of_org])
    before = _counted_before(connection, [run.id for run in runs])
    starting: list[AdmittedRun] = []
    held: list[tuple[AdmittedRun, OrgBudget]] = []
    spends: list[Spend] = []
    for run in runs:
        if run.id not in ours:
            continue
        full = _first_full(room, run, is_counted=run.id in before)
        if full is not None:
            held.append((run, full))
            continue
        starting.append(run)
        if run.id not in before:
            spends.append(Spend(run.id, run.org_id, run.definition_id, RUNS, "run", 1))
            for budget in room:
                if budget.org_id == run.org_id and budget.meter == RUNS:
                    room[budget] += 1
    counted = record(connection, spends, now)
    _let_wait(connection, held, now)
    return starting, counted


def _lock_levels(connection: Connection, listed: Sequence[OrgBudget]) -> dict[OrgBudget, int]:
    """What is used of each budget, locked, so that no other worker admits runs of these orgs meanwhile."""
    counters = {counter: 0 for budget in listed if (counter := budget.counter) is not None}
    used = budgets.count(connection, counters)
    return {budget: used[budget.counter] for budget in listed if budget.counter is not None}


def _counted_before(connection: Connection, run_ids: Collection[RunId]) -> set[RunId]:
    query = select(_spends.c.run_id).where(_spends.c.run_id.in_(run_ids), _spends.c.meter == RUNS)
    return set(connection.execute(query).scalars())


def _first_full(room: Mapping[OrgBudget, int], run: AdmittedRun, *, is_counted: bool) -> OrgBudget | None:
    """The reached budget of this run's org whose period ends last."""
    full = [
        budget
        for budget, used in room.items()
        if budget.org_id == run.org_id
        and Level(budget, used).reached
        and not (is_counted and budget.meter == RUNS)
    ]
    return max(full, key=_end, default=None)


def _end(budget: OrgBudget) -> datetime:
    return datetime.max.replace(tzinfo=UTC) if budget.period is None else budget.period.end


def _let_wait(connection: Connection, held: Sequence[tuple[AdmittedRun, OrgBudget]], now: datetime) -> None:
    """Undo these admissions: the runs wait for their budget, without a start deadline.

    Those that were asked to stop meanwhile are cancelled, which ends the transaction on PostgreSQL.
    """
    if not held:
        return
    ids = [run.id for run, _ in held]
    stopped = select(_live).where(_live.c.id.in_(ids), _live.c.cancel_requested_at.is_not(None))
    rows = connection.execute(stopped).all()
    asked = {row.id for row in rows}
    for run, budget in sorted(held, key=lambda each: each[0].id):
        if run.id in asked:
            continue
        connection.execute(
            update(_live)
            .where(_live.c.id == run.id, _live.c.fencing_token == run.fencing_token)
            .values(
                state="waiting",
                worker_id=None,
                started_at=None,
                attempt=_live.c.attempt - 1,
                **_held(budget, now),
            )
        )
    full: dict[OrgId, OrgBudget] = {}
    for run, budget in held:
        full[run.org_id] = max(full.get(run.org_id, budget), budget, key=_end)
    for org_id, budget in sorted(full.items()):
        # The others that would only be admitted to be held back, too.
        due = select(_live.c.id).where(
            _live.c.org_id == org_id, _live.c.state == "waiting", _live.c.available_at <= now
        )
        if budget.meter == RUNS:
            due = due.where(_live.c.attempt == 0)
        others = due.order_by(_live.c.id).limit(MOVED).with_for_update(skip_locked=True)
        moved = connection.execute(others).scalars().all()
        connection.execute(update(_live).where(_live.c.id.in_(moved)).values(**_held(budget, now)))
    if rows:
        placements.end_asked(connection, rows[0].worker_id, rows, now)


def _held(budget: OrgBudget, now: datetime) -> dict[str, object]:
    # Looked at again from time to time: the limit may come from a token.
    until = min(_end(budget), now + LOOK_AGAIN)
    return {
        "reason": "budget",
        "detail": f"{budget.meter} per {budget.per}",
        "available_at": until,
        "start_by": None,
    }


def charge_seconds(connection: Connection, ended: Sequence[EndedAttempt]) -> CountedSpends:
    """Count the time of handlers whose attempt ends, before the end is written; each attempt counts once."""
    ours = lock_running(connection, {attempt.run_id: attempt.fencing_token for attempt in ended})
    spends = []
    for attempt in ended:
        began_at = attempt.trail.handler_started_at
        if attempt.run_id in ours and began_at is not None:
            seconds = max(0, round((attempt.ended_at - began_at).total_seconds()))
            key = f"{attempt.attempt}:{RUN_SECONDS}"
            spends.append(
                Spend(attempt.run_id, attempt.org_id, attempt.definition_id, RUN_SECONDS, key, seconds)
            )
    return record(connection, spends, database_now(connection))
