"""What a handler asks means the same by every carrier, on both databases: a promise a test, seen in rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import delete, update

from tests.integration.contract.carriers import Carrier
from worker.errors import IssuerUnavailable, TokenRefused
from worker.ids import RunId
from worker.operations.answers import answer
from worker.operations.runs import cancel
from worker.secret import AccessToken
from worker.store import tables
from worker.telemetry.masking import MASK


async def test_a_checkpoint_is_stored_masked_and_the_last_one_counts(carrier: Carrier) -> None:
    told = await carrier.run(["save", {"done": 1}], ["save", {"leak": "x $token y"}])

    [row] = told.rows(tables.checkpoints)
    assert (row["data"], row["handler"]) == ({"leak": f"x {MASK} y"}, "acme.script")
    assert told.given == [None, None]


async def test_steps_are_called_once_and_replayed_by_the_next_attempt(carrier: Carrier) -> None:
    calls: list[list[Any]] = [
        ["step", "a", {"n": 1}],
        ["step", "b", "$token", "key/1"],
        ["map", "all", 3],
        ["step", "a", 2],
    ]
    run = carrier.start(*calls, retries=True)

    first = await carrier.attempt(run)
    told = await carrier.attempt(run)

    assert told.outcomes == ["retry", "succeeded"]
    rows = told.rows(tables.steps)
    assert sorted(row["seq"] for row in rows) == list(range(1, 7))
    assert sorted((row["name"], row["occurrence"]) for row in rows if row["name"] != "all") == [
        *(("a", 1), ("a", 2), ("b", 1))
    ]
    assert told.result == {"given": [{"n": 1}, MASK, [0, 1, 2], 2], "done": []}
    assert not any(token in told.everything() for token in first.tokens + told.tokens)


async def test_a_handler_waits_without_an_attempt_and_gets_the_answer(carrier: Carrier) -> None:
    run = carrier.start(
        ["wait_for", "ok", {"ask": {"text": "$token?"}, "options": ["yes", 1], "alert": True}]
    )

    parked = await carrier.attempt(run)
    [wait] = parked.rows(tables.waits)
    assert parked.outcomes == ["parked"]
    assert (wait["name"], wait["kind"], wait["ask"]["text"]) == ("ok", "answer", f"{MASK}?")
    answer(carrier.site.fleet.database, run, "ok", "yes", actor="test")
    told = await carrier.attempt(run)

    assert (told.outcomes, told.given) == (["parked", "succeeded"], ["yes"])
    assert len(told.rows(tables.waits)) == 1


async def test_a_sleep_is_a_wait_that_ends(carrier: Carrier) -> None:
    told = await carrier.run(["sleep", 3600])

    [wait] = told.rows(tables.waits)
    assert (told.outcomes, wait["kind"], wait["name"]) == (["parked"], "sleep", "sleep")
    assert wait["until"] is not None


async def test_spends_count_once_and_a_used_up_budget_stops_the_next_step(carrier: Carrier) -> None:
    told = await carrier.run(["spend", "tickets", 4], ["spend", "tickets", 1], ["step", "a", 1])

    spends = sorted(row["amount"] for row in told.rows(tables.spends))
    assert (spends, told.given[:2]) == ([1, 4], [None, None])
    assert told.given[2] == "BudgetExceeded"
    assert told.rows(tables.steps) == []


async def test_what_a_model_used_is_priced_by_the_worker_once(carrier: Carrier) -> None:
    """The run names model and units; the price is the worker's: 2 USD for a million tokens of input."""
    house = {"model": "house", "provider": "acme"}
    told = await carrier.run(
        ["spend", "tokens", 5, {**house, "kind": "input"}],
        ["spending step", "ask", ["tokens", {"input": 7, "output": 1}, house], ["tokens", 3, {}]],
        ["spend", "tokens", 1, {"model": "unheard-of", "kind": "output"}],
    )

    rows = [(row["model"], row["kind"], row["units"], row["money"]) for row in told.rows(tables.model_spends)]
    assert sorted(rows, key=str) == [
        ("house", "input", 5, 10_000),
        ("house", "input", 7, 14_000),
        ("house", "output", 1, None),
        ("unheard-of", "output", 1, None),
    ]
    spends = sorted((row["meter"], row["amount"]) for row in told.rows(tables.spends))
    assert spends == [("money", 10_000), ("money", 14_000), ("tokens", 1), ("tokens", 5), ("tokens", 11)]


