"""Orgs and credentials, one at a time and in bulk; secrets only ever sealed."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from worker.errors import Conflict, NotFound, UsageError
from worker.model.orgs import OrgEntry
from worker.operations.credentials import add_credential, retire_credential
from worker.operations.orgs import add_org, import_orgs
from worker.operations.runs import run_now
from worker.store import tables
from worker.store.lists import CREDENTIALS
from worker.store.lists.read import read

DEFINITION = """
[[definition]]
org = "{org}"
name = "plain"
handler = "acme.plain"
schedule = "@yearly"
"""
SECRET = "canary-5d41402abc4b2a76"
ACME = OrgEntry("org_acme", "Acme", "main", tags=frozenset({"pro", "eu"}))


def line(code, **more):
    values = {"code": code, "name": code, "issuer": "main", "client_id": "c1", "client_secret": SECRET}
    return json.dumps(values | more)


def test_an_org_is_added_once(database, rows):
    row = add_org(database, ACME, actor="ops", issuers=["main"])

    assert (row["code"], row["state"], row["tags"], row["weight"]) == ("org_acme", "active", ["eu", "pro"], 1)
    with pytest.raises(Conflict, match="there is an org org_acme already"):
        add_org(database, ACME, actor="ops")
    assert len(rows.orgs) == 1


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (OrgEntry("org_a", "A", "other"), "no issuer 'other'"),
        (OrgEntry("", "A", "main"), "is not an org's code"),
        (OrgEntry("org_a", "A", "main", timezone="Mars/Base"), "Mars/Base"),
        (OrgEntry("org_a", "A", "main", weight=0), "between 1 and"),
        (OrgEntry("org_a", "A", "main", max_concurrent_runs=2**31), "between 1 and"),
    ],
)
def test_an_org_that_cannot_work_is_refused(database, rows, entry, problem):
    with pytest.raises(UsageError, match=problem):
        add_org(database, entry, actor="ops", issuers=["main"])
    assert rows.orgs == []


def test_credentials_come_in_generations_and_are_listed_without_secrets(database, keyring, rows):
    add_org(database, ACME, actor="ops")
    add_credential(database, keyring, "org_acme", client_id="c1", secret=SECRET, actor="ops")

    second = add_credential(database, keyring, "org_acme", client_id="c2", secret=SECRET + "2", actor="ops")

    assert (second["generation"], second["client_id"], second["state"]) == (2, "c2", "active")
    with database.autocommit() as connection:
        listed = read(connection, CREDENTIALS, "org_acme")
    assert [row["generation"] for row in listed] == [2, 1]
    assert "sealed" not in listed[0]
    assert SECRET not in repr(listed) + repr(rows.audit)
    for row in rows.credentials:
        assert SECRET.encode() not in row["sealed"]
        opened = keyring.unseal(row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"])
        assert opened.startswith(SECRET)


def test_a_credential_may_be_a_file_in_the_secrets_folder(database, rows):
    add_org(database, ACME, actor="ops")

    row = add_credential(database, None, "org_acme", client_id="c1", reference="file:acme", actor="ops")

    assert row["reference"] == "file:acme"
    assert rows.credentials[0]["sealed"] is None


@pytest.mark.parametrize("reference", ["file:keyring", "file:database__url", "file:../keyring", "file:link"])
def test_a_credential_names_no_file_but_a_secret_of_its_own(database, rows, tmp_path, reference):
    add_org(database, ACME, actor="ops")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").touch()

    with pytest.raises(UsageError, match="reference: ") as caught:
        add_credential(
            *(database, None, "org_acme"),
            **{"client_id": "c1", "actor": "ops", "reference": reference},
            secrets_dir=tmp_path / "secrets",
        )

    assert "file of its own" in caught.value.fix
    assert rows.credentials == []


def test_an_import_takes_no_reference(database, keyring, rows):
    with pytest.raises(UsageError, match="reference"):
        import_orgs(database, keyring, [line("org_a", reference="file:keyring")], actor="ops")
    assert rows.credentials == []


@pytest.mark.parametrize(
    "wrong", [{"client_id": ""}, {"secret": " \n"}, {"secret": None}, {"reference": "file:x"}]
)
def test_a_credential_that_is_none_is_refused(database, keyring, wrong):
    add_org(database, ACME, actor="ops")
    with pytest.raises(UsageError):
        add_credential(
            database, keyring, "org_acme", **{"client_id": "c1", "secret": SECRET, "actor": "ops"} | wrong
        )


def test_a_generation_is_retired_once(database, keyring, rows):
    add_org(database, ACME, actor="ops")
    add_credential(database, keyring, "org_acme", client_id="c1", secret=SECRET, actor="ops")

    assert retire_credential(database, "org_acme", 1, actor="ops")["state"] == "retired"
    with pytest.raises(Conflict, match="retired already"):
        retire_credential(database, "org_acme", 1, actor="ops")
    with pytest.raises(NotFound, match="generation 7"):
        retire_credential(database, "org_acme", 7, actor="ops")


def test_orgs_are_imported_with_their_credentials_and_only_once(database, keyring, rows):
    lines = [line("org_a", tags=["pro"]), "", line("org_b", timezone="Europe/Berlin", weight=3)]

    counts = import_orgs(database, keyring, lines, actor="ops")
    assert list(counts.values()) == [2, 0, 2]

    orgs = {row["code"]: row for row in rows.orgs}
    assert (orgs["org_a"]["tags"], orgs["org_b"]["weight"]) == (["pro"], 3)
    assert {row["generation"] for row in rows.credentials} == {1}
    before, audited = rows.everything(), len(rows.audit)
    counts = import_orgs(database, keyring, lines, actor="ops")
    assert list(counts.values()) == [0, 0, 0]
    assert rows.everything() == before
    assert len(rows.audit) == audited == 4


@on_either
def test_an_import_changes_orgs_and_adds_new_secrets(database, keyring, rows):
    import_orgs(database, keyring, [line("org_a"), line("org_b")], actor="ops")

    lines = [line("org_a", name="A", client_secret=SECRET + "2"), line("org_b")]

    counts = import_orgs(database, keyring, lines, actor="ops")
    assert list(counts.values()) == [0, 1, 1]
    assert sorted(row["generation"] for row in rows.credentials) == [1, 1, 2]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{" + SECRET, "not JSON"),
        ("[1]", "not a JSON object"),
        (line("org_b", color="red"), "unknown key 'color'"),
        (line("org_b", issuer=None), "issuer is missing"),
        (line("org_b", client_id=7), "client_id must be a string"),
        (line("org_b", client_secret=None), "together"),
        (line("org_b", client_secret=""), "the secret is empty"),
        (line("org_b", tags="pro"), "tags"),
        (line("org_b", weight="3"), "weight"),
        (line("org_b", issuer="other"), "no issuer 'other'"),
        (line("org_a"), "is in line 1 already"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_imported(database, keyring, rows, bad, problem):
    lines = [line("org_a"), bad, line("org_c")]

    with pytest.raises(UsageError) as refused:
        import_orgs(database, keyring, lines, actor="ops", issuers=["main"])

    assert refused.value.message.startswith("line 2: ")
    assert problem in refused.value.message
    assert SECRET not in refused.value.message + refused.value.fix
    assert rows.orgs == rows.credentials == []


@on_either
def test_a_new_secret_lets_the_runs_that_wait_for_a_token_go_at_once(database, keyring, apply, rows):
    for code in ("org_a", "org_b"):
        add_org(database, OrgEntry(code, code, "main"), actor="ops")
        apply(DEFINITION.format(org=code))
        run_now(database, code, "plain", actor="ops")
    with database.transaction() as connection:
        later = database.now(connection) + timedelta(minutes=1)
        waiting = update(tables.live_runs).values(reason="no_token", available_at=later)
        connection.execute(waiting)

    add_credential(database, keyring, "org_a", client_id="c1", secret=SECRET, actor="ops")

    orgs = {row["id"]: row["code"] for row in rows.orgs}
    waits = {orgs[row["org_id"]]: row["available_at"] > rows.now() for row in rows.live_runs}
    assert waits == {"org_a": False, "org_b": True}
