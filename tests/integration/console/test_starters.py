"""The role starter: starts runs and reads those that it started; everything else is denied."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest

from tests.integration.console.conftest import (
    OPERATORS,
    TOKENS,
    Site,
    asking,
    log_in,
    logged_in,
    make_run,
    on_either,
)
from worker.clock import to_text
from worker.features.console.access import Operator
from worker.features.console.operators import add_operator, remove_operator
from worker.features.console.sessions import SESSION_COOKIE
from worker.operations.definitions import edit_definition
from worker.store import sign_in

API = "/api/v1"
RUN = f"{API}/definitions/org_a/digest/run"
STARTER, OPERATOR = TOKENS["starter"], TOKENS["operator"]
# Method, path, and the member of the body that the call needs; {run} is a run of its own, {other} another's.
DENIED = [
    *(("GET", f"{API}/{noun}") for noun in ("orgs", "definitions", "templates", "runs", "skips", "handlers")),
    *(("GET", f"{API}/{noun}") for noun in ("credentials", "audit", "status", "usage", "openapi.json")),
    ("GET", f"{API}/runs?q=state:failed"),
    ("GET", f"{API}/budgets/org_a"),
    ("POST", f"{API}/budgets/org_a/raise"),
    ("GET", f"{API}/orgs/org_a"),
    ("POST", f"{API}/orgs/org_a/pause"),
    ("POST", f"{API}/orgs/org_a/resume"),
    ("POST", f"{API}/credentials/org_a"),
    ("POST", f"{API}/credentials/org_a/1/retire"),
    ("GET", f"{API}/definitions/org_a/digest"),
    ("PATCH", f"{API}/definitions/org_a/digest"),
    ("POST", f"{API}/definitions/org_a/digest/pause"),
    ("POST", f"{API}/definitions/org_a/digest/resume"),
    ("POST", f"{API}/definitions/org_a/digest/backfill"),
    ("GET", f"{API}/definitions/org_a/digest/state"),
    ("PUT", f"{API}/definitions/org_a/digest/state"),
    ("DELETE", f"{API}/definitions/org_a/digest/state"),
    # Even of its own run.
    ("GET", f"{API}/runs/{{run}}/why"),
    ("GET", f"{API}/runs/{{run}}/attempts"),
    ("GET", f"{API}/runs/{{run}}/logs"),
    ("POST", f"{API}/runs/{{run}}/retry"),
    ("POST", f"{API}/runs/{{run}}/cancel"),
    ("POST", f"{API}/runs/{{run}}/answers/x"),
    ("POST", f"{API}/runs:cancel"),
    ("POST", f"{API}/runs:retry"),
    # Pages, and what only operators read.
    *(("GET", page) for page in ("/", "/search", "/orgs/org_a", "/runs/{run}", "/runs/{run}/log.txt")),
    *(("GET", page) for page in ("/runs/{run}/live", "/live/runs", "/failures", "/workers", "/audit")),
    ("GET", "/metrics"),
]
# What the operator's call needs, to be more than denied.
BODIES = {
    "raise": {"meter": "tokens", "by": 1},
    "org_a": {"client_id": "x", "reference": "file:x"},
    "backfill": {"from": "2d", "until": "1d", "dry_run": True},
    "state": {"data": {}},
    "x": {"data": 1},
    "runs:cancel": {"q": "state:running", "dry_run": True},
    "runs:retry": {"q": "state:failed", "dry_run": True},
}
BY_ADMINS = ("/credentials", "/audit")


async def started(site: Site, token: str = STARTER, **request: object) -> httpx.Response:
    return await site.post(RUN, token, **request)


@asynccontextmanager
async def asker(site: Site, token: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(site._app(), token) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), DENIED)
async def test_a_starter_may_not_and_the_control_may(staffed: Site, method: str, path: str):
    staffed.top_orgs = 5
    run = (await started(staffed)).json()["id"]
    path = path.format(run=run)
    last = path.partition("?")[0].rpartition("/")[2]
    body = None if method == "GET" else json.dumps(BODIES.get(last, {}))
    by_admin = any(word in path for word in BY_ADMINS)
    answers = []
    for token in (STARTER, TOKENS["admin"] if by_admin else OPERATOR):
        async with asker(staffed, token) as client:
            if path.endswith(("/live", "/live/runs")):
                # A stream does not end by itself.
                method = "HEAD"
            answers.append(await client.request(method, path, content=body))
            nowhere = await client.request(method, f"{path.partition('?')[0]}/nowhere/at/all", content=body)

    statuses = [answer.status_code for answer in answers]
    assert statuses[0] == 403
    # Conflicts and what is not there are answers to one who may.
    assert statuses[1] in (200, 201, 303, 400, 404, 409), statuses
    # Nor is it an address that does not exist.
    assert (statuses[1], answers[1].text) != (nowhere.status_code, nowhere.text)


def test_there_are_thirty_of_them():
    assert len(set(DENIED)) >= 30


@on_either
async def test_it_starts_runs_and_reads_them_as_their_org_does(staffed: Site):
    made = await started(staffed, headers={"idempotency-key": "order-1"}, json={"params": {"a": 1}})
    run = made.json()["id"]

    read = await staffed.get(f"{API}/runs/{run}", STARTER)
    by_operator = await staffed.get(f"{API}/runs/{run}", OPERATOR)

    assert (made.status_code, read.status_code) == (201, 200)
    assert made.headers["location"] == f"{API}/runs/{run}"
    assert "idempotency-replayed" not in made.headers
    assert staffed.last_change()[:2] == ("starter:starter", "definition.run")
    assert by_operator.json()["params"] == {"a": 1}
    assert read.json()["params"] == {}
    assert "spec" in by_operator.json()
    assert {"spec", "worker"} & {name for name, value in read.json().items() if value is not None} == set()


@on_either
async def test_it_reads_no_run_of_others(staffed: Site):
    """Neither an operator's, nor the schedule's, nor that of another starter; nor by a short id."""
    other = add_operator(staffed.database, "shop", "starter", taken=(), actor="tester")["token"]
    own = (await started(staffed)).json()["id"]
    runs = [
        make_run(staffed),
        (await started(staffed, OPERATOR)).json()["id"],
        (await started(staffed, other)).json()["id"],
    ]

    answers = [
        await staffed.get(f"{API}/runs/{run}{end}", STARTER) for run in runs for end in ("", "/events")
    ]
    short = [
        await staffed.get(f"{API}/runs/{text}", STARTER)
        for text in (own[:13], own[:8], f"{own[:13]}…{own[-4:]}")
    ]

    assert {answer.status_code for answer in (*answers, *short)} == {404}
    assert (await staffed.get(f"{API}/runs/{runs[2]}", other)).status_code == 200
    # The controls.
    assert (await staffed.get(f"{API}/runs/{runs[0]}", OPERATOR)).status_code == 200
    assert (await staffed.get(f"{API}/runs/{own[:13]}", OPERATOR)).status_code in (200, 400)
    # Nothing of the other runs is in what it is told.
    assert all(run not in answer.json()["error"]["message"] for answer in short for run in runs)


@on_either
async def test_a_key_makes_one_run_and_the_first_params_win(staffed: Site):
    key = {"idempotency-key": "order-2"}
    first = await started(staffed, headers=key, json={"params": {"a": 1}})
    again = await started(staffed, headers=key, json={"params": {"a": 1}})
    # What the definition says now is not what it said then.
    edit_definition(staffed.database, "org_a", "digest", {"params": {"b": 2}}, actor="tester")
    edited = await started(staffed, headers=key, json={"params": {"a": 1}})
    other = await started(staffed, headers=key, json={"params": {"a": 2}})
    of_b = await staffed.post(RUN.replace("org_a", "org_b"), STARTER, headers=key)

    assert {answer.json()["id"] for answer in (again, edited, other)} == {first.json()["id"]}
    assert of_b.json()["id"] != first.json()["id"]
    said = [answer.headers.get("idempotency-replayed") for answer in (first, again, edited, other, of_b)]
    assert said == [None, "same-params", "same-params", "other-params", None]


@on_either
async def test_a_key_of_somebody_else_gives_nothing_away(staffed: Site):
    """A guessed key must not show a run of others; an operator gets the run, as before."""
    key = {"idempotency-key": "nightly"}
    run = (await started(staffed, OPERATOR, headers=key, json={"params": {"a": 1}})).json()["id"]

    guessed = await started(staffed, headers=key, json={"params": {"a": 1}})
    by_org = await staffed.post(RUN, staffed.token("org_a"), headers=key)
    by_admin = await started(staffed, TOKENS["admin"], headers=key, json={"params": {"a": 1}})

    assert (guessed.status_code, run in guessed.text) == (400, False)
    # An org learns nothing of the params that an operator gave, right or wrong.
    assert by_org.headers["idempotency-replayed"] == "other-params"
    assert (by_admin.json()["id"], by_admin.headers["idempotency-replayed"]) == (run, "other-params")


@on_either
async def test_a_run_starts_not_before_its_time(staffed: Site):
    with staffed.database.autocommit() as connection:
        now = staffed.database.now(connection)
    later, ago, much_later = (to_text(now + timedelta(hours=hours)) for hours in (1, -1, 31 * 24))

    made = await started(staffed, json={"not_before": later})
    past = await started(staffed, json={"not_before": ago})
    far = await started(staffed, json={"not_before": much_later})

    assert made.json()["available_at"] == later
    assert ago < past.json()["available_at"] < later
    assert (far.status_code, far.json()["error"]["message"]) == (400, "not_before is over 30 days ahead")


async def test_it_opens_no_session(staffed: Site):
    async with staffed.client() as client:
        answer = await log_in(client, STARTER)

        assert (answer.status_code, SESSION_COOKIE in client.cookies) == (403, False)


async def test_a_session_ends_when_its_operator_becomes_a_starter(staffed: Site):
    """By an edit of worker.toml: the token stays."""
    async with logged_in(staffed, OPERATOR) as client:
        assert (await client.get("/")).status_code == 200
        staffed.operators = [
            Operator("operator", "starter", sign_in.sha256(OPERATOR)) if one.role == "operator" else one
            for one in OPERATORS
        ]
        async with staffed.client() as later:
            later.cookies = client.cookies
            assert (await later.get("/")).status_code in (303, 403)
            assert "digest" not in (await later.get("/definitions")).text


async def test_another_operator_of_its_name_leaves_it_no_runs(site: Site):
    """A starter gets a name that an operator had."""
    token = add_operator(site.database, "ada", "operator", taken=(), actor="tester")["token"]
    run = (await started(site, token)).json()["id"]
    remove_operator(site.database, "ada", configured=(), actor="tester")
    token = add_operator(site.database, "ada", "starter", taken=(), actor="tester")["token"]

    assert (await site.get(f"{API}/runs/{run}", token)).status_code == 404
