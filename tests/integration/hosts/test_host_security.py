"""What a host may not do, with a stolen token, another's run, or anything that it makes up.

Each attack has a control: the same call succeeds where it is allowed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.rows import within
from tests.integration.hosts.conftest import (
    ENTRIES,
    HANDLER,
    OTHER,
    STEP,
    Fleet,
    Host,
    end_of,
    fence,
    line_of,
    step_of,
)
from worker.engine.attempt import answers
from worker.engine.runners.child.messages import frame, work_message
from worker.features.hosts import attempt_api, wire
from worker.features.hosts import listener as web
from worker.features.hosts.operations import list_hosts, remove_host
from worker.features.org_secrets.operations import add_secret
from worker.handlers.calls import MAX_BYTES, GrantedAnswer
from worker.handlers.catalogue import HandlerEntry
from worker.ids import WorkerId, new_id
from worker.model.egress import BoundSecret, placeholder_of
from worker.model.runs import outcome as outcomes
from worker.operations.runs import cancel
from worker.store import tables
from worker.store import workers as store_workers
from worker.telemetry.masking import MASK, Masker, masker

WAIT = {"name": "ok", "occurrence": 1, "kind": "sleep", "seconds": 5.0, "ask_json": None, "alert": False}
# The calls of one run, and what each needs beside the run.
OF_A_RUN: Mapping[str, Mapping[str, Any]] = {
    "token": {"handler": HANDLER, "fresh": True},
    "save": {"handler": HANDLER, "data": "1"},
    "steps": {"after": 0},
    "totals": {},
    "wait": {"wait": WAIT},
    "budgets": {},
    "spend": {"meter": "llm", "amount": 1, "key": "1:1"},
}


async def status(host: Host, fleet: Fleet, name: str, message: Any = b"{}", **headers: str) -> int:
    return (await host.send(fleet.one, name, message, **headers)).status_code


async def test_without_the_token_of_a_host_nothing_is_answered(fleet: Fleet) -> None:
    host = await fleet.host()
    wrong = Host(fleet.client, "orgworker_host_" + secrets.token_urlsafe(32))
    wrong.id = host.id

    for name in ("register", "take", "renew", "finish", "token", "nothing"):
        assert await status(wrong, fleet, name) == 401, name
        assert await status(wrong, fleet, name, Authorization="Basic eDp5") == 401, name
    assert await status(host, fleet, "renew") == 200


async def test_guessing_tokens_is_slowed_down(fleet: Fleet) -> None:
    wrong = Host(fleet.client, "guess")

    host = await fleet.host()

    answers = await asyncio.gather(*(status(wrong, fleet, "renew") for _ in range(3 * web.BURST)))

    assert answers.count(401) >= web.BURST
    assert answers.count(429) >= web.BURST
    # A host at the same address goes on.
    assert await status(host, fleet, "renew") == 200


async def test_the_incarnation_of_another_host_is_refused(fleet: Fleet) -> None:
    mine, other = await fleet.host("h1"), await fleet.host("h2")
    stolen = Host(fleet.client, other.token)

    for name in ("take", "renew", "finish", "save", "unregister", "hand_back"):
        for incarnation in (mine.id, new_id(), "", "' OR 1=1 --", "x" * 5000):
            stolen.id = incarnation
            assert await status(stolen, fleet, name) == 403, (name, incarnation)
    assert await status(mine, fleet, "renew") == 200


@on_either
async def test_a_host_of_another_pool_gets_no_run(fleet: Fleet) -> None:
    elsewhere, here = await fleet.host("h1", "eu-gpu"), await fleet.host("h2")
    run = fleet.start()
    abroad = fleet.start("elsewhere")

    assert await elsewhere.take(fleet.one, wait=0.3) == []
    assert [taken.run.id for taken in await here.take(fleet.one, 2)] == [run]
    eu = await fleet.host("h3", "eu")
    assert [taken.run.id for taken in await eu.take(fleet.one, 2)] == [abroad]


async def test_a_host_that_was_moved_to_another_pool_must_register_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_api, "CALLER_AGE", -1.0)
    host = await fleet.host()
    assert await status(host, fleet, "take", {"wait": 0}) == 200
    with fleet.database.transaction() as connection:
        connection.execute(tables.hosts.update().values(pool="eu"))

    assert await status(host, fleet, "take", {"wait": 0}) == 403
    await host.register(fleet.one)
    assert await status(host, fleet, "take", {"wait": 0}) == 200


@on_either
async def test_an_ended_incarnation_gets_nothing_and_writes_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_api, "CALLER_AGE", -1.0)
    host, taken = await fleet.busy_host()
    within(fleet.database, store_workers.unregister, WorkerId(host.id))

    for name, given in OF_A_RUN.items():
        assert await status(host, fleet, name, {**fence(taken), **given}) == 409, name
    assert await status(host, fleet, "take", {"wait": 0}) == 403
    assert await host.finish(fleet.one, end_of(taken)) == []
    step = step_of(taken)
    assert await host.call(fleet.one, "store", steps=[step]) == {"stored": []}
    assert await host.call(fleet.one, "hand_back", runs=[fence(taken)]) == {"runs": []}
    line = line_of(taken, "late")
    assert await host.call(fleet.one, "logs", lines=[line]) == {}
    assert (await host.call(fleet.one, "renew")) == {"registered": False, "owned": []}
    assert await host.call(fleet.one, "unregister") == {}
    assert (
        fleet.rows.attempts(taken.run.id)
        == fleet.rows.all(tables.run_logs)
        == fleet.rows.all(tables.steps)
        == []
    )


@on_either
async def test_an_ended_incarnation_hears_which_of_its_ends_were_written(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_api, "CALLER_AGE", -1.0)
    host = await fleet.host()
    fleet.start()
    fleet.start()
    first, second = await host.take_all(fleet.one, 2)
    await host.finish(fleet.one, end_of(first))
    within(fleet.database, store_workers.unregister, WorkerId(host.id))

    assert await host.finish(fleet.two, end_of(first), end_of(second)) == [first.run.id]


@on_either
async def test_a_late_farewell_is_a_stop_and_takes_back_no_crash(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has stopped while no worker answered; one that ran something cannot hide that it was lost."""
    monkeypatch.setattr(attempt_api, "CALLER_AGE", -1.0)
    idle, busy = await fleet.host("idle"), await fleet.host("busy")
    fleet.start()
    await busy.take(fleet.one)
    with fleet.database.transaction() as connection:
        connection.execute(tables.workers.update().values(lease_until=tables.workers.c.started_at))
    await fleet.one.store.recover(lambda: True)

    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in list_hosts(fleet.database)}

    assert states() == {"idle": "silent", "busy": "crashed"}
    for host in (idle, busy):
        assert await host.call(fleet.two, "unregister") == {}
    assert states() == {"idle": "stopped", "busy": "crashed"}
    [row] = [row for row in list_hosts(fleet.database) if row["name"] == "busy"]
    assert (row["recovered_runs"], row["recovered_by"]) == (1, fleet.one.id)
    assert row["end"].endswith(f" UTC, 1 run recovered by {fleet.one.id}")


