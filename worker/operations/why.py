"""Why a run has its state, and why a scheduled time of a definition has no run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from worker.clock import to_text
from worker.definitions.definition import Definition, from_spec
from worker.definitions.triggers import Trigger
from worker.definitions.zones import parse_zone
from worker.handlers.ceiling import OF_DEFINITIONS
from worker.ids import ALL_ORGS, OrgId
from worker.operations import approvals
from worker.runs.fire import is_closed
from worker.runs.why import Why, last_error, why_run
from worker.store import catalogue, definitions, health, history, orgs, places
from worker.store.dialect import database_now
from worker.store.lists import runs as run_lists

Row = Mapping[str, Any]

_TICK = timedelta(microseconds=1)
_HALF_HOUR = timedelta(minutes=30)
# Retries of retries that are followed.
_MOST_RETRIES = 20
_YEAR = timedelta(days=366)
# Reasons of a run that starts as soon as a slot is free.
_READY = ("due", "handed_back", "recovered", "resumed")
_STOPS = {
    "definition.pause": "the definition was paused",
    "definition.close": "the definition was closed",
    "org.pause": "the org was paused",
    "org.suspend": "the org was suspended",
    "org.remove": "the org was removed",
}
_DEFINITION_ACTIONS = tuple(f"definition.{verb}" for verb in ("pause", "resume", "close", "reopen", "add"))
_ORG_ACTIONS = tuple(f"org.{verb}" for verb in ("pause", "suspend", "remove", "resume", "add"))


def why(connection: Connection, run_id: str, *, org: str | None = None) -> Why:
    """Why a run has its state; with `org`, only that org's runs are found.

    Raises:
        NotFound: no such run.
    """
    if org is None:
        return _why_run(connection, run_lists.run(connection, ALL_ORGS, run_id))
    return _why_run(connection, run_lists.run(connection, org, run_id))


def why_time(connection: Connection, org: str, name: str, at: datetime, *, now: datetime) -> Why:
    """The run of a definition at a scheduled time, or why there was no run.

    Raises:
        NotFound: no such org or definition.
    """
    org_id = orgs.require(connection, org)["id"]
    row = definitions.require(connection, org_id, org, name)
    run_id = history.run_of(connection, org_id, row["id"], at)
    if run_id is not None:
        return _why_run(connection, run_lists.run(connection, org, run_id))
    revision = history.revision_at(connection, row["id"], at)
    definition = from_spec(org, name, revision["spec"] if revision else row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    backfill = f"definitions backfill {org} {name} --from {to_text(at)} --until {to_text(at + _TICK)}"
    preview = f"definitions next {org} {name}"
    if trigger.nominal.after(at, inclusive=True) != at:
        around = _around(trigger.nominal, at)
        return _no_run(row, at, "is not a scheduled time of", around, f"{preview} --from {to_text(at)}")
    skip = history.skip_of(connection, org_id, row["id"], at)
    if skip is not None:
        return _skipped(connection, row, at, skip, backfill, definition)
    if at > now and is_closed(trigger, at):
        calendar = f"it will be skipped, since its date is in the calendar {definition.calendar}"
        return _no_run(row, at, "has not come yet for", calendar, preview)
    if at > now:
        return _no_run(row, at, "has not come yet for", _ahead(row), preview)
    stopped = _stopped(connection, row, at)
    if stopped is not None:
        return _no_run(row, at, "was not due for", stopped, backfill)
    if row["next_scheduled_for"] is not None and row["next_scheduled_for"] <= at:
        cause = "no worker has fired it yet"
        if row["next_fire_at"] is not None and row["next_fire_at"] > now:
            cause = f"its spread has not passed yet: it fires at {to_text(row['next_fire_at'])}"
        return _no_run(row, at, "has no run yet of", cause, preview)
    if at < row["created_at"]:
        cause = f"the definition was created at {to_text(row['created_at'])}"
        return _no_run(row, at, "was not due for", cause, backfill)
    cause = "its run or skip was deleted after its retention"
    return _no_run(row, at, "left no trace in", cause, backfill)


def _why_run(connection: Connection, run: Row) -> Why:
    """The run's own explanation, and how many other orgs have the same problem."""
    org = orgs.require(connection, run["org"])
    org_id = org["id"]
    retried = _last_retry(connection, org_id, run)
    attempt = last_error(run)
    if attempt is not None:
        around = attempt["ended_at"] - _HALF_HOUR, attempt["ended_at"] + _HALF_HOUR
        found = history.others_that_failed(connection, org_id, attempt["error_cause"], *around)
    elif run["reason"] == "no_token":
        found = history.others_without_token(connection, org_id)
    else:
        return _blocked(connection, run, org, why_run(run, retried=retried))
    explained = why_run(run, others=found.orgs, more=found.more, retried=retried)
    return _blocked(connection, run, org, explained)


