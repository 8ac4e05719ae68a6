"""What a run may have sent for it in a batch, and who reads of it."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from tests.fakes.batches import OPENAI, Rig, wait_of
from worker.demo.model_apis import ModelApis, client_of
from worker.diagnosis.why import explain
from worker.engine.attempt.answers import Running, admitted
from worker.engine.attempt.tools import GivenSecrets
from worker.features.batches.accounts import Accounts
from worker.features.batches.trying import TrialBatches
from worker.handlers.calls import NotACall, OpenWait
from worker.handlers.steps import StepError
from worker.ids import ALL_ORGS
from worker.model.batches import NewRequest
from worker.model.bindings import OrgSecret
from worker.model.egress import Gate
from worker.model.runs.clauses import clauses
from worker.model.runs.outcome import Trail
from worker.model.runs.waits import NewWait
from worker.store import batch_requests, batches
from worker.store.lists import BATCHES, FIRST_PAGE
from worker.store.lists import runs as run_lists
from worker.store.lists.read import page_of

pytestmark = pytest.mark.anyio
BODY = {"model": "gpt-5-mini", "input": "x"}
REQUEST = NewRequest("complete", None, 1, "openai", "/v1/responses", json.dumps(BODY))


@pytest.mark.parametrize(
    ("lists", "state"),
    [((("api",),), "over"), ((("https://api.openai.com",),), "pending"), ((), "pending")],
    ids=["not listed", "listed", "nothing declared"],
)
async def test_a_request_goes_only_where_its_run_may_send_it(
    rig: Rig, lists: tuple[tuple[str, ...], ...], state: str
) -> None:
    """A sealed run could send its data out in a batch that it may not send itself."""
    inflight = rig.inflight(rig.running())
    inflight.gate = Gate(lists, ())

    opened = await rig.sender().open(inflight, wait_of(REQUEST))

    assert opened is not None and opened.state == state
    assert {row["reason"] for row in rig.items()} == ({"egress"} if state == "over" else {None})


async def believed(
    rig: Rig, wait: NewWait, *, host: str | None = None, model_requests: str = "batch"
) -> NewWait:
    """The wait of a run's process as the worker takes it."""
    rig.definition = {}
    inflight = rig.inflight(rig.running())
    assert inflight.plan is not None
    object.__setattr__(inflight.plan.definition, "model_requests", model_requests)
    running = Running(inflight, Trail("acme.note"), None, None, rig.clock, host=host)  # type: ignore[arg-type]
    return (await admitted(OpenWait(wait), running)).wait


async def test_a_request_has_the_wait_of_its_step_whatever_its_process_calls_it(rig: Rig) -> None:
    given = NewWait("approval", 7, "batch", request=REQUEST, seconds=5.0, ask_json='"x"', alert=True)

    assert await believed(rig, given) == wait_of(REQUEST)


async def test_a_definition_without_batches_and_a_host_open_none(rig: Rig) -> None:
    for options in ({"model_requests": "sync"}, {"host": "incarnation-1"}):
        with pytest.raises(NotACall, match="go into no batches"):
            await believed(rig, wait_of(REQUEST), **options)  # type: ignore[arg-type]
    # The control.
    assert await believed(rig, wait_of(REQUEST))


async def test_no_other_wait_takes_the_name_of_a_batch(rig: Rig) -> None:
    with pytest.raises(StepError, match="reserved"):
        await believed(rig, NewWait(wait_of(REQUEST).name, 1, "answer"))


async def test_why_says_since_when_a_request_is_on_its_way_and_how_long_that_takes(rig: Rig) -> None:
    rig.definition = {"batch_within": timedelta(hours=8)}
    sender, before, run = rig.sender(), rig.running(), rig.running()
    await rig.ask(sender, before)
    rig.park(before)
    await rig.pass_time(sender, 45)
    await rig.ask(sender, run)
    rig.park(run)

    def cause() -> str:
        found = rig.stock.reading(
            lambda connection: explain(connection, run_lists.run(connection, ALL_ORGS, run.id))
        )
        return clauses(found).cause

    assert "in a batch of openai" in cause() and "not sent yet, but pooled since" in cause()
    await rig.pass_time(sender, 12)
    assert "sent 2030-01-01T" in cause() and "usually answered within 20m" in cause()
    assert "sent on its own at 2030-01-01T" in cause()


async def test_operators_list_batches_with_what_was_paid_for_nothing(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    await rig.pass_time(sender, 12)
    rig.stock.finish(rig.worker, rig.stock.ended(run, "cancelled"))
    await rig.pass_time(sender, 40)

    [row] = rig.stock.reading(page_of, BATCHES, ALL_ORGS, FIRST_PAGE).rows
    assert (row["api"], row["model"], row["state"], row["requests"], row["late"]) == (
        *("openai", "gpt-5-mini", "done", 1, 1),
    )


async def test_a_removed_orgs_requests_and_results_are_deleted(rig: Rig) -> None:
    sender, run, other = rig.sender(), rig.running(), rig.running()
    for one in (run, other):
        await rig.ask(sender, one)
    rig.stock.within(batch_requests.forget_org, run.org_id)

    rows = {row["run_id"]: row for row in rig.items()}
    assert (rows[run.id]["state"], rows[run.id]["body"]) == ("over", None)
    assert rows[other.id]["state"] == "pending" and rows[other.id]["body"]


async def test_old_batches_are_deleted(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 45)
    assert rig.stock.within(batches.forget_batches, timedelta(days=1), limit=10) == 0
    rig.clock.advance(timedelta(days=2))

    assert rig.stock.within(batches.forget_batches, timedelta(days=1), limit=10) == 1
    assert rig.batches() == []


async def test_a_trial_sends_its_request_in_a_batch_of_its_own(rig: Rig, apis: ModelApis) -> None:
    said: list[str] = []
    secrets = GivenSecrets({"openai_key": OrgSecret("sk-of-the-org-1")})
    accounts = Accounts({"openai": OPENAI}, "", secrets, client_of(apis))
    trial = TrialBatches({"openai": OPENAI}, accounts, {"openai": 0.0}, rig.clock, said.append)
    apis.takes = lambda: 0.0

    state = await trial.open(rig.inflight(rig.running()), wait_of(REQUEST))

    assert state is not None and state.state == "answered" and not apis.files
    assert [batch.key for batch in apis.batches.values()] == ["sk-of-the-org-1"]
    assert "in batch batch_2 of OpenAI" in said[0]
    apis.keys = set()
    state = await trial.open(rig.inflight(rig.running()), wait_of(REQUEST))
    assert state is not None and state.state == "over" and "401" in said[-1]
