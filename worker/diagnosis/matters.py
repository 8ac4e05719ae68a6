"""Matters: what needs attention over all orgs, as data; command line, API and console render them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, TypedDict

from sqlalchemy import Connection

from worker.ids import ALL_ORGS
from worker.model.definitions.units import took
from worker.model.runs import worker_ends
from worker.model.runs.causes import CAUSES as MEANINGS
from worker.model.runs.causes import READY, STUCK, Whose, whose_error, whose_token
from worker.model.runs.next_steps import NextStep
from worker.operations import approvals
from worker.store import places
from worker.store.dialect import Row
from worker.store.health import oldest_unfired
from worker.store.installation import read as read_installation
from worker.store.lists import failures, morning
from worker.store.lists.failures import Mismatch, mismatches
from worker.store.lists.morning import NAMED, Named
from worker.store.lists.tabs import LONG_WAIT, OVERDUE
from worker.store.lists.usage import forecast_text, forecasts
from worker.store.prices import currency_of

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
# Causes that are listed; /failures has all.
CAUSES = 5
Level = Literal["bad", "warn", "quiet"]
LEVELS: Sequence[Level] = ("bad", "warn", "quiet")
# What the provider returned, by reason and detail of the refused runs.
_MISMATCHES = {
    ("org_mismatch", "other_org"): "another org's token",
    ("org_mismatch", "org_missing"): "a token that names no org",
    ("client_mismatch", "other_client"): "another client's token",
    ("client_mismatch", "client_missing"): "a token that names no client",
}
# What each reason of waiting means for people; `s` and `their` follow the number of runs, `pools` that of
# pools.
_WAITS = {
    "due": "wait{s} for a free slot",
    "held": "wait{s} for an earlier run of {their} definition",
    "retry": "wait{s} for {their} next attempt",
    "snoozed": "wait{s} because {their} handler asked to be called again",
    "handed_back": "wait{s} since {their} worker stopped",
    "recovered": "wait{s} since {their} worker died",
    "no_token": "wait{s} for a token of {their} org",
    "no_handler": "wait{s} for a worker that offers {whats}",
    "no_pool": "wait{s} for a worker or host of {pools} {whats}",
    "not_approved": "wait{s} until an administrator approves what hosts declare of {whats}",
    "unplaced": "wait{s} for the engine that places runs on hosts of {pools} {whats}",
    "budget": "wait{s} for the budget of {whats}",
    "asleep": "sleep{s}, as {their} handler asked",
    "answer": "wait{s} for a person's answer",
    "children": "wait{s} for the runs that {they} started",
    "batch": "wait{s} for {their} requests to a model, which are in a batch",
    "window": "wait{s} until other runs of {their} parent have ended",
    "resumed": "wait{s} for a free slot, to go on after a sleep or an answer",
}
# What the names of such a reason are.
_WHATS = {"no_pool": "pools", "unplaced": "pools", "no_handler": "handlers", "budget": "budgets"}
# What the error of a token request says about its issuer; the pauses among them.
_PAUSES = ("issuer_paused", "issuer_unavailable", "throttled")
_NO_TOKEN = {
    "issuer_paused": "Issuer {} is paused: it does not respond",
    "issuer_unavailable": "Issuer {} does not respond",
    "throttled": "Issuer {} is paused: it throttles token requests",
    "answer_too_large": "Issuer {} gives tokens that are too large",
    "credentials_rejected": "Issuer {} rejects credentials",
}
_WORKERS = NextStep("check_workers")


class MatterRow(TypedDict):
    """Something that needs attention. `next` is a command; `subject` has the names that it is about, of orgs,
    pools and others up to three, and those that `next` takes.
    """

    level: Level
    title: str
    about: str
    next: str
    kind: str
    whose: Whose
    since: datetime | None
    subject: dict[str, str | list[str]]
    verb: str


class Overview(TypedDict):
    """What needs attention, most harmful first, the runs that run now and those that ended in 24 hours."""

    matters: list[MatterRow]
    running: int
    ended: dict[str, int]


@dataclass(frozen=True, slots=True)
class Matter:
    """Something that needs attention: `kind` is a stable word, `whose` who can do something about it.

    `subject` has up to three names of each sort, such as "orgs". `since` is None if it is not known.
    """

    kind: str
    level: Level
    whose: Whose
    title: str
    about: str
    step: NextStep
    subject: Mapping[str, Sequence[str]] = field(default_factory=dict)
    since: datetime | None = None

    def as_row(self) -> MatterRow:
        named = {sort: list(names) for sort, names in self.subject.items()}
        return MatterRow(
            level=self.level,
            title=self.title,
            about=self.about,
            next=self.step.command,
            kind=self.kind,
            whose=self.whose,
            since=self.since,
            subject={**named, **self.step.subject},
            verb=self.step.verb,
        )


def overview(connection: Connection, now: datetime, *, installation: str, is_admin: bool = True) -> Overview:
    """The morning page as a row."""
    found = matters(connection, now, installation=installation, is_admin=is_admin)
    hour = now.replace(minute=0, second=0, microsecond=0)
    ended: dict[str, int] = {}
    by_hour = morning.ended_by_hour(connection, ALL_ORGS, hour - 23 * HOUR, hour + HOUR)
    for (_, state), runs in sorted(by_hour.items(), key=lambda one: one[0][1]):
        ended[state] = ended.get(state, 0) + runs
    return Overview(
        matters=[each.as_row() for each in found],
        running=morning.running(connection, ALL_ORGS),
        ended=ended,
    )


def matters(
    connection: Connection, now: datetime, *, installation: str, is_admin: bool = True
) -> list[Matter]:
    """What needs attention, most harmful first; `installation` is the word of worker.toml.

    Without `is_admin` the next steps avoid the pages of administrators.
    """
    mixed_up = mismatches(connection, ALL_ORGS, now - DAY)
    known = {(one.reason, org) for one in mixed_up for org in one.orgs}
    found = [
        # Above all others: a boundary between orgs does not hold at the provider.
        *map(of_mismatch, mixed_up),
        *_of_installation(connection, installation),
        *_of_workers(connection, now),
        *_of_crashes(connection, now),
        *_of_causes(connection, "failed", now),
        *_of_causes(connection, "refused", now, known),
        *_of_late(connection),
        *_of_forecasts(connection),
        *_of_tokens(connection, is_admin=is_admin),
        *_of_inventory(connection),
        *_of_waiting(connection, now),
    ]
    return sorted(found, key=lambda matter: LEVELS.index(matter.level))


def what_of(found: Mismatch) -> str:
    """What the provider returned, in words."""
    return _MISMATCHES.get((found.reason, found.detail), "a token that is not the org's own")


def of_mismatch(found: Mismatch) -> Matter:
    """A provider that gives orgs tokens that are not theirs."""
    named = Named(len(found.orgs), found.orgs[:NAMED])
    if named.total == 1:
        step = NextStep("check_org", {"org": named.names[0]})
    else:
        step = _search(f"state:refused reason:{found.reason} since:{found.first_at:%Y-%m-%d}")
    were = "1 run was" if found.runs == 1 else f"{found.runs:,} runs were"
    return Matter(
        found.reason,
        "bad",
        "provider",
        f"The provider returns {what_of(found)} for {listed(named)}",
        f"{were} refused, and no handler was called. Last: {found.last_at:%H:%M} UTC. Correct the "
        "credentials, or the provider or proxy that mixes orgs up.",
        step,
        {"orgs": named.names},
        found.first_at,
    )


def _of_installation(connection: Connection, word: str) -> Iterator[Matter]:
    found = read_installation(connection)
    if found.state(word) == "differs":
        yield Matter(
            "installation_differs",
            "bad",
            "operator",
            f"The database belongs to the installation {found.word}, and worker.toml to {word}",
            "Nothing is provisioned, rotated or deleted at a provider. Correct the setting, or run "
            "installation adopt --same after a restore, installation adopt --new for a copy.",
            NextStep("correct_installation"),
        )


def _of_workers(connection: Connection, now: datetime) -> Iterator[Matter]:
    workers = morning.workers(connection, ALL_ORGS, now)
    if not workers.up:
        yield Matter(
            "no_worker",
            "bad",
            "operator",
            "No worker is running",
            "Nothing starts until one does.",
            _WORKERS,
        )
    levels: tuple[tuple[Level, Sequence[Row], str, str, str], ...] = (
        (
            "bad",
            workers.missing,
            "missing",
            "lease_until",
            "The lease expired without a stop; others take over the runs.",
        ),
        ("warn", workers.late, "late", "renewed_at", "It should have renewed its lease by now."),
    )
    for level, rows, state, instant, about in levels:
        if rows:
            hosts = _named(row["host"] for row in rows)
            yield Matter(
                f"worker_{state}",
                level,
                "operator",
                f"{_count(len(rows), 'worker')} {state}",
                f"On {listed(hosts)}. {about}",
                _WORKERS,
                {"workers": [row["id"] for row in rows[:NAMED]], "hosts": hosts.names},
                min(row[instant] for row in rows),
            )
    overdue = oldest_unfired(connection)
    if overdue is not None and overdue[2] > OVERDUE.total_seconds():
        org, name, seconds = overdue
        late = timedelta(seconds=seconds)
        yield Matter(
            "overdue",
            "bad",
            "operator",
            "Scheduled times are overdue",
            f"The oldest, of {org}/{name}, is {took(late)} late.",
            NextStep("show_definition", {"org": org, "definition": name}),
            since=now - late,
        )


def _of_crashes(connection: Connection, now: datetime) -> Iterator[Matter]:
    # A host that ran nothing may have stopped while no worker answered.
    kinds: tuple[tuple[Level, bool, str], ...] = (("warn", False, "crashed"), ("quiet", True, "went silent"))
    for level, silent, what in kinds:
        found = morning.crashed(connection, ALL_ORGS, now - DAY, silent=silent)
        if not found.total:
            continue
        ends = [worker_ends.named_end(row, now) for row in found.examples]
        rest = f"; and {found.total - len(ends):,} more" if found.total > len(ends) else ""
        noun = "host" if all(row["of_host"] for row in found.examples) else "worker"
        yield Matter(
            "worker_silent" if silent else "worker_crashed",
            level,
            "operator",
            f"{_count(found.total, noun)} {what}",
            f"{'; '.join(ends)}{rest}.",
            _WORKERS,
            {"workers": [row["id"] for row in found.examples]},
            min(row["ended_at"] for row in found.examples),
        )


def _of_causes(
    connection: Connection, state: str, now: datetime, known: Collection[tuple[str, str]] = ()
) -> Iterator[Matter]:
    """Causes of runs without a retry; those of `known` reasons and orgs have a matter of their own."""
    causes, more = failures.by_cause(connection, ALL_ORGS, state, now - DAY)
    unsolved = [cause for cause in causes if cause["open_runs"] and not _is_known(cause, known)]
    for cause in unsolved[:CAUSES]:
        retried = cause["runs"] - cause["open_runs"]
        also = f", {retried:,} more were retried" if retried else ""
        orgs = listed(Named(cause["open_orgs"], cause["named"]), at_least=more)
        yield Matter(
            f"{state}_runs",
            "bad",
            _whose(cause),
            cause["message"],
            f"{_count(cause['open_runs'], 'run')} {state} in {orgs}{also}. "
            f"Last: {cause['last_at']:%H:%M} UTC.",
            _search(failures.cause_text(cause)),
            {"orgs": cause["named"]},
            cause["first_at"],
        )
    if len(unsolved) > CAUSES or more:
        rest = len(unsolved) - CAUSES
        named = f"{rest} more cause{'' if rest == 1 else 's'} of {state} runs"
        yield Matter(
            f"more_{state}_runs",
            "bad",
            "operator",
            named if rest > 0 else f"More {state} runs than are read here",
            "All causes of the last day.",
            NextStep("show_failures", {"state": state}),
        )


def _whose(cause: failures.Cause) -> Whose:
    kind, _, message = cause["message"].partition(": ")
    if cause["reason"] == "error":
        return whose_error({"type": kind, "message": message})
    return _whose_is(cause["state"], cause["reason"])


def _whose_is(state: str, reason: str) -> Whose:
    meaning = MEANINGS.get((state, reason))
    return (meaning and meaning.whose) or "operator"


def _is_known(cause: failures.Cause, known: Collection[tuple[str, str]]) -> bool:
    # Of more orgs than are named, some may work again.
    return 0 < cause["open_orgs"] == len(cause["named"]) and all(
        (cause["reason"], org) in known for org in cause["named"]
    )


def _of_late(connection: Connection) -> Iterator[Matter]:
    late = morning.late_definitions(connection, ALL_ORGS)
    if not late.total:
        return
    first = late.examples[0]
    only = NextStep("show_definition", {"org": first["org"], "definition": first["name"]})
    due = [f"{row['org']}/{row['name']} (due {row['late_at']:%Y-%m-%d %H:%M} UTC)" for row in late.examples]
    yield Matter(
        "late",
        "bad",
        "operator",
        f"{_count(late.total, 'definition')} not done by {'its' if late.total == 1 else 'their'} deadline",
        f"{listed(Named(late.total, due))}. A run that succeeds ends it.",
        only if late.total == 1 else NextStep("list_late_orgs"),
        {
            "orgs": _named(row["org"] for row in late.examples).names,
            "definitions": [f"{row['org']}/{row['name']}" for row in late.examples],
        },
        min(row["late_at"] for row in late.examples),
    )


def _of_forecasts(connection: Connection) -> Iterator[Matter]:
    ahead = forecasts(connection, ALL_ORGS, limit=NAMED + 1)
    if not ahead:
        return
    currency = currency_of(connection) or ""
    said = "; ".join(forecast_text(level, currency) or "" for level in ahead[:NAMED])
    more = " There are others." if len(ahead) > NAMED else ""
    only = len(ahead) == 1
    yield Matter(
        "forecast",
        "warn",
        "limit",
        "the budget of money of one org will not last" if only else "budgets of money will not last",
        f"{said[:1].upper()}{said[1:]}.{more}",
        NextStep("show_budgets", {"org": ahead[0]["org"]}) if only else NextStep("list_usage"),
        {"orgs": [level["org"] for level in ahead[:NAMED]]},
    )


def _of_tokens(connection: Connection, *, is_admin: bool) -> Iterator[Matter]:
    dead = morning.dead_credentials(connection, ALL_ORGS)
    if dead.total:
        orgs = Named(dead.total, [f"{row['org']} ({row['last_error']})" for row in dead.examples])
        yield Matter(
            "credentials_rejected",
            "bad",
            "org",
            f"{_count(dead.total, 'credential')} rejected by the issuer",
            listed(orgs),
            # The page of credentials is for admins.
            NextStep("list_credentials" if is_admin else "list_broken_orgs"),
            {"orgs": _named(row["org"] for row in dead.examples).names},
        )
    for issuer, code, runs, named in morning.without_token(connection, ALL_ORGS):
        what = _NO_TOKEN.get(code, "No token from issuer {}").format(issuer)
        # Each worker pauses an issuer for itself, in memory: the waiting runs are the common record.
        own = " Each worker pauses the issuer for itself; these runs say why they wait." * (code in _PAUSES)
        yield Matter(
            f"no_token:{code}",
            "warn",
            whose_token(code)[0],
            f"{what} ({code})",
            f"{_count(runs, 'run')} of {listed(named, at_least=runs >= morning.MAX_ROWS)} "
            f"{'waits' if runs == 1 else 'wait'} for a token.{own}",
            _search("state:waiting reason:no_token"),
            {"issuers": [issuer], "orgs": named.names},
        )


def _of_waiting(connection: Connection, now: datetime) -> Iterator[Matter]:
    for reason, runs, start, orgs, whats in morning.waiting(connection, ALL_ORGS):
        if reason == "no_token":
            continue
        since = now - start
        is_long = since > LONG_WAIT and reason in READY
        least = runs >= morning.MAX_ROWS
        about = f"In {listed(orgs, at_least=least)}."
        if since > timedelta():
            about += f" The oldest could have started {took(since)} ago."
        waits = _WAITS.get(reason, f"wait{{s}} ({reason})").format(
            s="s" if runs == 1 else "",
            their="its" if runs == 1 else "their",
            they="it" if runs == 1 else "they",
            pools="pool" if whats.total == 1 else "pools",
            whats=listed(whats, at_least=least) or "their orgs",
        )
        yield Matter(
            f"waiting:{reason}",
            "bad" if reason in STUCK else "warn" if is_long else "quiet",
            _whose_is("waiting", reason),
            f"{_count(runs, 'run')} {waits}",
            about,
            _search(f"state:waiting reason:{reason}"),
            {"orgs": orgs.names, **({_WHATS.get(reason, "handlers"): whats.names} if whats.total else {})},
            start if since > timedelta() else None,
        )


def _of_inventory(connection: Connection) -> Iterator[Matter]:
    broken = morning.broken_handlers(connection)
    if broken.total:
        named = Named(broken.total, [row["name"] for row in broken.examples])
        yield Matter(
            "handlers_broken",
            "bad",
            "handler",
            f"{_count(named.total, 'handler')} {'does' if named.total == 1 else 'do'} not load",
            listed(named),
            _handlers(named.total, named.names),
            {"handlers": named.names},
        )
    if of_hosts := places.broken(connection):
        places_named = _named(f"{row['name']} in pool {row['pool']}" for row in of_hosts)
        names = list(dict.fromkeys(row["name"] for row in of_hosts))
        yield Matter(
            "host_handlers_broken",
            "warn",
            "handler",
            f"{_count(len(of_hosts), 'handler')} of hosts {'does' if len(of_hosts) == 1 else 'do'} not load",
            listed(places_named),
            _handlers(len(names), names),
            {"handlers": names[:NAMED]},
        )
    if pending := approvals.pending(connection):
        places_named = _named(f"{row['handler']} in pool {row['pool']}" for row in pending)
        yield Matter(
            "approvals_pending",
            "warn",
            "operator",
            f"{_count(len(pending), 'declaration')} of hosts not approved",
            listed(places_named),
            NextStep("list_all_approvals"),
            {
                "handlers": _named(row["handler"] for row in pending).names,
                "pools": _named(row["pool"] for row in pending).names,
            },
        )
    paused = morning.paused_definitions(connection, ALL_ORGS)
    if paused.total:
        named = Named(paused.total, [f"{row['org']}/{row['name']}" for row in paused.examples])
        yield Matter(
            "definitions_paused",
            "warn",
            "operator",
            f"{_count(paused.total, 'definition')} paused",
            listed(named),
            NextStep("list_paused"),
            {"definitions": named.names},
            paused.examples[0]["paused_at"] if paused.total == 1 else None,
        )


def _handlers(total: int, names: Sequence[str]) -> NextStep:
    return NextStep("show_handler", {"handler": names[0]}) if total == 1 else NextStep("list_handlers")


def _search(text: str) -> NextStep:
    return NextStep("search_runs", {"query": text})


def _named(names: Iterable[str]) -> Named:
    """Each name once, the first three of them named."""
    each = list(dict.fromkeys(names))
    return Named(len(each), each[:NAMED])


def listed(named: Named, *, at_least: bool = False) -> str:
    """`org_a`, `org_a and org_b`, or `org_a, org_b, org_c and 9 more`; empty without a name."""
    # Two credentials of an org read the same.
    shown = list(dict.fromkeys(named.names))
    rest = named.total - len(named.names)
    if rest > 0:
        return f"{', '.join(shown)} and {'at least ' if at_least else ''}{rest:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _count(number: int, noun: str) -> str:
    """The number with its noun; the bound of a count reads as "at least"."""
    least = "at least " if number >= morning.MAX_ROWS else ""
    return f"{least}{number:,} {noun}{'' if number == 1 else 's'}"
