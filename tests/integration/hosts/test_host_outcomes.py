"""How a host may say that an attempt ended: what only workers decide it cannot forge.

Each attack has a control: without the defence it succeeds.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.conftest import on_either
from tests.integration.hosts.conftest import HANDLER, Fleet, Host, end_of, fence
from worker.features.hosts.hosted_runs import HostedRuns
from worker.model.runs import outcome as outcomes
from worker.model.runs.egress import EgressRow
from worker.model.runs.outcome import Error, Failed, Outcome
from worker.operations.runs import cancel
from worker.store import hosts, tables
from worker.telemetry.events import Emitted


async def report(fleet: Fleet, host: Host, outcome: Outcome) -> str:
    """Have a run of `host` end so; returns the run."""
    run = fleet.start()
    [taken] = await host.take(fleet.one)
    assert await host.finish(fleet.one, end_of(taken, outcome)) == [run]
    return run


async def believe(runs: HostedRuns, reported: Outcome, *_: Any) -> Outcome:
    """In place of the defence."""
    return reported


SENT = EgressRow("https://api.example.com", 3, 300, 9_000, {"200": 2, "429": 1}, 0, 1.5)


def recorded(fleet: Fleet, run: str) -> dict[str, int]:
    """The requests by origin that are stored of a run."""
    rows = fleet.rows.all(tables.run_egress, tables.run_egress.c.run_id == run)
    return {row["origin"]: row["requests"] for row in rows}


@on_either
async def test_what_a_run_of_a_host_sent_is_stored_with_its_end(fleet: Fleet, emitted: list[Emitted]) -> None:
    host, taken = await fleet.busy_host()
    run = taken.run.id
    evil = EgressRow("https://evil.example", denied=2, reason="not listed in egress of its @job(...)")
    end = end_of(taken, egress=(SENT, evil))
    for _ in range(2):  # the answer to the first was lost
        assert await host.finish(fleet.one, end) == [run]

    rows = fleet.rows.all(tables.run_egress)
    assert [(row["run_id"], row["org_id"], row["origin"], row["denied"]) for row in rows] == [
        (run, fleet.org("org_a"), "https://api.example.com", 0),
        (run, fleet.org("org_a"), "https://evil.example", 2),
    ]
    assert (rows[0]["statuses"], rows[0]["waited_seconds"]) == ({"200": 2, "429": 1}, 1.5)
    [denied] = [one.fields for one in emitted if one.event.name == "egress.denied"]
    assert (denied["org"], denied["run"], denied["origin"]) == ("org_a", run, "https://evil.example")
    assert denied["reason"] == evil.reason


async def test_what_a_host_says_of_a_run_that_is_not_its_own_is_not_stored(fleet: Fleet) -> None:
    host, other = await fleet.host(), await fleet.host("h2")
    run = fleet.start()
    [taken] = await host.take(fleet.one)

    assert await other.finish(fleet.one, end_of(taken, egress=(SENT,))) == []
    assert recorded(fleet, run) == {}

    # The control: its own host may.
    assert await host.finish(fleet.one, end_of(taken, egress=(SENT,))) == [run]
    assert recorded(fleet, run) == {"https://api.example.com": 3}


async def test_totals_beyond_the_limits_fail_the_attempt_and_are_not_stored(fleet: Fleet) -> None:
    host = await fleet.host()
    run = fleet.start()
    [taken] = await host.take(fleet.one)
    flood = tuple(EgressRow(f"https://{number}.example", 1) for number in range(1_000))

    assert await host.finish(fleet.one, end_of(taken, egress=flood)) == [run]

    assert recorded(fleet, run) == {}
    [attempt] = fleet.rows.attempts(run)
    assert "egress: not a list of at most" in attempt["error"]["message"]


FORGED = [
    outcomes.Refused("secret_missing", "openai"),
    outcomes.Refused("forged"),
    Failed(Error("Lost", "forged"), "lost"),
]


@pytest.mark.parametrize("outcome", FORGED)
async def test_what_only_workers_decide_is_a_failed_attempt(fleet: Fleet, outcome: Outcome) -> None:
    run = await report(fleet, await fleet.host(), outcome)

    assert [row["outcome"] for row in fleet.rows.attempts(run)] == ["failed"]
    assert (fleet.rows.unended(run)["reason"], fleet.rows.unended(run)["failures"]) == ("retry", 1)


async def test_control_without_the_check_a_host_forges_a_refusal(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostedRuns, "_believed", believe)

    run = await report(fleet, await fleet.host(), FORGED[0])

    assert (fleet.rows.run(run)["state"], fleet.rows.run(run)["reason"]) == ("refused", "secret_missing")


async def test_a_refused_token_that_this_worker_has_not_seen_is_checked_by_the_next_attempt(
    fleet: Fleet,
) -> None:
    """Any worker may have answered the host's request for a token."""
    host = await fleet.host()
    run = await report(fleet, host, outcomes.Refused("org_mismatch"))
    assert (fleet.rows.unended(run)["reason"], fleet.rows.unended(run)["failures"]) == ("no_token", 0)
    make_due(fleet, run)
    fleet.tokens.of_org = "org_b"

    assert await host.take(fleet.two, wait=0.5) == []

    assert (fleet.rows.run(run)["state"], fleet.rows.run(run)["reason"]) == ("refused", "org_mismatch")


