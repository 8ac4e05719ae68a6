"""What the outside harness runs against each system, and each cell's figures, from the system's own rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CHAOS = frozenset({"repeated-kill", "pg-backend-kill", "pool-exhaustion", "postgres-restart"})


@dataclass(frozen=True, slots=True)
class Scenario:
    """A sequence of the harness's phases, in seconds, and the load.

    `rate` is of each replica; 0 means that the queue is kept at `depth`.
    """

    name: str
    phases: str
    rate: int = 100
    depth: int = 2000
    workers: int = 32
    replicas: int = 1

    def specs(self, scale: float) -> list[str]:
        """The phases as its command line has them, all longer or shorter by a factor."""
        parts = (phase.rpartition(":") for phase in self.phases.split())
        return [f"{phase}:{max(1, round(int(seconds) * scale))}s" for phase, _, seconds in parts]


# Its named scenarios with shorter phases: `idle_in_tx_saturation`, `active_readers` and `chaos_…`. `peak` is
# its search for the most that a system can do, and goes on with a held snapshot. The idle connections are 300
# of 400 there; our server has 200.
SCENARIOS = (
    Scenario(
        "peak",
        "warmup=warmup:8 clean=clean:18 held=idle-in-tx:26 recovery=recovery:10",
        rate=0,
        workers=256,
    ),
    Scenario(
        "pressure",
        "warmup=warmup:5 clean=clean:12 held=idle-in-tx:18 readers=active-readers:14 recovery=clean:6",
    ),
    Scenario(
        "kills",
        "warmup=warmup:5 baseline=clean:8 kills=repeated-kill(instance=0,period=6s):24 recovery=clean:20",
        rate=50,
        replicas=2,
    ),
    Scenario(
        "sessions", "warmup=warmup:4 baseline=clean:7 sessions=pg-backend-kill(rate=2):10 recovery=clean:8"
    ),
    Scenario(
        "connections",
        "warmup=warmup:3 baseline=clean:5 connections=pool-exhaustion(idle_conns=100):7 recovery=clean:4",
    ),
    Scenario("restart", "warmup=warmup:5 baseline=clean:7 restart=postgres-restart:12 recovery=clean:14"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the system: when it was put in and succeeded, in Unix time, and how often it was started.

    `held`: a worker owns it, alive or not.
    """

    made_at: float
    ended_at: float | None
    starts: int
    held: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """The begin of a phase, in Unix time."""

    label: str
    type: str
    at: float


@dataclass(slots=True)
class PhaseFigures:
    """The jobs that ended in a phase: how many a second, and milliseconds from insert to durable end."""

    label: str
    type: str
    rate: float
    p50: float | None
    p99: float | None


@dataclass(slots=True)
class Cell:
    """One scenario of one system.

    Once all was stopped, `held` jobs still belonged to a worker and `waiting` ones did not; `twice` jobs were
    started more than once. `pause` is the longest time without a success from the first blow on, in seconds;
    `died` is what the harness said of an adapter that ended.
    """

    system: str
    scenario: str
    died: str | None
    phases: list[PhaseFigures] = field(default_factory=list)
    made: int = 0
    ended: int = 0
    waiting: int = 0
    held: int = 0
    twice: int = 0
    pause: float | None = None
    # From the harness's own summary.
    claim_p99: dict[str, float] = field(default_factory=dict)
    dead_rows: dict[str, float] = field(default_factory=dict)
    recovery_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Cell:
        return cls(**stored | {"phases": [PhaseFigures(**phase) for phase in stored["phases"]]})


def figures(cell: Cell, jobs: Sequence[Job], marks: Sequence[Mark], until: float) -> None:
    """Fill in what the rows of the system show; the last phase ends at `until`."""
    for mark, after in zip(marks, [*(mark.at for mark in marks[1:]), until], strict=True):
        took = sorted(
            (job.ended_at - job.made_at) * 1000
            for job in jobs
            if job.ended_at and mark.at <= job.ended_at < after
        )
        rate = len(took) / (after - mark.at)
        cell.phases.append(PhaseFigures(mark.label, mark.type, rate, _share(took, 0.5), _share(took, 0.99)))
    cell.made = len(jobs)
    cell.ended = sum(job.ended_at is not None for job in jobs)
    cell.held = sum(job.ended_at is None and job.held for job in jobs)
    cell.waiting = cell.made - cell.ended - cell.held
    cell.twice = sum(job.starts > 1 for job in jobs)
    blow = next((mark.at for mark in marks if mark.type in CHAOS), None)
    if blow is not None:
        cell.pause = _longest_pause((job.ended_at for job in jobs if job.ended_at), blow, until)


def _longest_pause(ends: Iterable[float], since: float, until: float) -> float:
    within = [since, *sorted(end for end in ends if since <= end < until), until]
    return max(later - earlier for earlier, later in itertools.pairwise(within))


def _share(values: Sequence[float], share: float) -> float | None:
    """A percentile of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def from_summary(cell: Cell, summary: dict[str, Any]) -> None:
    """Fill in the figures of the harness's own summary."""
    for label, phase in summary.get("systems", {}).get(cell.system, {}).get("phases", {}).items():
        metrics = phase["metrics"]
        if "claim_p99_ms" in metrics:
            cell.claim_p99[label] = metrics["claim_p99_ms"]["median"]
        dead = [found["peak"] for name, found in metrics.items() if name.startswith("n_dead_tup@")]
        if dead:
            cell.dead_rows[label] = sum(dead)
        if phase.get("chaos_recovery_time_s") is not None:
            cell.recovery_seconds = phase["chaos_recovery_time_s"]


def rows(cells: Sequence[Cell]) -> list[str]:
    """The lines of a Markdown table: scenario and figure, then a column for each system."""
    systems = list(dict.fromkeys(cell.system for cell in cells))
    found = {(cell.scenario, cell.system): cell for cell in cells}
    lines = [f"| | {' | '.join(systems)} |", "|---" * (len(systems) + 1) + "|"]
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        mine = [found.get((scenario, system)) for system in systems]
        longest = max((cell.phases for cell in mine if cell), key=len)
        for phase in longest:
            if phase.type == "warmup":
                continue
            shown = [_phase(cell, phase.label) for cell in mine]
            lines.append(f"| {scenario}, {phase.label}: jobs/s; p99 | {' | '.join(shown)} |")
        for what, value in (
            ("put in; waiting, owned by a worker, started twice at the end", _counts),
            ("longest pause; dead rows", _blow),
        ):
            lines.append(f"| {scenario}: {what} | {' | '.join(value(cell) for cell in mine)} |")
    return lines


def _phase(cell: Cell | None, label: str) -> str:
    phase = next((phase for phase in cell.phases if phase.label == label), None) if cell else None
    if phase is None:
        return "not reached"
    return f"{phase.rate:,.0f}; {'none ended' if phase.p99 is None else f'{phase.p99:,.0f} ms'}"


def _counts(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.made:,}; {cell.waiting:,}, {cell.held}, {cell.twice}"


def _blow(cell: Cell | None) -> str:
    if cell is None:
        return ""
    pause = "" if cell.pause is None else f"{cell.pause:.1f} s"
    dead = f"{max(cell.dead_rows.values()):,.0f}" if cell.dead_rows else ""
    died = "" if cell.died is None else f"; {cell.died}"
    return f"{pause or '-'}; {dead or '-'}{died}"
