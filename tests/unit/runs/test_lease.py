"""The lease of a worker: when it freezes, when it is lost, when it may take from others."""

from __future__ import annotations

from datetime import timedelta

from worker.model.runs.lease import Lease

BEGUN = Lease.begun(timedelta(seconds=30), 1000.0)


def test_a_lease_freezes_at_four_fifths_and_ends_after_its_duration():
    assert BEGUN.freeze_at == 1024.0
    assert BEGUN.expires_at == 1030.0
