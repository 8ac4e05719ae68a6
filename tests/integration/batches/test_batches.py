"""Batches: each request is paid once, its result reaches its own run only, and no run waits for ever."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from tests.fakes.batches import ANTHROPIC, OPENAI, Rig, answer_of, text_of
from worker.demo.model_apis import AnswerLost, ModelApis
from worker.features.batches.advance import LeaseGone, Patience
from worker.features.batches.remote import Line
from worker.handlers.steps import StepError
from worker.model.batches import ModelApi
from worker.model.bindings import Binding, OrgSecret
from worker.model.prices import ModelUsage, Prices
from worker.model.runs.children import FamilyCap, NewChild
from worker.store import batch_requests, batches, children, tables
from worker.store.batch_requests import StoredResult

pytestmark = pytest.mark.anyio
BOTH = pytest.mark.parametrize("api", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])

CAP = FamilyCap("acme.page", frozenset(), frozenset(), (), frozenset())


def body_for(api: ModelApi, text: str) -> dict[str, object]:
    if api.provider == "openai":
        return {"model": "gpt-5-mini", "input": text}
    return {"model": "claude-x", "max_tokens": 100, "messages": [{"role": "user", "content": text}]}


@BOTH
async def test_requests_of_parked_runs_share_a_batch_and_each_gets_its_own_result(
    rig: Rig, apis: ModelApis, api: ModelApi
) -> None:
    apis.reply = lambda body: f"echo {body.get('input') or body['messages'][0]['content']}"
    sender = rig.sender()
    runs = [rig.running() for _ in range(3)]
    for run in runs:
        state = await rig.ask(sender, run, body_for(api, f"of {run.id}"), api=api)
        assert state is not None and state.state == "pending"
        rig.park(run)
    assert [rig.live(run) for run in runs] == ["parked"] * 3

    await rig.pass_time(sender, 45)

    assert [row["state"] for row in rig.batches()] == ["done"]
    assert len(apis.batches) == 1 and apis.twice == 0 and not apis.files
    assert [rig.live(run) for run in runs] == ["waiting"] * 3
    for run, again in zip(runs, rig.resumed(*runs), strict=True):
        assert again.id == run.id
        answer = answer_of(await rig.ask(sender, again, body_for(api, "another text"), api=api))
        assert text_of(answer) == f"echo of {run.id}"
        assert rig.spent(run) == 120
    assert {row["body"] for row in rig.items()} == {None}


async def test_tokens_are_reserved_until_the_result_settles_them(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, {"model": "gpt-5-mini", "input": "x" * 300, "max_output_tokens": 500})
    reserved = rig.spent(run)
    rig.park(run)
    [days] = rig.stock.all(tables.meter_days)

    await rig.pass_time(sender, 45)

    assert 600 < reserved == days["used"]
    assert rig.spent(run) == 120
    [days] = rig.stock.all(tables.meter_days)
    assert days["used"] == 120


async def test_a_step_is_one_request_in_all_attempts(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    await rig.ask(sender, run)
    rig.stock.finish(rig.worker, rig.stock.ended(run, "waiting"))
    rig.stock.make_available(run.id)
    [again] = rig.resumed(run)
    await rig.ask(sender, again, {"model": "gpt-5-mini", "input": "changed"})

    assert len(rig.items()) == 1
    assert len(rig.stock.all(tables.waits)) == 1


async def test_an_attempt_that_lost_its_run_stores_no_request(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    rig.stock.change(tables.live_runs, run.id, fencing_token=run.fencing_token + 1)

    assert await rig.ask(sender, run) is None
    assert rig.items() == []


# --- LeaseGone answers, and workers that die. ---


@pytest.mark.parametrize("place", ["POST /v1/files", "POST /v1/batches"])
@pytest.mark.parametrize("fault", ["lose_answers", "lose_requests"])
async def test_openai_is_paid_once_whatever_answer_is_lost(
    rig: Rig, apis: ModelApis, place: str, fault: str
) -> None:
    getattr(apis, fault)[place] = 1
    sender, runs = rig.sender(), [rig.running() for _ in range(2)]
    for run in runs:
        await rig.ask(sender, run)
        rig.park(run)

    await rig.pass_time(sender, 50)

    assert [rig.live(run) for run in runs] == ["waiting"] * 2
    assert sum(apis.paid.values()) == 2 and apis.twice == 0
    assert {row["state"] for row in rig.items()} == {"done"}
    # Also what a lost upload has left.
    assert not apis.files


@pytest.mark.parametrize("ahead", [-7200, 7200])
async def test_openai_is_paid_once_also_if_its_clock_is_another_one(
    rig: Rig, apis: ModelApis, ahead: int
) -> None:
    apis.now = lambda: rig.clock.now().timestamp() + ahead
    apis.lose_answers["POST /v1/batches"] = 1
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)

    await rig.pass_time(sender, 50)

    assert list(apis.paid.values()) == [1] and rig.live(run) == "waiting"


async def test_a_create_of_openai_that_comes_late_is_refused(rig: Rig, apis: ModelApis) -> None:
    """A worker was frozen after it had decided to submit, and another one took over."""
    frozen, run = rig.sender(), rig.running()
    await rig.ask(frozen, run)
    rig.park(run)
    apis.lose_requests["POST /v1/batches"] = 1
    await rig.pass_time(frozen, 10)
    [row] = rig.batches()
    assert row["state"] == "creating"
    late = await frozen.accounts.open("openai", None)
    assert late is not None

    rig.clock.advance(timedelta(minutes=1))
    await rig.pass_time(rig.sender(), 3)
    with pytest.raises(Exception, match="400 invalid_file"):
        await late.create(row["path"], "", row["file_id"], ())

    assert len(apis.batches) == 1


async def test_without_the_fence_it_would_be_paid_twice(rig: Rig, apis: ModelApis) -> None:
    """The control: a file that is not deleted takes the late submission."""
    sender = rig.sender()
    api = await sender.accounts.open("openai", None)
    assert api is not None
    file_id = await api.upload("a.jsonl", "/v1/responses", [Line("one", b'{"model": "m", "input": "x"}')])

    await api.create("/v1/responses", "", file_id, ())
    await api.create("/v1/responses", "", file_id, ())
    rig.clock.advance(timedelta(hours=1))
    await api.find_files("a.jsonl")

    assert apis.twice == 1


async def test_a_lost_answer_of_anthropic_is_found_by_its_results(rig: Rig, apis: ModelApis) -> None:
    apis.lose_answers["POST /v1/messages/batches"] = 1
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, body_for(ANTHROPIC, "hello"), api=ANTHROPIC)
    rig.park(run)
    # Another program's batch of the same size and time.
    api = await sender.accounts.open("anthropic", None)
    assert api is not None
    await rig.pass_time(sender, 10)
    await api.create("/v1/messages", "", None, [Line("theirs", b'{"model": "claude-x", "messages": []}')])

    await rig.pass_time(sender, 60)

    assert rig.live(run) == "waiting"
    assert apis.twice == 0 and len(apis.batches) == 2
    [row] = rig.batches()
    assert (row["state"], row["provider_id"]) == ("done", "msgbatch_1")


async def test_a_request_of_anthropic_that_never_arrived_is_sent_again(rig: Rig, apis: ModelApis) -> None:
    apis.lose_requests["POST /v1/messages/batches"] = 1
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, body_for(ANTHROPIC, "hello"), api=ANTHROPIC)
    rig.park(run)

    await rig.pass_time(sender, 60)

    assert rig.live(run) == "waiting" and apis.twice == 0


async def test_a_late_submission_is_found_although_the_worker_stood_still_as_it_looked(
    rig: Rig, apis: ModelApis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives after the list was made, in time; when the list is read, that time is over."""
    sender, run, real = rig.sender(), rig.running(), apis.answer
    sender.patience = Patience(grace=timedelta(seconds=70))
    late = list[tuple[Any, ...]]()

    def answer(*request: Any) -> tuple[int, bytes]:
        method, url = request[:2]
        if url.endswith("/batches") and method == "POST" and not late:
            late.append(request)
            raise AnswerLost(url)
        found = real(*request)
        if "/batches?" in url and apis.batches == {}:
            real(*late[0])
            rig.clock.advance(timedelta(seconds=20))
        return found

    monkeypatch.setattr(apis, "answer", answer)
    await rig.ask(sender, run, body_for(ANTHROPIC, "hello"), api=ANTHROPIC)
    rig.park(run)

    await rig.pass_time(sender, 60)

    [row] = rig.batches()
    assert (row["state"], row["tries"], len(apis.batches)) == ("done", 1, 1)
    assert rig.live(run) == "waiting"


