"""Metrics: one table of what each metric counts or measures, and their values in Prometheus' format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from worker.telemetry.events import EVENTS, Emitted
from worker.telemetry.vitals import Vitals

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Fields = Mapping[str, Any]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PREFIX = "orgworker_"
# Upper bounds of the histogram buckets, in seconds.
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
_BOUNDS: list[str] = [floatToGoString(bound) for bound in (*SECONDS, float("inf"))]  # type: ignore[no-untyped-call]
# `metrics_top_orgs` tracks at most this many orgs; later ones are not counted.
MAX_ORGS = 100_000
# Origins that metrics tell apart; later ones are counted together.
MAX_ORIGINS = 100
OTHERS = "others"
# The run states after an attempt.
STATES = ("waiting", "succeeded", "failed", "cancelled", "refused", "skipped")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric under its Prometheus name.

    With `event`, that event updates it: a counter grows by the field `value` (default 1), a
    histogram observes the field, and a gauge is set to the number in `value`. Labels are fields of
    the event. Without `event`, the metric is read at each scrape.
    """

    name: str
    kind: Kind
    labels: Labels
    meaning: str
    event: str = ""
    value: str = ""


def _metric(kind: Kind, words: str, meaning: str, source: str = "") -> Metric:
    """A metric from its name and labels in `words`, and the event and its `value` in `source`."""
    name, _, labels = words.partition(":")
    event, _, value = source.partition(" ")
    return Metric(f"{PREFIX}{name}", kind, tuple(labels.split()), meaning, event, value)


_counter, _gauge, _histogram = (partial(_metric, kind) for kind in ("counter", "gauge", "histogram"))

