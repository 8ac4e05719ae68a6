"""Changes in the role of a caller: what an operator may change, and what an org may."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.fakes.rows import reading
from tests.integration.console.conftest import Site, on_either
from worker.errors import DefinitionError
from worker.features.console.callers import Caller, CallerDatabase
from worker.ids import ALL_ORGS, OrgId
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.store import definitions, orgs
from worker.store.dialect import database_now
from worker.store.lists import RUNS, SKIPS
from worker.store.lists.read import read

ADA = Caller("ada", "operator")


def org_caller(site: Site, org: str = "org_a") -> Caller:
    return Caller(org, "operator", org=org, org_id=reading(site.database, orgs.require, org)["id"])


@on_either
async def test_an_org_pauses_and_resumes_its_definition_and_what_was_due_is_settled(site: Site):
    database, caller = CallerDatabase(site.database), org_caller(site)
    await database.edit(ADA, "org_a", "digest", {"schedule": "* * * * *", "misfire": "all"})
    with site.database.transaction() as connection:
        # As if no worker had run for five minutes.
        [(org_id, id_, due)] = [
            (row["org_id"], row["id"], row["next_scheduled_for"] - timedelta(minutes=5))
            for row in definitions.lock_org(connection, caller.org_id or OrgId(""))
        ]
        definitions.set_next(connection, [(org_id, id_, due, due)])

    paused = await database.pause(caller, "org_a", "digest", note="moving house")
    assert (paused["state"], paused["pause_note"], paused["next_scheduled_for"]) == (
        "paused",
        "moving house",
        None,
    )
    assert site.last_change() == ("org:org_a", "definition.pause", {"note": "moving house"})
    resumed = await database.resume(caller, "org_a", "digest")

    assert resumed["state"] == "active"
    assert resumed["next_scheduled_for"] is not None
    with site.database.autocommit() as connection:
        skipped, runs = read(connection, SKIPS, ALL_ORGS), read(connection, RUNS, ALL_ORGS)
    assert {row["org"] for row in [*skipped, *runs]} == {"org_a"}
    # On PostgreSQL, whose clock goes on, another minute may begin meanwhile.
    assert sum(row["count"] for row in skipped) + len(runs) in (5, 6)
    assert runs[0]["origin"] == "schedule"


async def test_an_operator_edits_a_definition_and_says_why(site: Site):
    database = CallerDatabase(site.database)

    edited = await database.edit(ADA, "org_a", "digest", {"priority": 7}, revision=1, reason="ticket 12")

    assert (edited["revision"], edited["spec"]["priority"]) == (2, 7)
    actor, action, detail = site.last_change()
    assert (actor, action) == ("operator:ada", "definition.change")
    assert detail == {"priority": {"before": None, "after": 7}, "reason": "ticket 12"}
    with pytest.raises(DefinitionError, match="schedule"):
        await database.edit(ADA, "org_a", "digest", {"schedule": "61 * * * *"})


@pytest.mark.feature("calendars")
@on_either
async def test_an_operator_gives_a_definition_a_calendar_and_its_org_settles_by_it(site: Site):
    """Each in its own role: the org may not read calendars, and needs none for the dates."""
    now = reading(site.database, database_now)
    dates = [(now + timedelta(days=days)).date().isoformat() for days in (-1, 0, 1)]
    holidays = f'[[calendar]]\nname = "holidays"\ndates = {dates}\n'
    apply(site.database, parse_file(holidays), actor="tester")
    database, caller = CallerDatabase(site.database), org_caller(site)

    edited = await database.edit(
        ADA, "org_a", "digest", {"calendar": "holidays", "schedule": "* * * * *", "timezone": "UTC"}
    )
    with pytest.raises(DefinitionError, match="there is no calendar absent"):
        await database.edit(ADA, "org_a", "digest", {"calendar": "absent"})
    with site.database.transaction() as connection:
        [row] = definitions.lock_org(connection, caller.org_id or OrgId(""))
        due = row["next_scheduled_for"] - timedelta(minutes=5)
        definitions.set_next(connection, [(row["org_id"], row["id"], due, due)])
    await database.pause(caller, "org_a", "digest")

    assert (edited["calendar"], edited["spec"]["calendar_dates"]) == ("holidays", dates)
    assert edited["next_run_for"] >= edited["next_scheduled_for"] + timedelta(hours=24)
    with site.database.autocommit() as connection:
        skipped, runs = read(connection, SKIPS, ALL_ORGS), read(connection, RUNS, ALL_ORGS)
    assert {row["reason"] for row in skipped} == {"calendar"}
    assert sum(row["count"] for row in skipped) in (5, 6)
    assert runs == []


async def test_a_run_is_run_cancelled_and_retried_with_a_reason(site: Site):
    database, caller = CallerDatabase(site.database), org_caller(site)

    run = await database.run_now(caller, "org_a", "digest", reason="asked by phone")
    assert site.last_change()[2]["reason"] == "asked by phone"
    await database.cancel(caller, run["id"], reason="by mistake")
    assert site.last_change() == ("org:org_a", "run.cancel", {"definition": "digest", "reason": "by mistake"})
    await database.retry(caller, run["id"], reason="after all")

    detail = {"retry_of": run["id"], "from_checkpoint": False, "reason": "after all"}
    assert site.last_change() == ("org:org_a", "run.retry", detail)
