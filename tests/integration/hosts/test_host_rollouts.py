"""Hosts and rollouts: a run has the version that a worker gave it, whatever its host says.

Each attack has a control: without the defence it succeeds.
"""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.rows import within
from tests.integration.hosts.conftest import HANDLER, OTHER, Fleet, Host, end_of, fence
from worker.features.hosts import wire
from worker.features.hosts.hosted_runs import HostedRuns
from worker.store import rollouts, tables

VALUES: dict[str, Any] = {
    "definitions": "render",
    "from_handler": HANDLER,
    "to_handler": OTHER,
    "orgs": "all",
    "flag": None,
    "steps": ["100%"],
    "auto": False,
    "watch": {"failed": "+2 points"},
}


async def hosted(fleet: Fleet, state: str) -> tuple[Host, wire.Taken]:
    """A host with a run of org_b, whose definition has a rollout in this state: 100 % if it runs."""
    with fleet.database.transaction() as connection:
        at = fleet.database.now(connection)
        rollouts.put(connection, "render-v2", VALUES, None, at=at, actor="test")
        began = {"state": state, "step": 1, "began_at": at, "step_began_at": at}
        connection.execute(update(tables.rollouts).values(**began))
    for worker in fleet.workers:
        await worker.store.look_at_rollouts()
    host = await fleet.host()
    fleet.start(org="org_b")
    [taken] = await host.take(fleet.one)
    return host, taken


async def named(fleet: Fleet, host: Host, taken: wire.Taken, handler: str) -> int:
    """The status of a checkpoint by a handler at a worker that has not prepared the attempt."""
    save = {**fence(taken), "handler": handler, "data": "1"}
    return (await host.send(fleet.two, "save", save)).status_code


@on_either
@pytest.mark.parametrize(("state", "handler"), [("running", OTHER), ("halted", HANDLER)])
async def test_a_run_on_a_host_has_its_version(fleet: Fleet, state: str, handler: str) -> None:
    host, taken = await hosted(fleet, state)

    assert await host.finish(fleet.two, end_of(taken)) == [taken.run.id]

    [version] = fleet.rows.all(tables.run_versions)
    [attempt] = fleet.rows.attempts(taken.run.id)
    assert (taken.work.handler, version["handler"], attempt["handler"]) == (handler, handler, handler)


@on_either
@pytest.mark.parametrize(
    ("state", "right", "wrong"), [("running", OTHER, HANDLER), ("halted", HANDLER, OTHER)]
)
async def test_a_host_cannot_choose_the_version_of_a_run(
    fleet: Fleet, state: str, right: str, wrong: str
) -> None:
    host, taken = await hosted(fleet, state)

    assert await named(fleet, host, taken, wrong) == 422
    assert await named(fleet, host, taken, right) == 200
    assert [row["handler"] for row in fleet.rows.all(tables.checkpoints)] == [right]


async def test_it_could_if_workers_took_each_handler_of_the_definition(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""

    async def each(self: Any, hosted: Any) -> set[str]:
        return {HANDLER, *hosted.inflight.plan.others()}

    monkeypatch.setattr(HostedRuns, "_possible_handlers", each)
    host, taken = await hosted(fleet, "halted")

    assert await named(fleet, host, taken, OTHER) == 200


@pytest.mark.parametrize(("origin", "answer"), [("manual", 200), ("child", 422)])
async def test_a_child_cannot_become_the_new_version(fleet: Fleet, origin: str, answer: int) -> None:
    """A child has the version of its parent: no rollout chooses its handler."""
    host, taken = await hosted(fleet, "running")
    within(
        fleet.database,
        lambda connection: connection.execute(tables.live_runs.update().values(origin=origin)),
    )

    assert await named(fleet, host, taken, OTHER) == answer