# The number of label values does not depend on the number of orgs: handlers, issuers, pools and loops are
# what is installed and configured; origins are at most 100; outcomes, states and reasons are closed sets.
METRICS: tuple[Metric, ...] = (
    _counter("events_total: event", "events of the documented set, by name"),
    # Definition to run.
    _counter("runs_fired_total", "due times that became runs", "runs.fired count"),
    _counter("runs_overlapped_total", "due times with an unfinished run", "runs.fired overlapped"),
    _counter("instants_skipped_total", "scheduled times that never become a run", "runs.fired skips"),
    _counter("definitions_failed_total", "failures to compute the next fire times", "definition.failed"),
    _counter("definitions_paused_total", "definitions paused after too many failures", "definition.paused"),
    _gauge("overdue", "1 while a due time has not been fired", "schedule.overdue 1"),
    _gauge("overdue", "", "schedule.caught_up 0"),
    # Run to outcome.
    _histogram("lateness_seconds", "from run available to run admitted", "run.admitted lateness"),
    _counter("attempts_total: handler outcome state reason", "ended attempts", "run.ended"),
    _counter("attempt_states_total: state", "ended attempts, by the new state of the run", "run.ended"),
    _histogram("attempt_seconds: outcome", "from admission to end of attempt", "run.ended seconds"),
    _counter("runs_recovered_total: state", "runs taken over from a dead worker", "run.recovered"),
    _counter("runs_fenced_out_total", "runs held here that another worker already owned", "run.fenced_out"),
    _counter("spent_total: meter", "spends of meters that have a budget", "meter.spent amount"),
    _counter("model_units_total: kind tariff", "tokens of models, and billed calls", "model.used units"),
    _counter(
        "model_money_total: kind tariff",
        "what models cost, in units of `[prices] currency`",
        "model.used money",
    ),
    _counter("batch_requests_total", "model requests that were sent in batches", "batch.sent requests"),
    _histogram("batch_seconds", "from the submission of a batch to its results", "batch.ended seconds"),
    _counter("batch_late_total", "results that were paid and of no use any more", "batch.ended late"),
    _counter(
        "batch_fallbacks_total: reason",
        "model requests that were sent on their own after all",
        "batch.fell_back requests",
    ),
    _counter("prices_missing_total", "models without a price, new for an org", "price.missing"),
    _counter("budgets_warned_total: meter per", "budgets that passed their `warn_at`", "budget.warned"),
    _gauge("limit_waiting: origin", "requests that wait for a limit or a pause", "limit.counted waiting"),
    _counter("limit_waits_total: origin", "requests that waited for a limit", "limit.counted waited"),
    _counter("limit_wait_seconds_total: origin", "how long they waited", "limit.counted seconds"),
    _counter("limit_refused_total: origin", "requests that raised RateLimited", "limit.counted refused"),
    _counter("origin_pauses_total: origin", "pauses of an org that a service asked for", "egress.paused"),
    _counter(
        "egress_requests_total: origin status",
        "requests of runs, by class of status; `none` without a response",
        "egress.sent count",
    ),
    _counter("egress_denied_total: origin", "requests of runs that were not sent", "egress.counted denied"),
    _gauge(
        "pool_waiting: pool",
        "due runs that wait for a slot of a pool; each worker reports those of all",
        "pool.counted waiting",
    ),
    _gauge(
        "late",
        "definitions that are late, up to 10,000; each worker reports those of all",
        "late.counted definitions",
    ),
    _counter("run_log_lines_dropped_total", "dropped lines of run logs", "logs.dropped lines"),
    # Tokens.
    _counter("tokens_requested_total: issuer", "tokens issued and accepted", "token.requested"),
    _histogram("token_request_seconds: issuer", "duration of a token request", "token.requested seconds"),
    _counter("tokens_refused_total: issuer reason", "tokens that failed the checks", "token.refused"),
    _counter("orgs_parked_total: issuer", "pauses of the token requests for one org", "org.parked"),
    _counter("credentials_unusable_total", "secrets that could not be opened", "credential.unusable"),
    _gauge("issuer_paused: issuer", "1 while requests to an issuer are paused", "issuer.paused 1"),
    _gauge("issuer_paused: issuer", "", "issuer.resumed 0"),
    _counter("keys_failed_total: issuer", "failed fetches of an issuer's keys", "keys.failed"),
    # Orgs and their applications at the provider; in the process `provision`.
    _counter("provisioned_orgs_total: issuer result", "orgs by result", "provisioning.counted orgs"),
    _gauge(
        "provisioning_success_timestamp_seconds: issuer",
        "end of the last complete round in Unix time",
        "provisioning.round ended",
    ),
    _counter(
        "management_requests_total: issuer request",
        "management requests that were carried out, by method and route",
        "provisioning.requests count",
    ),
    _counter("webhooks_total: issuer status", "webhooks by status of the response", "webhook.received"),
    # The worker itself.
    _gauge("info: version", "always 1; the version of the worker"),
    _gauge("admitting", "1 while this worker can admit runs"),
    _gauge("draining", "1 after the worker was asked to stop"),
    _gauge("slots: isolation", "maximum concurrent runs of this worker"),
    _gauge("slots_used: isolation", "concurrent runs of this worker"),
    _gauge("loop_tick_age_seconds: loop", "time since the last tick of a loop"),
    _gauge("lease_remaining_seconds", "time until the lease expires unless it is renewed"),
    _counter("lease_late_total", "failed lease renewals", "lease.late"),
    _counter("leases_lost_total", "leases that expired without renewal", "lease.lost"),
    _gauge("database_up", "1 while the database responds", "database.back 1"),
    _gauge("database_up", "", "database.lost 0"),
    _gauge("control_up", "on a host: 1 while a worker answers it", "control.back 1"),
    _gauge("control_up", "", "control.lost 0"),
    _counter("loop_failures_total: loop", "unexpected errors in a loop", "loop.failed"),
    _counter("clock_went_back_total", "backward moves of the wall clock", "clock.went_back"),
    _counter("clock_went_back_seconds_total", "sum of all backward moves", "clock.went_back seconds"),
    _counter("zygote_deaths_total", "deaths of the process that forks the runs", "zygote.died"),
    _gauge("broker_up", "1 while the process is up that sends the requests of runs", "broker.started 1"),
    _gauge("broker_up", "", "broker.died 0"),
    _counter("broker_deaths_total", "deaths of that process, and starts that failed", "broker.died"),
    _counter("children_frozen_total", "runs frozen because of an unrenewed lease", "children.frozen runs"),
    _counter("children_killed_total", "runs whose processes were killed", "child.killed"),
    _counter("files_opened_total", "files with secrets opened to other accounts", "files.opened"),
    _counter("handlers_broken_total", "handlers that failed to load", "handler.broken"),
    _counter(
        "web_connections_closed_total: reason", "connections closed by the server", "web.connection_closed"
    ),
    _counter("alerts_total: kind status", "alerts sent", "alert.sent"),
    _counter("alerts_undelivered_total", "alerts given up after a day", "alert.undelivered"),
    _counter("org_attempts_total: org state", "ended attempts by org; only with `metrics_top_orgs`"),
    # Of the worker's process, from the operating system.
    Metric("process_cpu_seconds_total", "counter", (), "processor time of the worker process"),
    Metric("process_max_fds", "gauge", (), "maximum number of open file descriptors"),
    Metric("process_open_fds", "gauge", (), "number of open file descriptors"),
    Metric("process_resident_memory_bytes", "gauge", (), "resident memory"),
    Metric("process_start_time_seconds", "gauge", (), "start time in Unix time"),
    Metric("process_virtual_memory_bytes", "gauge", (), "virtual memory"),
)


