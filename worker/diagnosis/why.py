"""Why a run has its state, and why a scheduled time of a definition has no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any

from sqlalchemy import Connection

from worker.clock import to_text
from worker.handlers.ceiling import OF_DEFINITIONS
from worker.ids import ALL_ORGS, OrgId, RunId
from worker.model.definitions.definition import Definition, from_spec
from worker.model.definitions.triggers import Trigger
from worker.model.definitions.units import format_duration
from worker.model.definitions.zones import parse_zone
from worker.model.runs.causes import READY, last_reason
from worker.model.runs.fire import is_closed
from worker.model.runs.next_steps import NextStep
from worker.model.runs.outcome import Error, fingerprint
from worker.model.runs.why import SinceThen, Why, blocked, last_error, limited, solved, why_run
from worker.operations import approvals
from worker.operations.handlers import Handlers
from worker.store import (
    batch_requests,
    catalogue,
    children,
    definitions,
    health,
    history,
    org_secrets,
    orgs,
    places,
    rollouts,
)
from worker.store.dialect import database_now
from worker.store.lists import morning
from worker.store.lists import runs as run_lists
from worker.store.lists.limits import waiting_for

Row = Mapping[str, Any]

# States of a run whose work was not done.
BAD = ("failed", "refused", "skipped")
_TICK = timedelta(microseconds=1)
_HALF_HOUR = timedelta(minutes=30)
# Retries of retries that are followed.
_MAX_RETRIES = 20
_YEAR = timedelta(days=366)
# Why a run has its version, which a rollout decided on when it started.
_BY_ROLLOUT = "by the rollout {version_rollout} it runs {version_handler}"
VERSION_BY = {
    "step": f"{_BY_ROLLOUT}, as of its step {{version_share}}",
    "flag": f"{_BY_ROLLOUT}, since the token of its org lacks the flag",
    "halted": f"{_BY_ROLLOUT}, since that was halted",
    "finished": f"{_BY_ROLLOUT}, which was finished",
    "stored": f"{_BY_ROLLOUT}, with which it had begun",
}
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
    return explain(connection, run_lists.run(connection, ALL_ORGS if org is None else org, run_id))


def why_time(connection: Connection, org: str, name: str, at: datetime, *, now: datetime) -> Why:
    """The run of a definition at a scheduled time, or why there was no run.

    Raises:
        NotFound: no such org or definition.
    """
    org_id = orgs.require(connection, org)["id"]
    row = definitions.require(connection, org_id, org, name)
    run_id = history.run_of(connection, org_id, row["id"], at)
    if run_id is not None:
        return explain(connection, run_lists.run(connection, org, run_id))
    revision = history.revision_at(connection, row["id"], at)
    definition = from_spec(org, name, revision["spec"] if revision else row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    place = {"org": org, "definition": name, "from": to_text(at), "until": to_text(at + _TICK)}
    backfill, preview = NextStep.of("backfill", place), NextStep.of("next_times", place)
    if trigger.nominal.after(at, inclusive=True) != at:
        around = _around(trigger.nominal, at)
        return _no_run(row, at, "is not a scheduled time of", around, NextStep.of("next_times_from", place))
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


def explain(connection: Connection, run: Row, *, across_orgs: bool = True) -> Why:
    """Explain a run by its row; without `across_orgs`, nothing of other orgs and of workers is read."""
    found = _explain(connection, run, across_orgs=across_orgs)
    if not across_orgs:
        return found
    version = rollouts.version_of(connection, orgs.require(connection, run["org"])["id"], RunId(run["id"]))
    if version is None:
        return found
    addition = "; ".join(filter(None, (found.addition, VERSION_BY[version["why"]])))
    values = {name: str(version[name]) for name in ("handler", "rollout", "share")}
    named = {f"version_{name}": value for name, value in values.items()}
    return replace(found, values={**found.values, **named}, addition=addition)


def _explain(connection: Connection, run: Row, *, across_orgs: bool) -> Why:
    org = orgs.require(connection, run["org"])
    org_id = org["id"]
    known: dict[str, Any] = {
        "retried": _last_retry(connection, org_id, run),
        "since_then": _since_then(connection, org_id, run),
    }
    if not across_orgs:
        return why_run(run, **known)
    attempt = last_error(run)
    others = None
    if attempt is not None:
        around = attempt["ended_at"] - _HALF_HOUR, attempt["ended_at"] + _HALF_HOUR
        others = history.others_that_failed(connection, org_id, attempt["error_cause"], *around)
    elif run["reason"] == "no_token":
        others = history.others_without_token(connection, org_id)
    if others is not None:
        known |= {"others": others.orgs, "more": others.more}
    found = why_run(run, **known)
    if run["reason"] == "children" and run["state"] == "waiting":
        return _waits_for_children(connection, org_id, run, found)
    if run["reason"] == "batch" and run["state"] == "waiting":
        return _waits_for_batch(connection, RunId(run["id"]), found)
    if run["state"] == "waiting":
        return _blocked(connection, run, org, found)
    if run["state"] == "running":
        return limited(found, waiting_for(connection, org_id))
    return solved(found) if _is_solved(connection, org_id, run, found) else found


def _waits_for_children(connection: Connection, org_id: OrgId, run: Row, found: Why) -> Why:
    """The same, with how far the runs are that a run waits for."""
    counts = children.counts(connection, org_id, RunId(run["id"]))
    values = {"ended": f"{counts.ended:,}", "total": f"{counts.total:,}", "failed": f"{counts.failed:,}"}
    addition = "{ended} of {total} have ended" + (", and {failed} of them failed" if counts.failed else "")
    return replace(found, values={**found.values, **values}, addition=addition)


def _waits_for_batch(connection: Connection, run_id: RunId, found: Why) -> Why:
    """The same, with how long its request has been on its way, and how long that usually takes."""
    standing = batch_requests.standing(connection, run_id)
    if standing is None:
        return found
    addition = (
        "sent {since_sent}" if standing.sent_at is not None else "not sent yet, but pooled since {opened}"
    )
    values: dict[str, Any] = {"since_sent": standing.sent_at, "opened": standing.opened_at}
    if standing.usual is not None:
        values["usual"] = format_duration(timedelta(minutes=max(1, round(standing.usual / 60))))
        addition += ", usually answered within {usual}"
    if standing.fall_back_at is not None:
        values["fall_back_at"] = standing.fall_back_at
        addition += "; sent on its own at {fall_back_at} at the latest"
    return replace(found, values={**found.values, **values}, addition=addition, since=standing.opened_at)


def _since_then(connection: Connection, org_id: OrgId, run: Row) -> SinceThen | None:
    """How the other runs of the definition went; None for a run that has no problem."""
    if run["state"] == "waiting" and run["reason"] == "no_token":
        return SinceThen(since=history.without_token_since(connection, org_id))
    if run["state"] not in (*BAD, "cancelled"):
        return None
    found = history.around(connection, org_id, RunId(run["id"]))
    # The run itself is the first: as it is stored, an org's own people read less of it.
    row = list(takewhile(lambda one: _how(one) == _how(found.before[0]), found.before))
    later = dict(Counter(each["state"] for each in found.after))
    return SinceThen(row[-1]["finished_at"], len(row), later, more=found.more)


def _how(run: Row) -> tuple[object, ...]:
    """What the ends of two runs have in common if they ended for the same reason."""
    error = run["error"]
    cause = fingerprint(Error(str(error.get("type")), str(error.get("message")))) if error else None
    return run["state"], run["reason"], cause


def _is_solved(connection: Connection, org_id: OrgId, run: Row, found: Why) -> bool:
    """Whether what prevented a run that never started does so no more, as far as it is stored."""
    if run["state"] not in ("refused", "skipped") or found.retried is not None or run["reason"] == "flag_off":
        return False
    if found.since_then is not None and found.since_then.later.get("succeeded"):
        return True
    if run["reason"] in ("secret_missing", "secret_bound"):
        stored = org_secrets.find(connection, org_id, str(run["detail"]))
        return stored is not None and (run["reason"] == "secret_missing" or stored["origin"] is None)
    if run["reason"] != "expired":
        return False
    match last_reason(run["detail"])[0]:
        case "no_token":
            return not history.is_rejected(connection, org_id)
        case "no_handler":
            return bool(catalogue.offering(connection, run["handler"]))
        case "no_pool":
            return any(run["pool"] in one["pools"] for one in health.live_workers(connection))
    return False


def _last_retry(connection: Connection, org_id: OrgId, run: Row) -> Row | None:
    """The run that the run's retries led to: the newest retry, or the newest retry of that one."""
    last, newer = None, run["retried_as"]
    for _ in range(_MAX_RETRIES):
        if newer is None:
            break
        last = run_lists.row(connection, org_id, newer)
        newer = last["retried_as"]
    return last