def _last_retry(connection: Connection, org_id: OrgId, run: Row) -> Row | None:
    """The run that the run's retries led to: the newest retry, or the newest retry of that one."""
    last, newer = None, run["retried_as"]
    for _ in range(_MOST_RETRIES):
        if newer is None:
            break
        last = run_lists.row(connection, org_id, newer)
        newer = last["retried_as"]
    return last


def _blocked(connection: Connection, run: Row, org: Row, found: Why) -> Why:
    """The same, with what blocks a waiting run, unless its reason says that already."""
    if run["state"] != "waiting":
        return found
    if org["state"] == "paused":
        cause = (
            f"its org was paused by {org['state_by']} at {to_text(org['state_at'])}: none of its runs start"
        )
        return replace(found, cause=cause, next=f"orgs resume {run['org']}")
    if run["reason"] == "not_approved":
        return _not_approved(connection, run, org, found)
    if run["reason"] == "no_handler":
        return _elsewhere(connection, run, found)
    if run["reason"] not in _READY:
        return found
    if run["available_at"] is not None and run["available_at"] > database_now(connection):
        return replace(found, cause=f"{found.cause}; it can start at {to_text(run['available_at'])}")
    alive = health.live_workers(connection)
    if not alive:
        return replace(found, cause="no worker is up to run it", next="doctor")
    if not any(run["pool"] in worker["pools"] for worker in alive):
        return replace(found, cause=f"no worker or host serves pool {run['pool']}", next="doctor")
    limit = org["max_concurrent_runs"]
    if history.running(connection, org["id"], limit=limit) >= limit:
        cause = f"its org already runs as many as its max_concurrent_runs allows: {limit}"
        return replace(found, cause=cause, next=f"runs list --org {run['org']} --state running")
    return found


def _not_approved(connection: Connection, run: Row, org: Row, found: Why) -> Why:
    """The same, with what hosts of the run's pool declare now, and the command that approves it."""
    row = definitions.require(connection, org["id"], run["org"], run["definition"])
    handlers = {run["handler"], *from_spec(run["org"], run["definition"], row["spec"]).handlers}
    pending = [one for one in approvals.pending(connection, run["pool"]) if one["handler"] in handlers]
    if not pending:
        cause = f"it waited for an approval, which is not needed any more; it starts at {_at(run)}"
        return replace(found, cause=cause, next=f"runs show {run['id']}")
    first = pending[0]
    cause = (
        f"hosts of pool {run['pool']} declare {approvals.what_of(first)} for {first['handler']}, "
        "which no administrator has approved"
    )
    if OF_DEFINITIONS.issuperset(first["pending"]):
        cause += f"; a definition that sets {' and '.join(first['pending'])} itself needs no approval"
    return replace(found, cause=cause, next=approvals.command_of(first))


def _at(run: Row) -> str:
    return "once" if run["available_at"] is None else to_text(run["available_at"])


