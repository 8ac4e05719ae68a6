"""The adapter for the outside harness: its telemetry against the harness's contract, and its figures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from bench.outside.cells import Cell, Job, Mark, figures, from_summary, rows
from bench.outside.contract import WINDOW, Latencies, Pace, Settings, Telemetry

URL = "postgresql://bench@localhost/orgworker_bench"
REQUIRED = {
    "claim_p50_ms": WINDOW,
    "claim_p95_ms": WINDOW,
    "claim_p99_ms": WINDOW,
    "enqueue_rate": 5,
    "completion_rate": 5,
    "queue_depth": 0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def settings(**environment: str) -> Settings:
    return Settings.read({"DATABASE_URL": URL, **environment})


def telemetry(out: io.StringIO, *, instance: str = "0") -> Telemetry:
    return Telemetry("orgworker", settings(BENCH_INSTANCE_ID=instance), lambda: 7, out)


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_samples_have_every_metric_of_the_contract_and_its_window():
    out = io.StringIO()
    sampled = telemetry(out)
    sampled.enqueued(20)
    sampled.claimed(12.0)
    sampled.completed(10)

    sampled.sample(5.0)

    found = {str(line["metric"]): line for line in lines(out)}
    assert REQUIRED.items() <= {name: line["window_s"] for name, line in found.items()}.items()
    values = {name: line["value"] for name, line in found.items()}
    assert values["enqueue_rate"] == 4
    assert values["completion_rate"] == 2
    assert values["queue_depth"] == 7
    assert values["claim_p99_ms"] == pytest.approx(12, rel=0.01)
    for line in found.values():
        assert line["kind"] == line["subject_kind"] == "adapter"
        assert (line["system"], line["subject"], line["instance_id"]) == ("orgworker", "", 0)
        assert str(line["t"]).endswith("Z")


def test_a_sample_counts_only_what_happened_since_the_last_one():
    out = io.StringIO()
    sampled = telemetry(out)
    sampled.completed(10)
    sampled.sample(5.0)
    sampled.sample(5.0)
    assert [line["value"] for line in lines(out) if line["metric"] == "completion_rate"] == [2, 0]


def test_only_the_first_replica_reports_what_holds_for_the_system():
    out = io.StringIO()
    telemetry(out, instance="1").sample(5.0)
    assert not {"queue_depth", "producer_target_rate"} & {line["metric"] for line in lines(out)}


def test_a_depth_that_cannot_be_read_leaves_out_only_the_depth():
    def gone() -> int:
        raise ConnectionError("the server is away")

    out = io.StringIO()
    Telemetry("orgworker", settings(), gone, out).sample(5.0)
    assert {line["metric"] for line in lines(out)} == {*REQUIRED, "producer_target_rate"} - {"queue_depth"}


def test_the_descriptor_names_the_database_and_the_tables():
    out = io.StringIO()
    telemetry(out).describe(tables=["public.runs"], version="1.0")
    (line,) = lines(out)
    assert line["kind"] == "descriptor"
    assert line["db_name"] == "orgworker_bench"
    assert line["event_tables"] == ["public.runs"]
    assert line["extensions"] == []


def test_the_pace_credits_the_time_that_passed_and_not_its_turns():
    clock = Clock()
    pace = Pace(settings(PRODUCER_RATE="80", PRODUCER_BATCH_MAX="15"), clock)
    clock.now += 0.0625
    assert pace.due() == 5
    clock.now += 0.03125
    assert pace.due() == 2
    clock.now += 0.25
    assert [pace.due(), pace.due(), pace.due()] == [15, 5, 0]


def test_the_pace_follows_the_file_that_a_phase_changes(tmp_path: Path):
    clock, file = Clock(), tmp_path / "rate"
    file.write_text("100")
    pace = Pace(settings(PRODUCER_RATE="100", PRODUCER_RATE_CONTROL_FILE=str(file)), clock)
    clock.now += 0.25
    assert pace.due() == 25
    file.write_text("200.0")
    clock.now += 0.25
    assert pace.due() == 50


def test_percentiles_are_of_the_last_thirty_seconds():
    clock = Clock()
    latencies = Latencies(clock)
    assert latencies.percentiles() == {"p50": 0, "p95": 0, "p99": 0}
    latencies.add(5000)
    clock.now += WINDOW + 1
    for milliseconds in range(1, 101):
        latencies.add(milliseconds)
    found = latencies.percentiles()
    assert found == {name: pytest.approx(int(name[1:]), rel=0.01) for name in ("p50", "p95", "p99")}


def test_figures_count_what_is_held_what_ran_twice_and_the_pause():
    marks = [Mark("baseline", "clean", 0), Mark("kills", "repeated-kill", 10), Mark("recovery", "clean", 20)]
    jobs = [
        *(Job(at, at + 0.1, 1, False) for at in range(10)),
        Job(10, 18, 2, False),
        Job(11, None, 1, True),
        Job(29, None, 1, False),
        Job(20, 21, 1, False),
    ]
    cell = Cell("orgworker", "kills", died=None)

    figures(cell, jobs, marks, until=30)

    assert (cell.made, cell.ended, cell.waiting, cell.held, cell.twice) == (14, 12, 1, 1, 1)
    assert cell.pause == 9
    assert [phase.rate for phase in cell.phases] == [1, 0.1, 0.1]
    assert cell.phases[0].p99 == pytest.approx(100)
    assert cell.phases[1].p99 == pytest.approx(8000)


def test_the_table_says_what_was_not_reached():
    first = Cell("orgworker", "restart", died=None)
    figures(
        first, [Job(1, 2, 1, False)], [Mark("baseline", "clean", 0), Mark("recovery", "clean", 10)], until=20
    )
    died = Cell("pgqueuer", "restart", died="replica 0 exited")
    figures(died, [Job(1, 1.05, 1, False)], [Mark("baseline", "clean", 0)], until=10)
    summary = {
        "phases": {"baseline": {"metrics": {"claim_p99_ms": {"median": 3.0}, "n_dead_tup@t": {"peak": 9}}}}
    }
    from_summary(first, {"systems": {"orgworker": summary}})

    stored = [Cell.from_json(json.loads(json.dumps(cell.as_json()))) for cell in (first, died)]
    table = "\n".join(rows(stored))

    assert stored == [first, died]
    assert first.claim_p99 == {"baseline": 3.0}
    assert "| restart, baseline: jobs/s; p99 | 0; 1,000 ms | 0; 50 ms |" in table
    assert "| restart, recovery: jobs/s; p99 | 0; none ended | not reached |" in table
    assert "replica 0 exited" in table