def _blocked(connection: Connection, run: Row, org: Row, found: Why) -> Why:
    """The same, with what blocks a waiting run, unless its reason says that already."""
    reason = run["reason"]
    if org["state"] == "paused":
        return blocked(
            found, "org_paused", since=org["state_at"], state_by=org["state_by"], state_at=org["state_at"]
        )
    if reason == "not_approved":
        return _not_approved(connection, run, org, found)
    if reason == "no_handler":
        return _without_handler(connection, run, found)
    if reason not in READY:
        return found
    now = database_now(connection)
    if run["available_at"] is not None and run["available_at"] > now:
        return blocked(found, "not_yet")
    alive = health.live_workers(connection)
    if not alive:
        return blocked(found, "no_worker")
    serving = [one for one in alive if run["pool"] in one["pools"]]
    if not serving:
        return blocked(found, "pool_not_served")
    if reason == "due" and not catalogue.offering(connection, run["handler"]):
        lacking = _without_handler(connection, run, found)
        if lacking is not found:
            return lacking
    limit = org["max_concurrent_runs"]
    if morning.running(connection, org["id"], most=limit, children=True) >= limit:
        return blocked(found, "org_limit", limit=limit)
    limit = morning.reached_by_definition(connection, org["id"], RunId(run["id"]))
    if limit is not None:
        return blocked(found, "definition_limit", limit=limit)
    handler = Handlers(connection).effective(run["handler"], run["pool"])
    limit = handler["max_concurrent"] if handler is not None else None
    if limit is not None and morning.is_handler_full(connection, ALL_ORGS, run["handler"], limit):
        return blocked(found, "handler_limit", limit=limit)
    silent = [
        one for one in serving if morning.lease_state(one["renewed_at"], one["lease_until"], now) == "late"
    ]
    if len(silent) == len(serving):
        names = ", ".join(f"worker {one['id'][:8]} on {one['host']}" for one in silent[:3])
        since = max(one["renewed_at"] for one in silent)
        words = f"{names} may be down"
        return blocked(found, "silent_worker", since=since, worker_may_be_down=words, silent_since=since)
    return blocked(found, "no_slot")


