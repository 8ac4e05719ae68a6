"""Matters: what needs attention over all orgs, as data; command line, API and console render them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from worker.definitions.units import took
from worker.operations import approvals
from worker.runs.next_steps import NextStep
from worker.store import places
from worker.store.health import oldest_unfired
from worker.store.installation import read as read_installation
from worker.store.lists import failures, morning

DAY = timedelta(days=1)
# A run that could have started so long ago waits for more than a free slot.
LONG_WAIT = timedelta(minutes=15)
# A scheduled time is overdue after this.
OVERDUE = 60.0
# Causes that the page names; /failures has all.
CAUSES = 5
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
_WORKERS = NextStep("check_workers")


@dataclass(frozen=True, slots=True)
class Matter:
    """Something that needs attention: how bad, in words, and what to do next."""

    level: str
    title: str
    about: str
    step: NextStep


def matters(connection: Connection, now: datetime, *, is_admin: bool, installation: str) -> list[Matter]:
    """What needs attention, most harmful first; `installation` is the word of worker.toml."""
    found = [
        *_of_installation(connection, installation),
        *_of_workers(connection, now),
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
            NextStep("correct_installation"),
        )


def _of_workers(connection: Connection, now: datetime) -> Iterator[Matter]:
    workers = morning.workers_for_all_orgs(connection, now)
    if not workers.up:
        yield Matter("bad", "No worker is running", "Nothing starts until one does.", _WORKERS)
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
            yield Matter(level, title, f"{hosts}. {about}", _WORKERS)
    overdue = oldest_unfired(connection)
    if overdue is not None and overdue[2] > OVERDUE:
        org, name, seconds = overdue
        yield Matter(
            "bad",
            "Scheduled times are overdue",
            f"The oldest, of {org}/{name}, is {took(timedelta(seconds=seconds))} late.",
            NextStep("show_definition", {"org": org, "definition": name}),
        )


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
            _search(failures.cause_text(cause)),
        )
    if len(unsolved) > CAUSES or more:
        rest = len(unsolved) - CAUSES
        title = f"{rest} more causes of {state} runs" if rest > 0 else f"More {state} runs than are read here"
        yield Matter("bad", title, "All causes of the last day.", NextStep("show_failures", {"state": state}))


def _of_tokens(connection: Connection, *, is_admin: bool) -> Iterator[Matter]:
    dead = morning.dead_credentials_for_all_orgs(connection)
    if dead.total:
        orgs = _some([f"{row['org']} ({row['last_error']})" for row in dead.examples], dead.total)
        title = f"{_count(dead.total, 'credential')} rejected by the issuer"
        # The page of credentials is for admins.
        yield Matter("bad", title, orgs, NextStep("list_credentials" if is_admin else "list_broken_orgs"))
    for (issuer, code), runs in morning.without_token_for_all_orgs(connection).items():
        what = _NO_TOKEN.get(code, "No token from issuer {}").format(issuer)
        # Each worker pauses an issuer for itself, in memory: the waiting runs are the common record.
        own = " Each worker pauses the issuer for itself; these runs say why they wait." * (code in _PAUSES)
        yield Matter(
            "warn",
            f"{what} ({code})",
            f"{_count(runs, 'run')} of its orgs wait for a token.{own}",
            _search("state:waiting reason:no_token"),
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
        yield Matter(level, title, about, _search(f"state:waiting reason:{reason}"))


def _of_inventory(connection: Connection) -> Iterator[Matter]:
    broken = morning.broken_handlers(connection)
    if broken.total:
        names = _some([row["name"] for row in broken.examples], broken.total)
        title = f"{_count(broken.total, 'handler')} {'does' if broken.total == 1 else 'do'} not load"
        yield Matter("bad", title, names, NextStep("list_handlers"))
    if of_hosts := places.broken(connection):
        names = _some(list(dict.fromkeys(f"{row['name']} in pool {row['pool']}" for row in of_hosts)))
        title = (
            f"{_count(len(of_hosts), 'handler')} of hosts {'does' if len(of_hosts) == 1 else 'do'} not load"
        )
        yield Matter("warn", title, names, NextStep("list_handlers"))
    if pending := approvals.pending(connection):
        names = _some(list(dict.fromkeys(f"{row['handler']} in pool {row['pool']}" for row in pending)))
        title = f"{_count(len(pending), 'declaration')} of hosts not approved"
        yield Matter("warn", title, names, NextStep("list_all_approvals"))
    paused = morning.paused_definitions_for_all_orgs(connection)
    if paused.total:
        names = _some([f"{row['org']}/{row['name']}" for row in paused.examples], paused.total)
        title = f"{_count(paused.total, 'definition')} paused"
        yield Matter("warn", title, names, NextStep("list_paused"))


def _search(text: str) -> NextStep:
    return NextStep("search_runs", {"query": text})


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