@on_either
async def test_a_removed_host_is_refused(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_api, "CALLER_AGE", -1.0)
    monkeypatch.setattr(attempt_api, "RENEWAL_AGE", -1.0)
    host, taken = await fleet.busy_host()
    remove_host(fleet.database, "h1", actor="test")

    for name in ("renew", "take", "register"):
        assert await status(host, fleet, name) == 401
    assert await status(host, fleet, "save", {**fence(taken), "handler": HANDLER, "data": "1"}) == 401


async def test_a_removed_host_is_refused_within_seconds_and_its_lease_at_once(fleet: Fleet) -> None:
    host = await fleet.host()
    assert (await host.call(fleet.one, "renew"))["registered"]
    remove_host(fleet.database, "h1", actor="test")

    assert not (await host.call(fleet.one, "renew"))["registered"]
    fleet.start()
    assert await host.take(fleet.one, wait=0.3) == []


@on_either
async def test_another_hosts_run_is_out_of_reach(fleet: Fleet) -> None:
    mine, other = await fleet.host("h1"), await fleet.host("h2")
    fleet.start()
    [taken] = await mine.take(fleet.one)

    for name, given in OF_A_RUN.items():
        message = {**fence(taken), **given}
        for fake in (
            message,
            {**message, "fencing_token": taken.run.fencing_token + 1},
            {**message, "run": new_id()},
            {**message, "run": "' OR 1=1"},
        ):
            response = await other.send(fleet.one, name, fake)
            assert (response.status_code, response.json()["code"]) == (409, "lease_lost"), (name, fake)
        assert await status(mine, fleet, name, {**message, "fencing_token": 99}) == 409, name
        assert await status(mine, fleet, name, message) == 200, name