def _without_handler(connection: Connection, run: Row, found: Why) -> Why:
    """The same, with what is known of a handler that no running worker offers."""
    handler = run["handler"]
    entries = catalogue.entries(connection, handler)
    pools = places.pools_with(connection, handler)
    if pools and run["pool"] not in pools and not entries:
        return blocked(found, "other_pools", pools=", ".join(pools))
    if entries and not pools and not catalogue.offering(connection, handler):
        broken = [entry["error"] for entry in entries]
        if all(broken):
            return blocked(found, "handler_broken", load_error=broken[-1].partition(":")[0])
        if health.live_workers(connection):
            newest = max(entries, key=lambda entry: entry["seen_at"])
            offered = f"{newest['distribution']} {newest['version']}"
            return blocked(found, "not_restarted", offered=offered)
    return found


def _not_approved(connection: Connection, run: Row, org: Row, found: Why) -> Why:
    """The same, with what hosts of the run's pool declare now, and the command that approves it."""
    row = definitions.require(connection, org["id"], run["org"], run["definition"])
    handlers = {run["handler"], *from_spec(run["org"], run["definition"], row["spec"]).handlers}
    pending = [one for one in approvals.pending(connection, run["pool"]) if one["handler"] in handlers]
    if not pending:
        starts = "once" if run["available_at"] is None else run["available_at"]
        return blocked(found, "approved_meanwhile", starts_at=starts)
    first = pending[0]
    unless = ""
    if OF_DEFINITIONS.issuperset(first["pending"]):
        unless = f"; a definition that sets {' and '.join(first['pending'])} itself needs no approval"
    declared = {"declared": approvals.what_of(first), "pending": first["handler"], "unless": unless}
    return replace(blocked(found, "not_approved", **declared, digest=""), step=approvals.step_of(first))


def _skipped(
    connection: Connection, row: Row, at: datetime, skip: Row, step: NextStep, definition: Definition
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
        step = NextStep("show_calendar", {**step.subject, "calendar": str(definition.calendar)})
    else:
        misfire = row["spec"].get("misfire", "once")
        cause = f"no worker fired it in time, and misfire = {misfire} ran nothing or a newer one instead"
    kept = (
        f"it is one of {skip['count']} scheduled times in a skip from {to_text(skip['skipped_from'])} "
        f"until {to_text(skip['skipped_until'])}"
    )
    found = _no_run(row, at, "was skipped for", cause, step)
    reason = skip["reason"]
    return replace(found, kind=f"no_run.{reason}", kept=kept, run={**found.run, "reason": reason})


def _no_run(row: Row, at: datetime, is_what: str, cause: str, step: NextStep) -> Why:
    can_backfill = step.verb == "backfill"
    return Why(
        kind="no_run",
        text="{cause}",
        values={"cause": cause},
        whose=None,
        probably=False,
        step=step,
        run={"org": row["org"], "definition": row["name"], "scheduled_for": at},
        what=f"{to_text(at)} {is_what} {row['org']}/{row['name']}",
        kept="it never ran, so nothing was retained",
        retry="a backfill is safe, since it never ran" if can_backfill else "there is nothing to retry",
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
