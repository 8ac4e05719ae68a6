"""Open alerts, shared by all workers: the first worker to claim an alert delivers it, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, literal, select, text, update

from worker.store import tables
from worker.store.bulk import rows_among
from worker.store.dialect import Instant, database_now, insert_into, upsert
from worker.store.health import oldest_unfired
from worker.telemetry.alerts import MAX_OPEN, Alert, Kind, Status, Strike

# A cause that does not occur again is resolved after this; longer than the period of a daily job.
QUIET = timedelta(hours=25)
# How long a claim keeps other workers from delivering; longer than a post takes.
CLAIM = timedelta(seconds=60)
# The newest runs of a definition that are searched for a success.
SEARCHED = 20

_alerts, _strikes = tables.alerts, tables.alert_strikes

_SUCCEEDED = (
    f"""EXISTS (SELECT 1 FROM (
        SELECT r.state, r.finished_at FROM runs r
        WHERE r.definition_id = subject_id AND r.origin <> 'child'
        ORDER BY r.id DESC LIMIT {SEARCHED}
    ) newest WHERE newest.state = 'succeeded' AND newest.finished_at > alert_strikes.struck_at)
    OR EXISTS (SELECT 1 FROM definitions d WHERE d.id = subject_id AND d.closed_at IS NOT NULL)""",
    "each affected definition succeeded again",
)
_RESUMED = (
    """NOT EXISTS (SELECT 1 FROM definitions d
    WHERE d.id = subject_id AND d.paused_at IS NOT NULL AND d.closed_at IS NULL)""",
    "it was resumed",
)
_HAS_TOKEN = (
    """EXISTS (SELECT 1 FROM credentials c WHERE c.org_id = subject_id
        AND c.last_error IS NULL AND c.last_used_at > alert_strikes.struck_at)
    OR EXISTS (SELECT 1 FROM orgs o WHERE o.id = subject_id AND o.state = 'removed')""",
    "it got a token again",
)
_PROVISIONED = (
    """NOT EXISTS (SELECT 1 FROM applications a
        WHERE a.org_id = subject_id AND a.last_error IS NOT NULL AND a.state <> 'deleted')
    OR EXISTS (SELECT 1 FROM orgs o WHERE o.id = subject_id AND o.state = 'removed')""",
    "the application of each affected org is as it should be",
)
# While another attempt begins and runs, only that one can tell whether it still comes to the wait.
_ANSWERED = (
    """NOT EXISTS (SELECT 1 FROM waits w JOIN live_runs l ON l.id = w.run_id
    WHERE w.run_id = subject_id AND w.kind = 'answer'
      AND (w.pending_attempt = l.attempt OR l.state <> 'parked')
      AND w.answered_at IS NULL AND w.timed_out_at IS NULL)""",
    "it was answered, its deadline passed, or the run has ended",
)
_DONE = (
    "NOT EXISTS (SELECT 1 FROM late_definitions l WHERE l.definition_id = subject_id)",
    "no affected definition is late any more",
)
# When an affected definition or org has recovered, and how the alert says that all have.
RECOVERED: Mapping[Kind, tuple[str, str]] = {
    "failed": _SUCCEEDED,
    "refused": _SUCCEEDED,
    "paused": _RESUMED,
    "credential_dead": _HAS_TOKEN,
    "provisioning_failed": _PROVISIONED,
    "waiting": _ANSWERED,
    "late": _DONE,
}
MAY_GO_QUIET: tuple[Kind, ...] = (
    *("failed", "refused", "credential_dead", "provisioning_failed"),
    *("files_opened", "files_changeable", "egress_denied", "unpriced", "forecast", "rollout"),
)


def note(connection: Connection, strikes: Sequence[Strike]) -> None:
    """Record strikes: open new causes, and continue those whose end is not delivered yet."""
    now = database_now(connection)
    known = set(connection.execute(select(_alerts.c.cause)).scalars())
    room = MAX_OPEN - len(known)
    taken = [strike for strike in strikes if strike.cause in known]
    taken += [strike for strike in strikes if strike.cause not in known][: max(room, 0)]
    if not taken:
        return
    subjects = _subjects(connection, taken)
    insert = insert_into(connection, _alerts)
    continued = insert.on_conflict_do_update(
        index_elements=["cause"],
        set_={
            "count": _alerts.c.count + insert.excluded["count"],
            "struck_at": insert.excluded.struck_at,
            "over_at": None,
            "over_how": None,
            # An end that was not delivered yet is cancelled.
            "try_at": case(
                (and_(_alerts.c.over_at.is_not(None), _alerts.c.told.is_not(None)), None),
                else_=_alerts.c.try_at,
            ),
        },
    )
    connection.execute(continued, [_row(strike, now) for strike in taken])
    rows = [
        {"cause": strike.cause, "subject_id": subject, "struck_at": at, "well": False}
        for strike in taken
        for subject, at in subjects(strike).items()
    ]
    if rows:
        connection.execute(upsert(connection, _strikes, ("cause", "subject_id"), ("struck_at", "well")), rows)


def is_any(connection: Connection) -> bool:
    """Whether any alert is open or not delivered yet."""
    return connection.execute(select(_alerts.c.cause).limit(1)).first() is not None


def resolve_ended(connection: Connection, *, overdue: float) -> None:
    """Resolve alerts whose cause is gone; a scheduled time is overdue after `overdue` seconds."""
    now = database_now(connection)
    for kind, (condition, how) in RECOVERED.items():
        open_ones = select(_alerts.c.cause).where(_alerts.c.kind == kind, _alerts.c.over_at.is_(None))
        recovered = update(_strikes).where(
            _strikes.c.cause.in_(open_ones), ~_strikes.c.well, text(f"({condition})")
        )
        connection.execute(recovered.values(well=True))
        of_cause = _strikes.c.cause == _alerts.c.cause
        left = select(_strikes.c.cause).where(of_cause, ~_strikes.c.well).exists()
        any_ = select(_strikes.c.cause).where(of_cause).exists()
        _end(connection, and_(_alerts.c.kind == kind, any_, ~left), how, now)
    unfired = oldest_unfired(connection)
    if unfired is None or unfired[2] < overdue:
        _end(connection, _alerts.c.kind == "overdue", "what was due was fired", now)
    quiet = and_(_alerts.c.kind.in_(MAY_GO_QUIET), _alerts.c.struck_at < now - QUIET)
    _end(connection, quiet, "it has not occurred again", now)


def claim(connection: Connection) -> tuple[Alert, int] | None:
    """Claim the next alert to deliver; returns it with the number of earlier tries."""
    now = database_now(connection)
    due = select(_alerts).where(_alerts.c.try_at <= now).order_by(_alerts.c.since, _alerts.c.cause).limit(1)
    row = connection.execute(due.with_for_update(skip_locked=True)).mappings().first()
    if row is None:
        return None
    mine = _alerts.c.cause == row["cause"]
    connection.execute(update(_alerts).where(mine).values(try_at=now + CLAIM))
    struck = select(func.count()).where(_strikes.c.cause == row["cause"])
    affected = connection.execute(struck).scalar_one()
    summary, at = row["summary"], row["since"]
    if row["told"] is not None:
        summary, at = f"over, {row['over_how']}: {summary}", row["over_at"]
    status: Status = "firing" if row["told"] is None else "resolved"
    same = {name: row[name] for name in ("id", "cause", "kind", "since", "count", "fields")}
    return Alert(status=status, summary=summary, at=at, affected=max(affected, 1), **same), row["tries"]


def mark_delivered(connection: Connection, alert: Alert) -> None:
    """Store that it is delivered. A cause that occurred again while its end was delivered opens again."""
    now, mine = database_now(connection), _alerts.c.id == alert.id
    if alert.status == "firing":
        end = case((_alerts.c.over_at.is_not(None), _instant(now)), else_=None)
        connection.execute(update(_alerts).where(mine).values(told="firing", tries=0, try_at=end))
        return
    forgotten = _strikes.c.cause == alert.cause
    if not connection.execute(delete(_alerts).where(mine, _alerts.c.over_at.is_not(None))).rowcount:
        forgotten = and_(forgotten, _strikes.c.well)
        reopened = {"id": _id(alert.cause, now), "since": now, "told": None, "tries": 0, "try_at": now}
        if not connection.execute(update(_alerts).where(mine).values(**reopened)).rowcount:
            return  # another worker delivered it, too, and the cause may be that of a newer alert
    connection.execute(delete(_strikes).where(forgotten))


def retry_later(connection: Connection, alert: Alert, seconds: float) -> None:
    """Store that delivery failed; the next try is after `seconds`."""
    at = database_now(connection) + timedelta(seconds=seconds)
    mine = and_(_alerts.c.id == alert.id, _alerts.c.try_at.is_not(None))
    connection.execute(update(_alerts).where(mine).values(tries=_alerts.c.tries + 1, try_at=at))


def _end(connection: Connection, which: ColumnElement[bool], how: str, now: datetime) -> None:
    # If its start is not delivered yet, that comes first.
    end = case((_alerts.c.told.is_(None), _alerts.c.try_at), else_=_instant(now))
    connection.execute(
        update(_alerts)
        .where(_alerts.c.over_at.is_(None), which)
        .values(over_at=now, over_how=how, tries=0, try_at=end)
    )


def _row(strike: Strike, now: datetime) -> dict[str, Any]:
    same = {name: getattr(strike, name) for name in ("cause", "kind", "summary", "count")}
    times = dict.fromkeys(("since", "struck_at", "try_at"), now)
    return {**same, "id": _id(strike.cause, now), "fields": dict(strike.fields), **times}


def _id(cause: str, at: datetime) -> str:
    return f"{cause}-{int(at.timestamp())}"


def _subjects(connection: Connection, strikes: Sequence[Strike]) -> Callable[[Strike], dict[str, datetime]]:
    """A function from a strike to the affected definitions, orgs or runs, each with its time."""
    runs, definitions, orgs = tables.runs, tables.definitions, tables.orgs
    struck = {run for strike in strikes for run in strike.runs.values()}
    query = select(runs.c.id, runs.c.definition_id, runs.c.finished_at).where(runs.c.finished_at.is_not(None))
    found = rows_among(connection, query, runs.c.id, struck)
    ended: dict[str, tuple[str, datetime]] = {id_: (definition, at) for id_, definition, at in found}
    codes = {org for strike in strikes for org in strike.orgs}
    codes |= {org for strike in strikes for org, _ in strike.definitions}
    of_codes = rows_among(connection, select(orgs.c.code, orgs.c.id), orgs.c.code, codes)
    named: dict[tuple[str, ...], str] = {(code,): org_id for code, org_id in of_codes}
    for org, name in {one for strike in strikes for one in strike.definitions}:
        its = and_(definitions.c.org_id == named.get((org,)), definitions.c.name == name)
        for id_ in connection.execute(select(definitions.c.id).where(its)).scalars():
            named[org, name] = id_

    def of(strike: Strike) -> dict[str, datetime]:
        if strike.kind == "waiting":
            # The run itself: it has not ended.
            return dict.fromkeys(strike.runs.values(), strike.at)
        found = dict(ended[run] for run in strike.runs.values() if run in ended)
        others = [*strike.definitions, *((org,) for org in strike.orgs)]
        return found | {named[one]: strike.at for one in others if one in named}

    return of


def _instant(at: datetime) -> ColumnElement[datetime]:
    return literal(at, Instant())
