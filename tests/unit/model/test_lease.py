"""The lease of a worker: when it freezes, when it is lost, when it may take from others."""

from __future__ import annotations

from datetime import timedelta

from worker.model.runs.lease import Lease

BEGUN = Lease.begun(timedelta(seconds=30), 1000.0)


def test_a_lease_freezes_at_four_fifths_and_ends_after_its_duration():
    assert BEGUN.freeze_at == 1024.0
    assert BEGUN.expires_at == 1030.0


def test_a_renewal_counts_from_when_it_was_asked_for():
    renewed = BEGUN.renewed(1005.0, 1006.0)

    assert (renewed.freeze_at, renewed.expires_at) == (1029.0, 1035.0)
    assert renewed.contact_since == 1000.0


def test_recovery_waits_for_a_whole_lease_of_contact():
    lease = BEGUN
    for asked_at in range(1005, 1030, 5):
        lease = lease.renewed(float(asked_at), float(asked_at))

    assert not lease.may_recover(1029.9)
    assert lease.may_recover(1030.0)
    assert not lease.may_recover(lease.expires_at)


def test_a_lease_renewed_too_late_begins_its_contact_anew():
    """After an outage the owners renew first; nobody takes their runs for a whole lease."""
    late = BEGUN.renewed(1031.0, 1032.0)

    assert late.contact_since == 1032.0
    assert not late.may_recover(1050.0)
    assert not late.renewed(1055.0, 1055.0).may_recover(1061.9)
    assert late.renewed(1055.0, 1055.0).may_recover(1062.0)


def test_a_renewal_that_is_missed_breaks_the_contact_and_not_the_lease():
    missed = BEGUN.renewed(1005.0, 1005.0).missed()

    assert missed.expires_at == 1035.0
    assert missed.unbroken_contact(1006.0) == 0.0
    assert missed.renewed(1010.0, 1011.0).unbroken_contact(1015.0) == 4.0
