"""Why a run is what it is, and why an instant of a definition has no run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from worker.clock import to_text
from worker.definitions.definition import from_spec
from worker.definitions.triggers import Trigger
from worker.runs.why import Why, last_error, why_run
from worker.store import definitions, health, history, orgs
from worker.store.dialect import database_now
from worker.store.lists import runs as run_lists

Row = Mapping[str, Any]

_INSTANT = timedelta(microseconds=1)
_HALF_HOUR = timedelta(minutes=30)
# Reasons of a run that starts as soon as there is room for it.
_READY = ("due", "handed_back", "recovered")
_YEAR = timedelta(days=366)
_STOPS = {
    "definition.pause": "the definition was paused",
    "definition.close": "the definition was closed",
    "org.pause": "the org was paused",
    "org.suspend": "the org was suspended",
    "org.remove": "the org was removed",
}
_DEFINITION_MOVES = (
    "definition.pause",
    "definition.resume",
    "definition.close",
    "definition.reopen",
    "definition.add",
)
_ORG_MOVES = ("org.pause", "org.suspend", "org.remove", "org.resume", "org.add")


def why(connection: Connection, run_id: str, *, org: str | None = None) -> Why:
    """Why a run is what it is; with `org`, another org's run does not exist.

    Raises:
        NotFound: there is no such run.
    """
    if org is None:
        return _why_run(connection, run_lists.run_for_all_orgs(connection, run_id))
    return _why_run(connection, run_lists.run(connection, org, run_id))


def why_instant(connection: Connection, org: str, name: str, at: datetime, *, now: datetime) -> Why:
    """What became of an instant of a definition: its run, or why it has none.

    Raises:
        NotFound: there is no such org or definition.
    """
    org_id = orgs.require(connection, org)["id"]
    row = definitions.require(connection, org_id, org, name)
    run_id = history.run_of(connection, org_id, row["id"], at)
    if run_id is not None:
        return _why_run(connection, run_lists.run(connection, org, run_id))
    skip = history.skip_of(connection, org_id, row["id"], at)
    revision = history.revision_at(connection, row["id"], at)
    definition = from_spec(org, name, revision["spec"] if revision else row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    is_instant = trigger.after(at, inclusive=True) == at
    backfill = f"definitions backfill {org} {name} --from {to_text(at)} --until {to_text(at + _INSTANT)}"
    preview = f"definitions next {org} {name}"
    if skip is not None and is_instant:
        return _skipped(connection, row, at, skip, backfill)
    if not is_instant:
        return _absent(row, at, "is no instant of", _around(trigger, at), f"{preview} --from {to_text(at)}")
    if at > now:
        return _absent(row, at, "has not come yet for", _ahead(row), preview)
    stopped = _stopped(connection, row, at)
    if stopped is not None:
        return _absent(row, at, "was not due for", stopped, backfill)
    if row["next_scheduled_for"] is not None and row["next_scheduled_for"] <= at:
        cause = "no worker has fired it yet"
        if row["next_fire_at"] is not None and row["next_fire_at"] > now:
            cause = f"its spread has not passed yet: it fires at {to_text(row['next_fire_at'])}"
        return _absent(row, at, "has no run yet of", cause, preview)
    if at < row["created_at"]:
        made = f"the definition was made at {to_text(row['created_at'])}, after it"
        return _absent(row, at, "was not due for", made, backfill)
    cause = "no run and no skip of it is left: both are deleted when their retention has passed"
    return _absent(row, at, "left no trace in", cause, backfill)


def _why_run(connection: Connection, run: Row) -> Why:
    """The run's own words, and how many other orgs met the same."""
    org = orgs.require(connection, run["org"])
    org_id = org["id"]
    attempt = last_error(run)
    if attempt is not None:
        around = attempt["ended_at"] - _HALF_HOUR, attempt["ended_at"] + _HALF_HOUR
        found = history.others_that_failed(connection, org_id, attempt["error_cause"], *around)
    elif run["reason"] == "no_token":
        found = history.others_without_token(connection, org_id)
    else:
        return _standing(connection, run, org, why_run(run))
    return _standing(connection, run, org, why_run(run, others=found.orgs, more=found.more))