@pytest.mark.parametrize(("asked", "least", "most"), [(0.0, 5, 8), (40.0, 38, 43), (10.0**8, 58, 63)])
async def test_the_pause_without_a_token_is_within_the_workers_limits(
    fleet: Fleet, asked: float, least: float, most: float
) -> None:
    with fleet.database.autocommit() as connection:
        now = fleet.database.now(connection)

    run = await report(fleet, await fleet.host(), outcomes.NoToken(timedelta(seconds=asked)))

    assert (
        timedelta(seconds=least)
        <= fleet.rows.unended(run)["available_at"] - now
        <= timedelta(seconds=most + 15)
    )


@on_either
async def test_a_stop_counts_only_if_it_was_asked_for(fleet: Fleet) -> None:
    host = await fleet.host()
    asked, forged = fleet.start(), fleet.start()
    taken = {one.run.id: one for one in await host.take_all(fleet.one, 2)}
    cancel(fleet.database, asked, actor="test")

    await host.finish(fleet.one, *(end_of(one, outcomes.Cancelled("requested")) for one in taken.values()))

    assert (fleet.rows.run(asked)["state"], fleet.rows.run(asked)["reason"]) == ("cancelled", "requested")
    assert fleet.rows.unended(forged)["reason"] == "handed_back"


@on_either
async def test_a_run_of_a_suspended_org_ends_as_that(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    with fleet.database.transaction() as connection:
        of = tables.orgs
        connection.execute(of.update().where(of.c.code == "org_a").values(state="suspended"))

    await host.finish(fleet.one, end_of(taken, outcomes.Cancelled("replaced")))

    run = fleet.rows.run(taken.run.id)
    assert (run["state"], run["reason"]) == ("cancelled", "suspended")


def make_due(fleet: Fleet, run: str) -> None:
    of = tables.live_runs
    with fleet.database.transaction() as connection:
        now = fleet.database.now(connection)
        connection.execute(of.update().where(of.c.id == run).values(available_at=now))
    for worker in fleet.workers:
        assert worker.api is not None
        worker.api.wake()


async def hand_back(fleet: Fleet, host: Host, *, by_call: bool = False, save: bool = False) -> None:
    [taken] = await host.take(fleet.one)
    if save:
        await host.call(fleet.one, "save", **fence(taken), handler=HANDLER, data=str(taken.run.attempt))
    if by_call:
        assert await host.call(fleet.one, "hand_back", runs=[fence(taken)]) == {"runs": [taken.run.id]}
    else:
        assert await host.finish(fleet.one, end_of(taken, outcomes.HandedBack())) == [taken.run.id]


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hosts, "MAX_HAND_BACKS", 3)
    return 3


@on_either
@pytest.mark.parametrize("by_call", [False, True])
async def test_a_run_that_is_handed_back_again_and_again_fails(
    fleet: Fleet, fewer: int, by_call: bool
) -> None:
    host = await fleet.host()
    run = fleet.start()
    for _ in range(fewer):
        await hand_back(fleet, host, by_call=by_call)
        assert fleet.rows.unended(run)["reason"] == "handed_back"

    await hand_back(fleet, host, by_call=by_call)

    assert (fleet.rows.unended(run)["reason"], fleet.rows.unended(run)["failures"]) == ("retry", 1)


async def test_control_without_the_limit_it_goes_on(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MAX_HAND_BACKS", 1_000)
    host = await fleet.host()
    run = fleet.start()

    for _ in range(5):
        await hand_back(fleet, host)

    assert (fleet.rows.unended(run)["reason"], fleet.rows.unended(run)["attempt"]) == ("handed_back", 5)


async def test_deploys_do_not_fail_a_run_that_goes_on(fleet: Fleet, fewer: int) -> None:
    """A run of days is handed back at each of many deploys, and saves in between."""
    host = await fleet.host()
    run = fleet.start()

    for number in range(2 * fewer + 1):
        await hand_back(fleet, host, save=number == fewer)

    assert (fleet.rows.unended(run)["reason"], fleet.rows.unended(run)["failures"]) == ("handed_back", 0)
