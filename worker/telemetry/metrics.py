"""Prometheus metrics: a listener over the table of events, and what the worker's parts say when asked."""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from worker.telemetry.events import EVENTS, Emitted
from worker.telemetry.metric_table import METRICS, SECONDS, Metric
from worker.telemetry.vitals import Vitals

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PREFIX = "orgworker_"
# Orgs that are counted one by one, to know which are the busiest; the rest goes uncounted.
MOST_ORGS = 100_000
# A series has to be there before its first rise, or Prometheus does not see that.
STATES = ("waiting", "succeeded", "failed", "cancelled", "refused", "skipped")

Follow = Callable[[Emitted], None]


class Metrics:
    """Counts from the moment it listens: `events.listen(metrics.take)`.

    No metric has an org for a label, but `org_attempts_total`, for the `top_orgs`
    that had the most attempts, if that is not 0.
    """

    def __init__(self, *, version: str, top_orgs: int = 0) -> None:
        # A second series for each counter and histogram, which says only when it was made.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._follow: dict[str, list[Follow]] = {}
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self._vitals: Vitals | None = None
        self._top_orgs = top_orgs
        self._attempts: dict[str, Tally[str]] = {}
        for metric in METRICS:
            if metric.event:
                self._follow.setdefault(metric.event, []).append(self._follower(metric))
        self._events = Counter(f"{PREFIX}events", _help("events_total"), ["event"], registry=self._registry)
        self._counts = {name: self._events.labels(name) for name in EVENTS}
        for state in STATES:
            self._made[f"{PREFIX}attempt_states_total"].labels(state)
        self._made[f"{PREFIX}database_up"].set(1)  # type: ignore[union-attr]
        Gauge(f"{PREFIX}info", _help("info"), ["version"], registry=self._registry).labels(version).set(1)
        ProcessCollector(registry=self._registry)
        self._registry.register(_WhenAsked(self._families))

    def watch(self, vitals: Vitals) -> None:
        """Ask these from now on, in place of those of an incarnation that has ended."""
        self._vitals = vitals

    def take(self, emitted: Emitted) -> None:
        """Count one event; from any thread."""
        self._counts[emitted.event.name].inc()
        for follow in self._follow.get(emitted.event.name, ()):
            follow(emitted)
        if self._top_orgs and emitted.event.name == "run.ended":
            self._count_org(emitted)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def _follower(self, metric: Metric) -> Follow:
        """What to do with the metric at its event."""
        made = self._made.get(metric.name) or self._make(metric)
        # The library takes a lock and checks each name to find what is asked for at every end of a run.
        known: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}

        def of(emitted: Emitted) -> Counter | Gauge | Histogram:
            if not metric.labels:
                return made
            words = tuple([_word(emitted.fields.get(label)) for label in metric.labels])
            found = known.get(words)
            if found is None:
                found = known[words] = made.labels(*words)
            return found

        def follow(emitted: Emitted) -> None:
            value = emitted.fields.get(metric.value) if metric.value.isalpha() else metric.value or 1
            target = of(emitted)
            if value is None:
                return
            if isinstance(target, Counter):
                target.inc(float(value))
            elif isinstance(target, Gauge):
                target.set(float(value))
            else:
                target.observe(float(value))

        return follow

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        made: Counter | Gauge | Histogram
        match metric.kind:
            case "counter":
                made = Counter(
                    metric.name.removesuffix("_total"),
                    metric.meaning,
                    metric.labels,
                    registry=self._registry,
                )
            case "gauge":
                made = Gauge(metric.name, metric.meaning, metric.labels, registry=self._registry)
            case "histogram":
                made = Histogram(
                    metric.name, metric.meaning, metric.labels, buckets=SECONDS, registry=self._registry
                )
        self._made[metric.name] = made
        return made

    def _count_org(self, emitted: Emitted) -> None:
        org, state = emitted.fields.get("org"), emitted.fields.get("state")
        with self._lock:
            if org and (org in self._attempts or len(self._attempts) < MOST_ORGS):
                self._attempts.setdefault(org, Tally())[_word(state)] += 1

    def _families(self) -> Iterator[Family]:
        vitals = self._vitals
        if vitals is not None:
            yield _gauge("admitting", float(vitals.admitting()))
            yield _gauge("draining", float(vitals.draining()))
            yield _gauge("lease_remaining_seconds", vitals.lease_remaining())
            yield _gauges("slots", "isolation", vitals.slots.items())
            yield _gauges("slots_used", "isolation", ((name, vitals.used(name)) for name in vitals.slots))
            # In a drain the loops have ended, and their age says nothing.
            ages = {} if vitals.draining() else vitals.ages()
            yield _gauges("loop_tick_age_seconds", "loop", ages.items())
        if self._top_orgs:
            yield self._by_org()

    def _by_org(self) -> Family:
        """An org that comes among the busiest comes with its true count since the process began."""
        family = CounterMetricFamily(
            f"{PREFIX}org_attempts", _help("org_attempts_total"), labels=["org", "state"]
        )
        with self._lock:
            busiest = sorted(self._attempts.items(), key=lambda entry: (-entry[1].total(), entry[0]))
            for org, states in busiest[: self._top_orgs]:
                for state, count in sorted(states.items()):
                    family.add_metric([org, state], count)
        return family


class _WhenAsked(Collector):
    """Families that are made at each scrape."""

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families()

    def describe(self) -> Iterable[Family]:
        return ()


def _gauge(name: str, value: float) -> Family:
    return GaugeMetricFamily(f"{PREFIX}{name}", _help(name), value=value)


def _gauges(name: str, label: str, values: Iterable[tuple[str, float]]) -> Family:
    family = GaugeMetricFamily(f"{PREFIX}{name}", _help(name), labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    return family


def _help(name: str) -> str:
    return next(metric.meaning for metric in METRICS if metric.name == f"{PREFIX}{name}")


def _word(value: object) -> str:
    """A label's value; what does not apply is empty."""
    return "" if value is None else str(value)
