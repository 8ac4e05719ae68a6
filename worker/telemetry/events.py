"""Every event the worker can report, in one table; logs and metrics are listeners.

An event is said where it happens, by `emit("run.ended", org=…, …)`. To add one, add
a line to the table: a test compares it with every call in the package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of event: its name, the level it is logged at, its fields, and what it means."""

    name: str
    level: Level
    fields: tuple[str, ...]
    meaning: str
    names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.fields))


class Emitted(NamedTuple):
    """One event that happened; a field that does not apply is left out or None."""

    event: Event
    fields: Mapping[str, Any]


Listener = Callable[[Emitted], object]


def _table(*rows: tuple[str, Level, str, str]) -> dict[str, Event]:
    return {name: Event(name, level, tuple(fields.split()), meaning) for name, level, fields, meaning in rows}


# `org` is the org's code, `definition` its name, `run` the run's id, `seconds` a duration,
# `error` the class of an exception or its stable code, `error_cause` what errors of one
# cause have in common. No field holds a secret or a claim set.
EVENTS: Mapping[str, Event] = _table(
    # The worker's own life.
    ("worker.started", "info", "worker host pid version database", "a worker incarnation begins"),
    ("worker.ready", "info", "worker seconds", "registered, schema current, admitting"),
    ("worker.draining", "info", "worker running seconds", "no run starts any more; it lasts at most so long"),
    ("worker.stopped", "info", "worker exit_code", "every run ended or handed back, all written"),
    (
        "loop.blocked",
        "warning",
        "org run attempt handler where seconds",
        "the worker's loop has stood still for so long, because of an inline handler where one is named",
    ),
    (
        "loop.failed",
        "error",
        "loop error org run attempt",
        "a loop met an error it did not expect and goes on",
    ),
    (
        "clock.went_back",
        "warning",
        "seconds",
        "the wall clock moved back: nothing is due until it has caught up",
    ),
    # The database and the lease.
    ("database.lost", "warning", "error", "the database does not answer; it is tried again for ever"),
    ("database.back", "info", "seconds", "the database answers again, after so long"),
    ("lease.late", "warning", "error remaining", "a renewal failed; the lease ends in this many seconds"),
    (
        "lease.lost",
        "error",
        "late",
        "the lease passed unrenewed, by this many seconds; others may own the runs",
    ),
    # Definition to run.
    ("runs.fired", "info", "count overlapped skips", "due instants became runs, in one transaction"),
    (
        "definition.failed",
        "error",
        "org definition error",
        "the next instants of a definition cannot be computed",
    ),
    (
        "template.progress",
        "info",
        "template done total",
        "the last change of a template has reached so many of the orgs",
    ),
    (
        "tzdata.changed",
        "info",
        "version definitions",
        "another release of the time zone database: so many definitions are due at other instants",
    ),
    (
        "definition.paused",
        "error",
        "org definition failures",
        "so many runs failed one after the other: nothing of it is due until it is resumed",
    ),
    ("backfill.ended", "info", "org definition instants", "every instant of a backfill has run to its end"),
    (
        "schedule.overdue",
        "error",
        "org definition seconds",
        "an instant came so many seconds ago and was not fired; this is the oldest",
    ),
    ("schedule.caught_up", "info", "", "nothing is overdue any more"),
    # Run to outcome.
    (
        "run.admitted",
        "debug",
        "org run definition handler attempt fencing_token lateness",
        "a run is this worker's; it starts so many seconds after it was available",
    ),
    (
        "run.changed",
        "debug",
        "org run definition attempt state reason detail",
        "the state of a run is another",
    ),
    (
        "run.ended",
        "info",
        "org run definition handler attempt outcome state reason detail seconds error_cause",
        "an attempt ended, and this is what became of its run",
    ),
    (
        "run.fenced_out",
        "warning",
        "org run attempt fencing_token",
        "a run held here is another's now; it is killed",
    ),
    (
        "run.recovered",
        "warning",
        "org run definition attempt worker state",
        "a run of a worker that is gone was taken up",
    ),
    (
        "result.unstorable",
        "error",
        "org run attempt error",
        "the database refuses a result; the run is failed",
    ),
    (
        "logs.dropped",
        "warning",
        "lines",
        "lines of run logs were dropped, since they came faster than written",
    ),
    (
        "history.forgotten",
        "info",
        "runs skips lines workers",
        "what is older than `[retention]` allows was deleted: so many of each",
    ),
    # Tokens.
    (
        "credential.unusable",
        "error",
        "org generation error",
        "a credential's secret does not open; another generation of the org is tried, if there is one",
    ),
    ("token.requested", "info", "org issuer seconds", "the issuer gave a token, and it was enforced"),
    ("token.refused", "error", "org issuer reason detail", "a token failed verification or enforcement"),
    ("org.parked", "error", "org issuer error seconds", "no token is asked for this org until then"),
    (
        "issuer.paused",
        "warning",
        "issuer error seconds",
        "it throttles, or gives no answer to several orgs: they wait",
    ),
    ("issuer.resumed", "info", "issuer", "the issuer gives tokens again"),
    ("keys.fetched", "info", "issuer keys", "the issuer's keys were read: so many"),
    ("keys.failed", "warning", "issuer error", "the issuer's keys cannot be read; the last good set is kept"),
    # Processes and plug-ins.
    ("zygote.started", "info", "pid", "the process that forks the runs is up"),
    ("zygote.died", "error", "pid runs", "it is gone; its runs were killed and count as lost"),
    (
        "sandbox.incomplete",
        "warning",
        "sandbox",
        "handlers are not confined, or not in everything; `sandbox` says in what",
    ),
    (
        "sandbox.narrowed",
        "warning",
        "path error",
        "a path that handlers may use contains a secret, which is kept from them",
    ),
    (
        "children.frozen",
        "warning",
        "runs",
        "so many runs were stopped for as long as the lease is not renewed",
    ),
    (
        "children.thawed",
        "info",
        "runs seconds",
        "the lease was renewed in time: so many runs go on, after so long",
    ),
    ("child.killed", "warning", "org run attempt reason", "a run's processes were killed"),
    ("handlers.loaded", "info", "distribution version handlers", "a distribution offers so many handlers"),
    (
        "handler.unchecked",
        "info",
        "handler distribution place reason",
        "a rule of the params' schema is checked by the run's own process only, before the handler is called",
    ),
    (
        "handler.broken",
        "error",
        "handler distribution version error",
        "a handler does not load; all else runs",
    ),
    # Who asks and who is told.
    ("traces.lost", "warning", "error", "the collector takes no spans; they are dropped until it does"),
    ("traces.back", "info", "spans", "the collector takes spans again; so many were dropped"),
    ("web.listening", "info", "address", "a listener of the web side is open at this address"),
    (
        "web.unavailable",
        "warning",
        "address error",
        "nothing is served there; it is tried again, and the worker works",
    ),
    ("web.failed", "error", "method path error", "a request met an error that nobody expected"),
    (
        "web.rights",
        "warning",
        "detail",
        "the database login of `serve` may do more than it needs, or bypasses row-level security",
    ),
    (
        "web.connection_closed",
        "debug",
        "reason",
        "a connection passed the deadline for its headers, its body or being idle, or made room for others "
        "(crowded, address)",
    ),
    ("web.login", "info", "caller role", "somebody opened the dashboard"),
    ("alert.sent", "info", "kind status alert", "an alert was taken by the webhook"),
    (
        "alert.late",
        "warning",
        "kind status alert error",
        "an alert was not taken for minutes; it is tried every five minutes, for a day",
    ),
    (
        "alert.undelivered",
        "error",
        "kind status alert error",
        "an alert was taken by nobody, also a day later",
    ),
    ("deadman.failed", "warning", "error", "the service that waits for a sign of life did not take it"),
)

listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every event from now on, in the thread that emits it; returns how to end that."""
    listeners.append(listener)

    def end() -> None:
        if listener in listeners:
            listeners.remove(listener)

    return end


def emit(name: str, **fields: Any) -> None:
    """Say that something happened.

    Raises:
        TypeError: no such event, or a field that it does not have: a mistake in the calling line.
    """
    event = EVENTS.get(name)
    if event is None:
        raise TypeError(f"no event is called {name!r}; add it to the table in telemetry/events.py")
    if not event.names.issuperset(fields):
        raise TypeError(f"{name} has the fields {', '.join(event.fields)}, not {', '.join(fields)}")
    emitted = Emitted(event, fields)
    for listener in tuple(listeners):
        try:
            listener(emitted)
        except Exception:
            # Whoever watches must never stop what is watched.
            logging.getLogger(__name__).exception("a listener failed at %s", name)