async def test_what_anthropic_was_paid_twice_is_counted_and_charged(rig: Rig, apis: ModelApis) -> None:
    """A submission comes so late that another one was made: Anthropic cannot refuse it."""
    apis.lose_requests["POST /v1/messages/batches"] = 1
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, body_for(ANTHROPIC, "hello"), api=ANTHROPIC)
    rig.park(run)
    await rig.pass_time(sender, 10)
    lines = [Line(rig.items()[0]["id"], b'{"model": "claude-x", "messages": []}')]

    await rig.pass_time(sender, 4)
    api = await sender.accounts.open("anthropic", None)
    assert api is not None
    await api.create("/v1/messages", "", None, lines)
    await rig.pass_time(sender, 60)

    [item], [row] = rig.items(), rig.batches()
    assert apis.twice == 1 and (item["state"], item["late"], row["state"]) == ("done", 1, "done")
    assert rig.spent(run) == 240


@BOTH
@pytest.mark.parametrize("after", range(1, 9))
async def test_a_worker_that_dies_after_any_request_loses_nothing(
    rig: Rig, apis: ModelApis, api: ModelApi, after: int
) -> None:
    """Killed once the provider has answered, before anything of it is stored."""
    first, runs = rig.sender(), [rig.running() for _ in range(2)]
    for run in runs:
        await rig.ask(first, run, body_for(api, "hello"), api=api)
        rig.park(run)
    real, left = apis.answer, after

    class Killed(BaseException):
        pass

    def dying(*args: object) -> object:
        nonlocal left
        answer = real(*args)  # type: ignore[arg-type]
        left -= 1
        if left == 0:
            raise Killed
        return answer

    apis.answer = dying  # type: ignore[method-assign, assignment]
    with suppress(BaseExceptionGroup, Killed):
        await rig.pass_time(first, 40)
    apis.answer = real  # type: ignore[method-assign]
    rig.clock.advance(timedelta(minutes=1))

    await rig.pass_time(rig.sender(), 70)

    assert [rig.live(run) for run in runs] == ["waiting"] * 2
    assert apis.twice == 0 and sum(apis.paid.values()) == 2
    assert {row["state"] for row in rig.items()} == {"done"} and not apis.files


