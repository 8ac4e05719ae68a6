"""The JSON API: who sees what, what may be done, and how it says no."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import httpx
import pytest
from sqlalchemy import insert, select

from tests.integration.console.conftest import TOKENS, Site, make_run, on_either
from worker.features.console.callers import Caller, CallerDatabase
from worker.ids import ALL_ORGS
from worker.operations.definitions import pause_definition
from worker.store import orgs, tables
from worker.store.lists import LISTS, RUNS
from worker.store.lists.read import read
from worker.store.lists.rows import Run, columns_of
from worker.store.tables import live_runs

API = "/api/v1"
RUN_PATHS = ("", "/attempts", "/logs")


class TestWhoMayAsk:
    @pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.7"])
    @pytest.mark.parametrize("path", ["/", "/runs/x", f"{API}/orgs", f"{API}/nothing", "/api", "/nothing"])
    async def test_without_a_token_every_address_answers_401(self, site: Site, path: str, address: str):
        answer = await site.get(path, address=address)

        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] if path.startswith("/api") else "Log in" in answer.text

    @pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer a b", "Bearer not.a.token", "token"])
    async def test_a_token_that_does_not_hold_answers_401_and_says_no_more(self, staffed: Site, header: str):
        async with staffed.client() as client:
            answer = await client.get(f"{API}/orgs", headers={"authorization": header})

        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "token"

    async def test_a_token_of_another_audience_or_one_that_has_expired_does_not_hold(self, site: Site):
        assert (await site.get(f"{API}/runs", site.token("org_a", aud=["https://other"]))).status_code == 401
        old = site.token("org_a")
        site.clock.advance(90_000)
        assert (await site.get(f"{API}/runs", old)).status_code == 401

    @pytest.mark.parametrize("org", ["org_c", "org_z"])
    async def test_an_org_that_is_not_this_issuers_or_not_here_is_denied(self, site: Site, org: str):
        """Another issuer may call an org of its own the same."""
        answer = await site.get(f"{API}/runs", site.token(org))

        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "denied")

    async def test_without_an_operator_only_this_machine_is_served(self, site: Site):
        token = site.token("org_a")

        assert (await site.get(f"{API}/runs", token, address="::ffff:127.0.0.1")).status_code == 200
        answer = await site.get(f"{API}/runs", token, address="10.0.0.7")
        assert answer.status_code == 403
        assert "web.operators" in answer.json()["error"]["fix"]

    async def test_with_an_operator_other_machines_are_served(self, staffed: Site):
        assert (await staffed.get(f"{API}/runs", staffed.token("org_a"), address="10.0.0.7")).is_success
        assert (await staffed.get(f"{API}/runs", TOKENS["viewer"], address="10.0.0.7")).is_success

    async def test_an_issuer_that_cannot_be_reached_is_no_verdict(self, site: Site):
        token = site.token("org_a")
        site.issuer.keys = lambda: httpx.Response(500)

        answer = await site.get(f"{API}/runs", token)

        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "issuer_unavailable")
        assert answer.headers["retry-after"]


class TestWhatAnOrgSees:
    async def test_every_list_is_its_own_only(self, site: Site):
        make_run(site, "org_a")
        make_run(site, "org_b")
        for name in (noun.name for noun in LISTS):
            answer = await site.get(f"{API}/{name}", site.token("org_a"))
            assert answer.status_code == 200, (name, answer.text)
            assert "org_b" not in answer.text
            assert all(row.get("org", "org_a") == "org_a" for row in answer.json())

        async def of(name: str) -> list[str]:
            rows = (await site.get(f"{API}/{name}", site.token("org_a"))).json()
            return [row.get("code") or row["name"] for row in rows]

        assert await of("orgs") == ["org_a"]
        assert await of("handlers") == ["acme.digest"]
        assert await of("templates") == []

    @on_either
    async def test_what_is_another_orgs_is_not_found(self, site: Site):
        theirs, token = make_run(site, "org_b"), site.token("org_a")
        for path in RUN_PATHS:
            answer = await site.get(f"{API}/runs/{theirs}{path}", token)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        for name in (noun.name for noun in LISTS):
            assert (await site.get(f"{API}/{name}?org=org_b", token)).status_code == 404
        for path in (f"runs/{theirs}/cancel", f"runs/{theirs}/retry", "definitions/org_b/digest/run"):
            assert (await site.post(f"{API}/{path}", token)).status_code == 404, path
        with site.database.autocommit() as connection:
            assert [run["id"] for run in read(connection, RUNS, ALL_ORGS)] == [theirs]
            assert connection.execute(live_runs.select()).one().cancel_requested_at is None

    @on_either
    @pytest.mark.parametrize(
        "path", [f"{API}/definitions/org_a/%00", f"{API}/definitions/%00/a", "/orgs/%00"]
    )
    async def test_a_name_that_no_database_stores_is_not_found(self, staffed: Site, path: str):
        assert (await staffed.get(path)).status_code == 401
        assert (await staffed.get(path, TOKENS["viewer"])).status_code == 404
        assert (await staffed.get(path, staffed.token("org_a"))).status_code == 404

    @on_either
    async def test_a_search_finds_only_what_the_caller_sees(self, staffed: Site):
        site = staffed
        runs = {org: make_run(site, org) for org in ("org_a", "org_b")}

        async def found(query: str, token: str, noun: str = "runs") -> list[str]:
            answer = await site.get(f"{API}/{noun}?{query}", token)
            assert answer.status_code == 200, answer.text
            return [row["id"] if noun == "runs" else row["code"] for row in answer.json()]

        for query in (
            "q=state:waiting,failed",
            "q=org definition:digest",
            f"q={runs['org_b']}",
            "state=waiting,failed",
        ):
            assert set(await found(query, site.token("org_a"))) <= {runs["org_a"]}, query
            assert runs["org_b"] in await found(query, TOKENS["viewer"]), query
        assert await found("q=org", site.token("org_a"), "orgs") == ["org_a"]
        assert await found("q=org:org_b", site.token("org_a"), "orgs") == []
        assert await found("broken=true", site.token("org_a"), "orgs") == []
        assert "org_b" in await found("q=org", TOKENS["viewer"], "orgs")
        assert await found("broken=true", TOKENS["viewer"], "orgs") == []

    @on_either
    async def test_late_orgs_and_definitions_are_those_of_the_caller(self, staffed: Site):
        site = staffed
        with site.database.transaction() as connection:
            rows = connection.execute(select(tables.definitions.c.id, tables.definitions.c.org_id)).all()
            at = datetime(2027, 1, 4, 6, tzinfo=UTC)
            late = [
                {"definition_id": id_, "org_id": org, "scheduled_for": at, "late_at": at} for id_, org in rows
            ]
            connection.execute(insert(tables.late_definitions), late)

        for token, codes in ((TOKENS["viewer"], {"org_a", "org_b"}), (site.token("org_a"), {"org_a"})):
            orgs = (await site.get(f"{API}/orgs?late=true", token)).json()
            definitions = (await site.get(f"{API}/definitions?state=late", token)).json()
            assert {row["code"] for row in orgs} & {"org_a", "org_b"} == codes
            assert {row["org"] for row in definitions} & {"org_a", "org_b"} == codes
            assert {row["late_since"] for row in definitions} == {"2027-01-04T06:00:00.000000Z"}
        assert (await site.get(f"{API}/orgs?late=yes", TOKENS["viewer"])).status_code == 400

    async def test_an_answer_for_anothers_org_is_that_for_one_that_does_not_exist(self, site: Site):
        token = site.token("org_a")
        theirs = (await site.get(f"{API}/runs?org=org_b", token)).text
        none = (await site.get(f"{API}/runs?org=org_q", token)).text

        assert theirs == none.replace("org_q", "org_b")

    @pytest.mark.parametrize("database", ["postgresql"], indirect=True)
    async def test_a_query_that_forgets_its_org_finds_no_other_orgs_rows(self, site: Site):
        for org in ("org_a", "org_b"):
            make_run(site, org)
        with site.database.autocommit() as connection:
            org_id = orgs.require(connection, "org_a")["id"]
        caller = Caller("org_a", "viewer", org="org_a", org_id=org_id)

        runs = await CallerDatabase(site.database).read(
            caller, lambda connection: read(connection, RUNS, ALL_ORGS)
        )

        assert [run["org"] for run in runs] == ["org_a"]


class TestOperators:
    async def test_an_operator_sees_every_org_or_one(self, staffed: Site):
        for org in ("org_a", "org_b"):
            make_run(staffed, org)

        every = (await staffed.get(f"{API}/runs", TOKENS["viewer"])).json()
        one = (await staffed.get(f"{API}/runs?org=org_b", TOKENS["viewer"])).json()

        assert [row["org"] for row in every] == ["org_b", "org_a"]
        assert one == every[:1]
        assert list(one[0]) == list(columns_of(Run))
        assert one[0]["scheduled_for"].endswith("Z")

    async def test_who_acted_is_in_the_audit(self, staffed: Site):
        await staffed.post(f"{API}/definitions/org_a/digest/run", TOKENS["operator"])
        await staffed.post(f"{API}/definitions/org_a/digest/run", staffed.token("org_a"))

        audit = (await staffed.get(f"{API}/audit?limit=2", TOKENS["admin"])).json()
        assert [(row["actor"], row["action"]) for row in audit] == [
            ("org:org_a", "definition.run"),
            ("operator:operator", "definition.run"),
        ]


class TestActing:
    async def test_one_idempotency_key_makes_one_run(self, site: Site):
        path, token = f"{API}/definitions/org_a/digest/run", site.token("org_a")
        headers = {"idempotency-key": "order-7"}

        first = await site.post(path, token, headers=headers)
        again = await site.post(path, token, headers=headers)

        assert first.status_code == again.status_code == 201
        assert first.json() == again.json()
        assert first.headers["location"] == f"{API}/runs/{first.json()['id']}"
        assert (await site.get(first.headers["location"], token)).json()["request_key"] == "order-7"
        assert len((await site.get(f"{API}/runs", token)).json()) == 1

    async def test_params_of_a_run_are_laid_over_the_definitions(self, staffed: Site):
        site, token = staffed, TOKENS["operator"]
        made = await site.post(
            f"{API}/definitions/org_a/digest/run", token, json={"params": {"collection": "faq"}}
        )

        run = (await site.get(made.headers["location"], token)).json()
        assert run["params"] == {"collection": "faq"}

    async def test_a_waiting_run_is_cancelled_then_it_is_a_conflict_then_it_is_retried(self, site: Site):
        run, token = make_run(site, "org_a"), site.token("org_a")

        cancelled = await site.post(f"{API}/runs/{run}/cancel", token)
        again = await site.post(f"{API}/runs/{run}/cancel", token)
        retried = await site.post(f"{API}/runs/{run}/retry", token, json={"from_checkpoint": False})
        twice = await site.post(f"{API}/runs/{run}/retry", token)
        odd = await site.post(f"{API}/runs/{run}/retry", token, json={"again": "yes"})
        shown = (await site.get(f"{API}/runs/{run}", token)).json()

        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        assert (retried.status_code, retried.json()["retry_of"]) == (201, run)
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "conflict")
        assert (odd.status_code, odd.json()["error"]["message"]) == (400, "again must be true or false")
        assert shown["retried_as"] == retried.json()["id"]

    @pytest.mark.parametrize("levels", [63, 64, 1_500, 40_000])
    @pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
    async def test_params_nest_at_most_64_levels(self, staffed: Site, start: str, end: str, levels: int):
        """A body too deep for the parser itself is refused with the same words."""
        body = '{"params": {"deep": ' + start * levels + "1" + end * levels + "}}"

        answer = await staffed.post(
            f"{API}/definitions/org_a/digest/run", TOKENS["operator"], content=body.encode()
        )

        if levels == 63:
            assert answer.status_code == 201
        else:
            assert answer.status_code == 422
            error = answer.json()["error"]
            assert error["code"] == "definition"
            assert error["message"].endswith("params: it nests more than 64 levels")

    @pytest.mark.parametrize(
        ("path", "request_", "status"),
        [
            ("definitions/org_a/digest/run", {"content": b"{"}, 400),
            ("definitions/org_a/digest/run", {"json": {"parms": {}}}, 400),
            ("definitions/org_a/digest/run", {"json": {"params": 3}}, 400),
            ("definitions/org_a/digest/run", {"headers": {"idempotency-key": "k" * 201}}, 400),
            ("definitions/org_a/digest/run", {"content": b" " * 300_000}, 413),
            ("definitions/org_a/digest/run", {"content": b"[" * 300_000}, 413),
            ("definitions/org_a/absent/run", {}, 404),
            ("runs/no-id/cancel", {}, 404),
            ("runs", {}, 405),
            ("nothing", {}, 404),
        ],
    )
    async def test_what_cannot_be_done_says_why(self, site: Site, path: str, request_: dict, status: int):
        answer = await site.post(f"{API}/{path}", site.token("org_a"), **request_)

        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "fix"}
        assert error["code"]
        assert error["message"]


class TestLists:
    @on_either
    async def test_pages_follow_each_other_by_key(self, staffed: Site):
        runs = [make_run(staffed, "org_a") for _ in range(5)]
        seen, path = [], f"{API}/runs?limit=2&org=org_a"
        async with staffed.client(TOKENS["viewer"]) as client:
            while path:
                answer = await client.get(path)
                seen += [row["id"] for row in answer.json()]
                path = answer.links["next"]["url"] if "next" in answer.links else ""

        assert seen == runs[::-1]

    async def test_lists_are_narrowed_by_their_parameters(self, staffed: Site):
        make_run(staffed, "org_a")
        pause_definition(staffed.database, "org_b", "digest", actor="tester")

        async def count(path: str) -> int:
            return len((await staffed.get(f"{API}/{path}", TOKENS["admin"])).json())

        assert await count("runs?state=waiting&definition=digest&since=2020-01-01") == 1
        assert await count("runs?state=failed") == 0
        assert await count("definitions?state=paused") == 1
        assert await count("orgs?org=org_a&state=paused") == 0
        assert await count("audit?since=2020-01-01T00:00:00Z&limit=1") == 1

    @pytest.mark.parametrize(
        ("query", "status"),
        [
            ("runs?limit=0", 400),
            ("runs?limit=1001", 400),
            ("runs?limit=-1", 400),
            ("runs?limit=many", 400),
            ("runs?state=lost", 400),
            ("runs?since=someday", 400),
            ("runs?colour=red", 400),
            ("runs?state=failed&state=running", 400),
            ("handlers?limit=3", 400),
            ("runs?after=no-id", 404),
            ("runs?org=org_q", 404),
            ("runs/0190", 404),
            ("runs/x/logs?after=1", 404),
            ("runs/x/logs?limit=0", 400),
            ("definitions/org_a/digest/next?count=0", 400),
            ("definitions/org_a/digest/next?count=1001", 400),
            ("definitions/org_a/digest/next?from=0001-01-01", 400),
            ("usage?until=0001-01-01", 400),
        ],
    )
    async def test_a_parameter_that_cannot_be_is_refused(self, staffed: Site, query: str, status: int):
        answer = await staffed.get(f"{API}/{query}", TOKENS["viewer"])

        assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True)

    async def test_an_answer_may_not_be_kept_by_anyone(self, staffed: Site):
        headers = (await staffed.get(f"{API}/runs", TOKENS["viewer"])).headers

        assert headers["cache-control"] == "no-store"
        assert headers["content-type"] == "application/json"
        assert "access-control-allow-origin" not in headers


async def test_an_error_that_nobody_expected_is_told_without_its_message(
    staffed: Site, monkeypatch: pytest.MonkeyPatch, emitted: list
):
    def broken(*_: object) -> None:
        raise ValueError("a secret")

    monkeypatch.setattr("worker.features.console.api.server.read_list", broken)

    answer = await staffed.get(f"{API}/runs", TOKENS["viewer"])

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "unexpected")
    assert "secret" not in answer.text
    fields = dict(emitted[-1].fields)
    # The line of our code, so that somebody can look for it.
    assert re.fullmatch(r"worker\.[\w.]+:\d+", fields.pop("place"))
    assert fields == {"method": "GET", "path": f"{API}/runs", "error": "ValueError"}