def _standing(connection: Connection, run: Row, org: Row, said: Why) -> Why:
    """The same, with what stands in the way of a run that waits, where it is not what its reason says."""
    if run["state"] != "waiting":
        return said
    if org["state"] == "paused":
        cause = (
            f"its org is paused by {org['state_by']} since {to_text(org['state_at'])}: nothing of it starts"
        )
        return replace(said, cause=cause, next=f"orgs resume {run['org']}")
    if run["reason"] not in _READY:
        return said
    if run["available_at"] is not None and run["available_at"] > database_now(connection):
        return replace(said, cause=f"{said.cause}; it may start at {to_text(run['available_at'])}")
    if not health.live_workers(connection):
        return replace(said, cause="no worker is up to run it", next="doctor")
    limit = org["max_concurrent_runs"]
    if history.running(connection, org["id"], limit=limit) >= limit:
        return replace(
            said,
            cause=f"its org has as many runs on as its max_concurrent_runs lets, {limit}",
            next=f"runs list --org {run['org']} --state running",
        )
    return said


def _skipped(connection: Connection, row: Row, at: datetime, skip: Row, backfill: str) -> Why:
    if skip["reason"] == "overlap":
        other = history.run_in_the_way(connection, row["org_id"], row["id"], at)
        cause = f"run {other or 'before it'} had not ended, and overlap = {_overlap(row)} kept it out"
    else:
        misfire = row["spec"].get("misfire", "once")
        cause = f"nobody fired it in time, and misfire = {misfire} let none or a newer one run instead"
    kept = (
        f"it is one of {skip['count']} instants counted in a skip from {to_text(skip['skipped_from'])} "
        f"until {to_text(skip['skipped_until'])}"
    )
    why = _absent(row, at, "was skipped for", cause, backfill)
    return Why(
        why.what, why.cause, kept, why.retry, why.next, {**why.facts, "state": None, "reason": skip["reason"]}
    )


def _absent(row: Row, at: datetime, is_what: str, cause: str, command: str) -> Why:
    return Why(
        what=f"{to_text(at)} {is_what} {row['org']}/{row['name']}",
        cause=cause,
        kept="nothing of it ran, so nothing is kept",
        retry="a backfill of it is safe: it never ran"
        if command.startswith("definitions backfill")
        else "there is nothing to retry",
        next=command,
        facts={
            "run": None,
            "org": row["org"],
            "definition": row["name"],
            "scheduled_for": at,
            "state": None,
            "reason": None,
            "other_orgs": None,
        },
    )


def _stopped(connection: Connection, row: Row, at: datetime) -> str | None:
    """What kept instants from being due at that time, by the audit; else by the definition as it is."""
    of_definition = history.last_change(
        connection, row["org_id"], f"{row['org']} {row['name']}", _DEFINITION_MOVES, at
    )
    of_org = history.last_change(connection, row["org_id"], row["org"], _ORG_MOVES, at)
    for change in (of_org, of_definition):
        if change is not None and change["action"] in _STOPS:
            note = (change["detail"] or {}).get("note")
            said = f" ({note})" if note else ""
            return f"{_STOPS[change['action']]} by {change['actor']} at {to_text(change['at'])}{said}"
    if not row["enabled"]:
        return "the definition says enabled = false"
    return None


def _ahead(row: Row) -> str:
    if row["closed_at"] is not None:
        return "and will not be due: the definition is closed"
    if row["org_state"] != "active":
        return f"and will not be due while the org is {row['org_state']}"
    if row["paused_at"] is not None:
        return f"and will not be due while the definition is paused by {row['paused_by']}"
    if not row["enabled"]:
        return "and will not be due while the definition says enabled = false"
    return "it is due then"


def _around(trigger: Trigger, at: datetime) -> str:
    before, after = trigger.last(at - _YEAR, at), trigger.after(at)
    near = [
        f"the one {side} is {to_text(found)}"
        for side, found in (("before", before), ("after", after))
        if found
    ]
    return f"its schedule names others: {', '.join(near)}" if near else "its schedule names none near it"


def _overlap(row: Row) -> str:
    return str(row["spec"].get("overlap", "skip"))
