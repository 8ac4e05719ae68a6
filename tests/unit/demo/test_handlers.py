"""The demo's handlers, and the distribution that only the demo installs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from worker.demo.handlers import HANDLERS, METER, install, letters, refund, reviews
from worker.testing import Orgworker


@pytest.mark.parametrize(("answer", "refunded"), [("yes", 40), ("no", 0)])
def test_only_an_approval_pays(orgworker: Orgworker, answer: object, refunded: int):
    run = orgworker.run(refund, params={"customer": "Ada", "euros": 40}, answers={"approval": answer})

    assert run.result == {"decision": answer, "refunded": refunded}
    assert [step.name for step in run.steps] == ["pay"] * bool(refunded)


def test_letters_stop_at_the_budget_and_none_is_sent_twice(
    orgworker: Orgworker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("worker.demo.handlers.PACE", 0)
    free = orgworker.run(letters, params={"customers": 3})
    stopped = orgworker.run(letters, params={"customers": 3}, budgets={METER: 2})

    assert (free.state, free.spends) == ("succeeded", {METER: 3})
    assert (stopped.reason, stopped.spends) == ("budget", {METER: 2})


def test_it_is_installed_in_the_folder_of_the_demo_alone(tmp_path: Path):
    install(tmp_path)

    [found] = metadata.distributions(path=[str(tmp_path)])
    points = {point.name: point.load() for point in found.entry_points}
    assert points == {"demo.refund": refund, "demo.letters": letters, "demo.reviews": reviews}
    assert not points.keys() & {point.name for point in metadata.entry_points(group="worker.jobs")}
    assert points.keys() == HANDLERS.keys()
