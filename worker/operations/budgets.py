"""Budgets: what `apply` changes, and their raises by operators."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection

from worker.clock import to_text
from worker.errors import Conflict, NotFound, UsageError
from worker.ids import OrgId, RunId, new_id
from worker.model.definitions.budgets import MONEY, PERS, BudgetEntry, Per, amount, meter_name
from worker.model.definitions.fields import refusal
from worker.model.money import parse_money
from worker.model.runs.waits import BUDGET
from worker.model.search import hint_of
from worker.operations.changes import Change, because, check_selected, differing
from worker.operations.runs import require_run
from worker.store import audit, budgets, children, orgs, prices, waits
from worker.store.database import Database
from worker.store.dialect import Row, hint
from worker.store.lists import runs as run_lists
from worker.store.lists.rows import WaitRow
from worker.store.lists.usage import Raise, name_of

# How long a raise for one run is kept: longer than any run lasts.
OF_RUN = timedelta(days=3650)
# The columns that a change of a file sets.
_COLUMNS = ("limit", "property", "zone", "at_limit", "warn_at")


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """A budget to add (`before` None), change or remove (`new` None), and its org if it has one."""

    id: str
    org_id: OrgId | None
    org: str | None
    name: str
    before: Row | None
    new: Mapping[str, Any] | None
    currency: str | None = None
    """That of a new limit of money."""

    @property
    def action(self) -> Literal["add", "change", "remove"]:
        if self.new is None:
            return "remove"
        return "add" if self.before is None else "change"

    def shown(self) -> Change:
        if self.new is None:
            return Change("budget", "remove", self.org, self.name)
        before = {} if self.before is None else {name: self.before[name] for name in _COLUMNS}
        return Change("budget", self.action, self.org, self.name, differing(before, self.new))

    def audit_entry(self) -> audit.Entry:
        return audit.Entry(self.org_id, f"budget.{self.action}", self.name, self.shown().detail)


def budget_changes(
    connection: Connection,
    entries: Sequence[BudgetEntry],
    ids: Mapping[str, OrgId],
    issuers: Iterable[str] | None,
    *,
    prune: frozenset[OrgId],
    currency: str | None = None,
) -> list[BudgetChange]:
    """What a file changes; `ids` are its orgs, stored or new. Those of the orgs in `prune` that it lacks go.

    Raises:
        DefinitionError: an org or issuer that does not exist.
    """
    if not (entries or prune):
        return []
    stored = budgets.by_target(connection, lock=True)
    currency = prices.currency_of(connection) or currency
    changes = []
    for entry in entries:
        name = f"budget {entry.meter} per {entry.per}"
        if entry.org is not None and entry.org not in ids:
            fix = f'add [[org]] code = "{entry.org}" to the file, or `orgs add {entry.org}`'
            raise refusal(f"there is no org {entry.org}", name, "org", fix=fix)
        check_selected(entry.orgs, issuers, name)
        if None not in (entry.currency, currency) and entry.currency != currency:
            problem = f"the limit is in {entry.currency}, and money is counted in {currency}"
            raise refusal(problem, name, "limit", fix=f"write it in {currency}; see [prices] currency")
        before = stored.pop((entry.target, entry.meter, entry.per), None)
        new = {
            "limit": entry.limit,
            "property": entry.property_name,
            "zone": entry.zone,
            "at_limit": entry.at_limit,
            "warn_at": entry.warn_at,
        }
        if before is not None and not differing({key: before[key] for key in _COLUMNS}, new):
            continue
        org_id = None if entry.org is None else ids[entry.org]
        identity = {
            "target": entry.target,
            "org_id": org_id,
            "selector": None if entry.orgs is None else entry.orgs.as_json(),
            "meter": entry.meter,
            "per": entry.per,
        }
        shown = name_of(identity)
        values = new if before is not None else {**identity, **new}
        changes.append(
            BudgetChange(
                before["id"] if before is not None else new_id(),
                org_id,
                entry.org,
                shown,
                before,
                values,
                entry.currency,
            )
        )
    for row in stored.values():
        if row["org_id"] in prune:
            org = row["target"].removeprefix("org:")
            changes.append(BudgetChange(row["id"], row["org_id"], org, name_of(row), row, None))
    return changes


def write_budgets(
    connection: Connection, changes: Sequence[BudgetChange], *, actor: str, at: datetime
) -> None:
    """Write changes of budgets, and let the runs that wait for one be looked at again."""
    budgets.remove(connection, [change.id for change in changes if change.new is None])
    for currency in {change.currency for change in changes if change.currency is not None}:
        prices.keep_currency(connection, currency)
    for change in changes:
        if change.new is not None:
            values = {**change.new, "updated_at": at, "updated_by": actor}
            if change.before is None:
                values |= {"id": change.id, "created_at": at}
            budgets.put(connection, values, change.before)
    if changes:
        budgets.wake(connection, _orgs_of(changes), at)
        hint(connection)


def wake_changed(database: Database, changes: Sequence[BudgetChange]) -> None:
    """As `wake_again`, for changes that are stored."""
    if changes:
        wake_again(database, _orgs_of(changes))


def _orgs_of(changes: Sequence[BudgetChange]) -> Collection[OrgId] | None:
    of = {change.org_id for change in changes}
    return None if None in of else {org for org in of if org is not None}


def raise_budget(
    database: Database,
    org: str,
    meter: str,
    *,
    by: int | str,
    per: str,
    until: datetime | None = None,
    actor: str,
    reason: str | None = None,
) -> Raise:
    """Raise an org's budgets of a meter and period until a time, by default until the period ends.

    Each period that begins before then has the higher limit. Wakes the runs that wait for it. `by` is a
    number, or of money a text such as `5 USD`.

    Raises:
        NotFound: no such org, or it has no such budget.
        UsageError: an invalid value.
    """
    wanted = _checked(meter, per)
    with database.transaction() as connection:
        more = _more(connection, meter, by)
        org_id = OrgId(orgs.require(connection, org, lock=True)["id"])
        now = database.now(connection)
        found = budgets.of_orgs(connection, [org_id], [meter], now).get(org_id, [])
        same = [budget for budget in found if budget.per == wanted]
        if not same:
            raise NotFound(
                f"org {org} has no budget of {meter} per {per}",
                fix=f"`budgets list --org {org}` lists its budgets, `apply` adds one",
            )
        ends = [budget.period.end for budget in same if budget.period is not None]
        if until is None and not ends:
            raise UsageError("a raise per run needs an end", fix="add --until T, such as 2027-01-01")
        end = until or max(ends)
        if end <= now:
            raise UsageError(f"until {to_text(end)} is not in the future", fix="choose a later time")
        row = budgets.raise_limit(
            connection, org_id, meter=meter, per=wanted, amount=more, until=end, actor=actor, at=now
        )
        budgets.wake(connection, [org_id], now)
        detail = {"by": by, "per": per, "until": to_text(end), **because(reason)}
        audit.note(connection, org_id, "budget.raise", f"{org} {meter}", detail, at=now, actor=actor)
        hint(connection)
        raised = Raise(
            id=row["id"],
            org=org,
            meter=meter,
            per=per,
            amount=more,
            until=end,
            limit=min(budget.limit + more for budget in same if budget.limit is not None)
            if any(budget.limit is not None for budget in same)
            else None,
            created_at=now,
            created_by=actor,
        )
    wake_again(database, [org_id])
    return raised


def wake_again(database: Database, org_ids: Collection[OrgId] | None) -> None:
    """Let runs go on that stored a wait while the change of a budget was not yet to be seen.

    In a transaction of its own after that of the change; None means the runs of all orgs.
    """
    with database.transaction() as connection:
        budgets.wake(connection, org_ids, database.now(connection))
        hint(connection)


def answer_budget(
    database: Database, run_id: str, name: str, data: Any, *, actor: str, occurrence: int
) -> WaitRow:
    """Answer the question of a budget that is used up: raise it for its period, or let the run fail.

    Raises:
        NotFound: no such run.
        UsageError: the answer is neither `{"by": N}` nor false.
        Conflict: the run does not ask this now, or it was answered already.
    """
    with database.transaction() as connection:
        by = _by(connection, name.removeprefix(BUDGET), data)
        run = require_run(connection, run_id, None)
        org_id, wanted = OrgId(run["org_id"]), RunId(run["id"])
        # Before the run: a raise by hand locks them in this order.
        orgs.lock(connection, org_id)
        attempt = waits.lock_attempt(connection, org_id, wanted)
        now = database.now(connection)
        found = waits.find(connection, org_id, wanted, name, occurrence)
        asks = found is not None and found["kind"] == "budget" and found["ask"] is not None
        see = f"see `runs show {wanted}`"
        if attempt is None or found is None or not asks:
            asked = [each["name"] for each in waits.open_questions(connection, org_id, wanted, at=now)]
            fix = f"{hint_of(name, asked)}{see}, or use `budgets raise`"
            raise Conflict(f"run {wanted} does not ask {name}", fix=fix)
        if found["answered_at"] is not None:
            raise Conflict(f"{name} of run {wanted} was answered already, by {found['answered_by']}", fix=see)
        if found["timed_out_at"] is not None or (found["until"] is not None and found["until"] <= now):
            raise Conflict(f"{name} of run {wanted} is over: its period has ended, or it was raised", fix=see)
        per = None
        # A budget per run is one of the whole tree.
        top = children.root_of(connection, wanted)
        if by:
            meter = name.removeprefix(BUDGET)
            per, until = _asked(connection, org_id, wanted, meter, found, now)
            budgets.raise_limit(
                connection,
                org_id,
                meter=meter,
                per=per,
                amount=by,
                until=until,
                actor=actor,
                at=now,
                run_id=top if per == "run" else None,
            )
        waits.answer(connection, found, data if by else False, at=now, by=actor)
        if found["pending_attempt"] == attempt:
            waits.wake(connection, org_id, wanted, at=now)
        detail = {"wait": name, "occurrence": occurrence, "by": data["by"] if by else 0}
        audit.note(connection, org_id, "run.answer", wanted, detail, at=now, actor=actor)
        row = run_lists.wait(connection, org_id, wanted, name, occurrence)
    if per is not None and (per != "run" or top != wanted):
        # Here runs are locked in the order of their ids.
        wake_again(database, [org_id])
    return row


def _asked(
    connection: Connection, org_id: OrgId, run_id: RunId, meter: str, wait: Row, now: datetime
) -> tuple[Per, datetime]:
    """The period of the budget that a question is about, and until when a raise of it counts.

    Workers of the previous release store what the run's process wrote, so this believes no more of it than
    the name of a budget that the org has. Raises Conflict.
    """
    ask = wait["ask"] if isinstance(wait["ask"], dict) else {}
    found = budgets.of_orgs(connection, [org_id], [meter], now, run_id).get(org_id, [])
    same = [budget for budget in found if budget.per == ask.get("per")]
    if ask.get("meter") != meter or not same:
        raise Conflict(
            f"{wait['name']} of run {run_id} is not a question about a budget of its org",
            fix="use `budgets raise`, or cancel the run",
        )
    ends = [budget.period.end for budget in same if budget.period is not None]
    until = max(ends) if ends else now + OF_RUN
    return same[0].per, until if wait["until"] is None else min(until, wait["until"])


def _by(connection: Connection, meter: str, data: Any) -> int:
    """What to add, 0 for no; raises UsageError."""
    if data is False:
        return 0
    try:
        by = data["by"] if isinstance(data, dict) and data.keys() == {"by"} else None
        return _amount_of(connection, meter, by, "by")
    except ValueError as error:
        raise UsageError(
            f"a budget's question is answered with a number or no: {error}",
            fix="give --data '{\"by\": 50000}' to raise it, or --data false to fail the run",
        ) from None


def _more(connection: Connection, meter: str, by: int | str) -> int:
    """What a raise adds; raises UsageError."""
    if meter != MONEY and isinstance(by, str) and by.isascii() and by.isdecimal():
        by = int(by[:20])
    try:
        return _amount_of(connection, meter, by, "--by")
    except ValueError as error:
        such = '"5 USD"' if meter == MONEY else "50000"
        raise UsageError(str(error), fix=f"such as `budgets raise ORG {meter} --by {such}`") from None


def _amount_of(connection: Connection, meter: str, by: Any, what: str) -> int:
    """What a raise adds: a number, or of money a text with the currency. Raises ValueError."""
    if meter != MONEY:
        return amount(what, least=1)(by)
    nano, given = parse_money(by)
    currency = prices.currency_of(connection)
    if currency is not None and given != currency:
        raise ValueError(f"{what} is in {given}, and money is counted in {currency}")
    if not nano:
        raise ValueError(f"{what} is 0")
    return nano


def _checked(meter: str, per: str) -> Per:
    try:
        meter_name(meter)
    except ValueError as error:
        raise UsageError(str(error), fix="such as `budgets raise ORG llm_tokens --by 50000`") from None
    for known in PERS:
        if known == per:
            return known
    raise UsageError(f"{per!r} is not a period", fix=f"one of {', '.join(PERS)}")


def remove_budget(database: Database, budget_id: str, *, actor: str) -> Mapping[str, Any]:
    """Remove a budget; what was spent stays. Returns its name.

    Raises:
        NotFound: no such budget.
    """
    with database.transaction() as connection:
        row = budgets.find(connection, budget_id)
        if row is None:
            raise NotFound(f"there is no budget {budget_id}", fix="`budgets list` lists the budgets")
        now = database.now(connection)
        org = row["target"].removeprefix("org:") if row["org_id"] is not None else None
        change = BudgetChange(row["id"], row["org_id"], org, name_of(row), row, None)
        write_budgets(connection, [change], actor=actor, at=now)
        audit.record(connection, [change.audit_entry()], at=now, actor=actor)
    wake_changed(database, [change])
    return {"id": row["id"], "org": org, "name": change.name}
