"""Secrets of orgs: sealed for one row, replaced, removed, covered by the keys, and found where they lack."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.site import definition
from worker.diagnosis import doctor
from worker.diagnosis.requirements import lacking_of_all_orgs
from worker.errors import ConfigurationError, Conflict, NotFound, UsageError
from worker.features.org_secrets.operations import (
    add_secret,
    remove_secret,
    rotate_secret,
)
from worker.handlers.catalogue import HandlerEntry
from worker.model.orgs import OrgEntry, OrgRef
from worker.operations.keys import rekey, remove_key
from worker.operations.orgs import add_org, set_org_state
from worker.store import catalogue, tables
from worker.tokens.sealing import KeyRing
from worker.wiring import check_ring, list_keys
from worker.wiring.secrets import OpenedSecrets

KEY = "sk-canary-0123456789"


@pytest.fixture(autouse=True)
def orgs(database):
    for code in ("org_a", "org_b"):
        add_org(database, OrgEntry(code, code, "main"), actor="ops")


def opened(database, ring, rows, org: str, *names: str) -> dict[str, str]:
    """The secrets that an attempt of the org gets."""
    ref = next(OrgRef(row["id"], row["code"]) for row in rows.orgs if row["code"] == org)

    async def ask() -> dict[str, str]:
        return dict(await OpenedSecrets(database, lambda _: ring).of(ref, names))

    return asyncio.run(ask())


@on_either
def test_an_attempt_gets_what_was_stored_last_of_its_own_org(database, keyring, rows):
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    add_secret(database, keyring, "org_b", "openai", f"{KEY}-b", actor="ops")
    add_secret(database, keyring, "org_b", "mail", "mail-0123456789", actor="ops")

    assert opened(database, keyring, rows, "org_a", "openai", "mail") == {"openai": KEY}
    row = rotate_secret(database, keyring, "org_a", "openai", f"{KEY}-2", actor="eve")
    assert (row["generation"], row["created_by"], row["rotated_by"]) == (2, "ops", "eve")
    assert opened(database, keyring, rows, "org_a", "openai") == {"openai": f"{KEY}-2"}
    remove_secret(database, "org_a", "openai", actor="ops")
    assert opened(database, keyring, rows, "org_a", "openai") == {}
    assert opened(database, keyring, rows, "org_b", "openai") == {"openai": f"{KEY}-b"}


def test_those_asked_for_at_once_are_read_in_one_query(database, keyring, rows):
    """Of 40 attempts of two orgs."""
    for org in ("org_a", "org_b"):
        add_secret(database, keyring, org, "openai", f"{KEY}-{org}", actor="ops")
    source, reads = OpenedSecrets(database, lambda _: keyring), []
    read = source._stored._read

    async def counted(wanted):
        reads.append(len(wanted))
        return await read(wanted)

    source._stored._read = counted

    async def ask() -> list[dict[str, str]]:
        refs = [OrgRef(row["id"], row["code"]) for row in rows.orgs] * 20
        return await asyncio.gather(*(source.of(ref, ("openai",)) for ref in refs))

    assert len(asyncio.run(ask())) == 40
    assert reads == [2]


def test_what_is_stored_and_audited_has_no_value(database, keyring, rows):
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    rotate_secret(database, keyring, "org_a", "openai", f"{KEY}-2", actor="ops")
    remove_secret(database, "org_a", "openai", actor="ops")

    assert "canary" not in str(rows.everything()) + str(rows.audit)
    kept = [row for row in rows.audit if row["action"].startswith("secret.")]
    assert [(row["action"], row["subject"], row["detail"]) for row in kept] == [
        ("secret.add", "org_a openai", {"generation": 1}),
        ("secret.rotate", "org_a openai", {"generation": 2}),
        ("secret.remove", "org_a openai", {"generation": 2}),
    ]
    assert all(row["org_id"] for row in kept)


@on_either
def test_a_value_copied_from_another_row_or_an_older_one_does_not_open(database, keyring, rows, emitted):
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    add_secret(database, keyring, "org_b", "openai", f"{KEY}-b", actor="ops")
    of = tables.org_secrets
    first, second = rows.org_secrets

    def paste(sealed: bytes) -> None:
        with database.transaction() as connection:
            connection.execute(update(of).where(of.c.id == second["id"]).values(sealed=sealed))

    paste(first["sealed"])
    with pytest.raises(ConfigurationError, match="another row"):
        opened(database, keyring, rows, "org_b", "openai")
    assert [each.fields["org"] for each in emitted if each.event.name == "secret.unusable"] == ["org_b"]
    [found] = doctor.org_secrets(database, keyring)
    assert not found.ok
    paste(second["sealed"])
    rotate_secret(database, keyring, "org_b", "openai", f"{KEY}-c", actor="ops")
    paste(second["sealed"])
    with pytest.raises(ConfigurationError, match="another row"):
        opened(database, keyring, rows, "org_b", "openai")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a b", KEY),
        ("", KEY),
        ("x" * 65, KEY),
        ("ok", ""),
        ("ok", " \n "),
        ("ok", "short"),
        ("ok", "x" * 16_385),
    ],
)
def test_what_cannot_be_asked_for_or_masked_is_refused(database, keyring, rows, name, value):
    with pytest.raises(UsageError):
        add_secret(database, keyring, "org_a", name, value, actor="ops")
    assert rows.org_secrets == []


def test_a_name_is_taken_once_and_what_is_not_there_is_said(database, keyring):
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")

    with pytest.raises(Conflict) as taken:
        add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    assert "secrets rotate org_a openai" in taken.value.fix
    for call in (
        lambda: rotate_secret(database, keyring, "org_b", "openai", KEY, actor="ops"),
        lambda: remove_secret(database, "org_b", "openai", actor="ops"),
        lambda: add_secret(database, keyring, "org_c", "openai", KEY, actor="ops"),
    ):
        with pytest.raises(NotFound):
            call()


def test_a_removed_org_has_no_secret_left(database, keyring, rows):
    for org in ("org_a", "org_b"):
        add_secret(database, keyring, org, "openai", KEY, actor="ops")

    set_org_state(database, "org_a", "suspended", actor="ops")
    assert len(rows.org_secrets) == 2
    set_org_state(database, "org_a", "removed", actor="ops")

    assert [row["org_id"] for row in rows.org_secrets] == [
        row["id"] for row in rows.orgs if row["code"] == "org_b"
    ]
    assert rows.audit[-1]["detail"]["secrets_destroyed"] == 1
    with pytest.raises(Conflict, match="was removed"):
        add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")


@on_either
def test_a_new_key_seals_them_too_and_the_old_one_goes_only_then(database, keyring, rows):
    for number in range(5):
        add_secret(database, keyring, "org_a", f"s{number}", f"{KEY}-{number}", actor="ops")
    old = keyring.sealing_key_id
    with pytest.raises(Conflict, match="still seals 5"):
        remove_key(database, keyring.with_new_key(), old, actor="ops")
    steps: list[int] = []

    done = rekey(database, KeyRing.load(keyring.path), actor="ops", batch=2, report=steps.append)

    ring = KeyRing.load(keyring.path)
    assert (done["new"], done["resealed"], done["unopened"], steps) == (False, 5, 0, [2, 4, 5])
    assert [row["active"] for row in list_keys(database, ring)] == [0, 5]
    remove_key(database, ring, old, actor="ops")
    names = [f"s{number}" for number in range(5)]
    assert opened(database, KeyRing.load(keyring.path), rows, "org_a", *names) == {
        f"s{number}": f"{KEY}-{number}" for number in range(5)
    }


def test_a_lost_ring_is_found(database, keyring, tmp_path):
    assert list(doctor.org_secrets(database, None)) == []
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    other = KeyRing.generate(tmp_path / "other")

    assert [found.ok for found in doctor.org_secrets(database, keyring)] == [True]
    for ring in (other, None):
        [found] = doctor.org_secrets(database, ring)
        assert (found.ok, "openai of org_a" in found.detail) == (False, True)
        assert "secrets rotate org_a openai" in found.fix
    assert rekey(database, other, actor="ops")["unopened"] == 1
    with pytest.raises(ConfigurationError, match="has 1 sealed secrets"):
        check_ring(database, None, tmp_path / "lost")


FILE = definition("org_a", "ask", "acme.ask", "@yearly") + definition(
    "org_b", "plain", "acme.plain", "@yearly"
)


@on_either
def test_an_org_that_lacks_a_secret_of_its_handlers_is_found(database, keyring, apply):
    entry = HandlerEntry("acme.ask", "acme-jobs", "1.0", "acme_jobs:ask", secrets=("mail", "openai"))
    with database.transaction() as connection:
        catalogue.put(connection, [entry], at=database.now(connection))
        [row] = catalogue.entries(connection, "acme.ask")
    assert row["secrets"] == ["mail", "openai"]
    apply(FILE)
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")

    [(org, found)] = lacking_of_all_orgs(database)

    assert org == "org_a"
    assert found.detail == "org org_a has no secret mail: runs of ask by acme.ask are refused"
    assert found.fix == "`python -m worker secrets add org_a mail`"
    add_secret(database, keyring, "org_a", "mail", json.dumps({"key": KEY}), actor="ops")
    assert lacking_of_all_orgs(database) == []
