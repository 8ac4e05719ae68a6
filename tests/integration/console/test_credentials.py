"""Credentials by the API: a secret comes in, sealed, and never goes out. Orgs are paused and resumed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.fakes.rows import reading
from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, on_either
from worker.ids import ALL_ORGS
from worker.kit.web.responses import MAX_BYTES
from worker.operations.orgs import set_org_state
from worker.store import credentials, orgs, tables
from worker.store.lists import AUDIT, CREDENTIALS
from worker.store.lists.read import org, read
from worker.telemetry.masking import masker
from worker.tokens.sealing import KeyRing

API = "/api/v1"
CANARY = "canary+secret/of=the-api"
FORMS = (CANARY, json.dumps(CANARY)[1:-1], base64.b64encode(CANARY.encode()).decode())


@pytest.fixture
def worker(staffed: Site, tmp_path: Path) -> Site:
    """The port of a worker, which has the key ring."""
    ring = KeyRing.load_or_generate(tmp_path / "keyring")
    staffed.open_ring = lambda: KeyRing.load(ring.path)
    return staffed


def audit_of(site: Site) -> list[Any]:
    return reading(site.database, read, AUDIT, ALL_ORGS)


def generations(site: Site) -> list[tuple[int, str]]:
    return [(row["generation"], row["state"]) for row in reading(site.database, read, CREDENTIALS, "org_a")]


async def test_an_admin_adds_a_secret_which_only_the_key_ring_opens(
    worker: Site, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    body = {"client_id": "m2m-new", "client_secret": CANARY}
    answer = await worker.post(f"{API}/credentials/org_a", TOKENS["admin"], json=body)

    assert answer.status_code == 201, answer.text
    row = answer.json()
    shown = (await worker.get(f"{API}/credentials?org=org_a", TOKENS["admin"])).json()
    assert row == shown[0]
    assert (row["generation"], row["client_id"], row["kind"]) == (2, "m2m-new", "client_secret")
    assert (row["state"], row["created_by"], row["uses"]) == ("active", "operator:admin", 0)
    with worker.database.autocommit() as connection:
        org_id = orgs.require(connection, "org_a")["id"]
        stored = credentials.active(connection, org_id)[0]
    ring = worker.open_ring()
    assert ring is not None
    opened = ring.unseal(stored["sealed"], stored["key_id"], org_id=org_id, credential_id=stored["id"])
    assert opened == CANARY
    newest = audit_of(worker)[0]
    assert (newest["actor"], newest["action"], newest["subject"]) == (
        "operator:admin",
        "credential.add",
        "org_a 2",
    )
    written = [answer.text, json.dumps(shown), *map(str, audit_of(worker)), caplog.text, *capsys.readouterr()]
    assert [text for text in written if any(form in text for form in FORMS)] == []


async def test_an_admin_retires_a_generation_and_what_is_not_there_is_said(worker: Site):
    path = f"{API}/credentials/org_a"
    body = {"client_id": "m2m-new", "reference": "file:acme", "kind": "private_key"}
    added = await worker.post(path, TOKENS["admin"], json=body)
    assert (added.status_code, added.json()["reference"]) == (201, "file:acme"), added.text

    retired = await worker.post(f"{path}/1/retire", TOKENS["admin"])

    assert (retired.status_code, retired.json()["state"]) == (200, "retired"), retired.text
    assert generations(worker) == [(2, "active"), (1, "retired")]
    assert audit_of(worker)[0]["action"] == "credential.retire"
    for generation, status in (("1", 409), ("3", 404), ("99999999999", 404), ("one", 404), ("-1", 404)):
        answer = await worker.post(f"{path}/{generation}/retire", TOKENS["admin"])
        assert (answer.status_code, bool(answer.json()["fix"])) == (status, True), generation


async def test_without_the_key_ring_a_secret_is_a_conflict_that_says_where_to_send_it(staffed: Site):
    body = {"client_id": "m2m-new", "client_secret": CANARY}
    answer = await staffed.post(f"{API}/credentials/org_a", TOKENS["admin"], json=body)

    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "conflict"
    assert "worker's own port" in answer.json()["fix"]
    assert "credentials add" in answer.json()["fix"]
    assert CANARY not in answer.text
    # The name of a file needs no key.
    named = {"client_id": "m2m-new", "reference": "file:acme"}
    assert (await staffed.post(f"{API}/credentials/org_a", TOKENS["admin"], json=named)).status_code == 201


REFUSED: dict[str, tuple[Any, int, str]] = {
    "no client id": ({"client_secret": CANARY}, 400, "client_id"),
    "a wrong client id": ({"client_id": 5, "client_secret": CANARY}, 400, "client_id"),
    "a control character": ({"client_id": "a\nb", "client_secret": CANARY}, 400, "client id"),
    "neither": ({"client_id": "a"}, 400, "client_secret or reference"),
    "both": ({"client_id": "a", "client_secret": CANARY, "reference": "file:b"}, 400, "client_secret or"),
    "a list": ({"client_id": "a", "client_secret": [CANARY]}, 400, "client_secret"),
    "a table": ({"client_id": "a", "client_secret": {"is": CANARY}}, 400, "client_secret"),
    "too long": ({"client_id": "a", "client_secret": CANARY * 1000}, 400, "client_secret"),
    "empty": ({"client_id": "a", "client_secret": ""}, 400, "client_secret"),
    "blank": ({"client_id": "a", "client_secret": " \n"}, 400, "secret is empty"),
    "a NUL": ({"client_id": "a", "client_secret": f"{CANARY}\0"}, 400, "client_secret has a NUL"),
    "half a character": ({"client_id": "a", "client_secret": f"{CANARY}\ud800"}, 400, "client_secret has"),
    "another name": ({"client_id": "a", "secret": CANARY}, 400, "unknown member 'secret'"),
    "a wrong kind": ({"client_id": "a", "client_secret": CANARY, "kind": "password"}, 400, "kind"),
    "a path": ({"client_id": "a", "reference": "../keyring"}, 400, "reference"),
    "a list as the body": ([CANARY], 400, "not a JSON object"),
    "no JSON": (f'{{"client_id": "a", "client_secret": "{CANARY}"', 400, "not JSON"),
    "a form": (f"client_id=a&client_secret={CANARY}", 400, "not JSON"),
    "too large": ({"client_id": "a", "client_secret": CANARY * 11_000}, 413, "larger than"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused_names_the_field_and_never_quotes_the_secret(
    worker: Site, name: str, capsys: pytest.CaptureFixture[str]
):
    given, status, said = REFUSED[name]
    body = given if isinstance(given, str) else json.dumps(given)
    assert (len(body) > MAX_BYTES) == (status == 413)
    # The masker would hide it, if an earlier test had registered it.
    masker.forget(CANARY)

    answer = await worker.post(f"{API}/credentials/org_a", TOKENS["admin"], content=body)

    assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    assert status == 413 or answer.json()["fix"]
    written = [answer.text, *capsys.readouterr()]
    assert [text for text in written if "canary" in text] == []
    assert generations(worker) == [(1, "active")]


async def test_a_secret_in_the_query_is_refused_and_not_quoted(worker: Site):
    body = {"client_id": "a", "reference": "file:b"}
    path = f"{API}/credentials/org_a?client_secret=canary"
    answer = await worker.post(path, TOKENS["admin"], json=body)

    assert (answer.status_code, "canary" in answer.text) == (400, False)


async def test_an_unknown_org_and_a_removed_one_are_said(worker: Site):
    set_org_state(worker.database, "org_c", "removed", actor="tester")
    for code, status in (("org_q", 404), ("org_c", 409)):
        body = {"client_id": "a", "client_secret": CANARY}
        answer = await worker.post(f"{API}/credentials/{code}", TOKENS["admin"], json=body)
        assert (answer.status_code, CANARY in answer.text) == (status, False)


class TestPausedOrgs:
    @on_either
    async def test_an_operator_pauses_and_resumes_an_org_by_the_api(self, staffed: Site):
        path = f"{API}/orgs/org_a"
        paused = await staffed.post(f"{path}/pause", TOKENS["operator"], json={"note": "ticket 4711"})

        assert paused.status_code == 200, paused.text
        assert (paused.json()["state"], paused.json()["state_note"]) == ("paused", "ticket 4711")
        assert paused.json()["state_by"] == "operator:operator"
        assert (await staffed.get(path, TOKENS["viewer"])).json() == paused.json()
        newest = audit_of(staffed)[0]
        assert (newest["actor"], newest["action"]) == ("operator:operator", "org.pause")
        assert newest["detail"] == {"from": "active", "note": "ticket 4711"}
        with staffed.database.autocommit() as connection:
            assert connection.execute(next_time("org_a")).scalar() is None
        resumed = await staffed.post(f"{path}/resume", TOKENS["operator"])

        assert (resumed.status_code, resumed.json()["state"]) == (200, "active")
        with staffed.database.autocommit() as connection:
            assert connection.execute(next_time("org_a")).scalar() is not None
        wrong = await staffed.post(f"{path}/pause", TOKENS["operator"], json={"reason": "x"})
        assert (wrong.status_code, "note" in wrong.json()["fix"]) == (400, True)

    async def test_the_page_of_an_org_says_what_a_pause_does_and_takes_a_note(self, staffed: Site):
        async with logged_in(staffed, TOKENS["operator"]) as client:
            page = await client.get("/orgs/org_a")
            assert "no definition of it is due" in page.text
            form = {"csrf": csrf_of(page), "note": "<b>moving</b>"}
            answer = await client.post("/orgs/org_a/pause", data=form, headers=OURS)
            assert (answer.status_code, answer.headers["location"]) == (303, "/orgs/org_a")
            paused = await client.get("/orgs/org_a")
            assert "&lt;b&gt;moving&lt;/b&gt;" in paused.text
            assert "/orgs/org_a/resume" in paused.text
            assert "/orgs/org_a/pause" not in paused.text
            await client.post("/orgs/org_a/resume", data={"csrf": csrf_of(paused)}, headers=OURS)
        assert reading(staffed.database, org, "org_a")["state"] == "active"

    async def test_a_removed_org_stays_removed_and_the_page_says_so(self, staffed: Site):
        async with logged_in(staffed, TOKENS["operator"]) as client:
            csrf = csrf_of(await client.get("/orgs/org_a"))
            set_org_state(staffed.database, "org_a", "removed", actor="tester")
            answer = await client.post("/orgs/org_a/resume", data={"csrf": csrf}, headers=OURS)

        assert answer.status_code == 409
        assert "Nothing was changed." in answer.text
        assert "org_a was removed" in answer.text

    async def test_an_org_and_its_people_see_no_button_for_it(self, staffed: Site):
        async with logged_in(staffed, staffed.token("org_a")) as client:
            assert "/orgs/org_a/pause" not in (await client.get("/orgs/org_a")).text


def next_time(code: str) -> Any:
    schedule, definitions = tables.schedule, tables.definitions
    query = select(schedule.c.next_scheduled_for).join(
        definitions, definitions.c.id == schedule.c.definition_id
    )
    return query.join(tables.orgs, tables.orgs.c.id == schedule.c.org_id).where(tables.orgs.c.code == code)
