"""The JSONL contract of the outside harness, for our two adapters: pace in, telemetry out.

Imports the standard library only: the peers' virtual environment runs it too.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

# Seconds over which percentiles are computed.
WINDOW = 30
# The relative error of a percentile is half of this.
STEP = 0.01
SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
# What only the first replica reports: it holds for the system.
OBSERVED = frozenset({"queue_depth", "producer_target_rate"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the harness asks for, in the environment."""

    database_url: str
    mode: str
    rate: int
    rate_file: str
    batch_max: int
    batch_seconds: float
    depth: int
    workers: int
    work_seconds: float
    sample_seconds: int
    instance: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        def number(name: str, default: int) -> int:
            return int(environment.get(name) or default)

        return cls(
            database_url=environment["DATABASE_URL"],
            mode=environment.get("PRODUCER_MODE", "fixed"),
            rate=number("PRODUCER_RATE", 800),
            rate_file=environment.get("PRODUCER_RATE_CONTROL_FILE", ""),
            batch_max=number("PRODUCER_BATCH_MAX", 128),
            batch_seconds=number("PRODUCER_BATCH_MS", 25) / 1000,
            depth=number("TARGET_DEPTH", 1000),
            workers=number("WORKER_COUNT", 32),
            work_seconds=number("JOB_WORK_MS", 1) / 1000,
            sample_seconds=number("SAMPLE_EVERY_S", 5),
            instance=number("BENCH_INSTANCE_ID", 0),
        )

    def rate_now(self) -> float:
        """The rate that the harness wants now: a phase with high load changes it in a file."""
        try:
            return float(Path(self.rate_file).read_text())
        except (OSError, ValueError):
            return float(self.rate)


class Pace:
    """How many jobs are due, by the time that has really passed."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._credited_at = clock()
        self._credit = 0.0

    def due(self) -> int:
        """The jobs of this turn, at most one batch; the rest is due at the next."""
        now = self._clock()
        self._credit += self._settings.rate_now() * (now - self._credited_at)
        self._credited_at = now
        jobs = min(self._settings.batch_max, int(self._credit))
        self._credit -= jobs
        return jobs


class Latencies:
    """Percentiles over the last 30 seconds, in memory that does not grow with the number of jobs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[tuple[int, Counter[int]]] = deque()

    def add(self, milliseconds: float) -> None:
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, Counter()))
        # Less than 10 us is as good as nothing.
        self._seconds[-1][1][round(math.log(max(milliseconds, 0.01)) / STEP)] += 1

    def percentiles(self) -> dict[str, float]:
        """Milliseconds by name; 0 without a job."""
        oldest = self._clock() - WINDOW
        while self._seconds and self._seconds[0][0] < oldest:
            self._seconds.popleft()
        counts: Counter[int] = Counter()
        for _, some in self._seconds:
            counts.update(some)
        found = dict.fromkeys(SHARES, 0.0)
        total, seen = counts.total(), 0
        for bucket in sorted(counts):
            before, seen = seen, seen + counts[bucket]
            for name, share in SHARES.items():
                if before < share * total <= seen:
                    found[name] = math.exp(bucket * STEP)
        return found


class Telemetry:
    """Counts jobs and emits a sample of each metric at each full interval of the wall clock."""

    def __init__(
        self, system: str, settings: Settings, depth: Callable[[], int], out: TextIO = sys.stdout
    ) -> None:
        self._system = system
        self._settings = settings
        self._depth = depth
        self._out = out
        self._lock = threading.Lock()
        self._claimed = Latencies()
        self._enqueued = self._completed = 0

    def describe(self, *, tables: list[str], version: str) -> None:
        """Emit the startup descriptor: the harness waits for it."""
        self._emit(
            kind="descriptor",
            event_tables=tables,
            extensions=[],
            version=version,
            schema_version=version,
            db_name=self._settings.database_url.rpartition("/")[2],
            started_at=stamp(),
        )

    def enqueued(self, jobs: int) -> None:
        with self._lock:
            self._enqueued += jobs

    def claimed(self, milliseconds: float) -> None:
        with self._lock:
            self._claimed.add(milliseconds)

    def completed(self, jobs: int = 1) -> None:
        with self._lock:
            self._completed += jobs

    def start(self) -> None:
        """Sample from a thread of its own, until the process ends."""
        threading.Thread(target=self._sample_always, daemon=True).start()

    def _sample_always(self) -> None:
        every = self._settings.sample_seconds
        before = time.monotonic()
        while True:
            time.sleep(every - time.time() % every)
            now = time.monotonic()
            self.sample(now - before)
            before = now

    def sample(self, seconds: float) -> None:
        """Emit what happened in the last `seconds`."""
        at = stamp()
        for metric, value, window in self._metrics(seconds):
            if self._settings.instance and metric in OBSERVED:
                continue
            self._emit(
                t=at,
                kind="adapter",
                subject_kind="adapter",
                subject="",
                metric=metric,
                value=round(value, 3),
                window_s=window,
            )

    def _metrics(self, seconds: float) -> Iterator[tuple[str, float, float]]:
        with self._lock:
            enqueued, completed = self._enqueued, self._completed
            self._enqueued = self._completed = 0
            percentiles = self._claimed.percentiles()
        for name, value in percentiles.items():
            yield f"claim_{name}_ms", value, WINDOW
        yield "enqueue_rate", enqueued / seconds, self._settings.sample_seconds
        yield "completion_rate", completed / seconds, self._settings.sample_seconds
        fixed = self._settings.mode == "fixed"
        yield "producer_target_rate", self._settings.rate_now() if fixed else 0.0, 0
        if not self._settings.instance:
            try:
                yield "queue_depth", self._depth(), 0
            except Exception as error:
                # The harness takes the database away; the next sample asks again.
                print(f"[{self._system}] no queue depth: {error}", file=sys.stderr)

    def _emit(self, **record: object) -> None:
        record |= {"system": self._system, "instance_id": self._settings.instance}
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()


def end_with_harness() -> None:
    """Ask this process to stop as soon as the harness has closed its standard input, or is gone."""

    def wait() -> None:
        while sys.stdin.readline():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def stamp() -> str:
    """The time of the wall clock, as the contract has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
