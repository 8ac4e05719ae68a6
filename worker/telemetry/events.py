"""Events: one table of everything that the worker reports; logs and metrics listen to them.

`emit("run.ended", org=…, …)` reports one. A new event needs a row here: a test compares the table with
every call in the package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of event; `level` is its log level."""

    name: str
    level: Level
    fields: tuple[str, ...]
    meaning: str
    names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.fields))


class Emitted(NamedTuple):
    """One event that happened; a field that does not apply is missing or None."""

    event: Event
    fields: Mapping[str, Any]


Listener = Callable[[Emitted], object]


def _event(level: Level, words: str, meaning: str) -> Event:
    """An event from its name and fields in `words`."""
    name, _, fields = words.partition(":")
    return Event(name, level, tuple(fields.split()), meaning)


_debug, _info, _warning, _error = (partial(_event, level) for level in ("debug", "info", "warning", "error"))

# `org` is the org's code, `definition` its name, `run` the run's id, `seconds` a duration, `error` the class
# of an exception or its stable code, `error_cause` the same for all errors with one cause, `error_summary`
# the cause of a failed run with the status of an HTTP response. No field holds a secret or a claim set.
_ROWS = (
    # The worker.
    _info("worker.started: worker host pid version database", "a worker incarnation has started"),
    _info("worker.ready: worker seconds", "registered, schema current, admitting runs"),
    _info("worker.draining: worker running seconds", "no new runs; the drain lasts at most `seconds`"),
    _info("worker.stopped: worker exit_code", "every run has ended or was handed back; all is written"),
    _info("host.started: worker host pid version pool", "a host was registered; it serves `pool`"),
    _info("relay.started: table", "a relay of an outbox begins"),
    _info(
        "relay.stopped: sent refused", "a relay has ended; what is not marked is sent again by the next one"
    ),
    _warning("relay.waiting: error message fix", "the API takes no start; the relay tries again"),
    _info("relay.back: failures", "the API takes starts again"),
    _error("relay.refused: row org definition key error fix", "the API refuses a start for good"),
    _warning(
        "relay.other_params: row org definition key",
        "the key had made a run of other params, which stays",
    ),
    _warning("relay.database_failed: error", "the outbox's database does not answer; the relay tries again"),
    _info("host.stopped: worker exit_code", "every run of a host has ended or was handed back"),
    _warning(
        "loop.blocked: org run attempt handler where seconds",
        "the event loop was blocked for `seconds`; `handler` is the inline handler that blocked it",
    ),
    _error("loop.failed: loop error org run attempt", "unexpected error in a loop; the loop continues"),
    _warning("clock.went_back: seconds", "the wall clock moved back; no run is due until it catches up"),
    # The database and the lease.
    _warning("database.lost: error", "the database does not respond; the worker retries indefinitely"),
    _info("database.back: seconds", "the database responds again, after `seconds`"),
    _warning("control.lost: error", "no worker answers this host; it retries indefinitely"),
    _info("control.back: seconds", "a worker answers this host again, after `seconds`"),
    _warning("lease.late: error remaining", "a renewal failed; the lease expires in `remaining` seconds"),
    _error("lease.lost: late", "the lease expired `late` seconds ago; other workers may own the runs"),
    # Definition to run.
    _info("runs.fired: count overlapped skips", "due times became runs, in one transaction"),
    _info("starts.made: count refused", "starts of products became runs, in one transaction"),
    _error("definition.failed: org definition error", "the next fire times cannot be computed"),
    _info("template.progress: template done total", "`done` of `total` orgs have the latest template"),
    _info(
        "tzdata.changed: version definitions",
        "new time zone data; `definitions` definitions have other fire times",
    ),
    _error(
        "definition.paused: org definition failures",
        "paused after `failures` consecutive failures; it does not fire until it is resumed",
    ),
    _info("backfill.ended: org definition instants", "every run of a backfill has ended"),
    _error(
        "schedule.overdue: org definition seconds",
        "a scheduled time has been due for `seconds` and was not fired; this one is the oldest",
    ),
    _error(
        "schedule.late: org definition newest_run scheduled_for late_at why",
        "a scheduled time was not done by its deadline, and why; once until the definition is done",
    ),
    _info("schedule.done: org definition", "a definition that was late has done its work"),
    _debug("late.counted: definitions", "the number of late definitions, of all orgs, has changed"),
    _error(
        "rollout.halted: rollout metric effect tolerance orgs runs",
        "a metric of the new version exceeds its tolerance: new runs of all orgs take the old version",
    ),
    _error(
        "rollout.stalled: rollout side",
        "a side of a rollout has had no runs for a day, while the other one had: nothing can be compared",
    ),
    _info(
        "rollout.ready: rollout step next", "a step has shown what it must; a person may start the next one"
    ),
    _info("rollout.advanced: rollout step", "the next step of a rollout has begun by itself"),
    _info("schedule.caught_up", "no scheduled time is overdue any more"),
    # Run to outcome.
    _debug(
        "run.admitted: org run definition handler attempt fencing_token lateness",
        "this worker owns the run and starts it, `lateness` seconds after it became available",
    ),
    _debug("run.changed: org run definition attempt state reason detail", "a run changed state"),
    _info(
        "run.ended: org run definition handler attempt outcome state reason detail seconds "
        "error_cause error_summary child",
        "an attempt ended with `outcome`; the run is now in `state`, or cancelled if meanwhile that was "
        "requested or its parent ended; `child` if another run started it",
    ),
    _info(
        "attempt.ended: org run handler attempt outcome seconds",
        "an attempt ended on this host; the event run.ended of a worker says what became of the run",
    ),
    _info(
        "run.asks: org run definition attempt wait",
        "a run waits for an answer; its handler asked for an alert",
    ),
    _warning(
        "run.fenced_out: org run attempt fencing_token",
        "a run that this worker held belongs to another worker; it is killed here",
    ),
    _warning("run.recovered: org run definition attempt worker state", "took over a run from a dead worker"),
    _debug("runs.placed: pool count", "an engine offers `count` runs to the hosts of a pool"),
    _warning("runs.unplaced: pool count detail", "placed runs wait again, since no host took them"),
    _warning(
        "engine.lost: pool error", "the engine that places the runs of a pool does not respond; they wait"
    ),
    _info("engine.back: pool seconds", "the engine that places the runs of a pool responds again"),
    _error("result.unstorable: org run attempt error", "the database rejects a result; the run fails"),
    _warning("logs.dropped: lines", "dropped lines of run logs that came faster than they were written"),
    _warning(
        "egress.denied: org run attempt handler origin reason",
        "a request was not sent, since the run may not reach this origin; once an attempt and origin. Of a "
        "host's run its worker reports it",
    ),
    _debug(
        "egress.counted: org run attempt handler origin denied seconds",
        "an attempt ended: its requests to this origin that were denied, and how long others waited",
    ),
    _debug("egress.sent: origin status count", "an attempt ended: its requests, by class of status"),
    _debug("meter.spent: meter amount", "runs spent `amount` of a meter that has a budget"),
    _debug(
        "model.used: kind tariff units money",
        "runs used `units` of models, which cost `money` in units of the currency",
    ),
    _warning(
        "budget.forecast: org meter per used limit reaches_at resets_at",
        "the pace of a budget of money reaches its limit before the month ends, as of this spend",
    ),
    _warning(
        "price.missing: org provider model",
        "runs of an org used a model without a price for the first time: no budget of money counts it until "
        "`[prices]` or a newer list, see `prices update`, has a price",
    ),
    _error(
        "prices.unreadable: error digest",
        "this worker cannot read the price list in the database, and uses that of its release",
    ),
    _warning(
        "budget.warned: org meter per used limit",
        "a budget's `warn_at` was passed, once in its period; at `limit` runs wait, fail or ask",
    ),
    _warning(
        "egress.paused: org origin seconds",
        "a service answered 429 or 503: requests of this org to it pause for `seconds`, on all workers",
    ),
    _info(
        "batch.sent: batch api model requests",
        "a batch of model requests was submitted to a provider",
    ),
    _info(
        "batch.ended: batch api model requests seconds late",
        "the results of a batch are stored; `late` of them were of no use any more, and were paid",
    ),
    _debug(
        "batch.fell_back: reason requests",
        "runs send `requests` on their own at the full price, that were to go into batches",
    ),
    _warning(
        "batch.unsure: batch api error",
        "the answer to the submission of a batch was lost; it is looked for before it is submitted again",
    ),
    _error(
        "batch.failed: batch api model requests error",
        "a provider refused a batch; its requests are sent again, apart by org or on their own",
    ),
    _debug(
        "limit.counted: origin waiting waited seconds refused",
        "`waiting` requests wait for a limit now, `waited` have waited `seconds`, `refused` would too long",
    ),
    _debug("pool.counted: pool waiting", "`waiting` due runs of a pool wait for a slot, over all workers"),
    _info("pool.rules_changed: pool rules", "this worker stored other rules for a pool, for all workers"),
    _warning(
        "pool.rules_differ: pool rules stored",
        "a worker that started later stored other rules; this one takes no run of the pool until it restarts",
    ),
    _info("history.forgotten: runs skips lines keys workers", "deleted what `[retention]` no longer keeps"),
    # Tokens.
    _error(
        "credential.unusable: org generation error",
        "the secret of a credential cannot be opened; another generation is tried if there is one",
    ),
    _error(
        "secret.unusable: org secret error",
        "the key ring does not open a secret of an org; runs that need it wait",
    ),
    _info("token.requested: org issuer seconds", "the issuer returned a token; it is not verified yet"),
    _error("token.refused: org issuer reason detail", "a token failed verification or enforcement"),
    _warning(
        "token.unopened: org issuer key error",
        "a stored token is not used: it does not open, or its credential is retired, as after a restored "
        "backup; it is deleted and a new one requested",
    ),
    _error("org.parked: org issuer error seconds", "no token is requested for this org for `seconds`"),
    _warning(
        "issuer.paused: issuer error seconds",
        "the issuer throttles or does not respond to several orgs; requests pause for `seconds`",
    ),
    _info("issuer.resumed: issuer", "the issuer returns tokens again"),
    _info("keys.fetched: issuer keys", "fetched the issuer's keys; `keys` is their number"),
    _warning("keys.failed: issuer error", "cannot fetch the issuer's keys; the last good set stays in use"),
    # Orgs and their applications at the provider.
    _info(
        "orgs.synced: issuer changed failed",
        "orgs were added, changed or suspended as the provider lists them",
    ),
    _info("application.made: org issuer client", "made a machine-to-machine application at the provider"),
    _info(
        "credential.pending: org issuer client seconds",
        "a token of a new client is verified; runs use this client after `seconds`",
    ),
    _info("credential.activated: org issuer client generation", "runs use this client from now on"),
    _info("application.deleted: org issuer client", "deleted an application that runs used before"),
    _error("provisioning.failed: org issuer error", "an org's application could not be made or changed"),
    _info(
        "application.scopes: org issuer client added removed",
        "an application has other scopes, as the definitions of its org need",
    ),
    _info("provisioning.started: issuers address pid", "`provision` has started; it listens on `address`"),
    _info("provisioning.stopped: exit_code", "`provision` has ended; the next start goes on from there"),
    _info(
        "provisioning.round: issuer seconds changed failed ended",
        "all orgs were compared with the provider's; `ended` is the end in Unix time",
    ),
    _debug("provisioning.counted: issuer result orgs", "the orgs of a round or a webhook, by result"),
    _debug("provisioning.requests: issuer request count", "management requests that were carried out"),
    _info("provisioning.waiting: issuer", "another process provisions this issuer; this one waits"),
    _error(
        "provisioning.unavailable: issuer error detail",
        "a round or a webhook could not be completed; it is tried again",
    ),
    _debug(
        "webhook.received: issuer status reason",
        "a provider's webhook was answered; `reason` is the check that failed",
    ),
    _info("webhook.taken: issuer org kind", "a genuine webhook names this org; it is read again"),
    _warning(
        "management.exposed: secret",
        "this worker may read the secret of a management API, which opens the secrets of all orgs",
    ),
    # Processes and plug-ins.
    _info("zygote.started: pid", "the process that forks the runs has started"),
    _error(
        "zygote.died: pid runs", "the process that forks the runs died; its runs were killed and are lost"
    ),
    _error(
        "broker.died: pid attempts reason",
        "the process that sends requests of runs died, or did not start; another one is started",
    ),
    _info("broker.started: pid", "the process that sends requests of runs is up"),
    _warning(
        "sandbox.incomplete: sandbox", "handlers are not fully confined; `sandbox` says what is missing"
    ),
    _warning("sandbox.narrowed: path error", "a path open to handlers contains a secret, which is hidden"),
    _error(
        "files.opened: path mode restored",
        "a file with secrets was opened to other accounts by this `mode`; `restored` if that is undone",
    ),
    _warning(
        "files.changeable: path files",
        "handlers could open `files` files with secrets to other accounts, which `require` will refuse",
    ),
    _warning("children.frozen: runs", "froze `runs` runs until the lease is renewed"),
    _info("children.thawed: runs seconds", "the lease was renewed in time; `runs` runs continue"),
    _warning("child.killed: org run attempt reason", "killed the processes of a run"),
    _warning(
        "child.replaced: org run attempt reason",
        "a process ended before it had read its run, which another one gets",
    ),
    _warning(
        "spare.died: reason", "a process that waited for its run ended; another one is forked after a pause"
    ),
    _info("handlers.loaded: distribution version handlers", "a distribution offers `handlers` handlers"),
    _info(
        "handler.unchecked: handler distribution place reason",
        "only the run's own process checks a rule of the params schema, before it calls the handler",
    ),
    _error("handler.broken: handler distribution version error", "a handler failed to load; others run"),
    # Web, alerts and traces.
    _warning("traces.lost: error", "the collector does not accept spans; they are dropped until it does"),
    _info("traces.back: spans", "the collector accepts spans again; `spans` were dropped"),
    _info("host.registered: host pool worker version", "a host has started an incarnation, here `worker`"),
    _info("attempts.listening: address", "the attempt API, for hosts, listens on this address"),
    _warning(
        "checker.died: call bytes exit_code",
        "the process that checks large bodies of hosts ended at this one, which is refused",
    ),
    _info("web.listening: address", "the web server listens on this address"),
    _warning("web.unavailable: address error", "cannot listen on this address; retrying, the worker runs"),
    _error("web.failed: method path error place", "unexpected error in a request, and the line of our code"),
    _warning(
        "web.rights: detail",
        "the database login of `serve` has more rights than it needs, or bypasses row-level security",
    ),
    _debug(
        "web.connection_closed: reason",
        "a connection exceeded its header, body or idle deadline, or made room for others (crowded, address)",
    ),
    _info("web.login: caller role", "somebody signed in to the console"),
    _warning("web.login_refused: error", "a person logged in at the provider, but gets no access here"),
    _info("alert.sent: kind status alert", "the webhook accepted an alert"),
    _warning(
        "alert.late: kind status alert error",
        "an alert could not be delivered for minutes; retrying every five minutes, for a day",
    ),
    _error("alert.undelivered: kind status alert error", "an alert was given up after a day"),
    _warning("deadman.failed: error", "the dead man's switch did not accept the sign of life"),
)
EVENTS: Mapping[str, Event] = {event.name: event for event in _ROWS}

listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every event, in the thread that emits it. Returns a function that ends this."""
    listeners.append(listener)

    def end() -> None:
        if listener in listeners:
            listeners.remove(listener)

    return end


def emit(name: str, **fields: Any) -> None:
    """Report an event.

    Raises:
        TypeError: the table has no such event or field.
    """
    event = EVENTS.get(name)
    if event is None:
        raise TypeError(f"unknown event {name!r}; add it to the table in telemetry/events.py")
    if not event.names.issuperset(fields):
        raise TypeError(f"{name} has the fields {', '.join(event.fields)}, not {', '.join(fields)}")
    emitted = Emitted(event, fields)
    for listener in tuple(listeners):
        try:
            listener(emitted)
        except Exception:
            # A listener must not stop the code that emits.
            logging.getLogger(__name__).exception("a listener failed at %s", name)
