"""The numbers of one metric, by the values of its labels; counted at every end of a run, so kept plain."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from worker.telemetry.events import EVENTS, Emitted
from worker.telemetry.metric_table import METRICS, SECONDS, Metric
from worker.telemetry.vitals import Vitals

Words = tuple[str, ...]
Fields = Mapping[str, Any]

_BOUNDS: list[str] = [floatToGoString(bound) for bound in (*SECONDS, float("inf"))]  # type: ignore[no-untyped-call]


class Series:
    """What has been counted or measured; the caller sees to it that one thread does so at a time.

    The library's own objects take a lock and check each name at every step, which
    for the events of each run costs as much as the run's token.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        # By the labels' values as the events have them: words are made of them when asked.
        self._sums: dict[tuple[Any, ...], float] = {}
        self._buckets: dict[tuple[Any, ...], list[int]] = {}
        if not metric.labels:
            self.begin()

    def begin(self, *labels: Any) -> None:
        """Show a series before its first rise, or Prometheus does not see that."""
        self._sums.setdefault(labels, 0.0)

    def set(self, value: float, *labels: str) -> None:
        self._sums[labels] = value

    def follower(self, by: str) -> Callable[[Fields], None]:
        """What to do with an event: grow by, observe or become its field `by`, or the number that it is."""
        kind, sums, buckets = self.metric.kind, self._sums, self._buckets
        labels_of = _picker(self.metric.labels)
        fixed = None if by.isalpha() else float(by or 1)

        def follow(fields: Fields) -> None:
            labels = labels_of(fields)
            value = fields.get(by) if fixed is None else fixed
            if value is None:
                self.begin(*labels)
            elif kind == "gauge":
                sums[labels] = value
            else:
                sums[labels] = sums.get(labels, 0.0) + value
                if kind == "histogram":
                    counts = buckets.get(labels) or buckets.setdefault(labels, [0] * len(_BOUNDS))
                    counts[bisect_left(SECONDS, value)] += 1

        return follow

    def family(self) -> Family:
        """All of it, as the library writes it out."""
        metric = self.metric
        name, meaning, labels = metric.name, metric.meaning, metric.labels
        match metric.kind:
            case "counter":
                counter = CounterMetricFamily(name.removesuffix("_total"), meaning, labels=labels)
                for words, value in self._by_words().items():
                    counter.add_metric(words, value)
                return counter
            case "gauge":
                gauge = GaugeMetricFamily(name, meaning, labels=labels)
                for words, value in self._by_words().items():
                    gauge.add_metric(words, value)
                return gauge
            case "histogram":
                histogram = HistogramMetricFamily(name, meaning, labels=labels)
                for words, value in self._by_words().items():
                    histogram.add_metric(words, _cumulated(self._buckets_of(words)), value)
                return histogram

    def _by_words(self) -> dict[Words, float]:
        sums: dict[Words, float] = {}
        for labels, value in self._sums.items():
            words = tuple(map(word, labels))
            sums[words] = sums.get(words, 0.0) + value
        return sums

    def _buckets_of(self, words: Words) -> list[int]:
        found = [counts for labels, counts in self._buckets.items() if tuple(map(word, labels)) == words]
        return [sum(counts) for counts in zip(*found, strict=True)]


def _picker(names: Words) -> Callable[[Fields], tuple[Any, ...]]:
    """Gives these fields; what an event does not have is None."""
    if len(names) < 2:
        return lambda fields: tuple(map(fields.get, names))
    # Nearly every event has all of them.
    pick = itemgetter(*names)

    def picked(fields: Fields) -> tuple[Any, ...]:
        try:
            labels: tuple[Any, ...] = pick(fields)
        except KeyError:
            return tuple(map(fields.get, names))
        return labels

    return picked


def word(value: object) -> str:
    """A label's value; what does not apply is empty."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def _cumulated(buckets: list[int]) -> list[tuple[str, int]]:
    total, bounds = 0, []
    for bound, count in zip(_BOUNDS, buckets or [0] * len(_BOUNDS), strict=True):
        total += count
        bounds.append((bound, total))
    return bounds


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PREFIX = "orgworker_"
# Orgs that are counted one by one, to know which are the busiest; the rest goes uncounted.
MOST_ORGS = 100_000
# Those that an attempt may leave its run in.
STATES = ("waiting", "succeeded", "failed", "cancelled", "refused", "skipped")


class Metrics:
    """Counts from the moment it listens: `events.listen(metrics.take)`.

    No metric has an org for a label, but `org_attempts_total`, for the `top_orgs`
    that had the most attempts, if that is not 0.
    """

    def __init__(self, *, version: str, top_orgs: int = 0) -> None:
        self._registry = CollectorRegistry()
        # Events come from any thread.
        self._lock = threading.Lock()
        self._vitals: Vitals | None = None
        self._top_orgs = top_orgs
        self._attempts: dict[str, Tally[str]] = {}
        self._counts = dict.fromkeys(EVENTS, 0)
        self._series: dict[str, Series] = {}
        self._follow: dict[str, list[Callable[[Fields], None]]] = {name: [] for name in EVENTS}
        for metric in METRICS:
            if metric.event:
                series = self._series.setdefault(metric.name, Series(metric))
                self._follow[metric.event].append(series.follower(metric.value))
        for state in STATES:
            self._series[f"{PREFIX}attempt_states_total"].begin(state)
        self._series[f"{PREFIX}database_up"].set(1)
        Gauge(f"{PREFIX}info", _help("info"), ["version"], registry=self._registry).labels(version).set(1)
        ProcessCollector(registry=self._registry)
        self._registry.register(_WhenAsked(self._families))

    @property
    def name_orgs(self) -> bool:
        """Whether some metric has an org for a label."""
        return self._top_orgs > 0

    def watch(self, vitals: Vitals) -> None:
        """Ask these from now on, in place of those of an incarnation that has ended."""
        self._vitals = vitals

    def take(self, emitted: Emitted) -> None:
        """Count one event; from any thread."""
        name, fields = emitted.event.name, emitted.fields
        with self._lock:
            self._counts[name] += 1
            for follow in self._follow[name]:
                follow(fields)
            if self._top_orgs and name == "run.ended":
                self._count_org(fields)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def _count_org(self, fields: Fields) -> None:
        org, state = fields.get("org"), fields.get("state")
        if org and (org in self._attempts or len(self._attempts) < MOST_ORGS):
            self._attempts.setdefault(org, Tally())[word(state)] += 1

    def _families(self) -> Iterator[Family]:
        with self._lock:
            counted = [self._events(), *(series.family() for series in self._series.values())]
            if self._top_orgs:
                counted.append(self._by_org())
        yield from counted
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

    def _events(self) -> Family:
        family = CounterMetricFamily(f"{PREFIX}events", _help("events_total"), labels=["event"])
        for name, count in self._counts.items():
            family.add_metric([name], count)
        return family

    def _by_org(self) -> Family:
        """An org that comes among the busiest comes with its true count since the process began."""
        family = CounterMetricFamily(
            f"{PREFIX}org_attempts", _help("org_attempts_total"), labels=["org", "state"]
        )
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