@pytest.mark.parametrize("alone", [True, False], ids=["", "control"])
async def test_a_run_that_is_lost_keeps_no_other_of_its_batch_from_its_step(
    fleet: Fleet, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is an answer as to a single call: its host gives up all runs of the batch."""
    if not alone:
        monkeypatch.setattr(attempt_api, "suppress", nullcontext)
    host = await fleet.host()
    fleet.start()
    fleet.start()
    lost, kept = await host.take_all(fleet.one, 2)
    fleet.tokens.of_org = "org_b"
    answer = await host.call(fleet.one, "token", **fence(lost), handler=HANDLER, fresh=True)
    assert answer["refused"]["reason"] == "org_mismatch"

    steps = [step_of(taken) for taken in (lost, kept)]
    response = await host.send(fleet.one, "store", {"steps": steps})

    assert response.status_code == (200 if alone else 409)
    stored = {row["run_id"] for row in fleet.rows.all(tables.steps)}
    assert stored == ({kept.run.id} if alone else set())
    if alone:
        assert response.json()["stored"] == [[kept.run.id, kept.run.fencing_token]]


@pytest.mark.parametrize("checked", [True, False], ids=["", "control"])
async def test_what_a_host_claims_of_a_step_or_a_wait_is_checked_as_a_processs(
    fleet: Fleet, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is a worker that believes it."""
    if not checked:

        async def believe(wait: Any, of: Any) -> Any:
            return wait

        monkeypatch.setattr(answers, "believed_step", lambda step, run, now: step)
        monkeypatch.setattr(answers, "believed_wait", believe)
    host, taken = await fleet.busy_host()
    mine = fence(taken)
    question = {
        **WAIT,
        "name": "budget:llm",
        "kind": "budget",
        "ask_json": '{"meter":"tokens"}',
        "alert": True,
    }
    step = {**STEP, "started_at": "1970-01-01T00:00:00Z", "ended_at": "9999-01-01T00:00:00Z"}

    await host.call(fleet.one, "store", steps=[{**mine, "handler": HANDLER, "step": step}])
    await host.call(fleet.two, "wait", **mine, wait=question)
    reserved = await status(host, fleet, "wait", {**mine, "wait": {**question, "kind": "answer"}})

    [stored] = fleet.rows.all(tables.steps)
    assert (stored["started_at"].year > 1970, stored["ended_at"].year < 9999) == (checked, checked)
    [wait] = fleet.rows.all(tables.waits)[:1]
    assert (wait["ask"] is None) == checked
    assert (reserved == 422) == checked


@on_either
async def test_batches_write_only_what_is_owned(fleet: Fleet) -> None:
    mine, other = await fleet.host("h1"), await fleet.host("h2")
    run = fleet.start()
    [taken] = await mine.take(fleet.one)
    theirs = fence(taken)
    line = line_of(taken, "forged")

    for host in (other, mine):
        forged = host is other
        stored = await host.call(fleet.one, "store", steps=[step_of(taken)])
        await host.call(fleet.one, "logs", lines=[line])
        await host.call(
            fleet.one, "progress", rows=[{**theirs, "progress": {"done": 1, "total": 2, "note": "x"}}]
        )
        await fleet.flush()
        assert (stored["stored"] == []) is forged
        assert (fleet.rows.all(tables.steps) == []) is forged
        assert (fleet.rows.all(tables.run_logs) == []) is forged
        live = fleet.rows.unended(run)
        assert (live["progress"] is None) is forged
        assert bool(await host.finish(fleet.one, end_of(taken))) is not forged
        if forged:
            assert (await host.call(fleet.one, "hand_back", runs=[theirs])) == {"runs": []}
            assert fleet.rows.live(run)["worker_id"] == mine.id  # type: ignore[index]


async def test_a_forged_or_swapped_record_of_an_attempt_fails_it_alone(fleet: Fleet) -> None:
    """Claims, times and handler of an attempt are what the worker recorded.

    A refused call would be sent again, for ever, with the other ends of the host.
    """
    host = await fleet.host()
    for which in range(7):
        fleet.start()
        fleet.start(org="org_b")
        one, two = await host.take_all(fleet.one, 2)
        key_id, _, sealed = one.sealed.partition(".")
        flipped = ("A" if sealed[40] != "A" else "B").join((sealed[:40], sealed[41:]))
        forged = [f"{key_id}.{flipped}", two.sealed, "", "k.AAAA", sealed, f"other.{sealed}", "x" * 10_000]

        ends = [end_of(one, outcomes.Succeeded("1", '{"n":1}'), sealed=forged[which]), end_of(two)]
        assert sorted(await host.finish(fleet.workers[which % 2], *ends)) == sorted([one.run.id, two.run.id])

        [failed] = fleet.rows.attempts(one.run.id)
        assert (failed["outcome"], failed["claims"], failed["handler"]) == ("failed", None, HANDLER)
        assert "did not return what its worker sealed" in failed["error"]["message"]
        [good] = fleet.rows.attempts(two.run.id)
        assert (good["outcome"], good["claims"]["org_code"]) == ("succeeded", two.org)
        cancel(fleet.database, one.run.id, actor="test")  # it would be tried again


async def test_the_record_of_an_earlier_attempt_does_not_open(fleet: Fleet) -> None:
    host = await fleet.host()
    fleet.start()
    [first] = await host.take(fleet.one)
    await host.finish(fleet.one, end_of(first, outcomes.HandedBack()))
    [second] = await host.take(fleet.one)

    assert await host.finish(fleet.one, end_of(second, sealed=first.sealed)) == [second.run.id]

    ended = fleet.rows.attempts(second.run.id)[-1]
    assert (ended["outcome"], ended["claims"]) == ("failed", None)


async def test_a_host_cannot_choose_the_handler_of_the_next_attempt(fleet: Fleet) -> None:
    """A run keeps the handler that stored progress first; that may only be one of its definition's."""
    host, taken = await fleet.busy_host()

    for worker in fleet.workers:
        for name in ("acme.admin", "acme.unknown"):
            save = {**fence(taken), "handler": name, "data": "1"}
            steps = {"steps": [{**fence(taken), "handler": name, "step": STEP}]}
            assert (await host.send(worker, "save", save)).status_code == 422
            assert (await host.send(worker, "store", steps)).status_code == 422
    # Where it was prepared also a variant that was not chosen is refused.
    other = {**fence(taken), "handler": OTHER, "data": "1"}
    assert (await host.send(fleet.one, "save", other)).status_code == 422
    assert fleet.rows.all(tables.checkpoints) == []
    await host.call(fleet.two, "save", **fence(taken), handler=HANDLER, data="1")
    assert [row["run_id"] for row in fleet.rows.all(tables.checkpoints)] == [taken.run.id]


@pytest.mark.parametrize(("origin", "answer"), [("manual", 200), ("child", 422)])
async def test_a_child_cannot_become_a_variant_of_its_definition(
    fleet: Fleet, origin: str, answer: int
) -> None:
    """With its scopes and children it would have more than its parent; any other run may be one."""
    host, taken = await fleet.busy_host()
    with fleet.database.transaction() as connection:
        connection.execute(tables.live_runs.update().values(origin=origin))

    save = {**fence(taken), "handler": OTHER, "data": "1"}

    assert (await host.send(fleet.two, "save", save)).status_code == answer


@on_either
async def test_state_is_only_changed_by_a_run_that_may(fleet: Fleet) -> None:
    host = await fleet.host()
    plain, remembering = fleet.start(), fleet.start("remember")
    taken = {one.run.id: one for one in await host.take_all(fleet.one, 2)}
    ends = [end_of(one, outcomes.Succeeded("1", '{"seen":1}')) for one in taken.values()]

    assert sorted(await host.finish(fleet.two, *ends)) == sorted([plain, remembering])

    [state] = fleet.rows.all(tables.definition_states)
    assert (state["run_id"], state["data"]) == (remembering, {"seen": 1})


async def test_a_large_body_is_refused_before_it_is_read(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    save = {**fence(taken), "handler": HANDLER}

    assert await status(host, fleet, "save", b" " * (MAX_BYTES + 1)) == 413

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * (MAX_BYTES // 16)

    response = await fleet.client.post(
        f"{fleet.one.url}{wire.PREFIX}/save",
        content=chunks(),
        headers={"Authorization": f"Bearer {host.token}", "OrgWorker-Incarnation": host.id},
    )
    assert response.status_code == 413
    assert await status(host, fleet, "save", {**save, "data": json.dumps("x" * 1_100_000)}) == 422
    assert await status(host, fleet, "save", {**save, "data": json.dumps("x" * 1_000_000)}) == 200


async def test_what_is_not_a_call_is_refused(fleet: Fleet) -> None:
    host = await fleet.host()

    for body in (b"", b"[]", b"{", b"\xff", b"null", b"[" * 200_000, b'{"run":1}', b'{"wait":"soon"}'):
        for name in ("take", "save", "finish", "store", "logs", "progress", "hand_back", "wait"):
            if name == "take" and body in (b'{"run":1}',):
                continue
            assert await status(host, fleet, name, body) in (413, 422), (name, body[:20])
    assert await status(host, fleet, "nothing", b"{}") == 422


async def test_tokens_are_masked_again_in_all_that_is_stored(fleet: Fleet) -> None:
    """A host that does not mask, at the worker that gave it the token and at another one."""
    host = await fleet.host()
    for worker in fleet.workers:
        run = fleet.start()
        [taken] = await host.take(fleet.one)
        mine = fence(taken)
        first = taken.work.token.reveal()
        granted = await host.call(worker, "token", **mine, handler=HANDLER, fresh=True)
        texts = [GrantedAnswer().read(granted)[0].reveal(), first]
        leak = " ".join(texts)

        line = line_of(taken, leak)
        await host.call(worker, "logs", lines=[line])
        await host.call(worker, "save", **mine, handler=HANDLER, data=json.dumps({"leak": leak}))
        await host.call(
            worker, "progress", rows=[{**mine, "progress": {"done": 1, "total": 2, "note": leak}}]
        )
        step = {**STEP, "result_json": json.dumps(leak)}
        await host.call(worker, "store", steps=[{**mine, "handler": HANDLER, "step": step}])
        await host.call(worker, "wait", **mine, wait={**WAIT, "kind": "answer", "ask_json": json.dumps(leak)})
        named = {**STEP, "seq": 2, "name": f"s{texts[0]}"[:90]}
        assert (
            await status(host, fleet, "store", {"steps": [{**mine, "handler": HANDLER, "step": named}]})
            == 422
        )
        error = outcomes.Error("ValueError", leak, leak)
        await host.finish(worker, end_of(taken, outcomes.Failed(error, detail=leak, permanent=True)))

        stored = str(
            [
                fleet.rows.run(run),
                fleet.rows.attempts(run),
                *(
                    fleet.rows.all(table, table.c.run_id == run)
                    for table in (tables.run_logs, tables.checkpoints, tables.steps, tables.waits)
                ),
            ]
        )
        assert stored.count(MASK) >= 6
        for text in texts:
            assert text not in stored


async def test_secrets_come_with_the_attempt_and_are_masked_again_at_every_worker(fleet: Fleet) -> None:
    host, key = await fleet.host(), "sk-canary-of-org-a-1"
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", key, actor="test")
    for worker in fleet.workers:
        run = fleet.start("keyed")
        [taken] = await host.take(fleet.one)
        assert taken.work.secrets == {"openai": key}
        if worker is fleet.two:
            # Another process, which has not prepared the attempt.
            masker.clear()
        line = line_of(taken, key)
        await host.call(worker, "logs", lines=[line])
        error = outcomes.Error("ValueError", key, key)
        await host.finish(worker, end_of(taken, outcomes.Failed(error, detail=key, permanent=True)))

        stored = str([fleet.rows.run(run), fleet.rows.attempts(run), fleet.rows.all(tables.run_logs)])
        assert (key in stored, MASK in stored) == (False, True)


@on_either
async def test_bound_secrets_come_with_the_attempt_and_are_masked_at_every_worker(fleet: Fleet) -> None:
    """The run gets the placeholder, which is stored as it is."""
    host, key, origin = await fleet.host(), "sk-canary-of-org-a-1", "https://api.openai.com"
    bound = {"origin": origin, "header": "x-api-key"}
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", key, **bound, actor="test")
    for worker in fleet.workers:
        run = fleet.start("keyed")
        [taken] = await host.take(fleet.one)
        place = placeholder_of(run, "openai")
        assert taken.work.secrets == {"openai": place}
        assert taken.work.bound == (BoundSecret("openai", key, origin, "x-api-key", place),)
        assert key.encode() not in frame(work_message(taken.work, 60.0))
        if worker is fleet.two:
            masker.clear()
        await host.call(worker, "logs", lines=[line_of(taken, f"{key} {place}")])
        await host.finish(worker, end_of(taken, outcomes.Succeeded(json.dumps([key, place]))))

        logged = fleet.rows.all(tables.run_logs)[-1]["text"]
        assert logged == f"{MASK} {place}"
        assert fleet.rows.run(run)["result"] == [MASK, place]


@pytest.mark.parametrize("scoped", [True, False])
async def test_what_a_host_sends_tells_nothing_of_another_orgs_secret(
    fleet: Fleet, scoped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's own calls and ends, with 60,000 guesses; the control is one mask for all orgs."""
    if not scoped:
        monkeypatch.setattr(Masker, "_indexes", lambda self, org: [self._all])
    host, key, two = await fleet.host(), "sk-041234", fleet.two
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", key, actor="test")
    masker.clear()
    fleet.start("keyed")
    [holder] = await host.take(two)
    assert holder.work.secrets == {"openai": key}
    run = fleet.start("render", "org_b")
    [taken] = await host.take(fleet.one)
    guesses = [f"sk-{number:06}" for number in range(60_000)]
    near = " ".join(guesses[41_200:41_240])

    await host.call(two, "save", **fence(taken), handler=HANDLER, data=json.dumps(guesses))
    line = line_of(taken, near)
    await host.call(two, "logs", lines=[line])
    error = outcomes.Error("E", near, near)
    progress = {"done": 1, "total": 2, "note": near}
    end = end_of(taken, outcomes.Failed(error, detail=near, permanent=True), progress=progress)
    [checkpoint] = fleet.rows.all(tables.checkpoints)
    await host.finish(two, end)

    [attempt] = fleet.rows.attempts(run)
    [row] = fleet.rows.all(tables.run_logs)
    told = [str(one).count(MASK) for one in (checkpoint["data"], row["text"], attempt, fleet.rows.run(run))]
    assert (sum(told) == 0) == scoped
    assert all(told[:3]) == (not scoped)


async def test_an_org_without_a_secret_is_refused_and_the_host_hears_nothing(fleet: Fleet) -> None:
    host = await fleet.host()
    run = fleet.start("keyed")

    async with asyncio.timeout(20):
        while (row := fleet.rows.run(run))["finished_at"] is None:
            assert await host.take(fleet.one, wait=0.2) == []

    assert (row["state"], row["reason"], row["detail"]) == ("refused", "secret_missing", "openai")


@on_either
async def test_a_host_does_not_change_the_handlers_of_workers(fleet: Fleet) -> None:
    fleet.one.store.register(version="1", handlers=[HANDLER], capacity={})
    harmless = HandlerEntry(HANDLER, "acme", "666", "acme:evil", scopes=())
    own = HandlerEntry("gpu.own", "gpu", "1", "gpu:own", scopes=("render",))

    host = await fleet.host(entries=[*ENTRIES[1:], harmless, own])

    found = {row["name"]: row for row in fleet.rows.all(tables.catalogue)}
    assert (found[HANDLER]["scopes"], found[HANDLER]["version"]) == (["read:kb"], "1")
    assert "gpu.own" not in found
    fleet.start()
    [taken] = await host.take(fleet.one)
    # As the workers declare it: the scopes, and what is called is the host's own.
    assert fleet.tokens.wanted[-1].scopes == {"read:kb"}
    assert taken.work.handler == HANDLER


async def test_problems_name_neither_secrets_nor_the_machine(fleet: Fleet) -> None:
    host = await fleet.host()
    wrong = Host(fleet.client, "orgworker_host_wrong")
    wrong.id = host.id

    for response in (
        await wrong.send(fleet.one, "renew"),
        await host.send(
            fleet.one, "save", {"run": new_id(), "fencing_token": 1, "handler": "x", "data": "1"}
        ),
        await host.send(fleet.one, "finish", {"ends": [{}]}),
    ):
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["cache-control"] == "no-store"
        for secret in (host.token, wrong.token, "sqlite", "postgres", "/tmp", "Traceback"):
            assert secret not in response.text