def _elsewhere(connection: Connection, run: Row, found: Why) -> Why:
    """The same; for a handler that only hosts of other pools offer, with these pools."""
    handler = run["handler"]
    pools = places.pools_with(connection, handler)
    if not pools or run["pool"] in pools or catalogue.is_of_workers(connection, [handler]):
        return found
    cause = (
        f"only hosts offer its handler {handler}, those of pool {', '.join(pools)}, and its pool is "
        f"{run['pool']}: the definition must name the pool"
    )
    return replace(found, cause=cause, next=f"definitions show {run['org']} {run['definition']}")


def _skipped(
    connection: Connection, row: Row, at: datetime, skip: Row, backfill: str, definition: Definition
) -> Why:
    if skip["reason"] == "overlap":
        other = history.run_in_the_way(connection, row["org_id"], row["id"], at)
        overlap = row["spec"].get("overlap", "skip")
        cause = f"run {other or 'before it'} had not ended, and overlap = {overlap} kept it out"
    elif skip["reason"] == "calendar":
        zone = definition.timezone or row["org_timezone"] or "UTC"
        day = at.astimezone(parse_zone(zone)).date()
        cause = f"{day}, its date in {zone}, is in the calendar {definition.calendar}"
        # A backfill skips it, too.
        backfill = f"calendars show {definition.calendar}"
    else:
        misfire = row["spec"].get("misfire", "once")
        cause = f"no worker fired it in time, and misfire = {misfire} ran nothing or a newer one instead"
    kept = (
        f"it is one of {skip['count']} scheduled times in a skip from {to_text(skip['skipped_from'])} "
        f"until {to_text(skip['skipped_until'])}"
    )
    found = _no_run(row, at, "was skipped for", cause, backfill)
    return replace(found, kept=kept, facts={**found.facts, "reason": skip["reason"]})


def _no_run(row: Row, at: datetime, is_what: str, cause: str, command: str) -> Why:
    can_backfill = command.startswith("definitions backfill")
    return Why(
        what=f"{to_text(at)} {is_what} {row['org']}/{row['name']}",
        cause=cause,
        kept="it never ran, so nothing was retained",
        retry="a backfill is safe, since it never ran" if can_backfill else "there is nothing to retry",
        next=command,
        facts={
            "run": None,
            "org": row["org"],
            "definition": row["name"],
            "scheduled_for": at,
            "state": None,
            "reason": None,
            "retried_as": None,
            "other_orgs": None,
        },
    )


def _stopped(connection: Connection, row: Row, at: datetime) -> str | None:
    """What kept the definition from being due at that time, by the audit or by its spec."""
    org_id, name = row["org_id"], f"{row['org']} {row['name']}"
    for change in (
        history.last_change(connection, org_id, row["org"], _ORG_ACTIONS, at),
        history.last_change(connection, org_id, name, _DEFINITION_ACTIONS, at),
    ):
        if change is not None and change["action"] in _STOPS:
            note = (change["detail"] or {}).get("note")
            reason = f" ({note})" if note else ""
            return f"{_STOPS[change['action']]} by {change['actor']} at {to_text(change['at'])}{reason}"
    return None if row["enabled"] else "the definition has enabled = false"


def _ahead(row: Row) -> str:
    if row["closed_at"] is not None:
        return "and will not be due: the definition is closed"
    if row["org_state"] != "active":
        return f"and will not be due while the org is {row['org_state']}"
    if row["paused_at"] is not None:
        return f"and will not be due while the definition is paused by {row['paused_by']}"
    if not row["enabled"]:
        return "and will not be due while the definition has enabled = false"
    return "it is due then"


def _around(trigger: Trigger, at: datetime) -> str:
    before, after = trigger.last(at - _YEAR, at), trigger.after(at)
    near = [
        f"the one {side} is {to_text(found)}"
        for side, found in (("before", before), ("after", after))
        if found
    ]
    return f"its schedule has others: {', '.join(near)}" if near else "its schedule has none near it"
