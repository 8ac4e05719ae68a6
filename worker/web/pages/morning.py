"""The morning page: what needs attention over all orgs, most harmful first, and the day around now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from markupsafe import Markup
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from worker.operations import approvals
from worker.runs import worker_ends
from worker.store import places
from worker.store.health import oldest_unfired
from worker.store.installation import read as read_installation
from worker.store.lists import failures, morning
from worker.web.charts import Series, bars
from worker.web.pages.base import Pages, caller_of, query
from worker.web.pages.due import HOUR, HOURS, MOST_DEFINITIONS, Due, DueByHour, hour_of
from worker.web.pages.links import cause_text, definition_path, hour_path, org_path, search_path
from worker.web.pages.rendering import took

DAY = timedelta(days=1)
# A run that could have started so long ago waits for more than a free slot.
LONG_WAIT = timedelta(minutes=15)
# A scheduled time is overdue after this.
OVERDUE = 60.0
# Causes that the page names; /failures has all.
CAUSES = 5
# Crashed workers and hosts that the page names.
CRASHES = 3
# The layers of the chart, from the bottom.
_ENDED = ("succeeded", "skipped", "cancelled", "refused", "failed")
# What each reason of waiting means for people.
_WAITS = {
    "due": "wait for a free slot",
    "held": "wait for an earlier run of their definition",
    "retry": "wait for their next attempt",
    "snoozed": "wait because their handler asked to be called again",
    "handed_back": "wait since their worker stopped",
    "recovered": "wait since their worker died",
    "no_token": "wait for a token of their org",
    "no_handler": "wait for a worker that offers their handler",
    "no_pool": "wait for a worker or host of their pool",
    "not_approved": "wait until an administrator approves what the hosts of their pool declare",
    "unplaced": "wait for the engine that places them on hosts",
    "budget": "wait for a budget of their org",
    "asleep": "sleep, as their handler asked",
    "answer": "wait for a person's answer",
    "resumed": "wait for a free slot, to go on after a sleep or an answer",
}
# What the error of a token request says about its issuer; the pauses among them.
_PAUSES = ("issuer_paused", "issuer_unavailable", "throttled")
_NO_TOKEN = {
    "issuer_paused": "Issuer {} is paused: it does not respond",
    "issuer_unavailable": "Issuer {} does not respond",
    "throttled": "Issuer {} is paused: it throttles token requests",
    "answer_too_large": "Issuer {} gives tokens that are too large",
    "credentials_rejected": "Issuer {} rejects credentials",
}
# Reasons of waiting that nothing ends but a person.
_STUCK = ("no_handler", "no_pool", "not_approved", "unplaced")
_LEVELS = ("bad", "warn", "quiet")


@dataclass(frozen=True, slots=True)
class Matter:
    """Something that needs attention: how bad, in words, and where to go."""

    level: str
    title: str
    about: str
    href: str
    link: str


class MorningPage:
    def __init__(self, pages: Pages, installation: str) -> None:
        self._pages = pages
        self._installation = installation
        self._hours = EndedByHour()
        self._due = DueByHour(pages.database, pages.clock)

    def routes(self) -> Sequence[Route]:
        return (Route("/", self._morning),)

    async def _morning(self, request: Request) -> Response:
        caller = caller_of(request)
        query(request)
        if caller.org is not None:
            return RedirectResponse(org_path(caller.org), 303)
        now = self._pages.clock.now()
        due = await self._due.read(caller)

        def work(connection: Connection) -> dict[str, Any]:
            ended = self._hours.read(connection, now)
            return {
                "matters": matters(
                    connection, now, is_admin=caller.role == "admin", installation=self._installation
                ),
                "running": morning.running_for_all_orgs(connection),
                "ended": _ended_chart(ended),
                "due": _due_chart(due, now),
                "due_of": MOST_DEFINITIONS if due.is_part else None,
                "totals": _totals(ended),
            }

        return await self._pages.show(request, "morning.html", work)


class EndedByHour:
    """Runs that ended by hour and state. Hours that are long over are read once and kept."""

    def __init__(self) -> None:
        self._kept: dict[datetime, Mapping[str, int]] = {}

    def read(self, connection: Connection, now: datetime) -> Mapping[datetime, Mapping[str, int]]:
        """The last 24 hours, the current one included."""
        last = hour_of(now)
        hours = [last - HOUR * back for back in reversed(range(24))]
        kept = self._kept
        # A worker may write the outcomes of the previous hour late.
        missing = [hour for hour in hours if hour not in kept or hour >= last - HOUR]
        found: dict[datetime, dict[str, int]] = {hour: {} for hour in missing}
        counted = morning.ended_by_hour_for_all_orgs(connection, missing[0], last + HOUR)
        for (hour, state), runs in counted.items():
            if hour in found:
                found[hour][state] = runs
        # Replaced as a whole: pages are made in several threads.
        self._kept = {hour: found.get(hour, kept.get(hour, {})) for hour in hours}
        return self._kept


def matters(connection: Connection, now: datetime, *, is_admin: bool, installation: str) -> list[Matter]:
    """What needs attention, most harmful first; `installation` is the word of worker.toml."""
    found = [
        *_of_installation(connection, installation),
        *_of_workers(connection, now),
        *_of_crashes(connection, now),
        *_of_causes(connection, "failed", now),
        *_of_causes(connection, "refused", now),
        *_of_tokens(connection, is_admin=is_admin),
        *_of_inventory(connection),
        *_of_waiting(connection, now),
    ]
    return sorted(found, key=lambda matter: _LEVELS.index(matter.level))


def _of_installation(connection: Connection, word: str) -> Iterator[Matter]:
    found = read_installation(connection)
    if found.state(word) == "differs":
        yield Matter(
            "bad",
            f"The database belongs to the installation {found.word}, and worker.toml to {word}",
            "Nothing is provisioned, rotated or deleted at a provider. Correct the setting, or run "
            "installation adopt --same after a restore, installation adopt --new for a copy.",
            "/orgs",
            "Orgs",
        )


def _of_workers(connection: Connection, now: datetime) -> Iterator[Matter]:
    workers = morning.workers_for_all_orgs(connection, now)
    if not workers.up:
        yield Matter("bad", "No worker is running", "Nothing starts until one does.", "/workers", "Workers")
    for level, rows, state, about in (
        (
            "bad",
            workers.missing,
            "missing",
            "The lease expired without a stop; others take over the runs.",
        ),
        ("warn", workers.late, "late", "It should have renewed its lease by now."),
    ):
        if rows:
            hosts = _some([row["host"] for row in rows])
            title = f"{_count(len(rows), 'worker')} {state}"
            yield Matter(level, title, f"{hosts}. {about}", "/workers", "Workers")
    overdue = oldest_unfired(connection)
    if overdue is not None and overdue[2] > OVERDUE:
        org, name, seconds = overdue
        yield Matter(
            "bad",
            "Scheduled times are overdue",
            f"The oldest, of {org}/{name}, is {took(timedelta(seconds=seconds))} late.",
            definition_path(org, name),
            "Definition",
        )


def _of_crashes(connection: Connection, now: datetime) -> Iterator[Matter]:
    # A host that ran nothing may have stopped while no worker answered.
    for level, silent, what in (("warn", False, "crashed"), ("quiet", True, "went silent")):
        found = morning.crashed_for_all_orgs(connection, now - DAY, silent=silent)
        if not found.total:
            continue
        shown = found.examples[:CRASHES]
        rest = f"; and {found.total - len(shown):,} more" if found.total > len(shown) else ""
        ends = "; ".join(worker_ends.named_end(row, now) for row in shown)
        noun = "host" if all(row["of_host"] for row in shown) else "worker"
        title = f"{_count(found.total, noun)} {what}"
        yield Matter(level, title, f"{ends}{rest}.", "/workers", "Workers")


def _of_causes(connection: Connection, state: str, now: datetime) -> Iterator[Matter]:
    causes, more = failures.by_cause_for_all_orgs(connection, state, now - DAY)
    unsolved = [cause for cause in causes if cause["open_runs"]]
    for cause in unsolved[:CAUSES]:
        retried = cause["runs"] - cause["open_runs"]
        also = f", {retried} more were retried" if retried else ""
        yield Matter(
            "bad",
            cause["message"],
            f"{_count(cause['open_runs'], 'run')} {state} in {_count(cause['open_orgs'], 'org')}{also}. "
            f"Last: {cause['last_at']:%H:%M} UTC.",
            search_path(cause_text(cause)),
            "Runs",
        )
    if len(unsolved) > CAUSES or more:
        rest = len(unsolved) - CAUSES
        title = f"{rest} more causes of {state} runs" if rest > 0 else f"More {state} runs than are read here"
        yield Matter("bad", title, "All causes of the last day.", f"/failures?state={state}", "Failures")


def _of_tokens(connection: Connection, *, is_admin: bool) -> Iterator[Matter]:
    dead = morning.dead_credentials_for_all_orgs(connection)
    if dead.total:
        orgs = _some([f"{row['org']} ({row['last_error']})" for row in dead.examples], dead.total)
        title = f"{_count(dead.total, 'credential')} rejected by the issuer"
        # The page of credentials is for admins.
        href, link = ("/credentials", "Credentials") if is_admin else ("/orgs?broken=true", "Orgs")
        yield Matter("bad", title, orgs, href, link)
    for (issuer, code), runs in morning.without_token_for_all_orgs(connection).items():
        what = _NO_TOKEN.get(code, "No token from issuer {}").format(issuer)
        # Each worker pauses an issuer for itself, in memory: the waiting runs are the common record.
        own = " Each worker pauses the issuer for itself; these runs say why they wait." * (code in _PAUSES)
        yield Matter(
            "warn",
            f"{what} ({code})",
            f"{_count(runs, 'run')} of its orgs wait for a token.{own}",
            search_path("state:waiting reason:no_token"),
            "Runs",
        )


def _of_waiting(connection: Connection, now: datetime) -> Iterator[Matter]:
    for wait in morning.waiting_for_all_orgs(connection):
        reason = wait["reason"]
        if reason == "no_token":
            continue
        since = now - wait["since"]
        is_long = since > LONG_WAIT and reason in ("due", "handed_back", "recovered", "resumed")
        level = "bad" if reason in _STUCK else "warn" if is_long else "quiet"
        about = f"In {_count(wait['orgs'], 'org')}."
        if since > timedelta():
            about += f" The oldest could have started {took(since)} ago."
        title = f"{_count(wait['runs'], 'run')} {_WAITS.get(reason, f'wait ({reason})')}"
        yield Matter(level, title, about, search_path(f"state:waiting reason:{reason}"), "Runs")


def _of_inventory(connection: Connection) -> Iterator[Matter]:
    broken = morning.broken_handlers(connection)
    if broken.total:
        names = _some([row["name"] for row in broken.examples], broken.total)
        title = f"{_count(broken.total, 'handler')} {'does' if broken.total == 1 else 'do'} not load"
        yield Matter("bad", title, names, "/handlers", "Handlers")
    if of_hosts := places.broken(connection):
        names = _some(list(dict.fromkeys(f"{row['name']} in pool {row['pool']}" for row in of_hosts)))
        title = (
            f"{_count(len(of_hosts), 'handler')} of hosts {'does' if len(of_hosts) == 1 else 'do'} not load"
        )
        yield Matter("warn", title, names, "/handlers", "Handlers")
    if pending := approvals.pending(connection):
        names = _some(list(dict.fromkeys(f"{row['handler']} in pool {row['pool']}" for row in pending)))
        title = f"{_count(len(pending), 'declaration')} of hosts not approved"
        yield Matter("warn", title, names, "/workers#approvals", "Workers")
    paused = morning.paused_definitions_for_all_orgs(connection)
    if paused.total:
        names = _some([f"{row['org']}/{row['name']}" for row in paused.examples], paused.total)
        title = f"{_count(paused.total, 'definition')} paused"
        yield Matter("warn", title, names, "/definitions?state=paused", "Definitions")


def _ended_chart(ended: Mapping[datetime, Mapping[str, int]]) -> Markup:
    series = [
        Series(state, state, [by_state.get(state, 0) for by_state in ended.values()]) for state in _ENDED
    ]
    labels, ticks = _axis(ended)
    return bars(
        series,
        labels,
        title="Runs that ended, by hour (UTC)",
        ticks=ticks,
        links=[hour_path(hour, by_state) for hour, by_state in ended.items()],
    )


def _due_chart(due: Due, now: datetime) -> Markup:
    hours = [hour_of(now) + HOUR * ahead for ahead in range(HOURS)]
    labels, ticks = _axis(hours)
    counts = [due.by_hour.get(hour, 0) for hour in hours]
    return bars(
        [Series("due", "due", counts)],
        labels,
        title="Scheduled times that come due, by hour (UTC)",
        ticks=ticks,
    )


def _axis(hours: Iterable[datetime]) -> tuple[list[str], list[str]]:
    """Labels of all hours, and the ticks of every sixth."""
    known = list(hours)
    ticks = [f"{hour:%H:%M}" if at % 6 == 0 else "" for at, hour in enumerate(known)]
    return [f"{hour:%d %b %H:%M}" for hour in known], ticks


def _totals(ended: Mapping[datetime, Mapping[str, int]]) -> dict[str, int]:
    """Runs of the last day by final state."""
    return {state: sum(by_state.get(state, 0) for by_state in ended.values()) for state in _ENDED}


def _some(names: Sequence[str], count: int | None = None) -> str:
    """A few names, and how many more there are."""
    # Two credentials of an org read the same.
    shown = list(dict.fromkeys(names[: morning.SHOWN]))
    rest = (len(names) if count is None else count) - min(len(names), morning.SHOWN)
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")


def _count(number: int, noun: str) -> str:
    """The number with its noun; the bound of a count reads as "at least"."""
    least = "at least " if number >= morning.MOST else ""
    return f"{least}{number:,} {noun}{'' if number == 1 else 's'}"