async def test_a_renewed_token_is_masked(carrier: Carrier) -> None:
    told = await carrier.run(["token"], ["save", "$token"])

    assert told.given == ["a token", None]
    assert [row["data"] for row in told.rows(tables.checkpoints)] == [MASK]
    assert not any(token in told.everything() for token in told.tokens)


async def test_lines_and_progress_are_stored_masked(carrier: Carrier) -> None:
    told = await carrier.run(["log", "hello"], ["log", "leaks $token"], ["progress", 1, 2, "at $token"])

    lines = [(row["seq"], row["level"], row["text"]) for row in told.rows(tables.run_logs)]
    assert lines == [(1, "warning", "hello"), (2, "warning", f"leaks {MASK}")]
    assert told.row["progress"] == {"done": 1, "total": 2, "note": f"at {MASK}"}


@pytest.mark.parametrize(
    "call",
    [
        ["step", "s$token", 1],
        ["step", "s", 1, "k$token"],
        ["spend", "m$token", 1],
        ["spend", "m", 1, {"model": "m$token", "kind": "input"}],
        ["spending step", "s", ["m", {"input": 1}, {"model": "m", "provider": "$token"}]],
        ["wait_for", "ok", {"options": ["yes", "$token"]}],
    ],
)
async def test_a_name_with_a_secret_is_refused_and_the_handler_goes_on(carrier: Carrier, call: Any) -> None:
    told = await carrier.run(call, ["save", 1])

    assert told.given == ["StepError", None]
    assert told.rows(tables.steps) == told.rows(tables.spends) == told.rows(tables.waits) == []
    assert told.rows(tables.model_spends) == []


async def test_a_refusal_that_the_handler_does_not_catch_fails_the_run_for_good(carrier: Carrier) -> None:
    told = await carrier.run(["step", "s$token", 1], ["save", 1], raises=True)

    error = told.row["error"]
    assert (told.row["state"], error["type"]) == ("failed", "worker.handlers.steps.StepError")
    assert "it contains a secret" in error["message"]
    assert told.rows(tables.checkpoints) == []
    assert not any(token in told.everything() for token in told.tokens)


@pytest.mark.parametrize(
    ("renewed", "outcome", "why"),
    [
        (None, "succeeded", ("succeeded", None)),
        (IssuerUnavailable("issuer main does not respond"), "no_token", ("waiting", "no_token")),
        (TokenRefused("org_mismatch", "other_org"), "refused", ("refused", "org_mismatch")),
    ],
    ids=["renewed", "issuer away", "other org"],
)
async def test_a_token_that_ends_during_a_run_is_renewed_or_ends_the_attempt(
    carrier: Carrier,
    monkeypatch: pytest.MonkeyPatch,
    renewed: Exception | None,
    outcome: str,
    why: tuple[str, str | None],
) -> None:
    tokens = carrier.site.fleet.tokens
    ensure, texts = tokens.ensure, len(tokens.texts)

    async def ending(*args: Any, **wanted: Any) -> Any:
        if len(tokens.texts) > texts and renewed is not None:
            raise renewed
        enforced = await ensure(*args, **wanted)
        if len(tokens.texts) == texts + 1:
            enforced.token = AccessToken(enforced.token.reveal(), datetime.now(UTC))
        return enforced

    monkeypatch.setattr(tokens, "ensure", ending)
    told = await carrier.run(["save", "$token"])

    row = told.row
    assert (told.outcomes, (row["state"], row["reason"])) == ([outcome], why)
    assert len(told.tokens) == (2 if renewed is None else 1)
    assert [row["data"] for row in told.rows(tables.checkpoints)] == ([MASK] if renewed is None else [])


async def attempt_children(carrier: Carrier, run: RunId) -> list[RunId]:
    """The next attempt of each child of a run that may start now, oldest first."""
    rows = carrier.site.fleet.rows
    waiting = rows.all(tables.live_runs, tables.live_runs.c.parent_id == run)
    ready = sorted((row["place"], RunId(row["id"])) for row in waiting if row["state"] == "waiting")
    for _, child in ready:
        await carrier.attempt(child)
    return [child for _, child in ready]


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (["gather", ["a", "b"]], [{"given": [], "done": []}] * 2),
        (["as_ended", ["a", "b"]], [["a", {"given": [], "done": []}], ["b", {"given": [], "done": []}]]),
        (["map_runs", 2, 5], [{"given": [], "done": []}] * 2),
    ],
    ids=["gather", "as_ended", "map_runs"],
)
async def test_a_run_waits_for_its_children_without_an_attempt(
    carrier: Carrier, call: Any, given: Any
) -> None:
    run = carrier.start(call)

    parked = await carrier.attempt(run)
    live = parked.row
    assert (parked.outcomes, live["state"], live["reason"]) == (["parked"], "parked", "children")
    children = await attempt_children(carrier, run)
    assert len(children) == 2
    carrier.make_available(run)
    told = await carrier.attempt(run)

    assert (told.outcomes, told.given) == (["parked", "succeeded"], [given])
    assert len(told.children) == 2