_OF_ORIGINS = frozenset(metric.event for metric in METRICS if "origin" in metric.labels)


class MetricSeries:
    """The values of one metric by its labels. The caller must hold a lock.

    The client library locks and validates at each step; for the events of one run that takes as long
    as its token.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        # By label values as the events have them; converted to text at a scrape.
        self._sums: dict[tuple[Any, ...], float] = {}
        self._buckets: dict[tuple[Any, ...], list[int]] = {}
        if not metric.labels:
            self.begin()

    def begin(self, *labels: Any) -> None:
        """Start a series at 0: Prometheus does not see an increase without a first value."""
        self._sums.setdefault(labels, 0.0)

    def set(self, value: float, *labels: str) -> None:
        self._sums[labels] = value

    def follower(self, by: str) -> Callable[[Fields], None]:
        """The function that updates this metric from an event; `by` is `Metric.value`."""
        kind, sums, buckets = self.metric.kind, self._sums, self._buckets
        labels_of = _picker(self.metric.labels)

        def add_one(fields: Fields) -> None:
            labels = labels_of(fields)
            sums[labels] = sums.get(labels, 0.0) + 1.0

        def set_to(fields: Fields) -> None:
            sums[labels_of(fields)] = float(by)

        def set_from(fields: Fields) -> None:
            labels, value = labels_of(fields), fields.get(by)
            if value is None:
                self.begin(*labels)
            else:
                sums[labels] = value

        def add(fields: Fields) -> None:
            labels, value = labels_of(fields), fields.get(by)
            if value is None:
                self.begin(*labels)
                return
            sums[labels] = sums.get(labels, 0.0) + value
            if kind == "histogram":
                counts = buckets.get(labels) or buckets.setdefault(labels, [0] * len(_BOUNDS))
                counts[bisect_left(SECONDS, value)] += 1

        if by.isalpha():
            return set_from if kind == "gauge" else add
        return set_to if kind == "gauge" else add_one

    def family(self) -> Family:
        sums: dict[Labels, float] = {}
        for labels, value in self._sums.items():
            texts = tuple(map(_text, labels))
            sums[texts] = sums.get(texts, 0.0) + value
        if self.metric.kind != "histogram":
            return _family(self.metric.name, sums.items())
        histogram = HistogramMetricFamily(self.metric.name, self.metric.meaning, labels=self.metric.labels)
        for texts, value in sums.items():
            histogram.add_metric(texts, self._cumulative(texts), value)
        return histogram

    def _cumulative(self, texts: Labels) -> list[tuple[str, int]]:
        found = [counts for labels, counts in self._buckets.items() if tuple(map(_text, labels)) == texts]
        total, bounds = 0, []
        for index, bound in enumerate(_BOUNDS):
            total += sum(counts[index] for counts in found)
            bounds.append((bound, total))
        return bounds


def _picker(names: Labels) -> Callable[[Fields], tuple[Any, ...]]:
    """A function that returns these fields of an event, None for a missing one."""
    if not names:
        return lambda fields: ()
    if len(names) == 1:
        (name,) = names
        return lambda fields: (fields.get(name),)
    # Nearly every event has all of them.
    pick = itemgetter(*names)

    def picked(fields: Fields) -> tuple[Any, ...]:
        try:
            labels: tuple[Any, ...] = pick(fields)
        except KeyError:
            return tuple(map(fields.get, names))
        return labels

    return picked


class Metrics(Collector):
    """Counts from the moment it listens: `events.listen(metrics.take)`.

    No metric has a label for the org, except `org_attempts_total`, for the `top_orgs` orgs with the
    most attempts. `on_host` is true in a host, which has no database.
    """

    def __init__(self, *, version: str, top_orgs: int = 0, on_host: bool = False) -> None:
        # Events come from any thread.
        self._lock = threading.Lock()
        self._version = version
        self._vitals: Vitals | None = None
        self._top_orgs = top_orgs
        self._attempts: dict[str, Tally[str]] = {}
        self._origins: set[str] = set()
        self._counts = dict.fromkeys(EVENTS, 0)
        self._series: dict[str, MetricSeries] = {}
        self._follow: dict[str, list[Callable[[Fields], None]]] = {name: [] for name in EVENTS}
        for metric in METRICS:
            if metric.event:
                series = self._series.setdefault(metric.name, MetricSeries(metric))
                self._follow[metric.event].append(series.follower(metric.value))
        for state in STATES:
            self._series[f"{PREFIX}attempt_states_total"].begin(state)
        # A host has no database, and a worker no worker behind it.
        mine, not_mine = ("control_up", "database_up") if on_host else ("database_up", "control_up")
        self._series[f"{PREFIX}{mine}"].set(1)
        del self._series[f"{PREFIX}{not_mine}"]
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def name_orgs(self) -> bool:
        """Whether a metric has a label for the org."""
        return self._top_orgs > 0

    def watch(self, vitals: Vitals) -> None:
        """Report the vitals of this incarnation from now on."""
        self._vitals = vitals

    def take(self, emitted: Emitted) -> None:
        """Count one event; may be called from any thread."""
        name, fields = emitted.event.name, emitted.fields
        with self._lock:
            self._counts[name] += 1
            if name in _OF_ORIGINS:
                fields = {**fields, "origin": self._known(fields["origin"])}
            for follow in self._follow[name]:
                follow(fields)
            if self._top_orgs and name == "run.ended":
                self._count_org(fields)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        with self._lock:
            events = [((name,), count) for name, count in self._counts.items()]
            counted = [series.family() for series in self._series.values()]
            top_orgs = list(self._busiest_orgs())
        yield _family("info", [((self._version,), 1)])
        yield _family("events_total", events)
        yield from counted
        if self._top_orgs:
            yield _family("org_attempts_total", top_orgs)
        vitals = self._vitals
        if vitals is not None:
            yield _family("admitting", [((), vitals.admitting())])
            yield _family("draining", [((), vitals.draining())])
            yield _family("lease_remaining_seconds", [((), vitals.lease_remaining())])
            yield _family("slots", [((name,), count) for name, count in vitals.slots.items()])
            yield _family("slots_used", [((name,), vitals.used(name)) for name in vitals.slots])
            # A drain has ended the loops on purpose.
            ages = {} if vitals.draining() else vitals.ages()
            yield _family("loop_tick_age_seconds", [((name,), age) for name, age in ages.items()])

    def _known(self, origin: str) -> str:
        """The origin, or `OTHERS` for one after the first `MAX_ORIGINS`."""
        if len(self._origins) < MAX_ORIGINS:
            self._origins.add(origin)
        return origin if origin in self._origins else OTHERS

    def _count_org(self, fields: Fields) -> None:
        org, state = fields.get("org"), fields.get("state")
        if org and (org in self._attempts or len(self._attempts) < MAX_ORGS):
            self._attempts.setdefault(org, Tally())[_text(state)] += 1

    def _busiest_orgs(self) -> Iterator[tuple[Labels, int]]:
        """Each count is complete, since the process started."""
        busiest = sorted(self._attempts.items(), key=lambda entry: (-entry[1].total(), entry[0]))
        for org, states in busiest[: self._top_orgs]:
            for state, count in sorted(states.items()):
                yield (org, state), count


def _family(name: str, values: Iterable[tuple[Labels, float]]) -> Family:
    metric = _BY_NAME[name.removeprefix(PREFIX)]
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values:
        family.add_metric(labels, float(value))
    return family


# The first row of a metric has its meaning.
_BY_NAME = {metric.name.removeprefix(PREFIX): metric for metric in reversed(METRICS)}


def _text(value: object) -> str:
    """A label value; empty for None."""
    return value if isinstance(value, str) else "" if value is None else str(value)
