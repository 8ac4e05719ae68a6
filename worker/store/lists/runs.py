"""Runs: a page of their list by key, one run with all that is known of it, and its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict, cast

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    Text,
    case,
    column,
    func,
    literal_column,
    select,
    table,
    tuple_,
)

from worker.clock import to_text
from worker.errors import NotFound
from worker.handlers.steps import MAX_STEPS
from worker.ids import ALL_ORGS, AllOrgs, DefinitionId, OrgId, OrgScope, RunId, Scope, lowest_id
from worker.model.runs.budgets import MAX_SPENDS
from worker.store import children as run_children
from worker.store import orgs, tables
from worker.store.dialect import Id, Instant, Row, all_rows, below, first_row, in_scope, json_type, rows_as
from worker.store.lists import MAX_LIMIT, Page
from worker.store.lists.rows import (
    AttemptRow,
    Children,
    EgressTotals,
    LogRow,
    Run,
    RunDetail,
    Spent,
    StepRow,
    WaitRow,
    columns_of,
)
from worker.store.lists.run_ids import id_of
from worker.store.lists.step_spends import spends_of_steps
from worker.store.sums import CappedSum

# Runs examined under one condition: about 20 ms on SQLite.
WINDOW = 20_000
START = (0, 0)

_runs = tables.runs
_ends = tables.run_ends
_live = tables.live_runs
_definitions = tables.definitions

_LOOKED_AT = (_runs.c.id, _runs.c.org_id, _runs.c.definition_id, _runs.c.state, _runs.c.origin)
_ENDED = (_ends.c.run_id.label("id"), _ends.c.org_id, _ends.c.definition_id, _ends.c.state)

Condition = ColumnElement[bool]
Met = dict[str, str | list[str] | Select[Any]]


def find(connection: Connection, scope: Scope, page: Page, limit: int) -> list[RunId]:
    """The ids of a page of runs."""
    met = _met(scope, page.definition)
    final = [state for state in page.states if state in tables.FINAL_STATES]
    kept = [kept for state in page.states for kept in tables.UNFINISHED.get(state, ())]
    if kept:
        unfinished = _unfinished(connection, met, kept, page, limit)
        if not final:
            return unfinished
        ended = find(connection, scope, replace(page, state=",".join(final)), limit)
        return sorted({*ended, *unfinished}, reverse=True)[:limit]
    if final:
        met["state"] = final
    # The runs of one org or definition are in order in an index; those of a state or of a name are not.
    if len(met) > 1 or page.state is not None or (page.definition is not None and scope is ALL_ORGS):
        for alone in ((), ("state",), ("org_id",), ("definition_id",)):
            if met.keys() >= set(alone):
                found = _in_window(connection, alone, met, page, limit)
                if found is not None:
                    return found
    query = select(_runs.c.id).where(*_that_meet(_runs, met), *_bounds(_runs.c.id, page), is_listed(_runs))
    if page.since is not None:
        query = query.where(_runs.c.created_at >= page.since)
    return _ids(connection, query, _runs.c.id, limit)


def _unfinished(connection: Connection, met: Met, kept: Sequence[str], page: Page, limit: int) -> list[RunId]:
    """Search the unfinished runs, which are few and in a table of their own."""
    query = select(_live.c.id).where(
        _live.c.state.in_(kept), *_that_meet(_live, met), *_bounds(_live.c.id, page), is_listed(_live)
    )
    if page.since is not None:
        query = query.join(_runs, _runs.c.id == _live.c.id).where(_runs.c.created_at >= page.since)
    return _ids(connection, query, _live.c.id, limit)


def _met(scope: Scope, definition: str | None) -> Met:
    """The conditions: the value that a column must have, or a query for its values."""
    met: Met = {}
    named = select(_definitions.c.id).where(_definitions.c.name == definition)
    if not isinstance(scope, AllOrgs):
        met["org_id"] = scope
        named = named.where(_definitions.c.org_id == scope)
    if definition is not None:
        met["definition_id"] = named
    return met


def _that_meet(rows: FromClause, met: Met) -> list[Condition]:
    return [
        rows.c[name] == value if isinstance(value, str) else rows.c[name].in_(value)
        for name, value in met.items()
    ]


def is_listed(rows: FromClause) -> Condition:
    """Whether a run is shown in lists: one that another run started only if that is asked for."""
    # As the index says it: with a parameter, no plan would use it.
    return rows.c.origin != literal_column("'child'")


def _bounds(id_: ColumnElement[Any], page: Page) -> list[Condition]:
    """Bounds of the ids, which sort by creation time."""
    bounds = [*below(id_, page.after)]
    if page.since is not None:
        bounds.append(id_ >= lowest_id(page.since))
    return bounds


def _in_window(
    connection: Connection, alone: Sequence[str], met: Met, page: Page, limit: int
) -> list[RunId] | None:
    """The page, from the newest runs that meet the conditions `alone`; None if they do not fill it."""
    within = {name: met[name] for name in alone}
    # By state from the narrow table alone: a join with all runs reads all of them.
    rows, columns = (_ends, _ENDED) if "state" in within else (_runs, _LOOKED_AT)
    some = select(*columns).where(*_that_meet(rows, within), *_bounds(columns[0], page)).limit(WINDOW)
    if page.since is not None and rows is _runs:
        some = some.where(_runs.c.created_at >= page.since)
    if rows is _runs and not alone:
        some = some.where(is_listed(_runs))
    in_order = not isinstance(within.get("definition_id"), Select)
    window = (some.order_by(columns[0].desc()) if in_order else some).subquery("some")
    rest = _that_meet(window, {name: value for name, value in met.items() if name not in alone})
    if rows is _runs:
        rest.append(is_listed(window))
    query = select(window.c.id).where(*rest).order_by(window.c.id.desc()).limit(limit)
    if page.since is not None and rows is _ends:
        query = query.join(_runs, _runs.c.id == window.c.id).where(_runs.c.created_at >= page.since)
    found = [RunId(id_) for id_ in connection.execute(query).scalars()]
    if len(found) == limit and in_order:
        return found
    size = connection.execute(select(func.count()).select_from(window)).scalar_one()
    return found if size < WINDOW else None


def _ids(connection: Connection, query: Select[Any], id_: ColumnElement[Any], limit: int) -> list[RunId]:
    return [RunId(found) for found in connection.execute(query.order_by(id_.desc()).limit(limit)).scalars()]


_logs = tables.run_logs
_PLACE = tuple_(_logs.c.attempt, _logs.c.seq)
_attempts = tables.attempts
_checkpoints = tables.checkpoints
_steps = tables.steps
_waits = tables.waits
_egress = tables.run_egress
_starts = tables.starts
_revisions = tables.definition_revisions
# Bytes of the results of steps that are shown with a run.
RESULT_BYTES = 1024 * 1024
# Children that failed that are shown with a run.
SHOWN_FAILED = 20
_view = table(
    "run_view",
    *(
        column(name, kind)
        for kind, names in (
            (Id(), "id org_id definition_id retry_of idempotency_key worker"),
            (Text(), "org definition handler pool origin request_key state reason detail"),
            (Integer(), "revision attempt"),
            (BigInteger(), "fencing_token result_fencing_token"),
            (Instant(), "scheduled_for created_at available_at started_at finished_at cancel_requested_at"),
            (json_type(), "progress result error params"),
        )
        for name in names.split()
    ),
)
# The newest run that retries this one. By id alone, SQLite would look through all runs of the org.
_retries = _runs.alias("retries")
_retried_as = (
    select(_retries.c.id)
    .where(_retries.c.retry_of == _view.c.id, _retries.c.org_id == _view.c.org_id)
    .order_by(_retries.c.created_at.desc(), _retries.c.id.desc())
    .limit(1)
    .correlate(_view)
    .scalar_subquery()
    .label("retried_as")
)
_listed = select(*(_retried_as if name == "retried_as" else _view.c[name] for name in columns_of(Run)))


class SerialRun(TypedDict):
    """An unfinished run of a definition whose runs may not overlap."""

    id: RunId
    state: str


def page_of(connection: Connection, scope: Scope, page: Page, limit: int) -> list[Run]:
    """A page of the runs of one org or of all, newest first."""
    return rows_of(connection, scope, find(connection, scope, page, limit))


def rows_of(connection: Connection, scope: Scope, ids: Sequence[RunId]) -> list[Run]:
    """These runs as the list shows them, newest first."""
    query = _listed.where(_view.c.id.in_(ids), *in_scope(_view.c.org_id, scope))
    return rows_as(Run, connection, query.order_by(_view.c.id.desc())) if ids else []


def of_definition(
    connection: Connection, org_id: OrgId, definition_id: DefinitionId, *, limit: int
) -> list[Run]:
    """The newest runs of one definition, newest first."""
    newest = (
        select(_runs.c.id)
        .where(_runs.c.org_id == org_id, _runs.c.definition_id == definition_id, is_listed(_runs))
        .order_by(_runs.c.id.desc())
    )
    return rows_of(connection, org_id, list(connection.execute(newest.limit(limit)).scalars()))


class Neighbours(NamedTuple):
    """The previous and the next run of the same definition; None at an end."""

    previous: RunId | None
    next: RunId | None


def neighbours(connection: Connection, org: OrgScope, run_id: RunId) -> Neighbours:
    """The runs beside an existing one, in the order of lists; raises NotFound: there is no such org."""
    mine = in_scope(_runs.c.org_id, orgs.scope_of(connection, org))
    of_run = select(_runs.c.definition_id).where(_runs.c.id == run_id, *mine).scalar_subquery()
    beside = select(_runs.c.id).where(_runs.c.definition_id == of_run, *mine, is_listed(_runs)).limit(1)
    previous = beside.where(_runs.c.id < run_id).order_by(_runs.c.id.desc())
    following = beside.where(_runs.c.id > run_id).order_by(_runs.c.id)
    found = connection.execute(select(previous.scalar_subquery(), following.scalar_subquery())).one()
    return Neighbours(*found)


def row(connection: Connection, org_id: OrgId, run_id: RunId) -> Run:
    """An existing run as the list shows it."""
    [found] = all_rows(connection, _listed.where(_view.c.id == run_id, _view.c.org_id == org_id))
    return cast(Run, found)


def with_org(connection: Connection, scope: Scope, run_id: str) -> tuple[Run, OrgId]:
    """A run as the list shows it, and its org.

    Raises:
        NotFound: there is no such run in this scope.
        UsageError: several runs of the scope fit.
    """
    row = _require(connection, _listed.add_columns(_view.c.org_id), scope, run_id)
    org_id = OrgId(row.pop("org_id"))
    return cast(Run, row), org_id


def _require(connection: Connection, columns: Select[Any], scope: Scope, run_id: str) -> Row:
    """These columns of a run; raises as `id_of`."""
    id_ = id_of(connection, scope, run_id)
    row = first_row(connection, columns.where(_view.c.id == id_, *in_scope(_view.c.org_id, scope)))
    if row is None:
        raise _missing(connection, scope, id_)
    return row


def _missing(connection: Connection, scope: Scope, run_id: RunId) -> NotFound:
    """What is known of a run that is not there: a product may have started it a moment ago."""
    query = select(_starts.c.not_before).where(_starts.c.id == run_id, _starts.c.state != "made")
    found = first_row(connection, query.where(*in_scope(_starts.c.org_id, scope)))
    if found is None:
        return NotFound(f"there is no run {run_id}", fix="`runs list` shows the runs")
    if found["not_before"] is None:
        fix = "a worker makes it within `execution.poll`; `doctor` says if none is up"
        return NotFound(f"run {run_id} is not made yet: its start waits for a worker", fix=fix)
    at = to_text(found["not_before"])
    return NotFound(f"run {run_id} is not made yet: it was started for {at}", fix="it is made at that time")


def run(connection: Connection, org: OrgScope, run_id: str) -> RunDetail:
    """One run with its newest attempts and steps, checkpoint, claims (redacted) and spec.

    Raises:
        NotFound: there is no such org, or it has no such run.
        UsageError: several of its runs fit.
    """
    scope = orgs.scope_of(connection, org)
    found = _require(connection, select(_view, _retried_as), scope, run_id)
    org_id, id_ = found["org_id"], found["id"]
    ended = all_rows(
        connection,
        select(_attempts, _attempts.c.worker_id.label("worker"))
        .where(_attempts.c.run_id == id_, _attempts.c.org_id == org_id)
        .order_by(_attempts.c.attempt.desc())
        .limit(MAX_LIMIT),
    )[::-1]
    attempts = [{name: attempt[name] for name in columns_of(AttemptRow)} for attempt in ended]
    if found["state"] == "running":
        known = ("attempt", "worker", "fencing_token", "handler", "started_at")
        attempts.append(dict.fromkeys(columns_of(AttemptRow)) | {name: found[name] for name in known})
    checkpoint = select(_checkpoints.c.data).where(
        _checkpoints.c.run_id == id_, _checkpoints.c.org_id == org_id
    )
    spec = (
        select(_revisions.c.spec)
        .join(_definitions, _definitions.c.id == _revisions.c.definition_id)
        .where(
            _revisions.c.definition_id == found["definition_id"],
            _revisions.c.revision == found["revision"],
            _definitions.c.org_id == org_id,
        )
    )
    spends = _spends_of(connection, org_id, id_)
    more = {
        **_made_by(connection, org_id, id_),
        "claims": next((each["claims"] for each in reversed(ended) if each["claims"] is not None), None),
        "attempts": attempts,
        "waits": waits_of(connection, org_id, id_),
        "checkpoint": connection.execute(checkpoint.limit(1)).scalar_one_or_none(),
        "step_count": _step_count(connection, org_id, id_),
        "steps": newest_steps(connection, org_id, id_, [each["meter"] for each in spends]),
        "spends": spends,
        "egress": _egress_of(connection, org_id, id_),
        "parent": run_children.parent_of(connection, id_) if found["origin"] == "child" else None,
        "children": _children_of(connection, org_id, id_),
        "spec": connection.execute(spec.limit(1)).scalar_one_or_none(),
    }
    return cast(RunDetail, {name: more.get(name, found.get(name)) for name in columns_of(RunDetail)})


def _made_by(connection: Connection, org_id: OrgId, run_id: RunId) -> Row:
    """Who made a run, and with which key: of one that a product started, while the key holds."""
    columns = _runs.c.created_by, func.coalesce(_runs.c.request_key, _starts.c.key).label("request_key")
    query = select(*columns).outerjoin(_starts, _starts.c.id == _runs.c.id)
    return first_row(connection, query.where(_runs.c.id == run_id, _runs.c.org_id == org_id)) or {}


def _children_of(connection: Connection, org_id: OrgId, run_id: RunId) -> Children | None:
    """How far the runs are that a run started, and the first ones that failed; None if it started none."""
    links = tables.children
    some = select(links.c.run_id).where(links.c.parent_id == run_id, links.c.org_id == org_id).limit(1)
    if connection.execute(some).first() is None:
        return None
    counts = run_children.counts(connection, org_id, run_id)
    failed = (
        select(_runs.c.id)
        .join(links, links.c.run_id == _runs.c.id)
        .where(links.c.parent_id == run_id, links.c.org_id == org_id)
        .where(_runs.c.state.in_(("failed", "refused")))
        .order_by(links.c.place)
        .limit(SHOWN_FAILED)
    )
    return Children(
        total=counts.total,
        ended=counts.ended,
        failed=counts.failed,
        states=dict(counts.by_state),
        failed_runs=list(connection.execute(failed).scalars()),
    )


def _spends_of(connection: Connection, org_id: OrgId, run_id: RunId) -> list[Spent]:
    """What a run spent, by meter; of a run with more spends than an attempt may make, the first ones."""
    spends = tables.spends
    first = (
        select(spends.c.meter, spends.c.amount)
        .where(spends.c.run_id == run_id, spends.c.org_id == org_id)
        .order_by(spends.c.run_id, spends.c.meter, spends.c.key)
        .limit(MAX_SPENDS)
        .subquery()
    )
    query = (
        select(first.c.meter, CappedSum(first.c.amount).label("amount"), func.count().label("spends"))
        .group_by(first.c.meter)
        .order_by(first.c.meter)
    )
    return [
        Spent(meter=row["meter"], amount=int(row["amount"]), spends=row["spends"])
        for row in all_rows(connection, query)
    ]


def _egress_of(connection: Connection, org_id: OrgId, run_id: RunId) -> list[EgressTotals]:
    """What a run has sent, the origins with the most requests first; a run has few of them."""
    query = (
        select(*(_egress.c[name] for name in columns_of(EgressTotals)))
        .where(_egress.c.run_id == run_id, _egress.c.org_id == org_id)
        .order_by(_egress.c.requests.desc(), _egress.c.denied.desc(), _egress.c.origin)
    )
    return rows_as(EgressTotals, connection, query.limit(MAX_LIMIT))


def newest_steps(
    connection: Connection, org_id: OrgId, run_id: RunId, meters: Sequence[str] = ()
) -> list[StepRow]:
    """The newest steps of a run, oldest first; results only of those that fit into `RESULT_BYTES`.

    With what they spent of these meters.
    """
    size = func.sum(_steps.c.size).over(order_by=_steps.c.seq.desc()).label("with_newer")
    newest = (
        select(_steps, size)
        .where(_steps.c.run_id == run_id, _steps.c.org_id == org_id)
        .order_by(_steps.c.seq.desc())
        .limit(MAX_LIMIT)
        .subquery()
    )
    result = case((newest.c.with_newer <= RESULT_BYTES, newest.c.result)).label("result")
    stored = [name for name in columns_of(StepRow) if name != "spends"]
    columns = [result if name == "result" else newest.c[name] for name in stored]
    found = all_rows(connection, select(*columns).order_by(newest.c.seq))
    spent = spends_of_steps(connection, org_id, run_id, [step["seq"] for step in found], meters)
    return [cast(StepRow, {**step, "spends": spent.get(step["seq"], {})}) for step in found]


def _step_count(connection: Connection, org_id: OrgId, run_id: RunId) -> int:
    # At most MAX_STEPS of `ctx.step`, and a few more that were in flight together.
    mine = (_steps.c.run_id == run_id, _steps.c.org_id == org_id)
    some = select(_steps.c.seq).where(*mine).limit(MAX_STEPS + MAX_LIMIT).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def waits_of(connection: Connection, org_id: OrgId, run_id: RunId) -> list[WaitRow]:
    """What a run waits or has waited for, oldest first: the newest `MAX_LIMIT`."""
    since = func.coalesce(_waits.c.opened_at, _waits.c.answered_at)
    query = select(*(_waits.c[name] for name in columns_of(WaitRow))).where(
        _waits.c.run_id == run_id, _waits.c.org_id == org_id
    )
    newest = query.order_by(since.desc(), _waits.c.name, _waits.c.occurrence).limit(MAX_LIMIT)
    return rows_as(WaitRow, connection, newest)[::-1]


def wait(connection: Connection, org_id: OrgId, run_id: RunId, name: str, occurrence: int) -> WaitRow:
    """An existing wait of a run."""
    query = select(*(_waits.c[column] for column in columns_of(WaitRow))).where(
        *(_waits.c.run_id == run_id, _waits.c.org_id == org_id),
        *(_waits.c.name == name, _waits.c.occurrence == occurrence),
    )
    [found] = all_rows(connection, query)
    return cast(WaitRow, found)


def unfinished(connection: Connection, org: str, definition_id: DefinitionId) -> list[SerialRun]:
    """A definition's unfinished serial runs, oldest first, with their state, also `held`."""
    query = select(_live.c.id, _live.c.state).where(
        _live.c.org_id == orgs.require(connection, org)["id"],
        _live.c.definition_id == definition_id,
        _live.c.serial,
    )
    # One unfinished and one held, as unique indexes ensure.
    return rows_as(SerialRun, connection, query.order_by(_live.c.id).limit(2))


