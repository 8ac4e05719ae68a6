"""A change of an org's properties is found once by each worker, which then drops the org's tokens."""

from __future__ import annotations

from datetime import timedelta

from tests.conftest import on_either
from worker.clock import SystemClock
from worker.features.provisioning.properties import _record
from worker.ids import OrgId
from worker.operations import new_claims
from worker.operations.new_claims import NewClaims
from worker.store import audit

FILE = '[[org]]\ncode = "org_a"\nissuer = "main"\n[[org]]\ncode = "org_b"\nissuer = "main"\n'


@on_either
async def test_each_change_is_found_once_by_each_worker(apply, database, rows):
    """Other rows of the audit, the control, drop no token."""
    apply(FILE)
    ids = {row["code"]: row["id"] for row in rows.orgs}
    first, second = NewClaims(database, SystemClock()), NewClaims(database, SystemClock())
    assert await first.look() == set()

    await database.call(_record, "org_a", "plan", is_set=True, actor="kim", database=database)
    with database.transaction() as connection:
        entry = audit.Entry(OrgId(ids["org_b"]), "org.pause", "org_b")
        audit.record(connection, [entry], at=database.now(connection), actor="kim")

    assert await first.look() == {ids["org_a"]}
    assert await first.look() == set()
    assert await second.look() == {ids["org_a"]}
    await database.call(_record, "org_a", "plan", is_set=False, actor="kim", database=database)
    assert await first.look() == {ids["org_a"]}


async def test_a_change_whose_clock_is_behind_is_found(apply, database, rows, monkeypatch):
    """The control looks back no further than its own clock says."""
    apply(FILE)
    ids = {row["code"]: row["id"] for row in rows.orgs}
    await database.call(_record, "org_a", "plan", is_set=True, actor="kim", database=database)

    class Ahead(SystemClock):
        def now(self):  # type: ignore[no-untyped-def]
            return super().now() + timedelta(seconds=30)

    assert await NewClaims(database, Ahead()).look() == {ids["org_a"]}
    monkeypatch.setattr(new_claims, "LATE", timedelta(seconds=29))
    assert await NewClaims(database, Ahead()).look() == set()