# --- Orgs, keys, and runs that lie. ---


async def test_a_result_of_another_batch_reaches_no_run(rig: Rig) -> None:
    """A provider, or the key of an org, gives an id that is not of its batch."""
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 10)
    [item] = rig.items()

    other = "018f0000-0000-7000-8000-000000000000"
    result = [StoredResult(item["id"], b"x")]
    counted = rig.stock.within(batch_requests.store_results, other, "batch_x", result, Prices())

    assert counted.stored == 0 and rig.live(run) == "parked"
    # The control: of its own batch it counts.
    assert (
        rig.stock.within(batch_requests.store_results, item["batch_id"], "batch_x", result, Prices()).stored
        == 1
    )


async def test_a_result_that_was_copied_to_another_org_does_not_open(rig: Rig) -> None:
    sender = rig.sender()
    ours, theirs = rig.running(), rig.running()
    for run in (ours, theirs):
        await rig.ask(sender, run)
        rig.park(run)
    await rig.pass_time(sender, 45)
    stolen = next(row for row in rig.items() if row["run_id"] == theirs.id)
    mine = tables.batch_items.c.run_id == ours.id

    def copy(connection: object) -> None:
        change = update(tables.batch_items).where(mine).values(result=stolen["result"])
        connection.execute(change)  # type: ignore[attr-defined]

    again, control = rig.resumed(ours, theirs)
    rig.stock.within(copy)

    state = await rig.ask(sender, again)
    assert state is not None and (state.state, state.answer_json) == ("over", None)
    assert "of" in text_of(answer_of(await rig.ask(sender, control)))


async def test_an_orgs_own_key_sends_its_requests_and_no_others(rig: Rig, apis: ModelApis) -> None:
    own, shared = rig.running(), rig.running()
    rig.keys.values[own.org_id, "openai_key"] = OrgSecret("sk-of-this-org-1")
    sender = rig.sender()
    for run in (own, shared):
        await rig.ask(sender, run)
        rig.park(run)

    await rig.pass_time(sender, 45)

    assert sorted(batch.key for batch in apis.batches.values()) == ["sk-of-this-org-1", "sk-operator-0001"]
    by_key = {batch.key: {id_ for id_, _ in batch.items} for batch in apis.batches.values()}
    assert by_key["sk-of-this-org-1"] == {row["id"] for row in rig.items() if row["run_id"] == own.id}