def lines(
    connection: Connection,
    org: OrgScope,
    run_id: RunId,
    *,
    after: tuple[int, int] = START,
    limit: int = 1000,
) -> list[LogRow]:
    """The first `limit` log lines of a run that follow (attempt, seq), oldest first.

    Raises:
        NotFound: there is no such org.
    """
    query = _log_of(connection, org, run_id).where(tuple_(*after) < _PLACE)
    return rows_as(LogRow, connection, query.order_by(_logs.c.attempt, _logs.c.seq).limit(limit))


def newest_lines(
    connection: Connection,
    org: OrgScope,
    run_id: RunId,
    *,
    before: tuple[int, int] | None = None,
    limit: int,
) -> list[LogRow]:
    """The last `limit` lines of a run, or the last ones before (attempt, seq); oldest first.

    Raises:
        NotFound: there is no such org.
    """
    query = _log_of(connection, org, run_id)
    if before is not None:
        query = query.where(tuple_(*before) > _PLACE)
    query = query.order_by(_logs.c.attempt.desc(), _logs.c.seq.desc()).limit(limit)
    return rows_as(LogRow, connection, query)[::-1]


def _log_of(connection: Connection, org: OrgScope, run_id: RunId) -> Select[Any]:
    query = select(*(_logs.c[name] for name in columns_of(LogRow))).where(_logs.c.run_id == run_id)
    return query.where(*in_scope(_logs.c.org_id, orgs.scope_of(connection, org)))