async def test_children_are_stored_masked_and_at_the_end_of_an_attempt_at_the_latest(
    carrier: Carrier,
) -> None:
    told = await carrier.run(["start", {"calls": [], "leak": "x $token"}], ["start"])

    stored = [carrier.site.fleet.rows.run(row["run_id"]) for row in told.children]
    assert told.outcomes == ["succeeded"]
    assert [row["params"] for row in stored] == [{"calls": [], "leak": f"x {MASK}"}, {}]
    assert not any(token in str(stored) for token in told.tokens)
    for row in stored:
        cancel(carrier.site.fleet.database, row["id"], actor="test")


async def test_a_step_is_stored_after_the_children_that_were_started_before_it(carrier: Carrier) -> None:
    told = await carrier.run(["start", {"calls": []}], ["step", "a", 1], ["log", "x"], retries=True)

    [child] = told.children
    assert told.outcomes == ["retry"]
    assert len(told.rows(tables.steps)) == 1
    cancel(carrier.site.fleet.database, told.run, actor="test")
    assert carrier.site.fleet.rows.run(child["run_id"])["reason"] == "parent"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["return"], [["ChildFailed", "cancelled", "requested"], {"given": [], "done": []}]),
        ([], "ChildFailed"),
    ],
    ids=["return", "raise"],
)
async def test_a_failed_child_is_returned_in_its_place_or_raised(
    carrier: Carrier, options: list[str], given: Any
) -> None:
    run = carrier.start(["gather", ["a", "b"], *options])
    await carrier.attempt(run)
    rows = carrier.site.fleet.rows
    one, two = sorted(
        rows.all(tables.live_runs, tables.live_runs.c.parent_id == run), key=lambda row: row["place"]
    )
    cancel(carrier.site.fleet.database, one["id"], actor="test")
    await carrier.attempt(two["id"])
    told = await carrier.attempt(run)

    assert told.given == [given]


async def test_a_child_without_the_row_of_its_parent_does_not_start(carrier: Carrier) -> None:
    """Nothing says then what it may have. The control is every other test with a child."""
    run = carrier.start(["gather", ["a"]])
    await carrier.attempt(run)
    site = carrier.site
    [child] = site.fleet.rows.all(tables.live_runs, tables.live_runs.c.parent_id == run)
    with site.fleet.database.transaction() as connection:
        connection.execute(delete(tables.parents).where(tables.parents.c.run_id == run))

    if carrier.name == "host":
        assert await site.host.take(site.fleet.one, wait=1) == []
    else:
        await carrier.attempt(child["id"])

    ended = site.fleet.rows.run(child["id"])
    assert (ended["state"], ended["reason"]) == ("cancelled", "parent")


async def test_a_child_that_declares_more_than_its_parent_is_refused(carrier: Carrier) -> None:
    """Its cap is that of when it was started; the handler has grown since."""
    if carrier.name == "host":
        pytest.skip("its pool grants the handler no scopes at all")
    run = carrier.start(["gather", ["a"]])
    await carrier.attempt(run)
    site = carrier.site
    [parent] = site.fleet.rows.all(tables.parents, tables.parents.c.run_id == run)
    with site.fleet.database.transaction() as connection:
        of_run = update(tables.parents).where(tables.parents.c.run_id == run)
        connection.execute(of_run.values(cap={**parent["cap"], "scopes": []}))
    [child] = site.fleet.rows.all(tables.live_runs, tables.live_runs.c.parent_id == run)
    await carrier.attempt(child["id"])

    ended = site.fleet.rows.run(child["id"])
    assert (ended["state"], ended["reason"]) == ("refused", "child_exceeds")
    assert ended["detail"] == "the scope read:kb"
    told = await carrier.attempt(run)
    assert told.given == ["ChildFailed"]