async def test_a_key_that_is_bound_to_another_origin_is_not_sent(rig: Rig, apis: ModelApis) -> None:
    run = rig.running()
    bound = OrgSecret("sk-of-this-org-1", Binding("https://llm.example.com", None))
    rig.keys.values[run.org_id, "openai_key"] = bound
    sender = rig.sender()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 45)

    assert {batch.key for batch in apis.batches.values()} == {"sk-operator-0001"}


async def test_a_rotated_key_reads_the_batches_of_the_one_before(rig: Rig, apis: ModelApis) -> None:
    run = rig.running()
    rig.keys.values[run.org_id, "openai_key"] = OrgSecret("sk-before-1234")
    sender = rig.sender()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 12)

    rig.keys.values[run.org_id, "openai_key"] = OrgSecret("sk-after-12345")
    for batch in apis.batches.values():
        batch.key = "sk-after-12345"  # of the same project
    apis.keys = {"sk-after-12345"}
    apis.files.clear()
    await rig.pass_time(sender, 30)

    assert rig.live(run) == "waiting" and {row["state"] for row in rig.items()} == {"done"}


async def test_a_suspended_orgs_requests_are_not_sent(rig: Rig, apis: ModelApis) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    rig.stock.change(tables.orgs, run.org_id, state="suspended")
    await rig.pass_time(sender, 15)
    assert apis.batches == {}

    rig.stock.change(tables.orgs, run.org_id, state="active")
    await rig.pass_time(sender, 30)
    assert rig.live(run) == "waiting"


async def test_the_model_is_that_of_the_body_and_each_model_has_its_batch(rig: Rig, apis: ModelApis) -> None:
    sender = rig.sender()
    for model in ("gpt-5-mini", "gpt-5-nano", "gpt-5-mini"):
        run = rig.running()
        await rig.ask(sender, run, {"model": model, "input": "x"})
        rig.park(run)
    await rig.pass_time(sender, 12)

    assert sorted(len(batch.items) for batch in apis.batches.values()) == [1, 2]
    assert not any(batch.refused for batch in apis.batches.values())


async def test_a_request_that_spoils_its_batch_spoils_only_those_of_its_org(
    rig: Rig, apis: ModelApis
) -> None:
    sender, good, bad = rig.sender(), rig.running(), rig.running()
    await rig.ask(sender, good)
    await rig.ask(sender, bad, {"model": "gpt-5-mini", "input": "x", "poison": True})
    for run in (good, bad):
        rig.park(run)

    await rig.pass_time(sender, 60)

    states = {row["run_id"]: (row["state"], row["reason"]) for row in rig.items()}
    assert states == {good.id: ("done", None), bad.id: ("sync", "refused")}
    assert apis.twice == 0 and [rig.live(run) for run in (good, bad)] == ["waiting"] * 2


async def test_an_upload_without_an_answer_is_deleted_although_its_runs_have_ended(
    rig: Rig, apis: ModelApis
) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    apis.lose_answers["POST /v1/files"] = 1
    await rig.pass_time(sender, 10)
    assert len(apis.files) == 1
    rig.stock.finish(rig.worker, rig.stock.ended(run, "cancelled"))

    await rig.pass_time(sender, 5)

    assert apis.files == {}


async def test_an_upload_that_arrives_late_is_deleted_with_its_batch(rig: Rig, apis: ModelApis) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    apis.lose_requests["POST /v1/files"] = 1
    await rig.pass_time(sender, 12)
    [(key, name, content, at)] = apis.files.values()
    apis.files["file-999"] = (key, name, content, at)

    await rig.pass_time(sender, 40)

    assert apis.files == {}


async def test_a_batch_that_fails_lets_its_requests_wait_for_another_one_in_the_same_transaction(
    rig: Rig, apis: ModelApis
) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    apis.throttle["POST /v1/files"] = 1
    await rig.pass_time(sender, 10)
    [batch], lease = rig.batches(), sender._held["default"][0]

    lost = replace(lease, fencing_token=lease.fencing_token - 1)
    assert not rig.stock.within(batches.fail, lost, batch["id"], "refused", apart=True)
    assert [(row["state"], row["apart"]) for row in rig.items()] == [("sent", False)]
    assert rig.stock.within(batches.fail, lease, batch["id"], "refused", apart=True)

    assert [(row["state"], row["apart"]) for row in rig.items()] == [("pending", True)]
    assert [(row["state"], row["error"]) for row in rig.batches()] == [("failed", "refused")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x"}, "no model"),
        ({"model": "m", "stream": True}, "stream"),
        ({"model": "a b"}, "no model"),
    ],
)
async def test_a_body_that_no_batch_takes_is_refused(rig: Rig, body: dict[str, object], message: str) -> None:
    with pytest.raises(StepError, match=message):
        await rig.ask(rig.sender(), rig.running(), body)
    assert rig.items() == []


