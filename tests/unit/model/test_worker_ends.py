"""How a worker's or a host's life ended, in words; an org reads them without ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from worker.ids import WorkerId
from worker.model.runs.worker_ends import end_in_words, end_of, lost_line, named_end
from worker.store import redaction
from worker.store.lists.rows import LogRow
from worker.store.redaction import redacted

NOW = datetime(2026, 11, 30, 3, 0, tzinfo=UTC)
# Fixed: they are part of the ids of the tests, which every process of a run has to agree on.
DEAD = WorkerId("01a22c71-8b88-78e5-b312-5077d97be175")
OTHER = WorkerId("01a22c71-9c40-7a01-8a6e-2f1c7be0d3a4")


def row(
    outcome: str | None = "crashed", runs: int = 0, host: str | None = None, **values: Any
) -> dict[str, Any]:
    return {
        "host_id": host and "id",
        "of_host": host,
        "host": "app1",
        "renewed_at": NOW - timedelta(minutes=9),
        "ended_at": NOW - timedelta(minutes=8),
        "outcome": outcome,
        "recovered_runs": runs,
        "recovered_by": OTHER if runs else None,
        **values,
    }


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        (row(), "crashed", "crashed 02:51 UTC"),
        (row(runs=1), "crashed", f"crashed 02:51 UTC, 1 run recovered by {OTHER}"),
        (row(runs=1200, host="gpu1"), "crashed", f"crashed 02:51 UTC, 1,200 runs recovered by {OTHER}"),
        # It may have stopped while no worker answered: nobody can know.
        (row(host="gpu1"), "silent", "silent since 02:51 UTC"),
        (row("stopped", host="gpu1"), "stopped", "stopped 02:52 UTC"),
        (row("stopped", runs=1), "stopped", f"stopped 02:52 UTC, 1 run recovered by {OTHER}"),
        (row("removed", host="gpu1"), "removed", "removed 02:52 UTC"),
        (row(None), "stopped", "stopped 02:52 UTC"),
        (row(renewed_at=NOW - timedelta(days=2)), "crashed", "crashed 2026-11-28 03:00 UTC"),
    ],
)
def test_each_end_has_its_word(given: dict[str, Any], state: str, words: str) -> None:
    assert (end_of(given), end_in_words(given, NOW)) == (state, words)


def test_one_that_lives_has_no_end_and_a_host_has_its_own_name() -> None:
    assert end_of(row(None, ended_at=None)) is None
    assert named_end(row(runs=1, host="gpu1"), NOW).startswith("gpu1 crashed")
    assert named_end(row(runs=1), NOW).startswith("app1 crashed")


@pytest.mark.parametrize(
    ("of_worker", "how"),
    [
        (row(), f": worker {DEAD} crashed, last seen 02:51:00 UTC"),
        (row("removed"), f": the host of worker {DEAD} was removed"),
        (row("stopped"), f": worker {DEAD} ended before it handed the run back"),
        (row(None), f": worker {DEAD} ended before it handed the run back"),
        (None, f" with worker {DEAD}"),
    ],
)
def test_the_log_says_why_an_attempt_was_lost(of_worker: dict[str, Any] | None, how: str) -> None:
    line = lost_line(1, DEAD, of_worker, OTHER, waits=True)

    assert line == f"attempt 1 was lost{how}; recovered by worker {OTHER}"


def seen_by_an_org(source: str, text: str) -> str:
    line = {"attempt": 1, "seq": 1, "at": NOW, "level": "warning", "source": source, "text": text}
    shown: str = redacted(LogRow, line, "org_a")["text"]
    return shown


def test_an_org_reads_no_ids_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = lost_line(1, DEAD, row(), OTHER, waits=True)

    assert seen_by_an_org("worker", text) == (
        "attempt 1 was lost: a worker crashed, last seen 02:51:00 UTC; recovered by a worker"
    )
    # What its own handler prints is its own.
    assert seen_by_an_org("stdout", text) == text
    # The control: without the rule an org would read them.
    monkeypatch.setattr(redaction, "SOURCE", "none")
    assert DEAD in seen_by_an_org("worker", text)
