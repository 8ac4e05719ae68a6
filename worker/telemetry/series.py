"""The numbers of one metric, by the values of its labels; counted at every end of a run, so kept plain."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.utils import floatToGoString

from worker.telemetry.metric_table import SECONDS, Metric

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
