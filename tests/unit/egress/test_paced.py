"""What a broker counts of limits, as its worker or host reports it."""

from __future__ import annotations

from typing import Any

from tests.fakes.clock import ManualClock
from worker.features.egress.handle import BrokerHandle
from worker.features.egress.pacing import OriginCounts
from worker.telemetry.events import Emitted

ORIGIN = "https://api.example.com"


def test_counts_are_reported_as_differences_and_begin_again_with_a_broker(emitted: list[Emitted]) -> None:
    broker = BrokerHandle(ManualClock(), {})

    def tell(*counts: Any) -> None:
        told = [OriginCounts(ORIGIN, *counts)._asdict()] if counts else []
        broker._receive({"op": "paced", "counts": told})

    for counts in ((2, 5, 1.5, 1), (2, 5, 1.5, 1), (1, 7, 2.0, 1), (), (1, 1, 0.5, 0)):
        tell(*counts)

    found = [one.fields for one in emitted if one.event.name == "limit.counted"]
    assert {each["origin"] for each in found} == {ORIGIN}
    assert [(each["waiting"], each["waited"], each["seconds"], each["refused"]) for each in found] == [
        (2, 5, 1.5, 1),
        (1, 2, 0.5, 0),
        (0, 0, 0.0, 0),
        (1, 1, 0.5, 0),
    ]