# --- Falling back, and late results. ---


@BOTH
async def test_a_request_that_fails_in_its_batch_is_sent_on_its_own(
    rig: Rig, apis: ModelApis, api: ModelApi
) -> None:
    apis.reply = lambda body: 500
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, body_for(api, "x"), api=api)
    rig.park(run)
    await rig.pass_time(sender, 45)

    [again] = rig.resumed(run)
    state = await rig.ask(sender, again, body_for(api, "x"), api=api)
    assert state is not None and state.state == "over"
    assert [row["reason"] for row in rig.items()] == ["failed"] and rig.spent(run) == 0


@BOTH
async def test_a_request_that_expires_is_sent_on_its_own(rig: Rig, apis: ModelApis, api: ModelApi) -> None:
    apis.expire = 1.0
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run, body_for(api, "x"), api=api)
    rig.park(run)
    await rig.pass_time(sender, 45)

    print(rig.batches(), apis.batches)
    assert [(row["state"], row["reason"]) for row in rig.items()] == [("sync", "expired")]
    assert rig.live(run) == "waiting"


async def test_a_deadline_sends_it_on_its_own_and_the_late_result_is_charged(
    rig: Rig, apis: ModelApis
) -> None:
    apis.takes = lambda: 120 * 60.0
    rig.definition = {"batch_within": timedelta(minutes=60)}
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)

    await rig.pass_time(sender, 61)
    assert rig.live(run) == "waiting"
    [again] = rig.resumed(run)
    state = await rig.ask(sender, again)
    assert state is not None and state.state == "over" and rig.spent(run) == 0
    await rig.pass_time(sender, 90)

    [item] = rig.items()
    assert (item["state"], item["reason"], item["late"]) == ("sync", "deadline", 1)
    assert rig.spent(run) == 120


async def test_a_run_is_forecast_by_earlier_runs_and_not_by_their_children(rig: Rig) -> None:
    """It makes three requests, its children one each, and three batches do not fit before its time."""
    rig.definition = {"batch_within": timedelta(minutes=60)}
    sender, org = rig.sender(), rig.stock.org(limit=10_000)
    definition = rig.stock.definition(org)
    before = rig.stock.running(rig.worker, org, definition)
    for step in ("one", "two", "three"):
        await rig.ask(sender, before, step=step)
    options = {"cap": CAP, "keep": False, "isolations": {"acme.page": "child"}}
    new = [NewChild("acme.page", f"page-{n}", 1, "{}") for n in range(20)]
    rig.stock.within(children.start, before, new, **options)
    pages = rig.stock.admit(rig.worker, offered={"acme.page": None})
    assert len(pages) == 20
    for page in pages:
        await rig.ask(sender, page)
    await rig.pass_time(sender, 45)
    rig.stock.finish(rig.worker, *(rig.stock.ended(one) for one in (before, *pages)))

    run, sender = rig.stock.running(rig.worker, org, definition), rig.sender()
    await rig.ask(sender, run)

    assert [(row["state"], row["reason"]) for row in rig.items()][-1] == ("sync", "late")


