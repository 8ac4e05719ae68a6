"""Every metric of the worker, in one table: what it counts or measures, and of which event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric under the name that Prometheus sees.

    With `event` it follows that event: a counter grows by the field `value`, or by
    one, a histogram observes it, and a gauge is set to `value` as a number. Labels
    are fields of the event of the same name. Without `event` it is read when asked.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    event: str = ""
    value: str = ""


def _metric(name: str, kind: Kind, labels: str, meaning: str, event: str = "", value: str = "") -> Metric:
    return Metric(f"orgworker_{name}", kind, tuple(labels.split()), meaning, event, value)


# Labels take few values, whatever the number of orgs: handlers, issuers and loops are what is
# installed and configured; outcomes, states and reasons are closed sets.
METRICS: tuple[Metric, ...] = (
    _metric("events_total", "counter", "event", "events of the documented set, each by its name"),
    # Definition to run.
    _metric("runs_fired_total", "counter", "", "due instants that became runs", "runs.fired", "count"),
    _metric(
        "runs_overlapped_total",
        "counter",
        "",
        "due instants that met an unfinished run of their definition",
        "runs.fired",
        "overlapped",
    ),
    _metric(
        "instants_skipped_total",
        "counter",
        "",
        "instants that will never become a run",
        "runs.fired",
        "skips",
    ),
    _metric(
        "definitions_failed_total",
        "counter",
        "",
        "times that the next instants of a definition could not be computed",
        "definition.failed",
    ),
    _metric(
        "definitions_paused_total",
        "counter",
        "",
        "definitions paused after too many failures",
        "definition.paused",
    ),
    _metric("overdue", "gauge", "", "1 while instants that have come are not fired", "schedule.overdue", "1"),
    _metric("overdue", "gauge", "", "", "schedule.caught_up", "0"),
    # Run to outcome.
    _metric(
        "lateness_seconds",
        "histogram",
        "",
        "from when a run was available to its admission",
        "run.admitted",
        "lateness",
    ),
    _metric(
        "attempts_total",
        "counter",
        "handler outcome state reason",
        "ended attempts, and what became of their runs",
        "run.ended",
    ),
    _metric(
        "attempt_states_total",
        "counter",
        "state",
        "states that ended attempts left their runs in",
        "run.ended",
    ),
    _metric(
        "attempt_seconds",
        "histogram",
        "outcome",
        "from admission to the end of an attempt",
        "run.ended",
        "seconds",
    ),
    _metric(
        "runs_recovered_total", "counter", "state", "runs taken from a worker that is gone", "run.recovered"
    ),
    _metric(
        "runs_fenced_out_total",
        "counter",
        "",
        "runs held here that were another worker's already",
        "run.fenced_out",
    ),
    _metric(
        "run_log_lines_dropped_total", "counter", "", "lines of run logs not kept", "logs.dropped", "lines"
    ),
    # Tokens.
    _metric("tokens_requested_total", "counter", "issuer", "tokens that an issuer gave", "token.requested"),
    _metric(
        "token_request_seconds",
        "histogram",
        "issuer",
        "how long an issuer took to give a token",
        "token.requested",
        "seconds",
    ),
    _metric(
        "tokens_refused_total",
        "counter",
        "issuer reason",
        "tokens that failed verification or enforcement",
        "token.refused",
    ),
    _metric(
        "orgs_parked_total",
        "counter",
        "issuer",
        "times that no token was to be asked for an org for a while",
        "org.parked",
    ),
    _metric("credentials_unusable_total", "counter", "", "secrets that did not open", "credential.unusable"),
    _metric(
        "issuer_paused",
        "gauge",
        "issuer",
        "1 while an issuer throttles or gives several orgs no answer",
        "issuer.paused",
        "1",
    ),
    _metric("issuer_paused", "gauge", "issuer", "", "issuer.resumed", "0"),
    _metric("keys_failed_total", "counter", "issuer", "reads of an issuer's keys that failed", "keys.failed"),
    # The worker itself.
    _metric("info", "gauge", "version", "always 1; the version of the worker"),
    _metric("admitting", "gauge", "", "1 while the database lets this worker admit runs"),
    _metric("draining", "gauge", "", "1 once the worker was asked to stop"),
    _metric("slots", "gauge", "isolation", "runs that this worker may carry at once"),
    _metric("slots_used", "gauge", "isolation", "runs that this worker carries"),
    _metric("loop_tick_age_seconds", "gauge", "loop", "since a loop last came round"),
    _metric("lease_remaining_seconds", "gauge", "", "until the lease ends, if it is not renewed"),
    _metric("lease_late_total", "counter", "", "renewals that failed, as told", "lease.late"),
    _metric("leases_lost_total", "counter", "", "leases that passed unrenewed", "lease.lost"),
    _metric("database_up", "gauge", "", "1 while the database answers", "database.back", "1"),
    _metric("database_up", "gauge", "", "", "database.lost", "0"),
    _metric("loop_failures_total", "counter", "loop", "errors that a loop did not expect", "loop.failed"),
    _metric(
        "clock_went_back_total", "counter", "", "times that the wall clock moved back", "clock.went_back"
    ),
    _metric(
        "clock_went_back_seconds_total",
        "counter",
        "",
        "how far the wall clock moved back, all times together",
        "clock.went_back",
        "seconds",
    ),
    _metric("zygote_deaths_total", "counter", "", "deaths of the process that forks the runs", "zygote.died"),
    _metric(
        "children_frozen_total",
        "counter",
        "",
        "runs stopped for an unrenewed lease",
        "children.frozen",
        "runs",
    ),
    _metric("children_killed_total", "counter", "", "runs whose processes were killed", "child.killed"),
    _metric("handlers_broken_total", "counter", "", "handlers that did not load", "handler.broken"),
    _metric(
        "web_connections_closed_total",
        "counter",
        "reason",
        "connections that passed a deadline or made room for others",
        "web.connection_closed",
    ),
    _metric("alerts_total", "counter", "kind status", "alerts sent", "alert.sent"),
    _metric("alerts_undelivered_total", "counter", "", "alerts that nobody took", "alert.undelivered"),
    # Only where `[web] metrics_top_orgs` asks for them.
    _metric(
        "org_attempts_total",
        "counter",
        "org state",
        "ended attempts of the orgs that had the most; only with `metrics_top_orgs`",
    ),
    # What the operating system says of the worker's process.
    Metric("process_cpu_seconds_total", "counter", (), "processor time of the worker's own process"),
    Metric("process_max_fds", "gauge", (), "file descriptors that it may have open"),
    Metric("process_open_fds", "gauge", (), "file descriptors that it has open"),
    Metric("process_resident_memory_bytes", "gauge", (), "its memory in RAM"),
    Metric("process_start_time_seconds", "gauge", (), "when it started, in Unix time"),
    Metric("process_virtual_memory_bytes", "gauge", (), "its address space"),
)