async def test_a_late_result_of_a_cancelled_run_is_discarded_and_charged(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    await rig.pass_time(sender, 12)
    rig.stock.finish(rig.worker, rig.stock.ended(run, "cancelled"))

    await rig.pass_time(sender, 40)

    [item] = rig.items()
    assert (item["state"], item["reason"], item["late"], item["result"]) == ("over", "run_ended", 1, None)
    assert rig.spent(run) == 120


async def test_results_that_are_read_again_count_once(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 12)
    [item] = rig.items()
    used = ModelUsage("openai", "gpt-5-mini", (("input", 100), ("output", 20)))
    result = [StoredResult(item["id"], b"x", used)]
    for _ in range(3):
        rig.stock.within(batch_requests.store_results, item["batch_id"], "batch_1", result, Prices())

    [item] = rig.items()
    assert (item["late"], item["tokens"], rig.spent(run)) == (0, 120, 120)


async def test_a_result_that_comes_before_the_attempt_parks_wakes_it(rig: Rig) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    await rig.pass_time(sender, 45)
    assert rig.live(run) == "running"

    rig.stock.finish(rig.worker, rig.stock.ended(run, "parked", outcome="parked", reason="batch"))

    assert rig.live(run) == "waiting"


async def test_a_run_that_ended_before_its_batch_pays_nothing(rig: Rig, apis: ModelApis) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.stock.finish(rig.worker, rig.stock.ended(run, "cancelled"))

    await rig.pass_time(sender, 15)

    assert apis.batches == {} and rig.spent(run) == 0
    print(rig.batches(), apis.batches)
    assert [(row["state"], row["reason"]) for row in rig.items()] == [("over", "run_ended")]


async def test_a_run_that_ended_before_its_batch_was_sent_keeps_nothing_reserved(
    rig: Rig, apis: ModelApis
) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    apis.throttle["POST /v1/files"] = 1
    await rig.pass_time(sender, 10)
    assert [row["state"] for row in rig.batches()] == ["new"] and rig.spent(run) > 0
    rig.stock.finish(rig.worker, rig.stock.ended(run, "cancelled"))

    await rig.pass_time(sender, 5)

    assert apis.batches == {} and rig.spent(run) == 0
    print(rig.batches(), apis.batches)
    assert [(row["state"], row["reason"]) for row in rig.items()] == [("over", "run_ended")]
    assert [(row["state"], row["error"]) for row in rig.batches()] == [("failed", "empty")]


# --- The lease. ---


async def test_one_worker_at_a_time_sends_the_batches_of_a_pool(rig: Rig) -> None:
    first, second = rig.sender(), rig.sender()
    assert await rig.hold(first) and not await rig.hold(second)
    rig.clock.advance(timedelta(seconds=31))
    assert await rig.hold(second)

    # The first one was frozen, and does not know it yet.
    run = rig.running()
    await rig.ask(first, run)
    rig.clock.advance(timedelta(minutes=11))
    assert await rig.hold(second)
    first._held["default"] = (first._held["default"][0], rig.clock.monotonic() + 20)
    [listed] = [rig.stock.reading(batches.pending, "default")]
    assert rig.stock.within(batches.make_batch, first._held["default"][0], listed) is None
    # The control: the holder makes it.
    assert rig.stock.within(batches.make_batch, second._held["default"][0], listed) is not None


async def test_a_lease_that_was_lost_in_between_is_not_the_one_that_was_held(rig: Rig) -> None:
    """A worker was frozen in the middle of a batch, another one had the pool, and the first has it again."""
    first, second = rig.sender(), rig.sender()
    await rig.hold(first)
    advance = first.advance("default")
    rig.clock.advance(timedelta(seconds=31))
    assert await rig.hold(second)
    rig.clock.advance(timedelta(seconds=31))
    assert await rig.hold(first)

    with pytest.raises(LeaseGone):
        advance.check()
    # The control: what began under the new lease goes on.
    first.advance("default").check()


async def test_a_worker_whose_lease_may_have_expired_sends_nothing(rig: Rig, apis: ModelApis) -> None:
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.hold(sender)
    rig.clock.advance(timedelta(minutes=11))

    with pytest.raises(LeaseGone):
        await sender.look("default")
    assert apis.asked == []


async def test_a_provider_that_is_down_or_throttles_is_asked_again(rig: Rig, apis: ModelApis) -> None:
    apis.throttle["POST /v1/batches"] = 2
    apis.throttle["GET /v1/batches/ID"] = 2
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)

    await rig.pass_time(sender, 60)

    assert rig.live(run) == "waiting" and apis.twice == 0 and len(apis.batches) == 1


async def test_a_batch_that_ended_while_no_worker_looked_for_two_days_is_read(
    rig: Rig, apis: ModelApis
) -> None:
    """It is paid: sent on their own, its requests would be paid again, and the first time counted nowhere."""
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    await rig.pass_time(sender, 12)
    assert rig.batches()[0]["state"] == "sent"
    rig.clock.advance(timedelta(hours=48))

    await rig.look(sender, times=2)

    assert rig.items()[0]["state"] == "done"


async def test_a_batch_that_was_submitted_late_has_its_day(rig: Rig, apis: ModelApis) -> None:
    """Its provider ends it a day after that, whenever its requests were put together."""
    apis.takes = lambda: 23 * 3600.0
    sender, run = rig.sender(), rig.running()
    await rig.ask(sender, run)
    rig.park(run)
    apis.throttle["POST /v1/batches"] = 10_000
    await rig.pass_time(sender, 300, every=5)
    apis.throttle.clear()
    await rig.pass_time(sender, 23 * 60 + 30, every=10)

    print(rig.batches(), apis.batches)
    assert [(row["state"], row["reason"]) for row in rig.items()] == [("done", None)]
