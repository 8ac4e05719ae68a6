"""Secrets of orgs: sealed for one row, replaced, removed, covered by the keys, and found where they lack."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.rows import reading
from tests.fakes.site import definition
from worker.diagnosis import doctor
from worker.diagnosis.requirements import lacking_of_all_orgs
from worker.diagnosis.why import why
from worker.errors import ConfigurationError, Conflict, NotFound, UsageError
from worker.features.org_secrets.operations import (
    add_secret,
    bind_secret,
    remove_secret,
    rotate_secret,
)
from worker.handlers.catalogue import HandlerEntry
from worker.model.bindings import Binding, OrgSecret, OrgSecrets
from worker.model.orgs import OrgEntry, OrgRef
from worker.operations.keys import rekey, remove_key
from worker.operations.orgs import add_org, set_org_state
from worker.operations.runs import run_now
from worker.store import catalogue, tables
from worker.tokens import sealing
from worker.tokens.sealing import KeyRing
from worker.wiring import check_ring, list_keys
from worker.wiring.secrets import OpenedSecrets

KEY = "sk-canary-0123456789"
ASK = HandlerEntry("acme.ask", "acme-jobs", "1.0", "acme_jobs:ask", secrets=("mail", "openai"))


@pytest.fixture(autouse=True)
def orgs(database):
    for code in ("org_a", "org_b"):
        add_org(database, OrgEntry(code, code, "main"), actor="ops")


def opened(database, ring, rows, org: str, *names: str) -> dict[str, str]:
    """The values of the secrets that an attempt of the org uses."""
    found = secrets_of(database, ring, rows, *names, org=org)
    return {name: each.value for name, each in found.items()}


def secrets_of(database, ring, rows, *names: str, org: str = "org_a") -> dict[str, OrgSecret]:
    ref = next(OrgRef(row["id"], row["code"]) for row in rows.orgs if row["code"] == org)

    async def ask() -> dict[str, OrgSecret]:
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

    async def ask() -> list[OrgSecrets]:
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


OPENAI, EVIL = "https://api.openai.com", "https://evil.example"


@on_either
def test_a_binding_is_kept_by_rotation_and_changed_with_the_same_value(database, keyring, rows):
    given = {"origin": "HTTPS://api.OpenAI.com:443/", "header": "X-API-Key"}
    row = add_secret(database, keyring, "org_a", "openai", KEY, **given, actor="ops")
    assert (row["origin"], row["header"], row["generation"]) == (OPENAI, "x-api-key", 1)
    rotate_secret(database, keyring, "org_a", "openai", f"{KEY}-2", actor="ops")

    bound = Binding(OPENAI, "x-api-key")
    assert secrets_of(database, keyring, rows, "openai") == {"openai": OrgSecret(f"{KEY}-2", bound)}
    for _ in range(2):
        row = bind_secret(database, keyring, "org_a", "openai", origin=f"{OPENAI}:8443", actor="eve")
    assert (row["origin"], row["header"], row["generation"]) == (f"{OPENAI}:8443", None, 2)
    bind_secret(database, keyring, "org_a", "openai", origin=None, actor="eve")
    assert secrets_of(database, keyring, rows, "openai") == {"openai": OrgSecret(f"{KEY}-2")}
    first, second = {"origin": OPENAI, "header": "x-api-key"}, {"origin": f"{OPENAI}:8443", "header": None}
    kept = [row for row in rows.audit if row["action"].startswith("secret.")]
    assert [(row["action"], row["actor"], row["detail"]) for row in kept] == [
        ("secret.add", "ops", {"generation": 1, **first}),
        ("secret.rotate", "ops", {"generation": 2}),
        ("secret.bind", "eve", {**second, "before": first}),
        ("secret.bind", "eve", {"origin": None, "header": None, "before": second}),
    ]


TAMPERED = [
    {"origin": EVIL},
    {"header": "x-other"},
    {"header": None},
    {"origin": None, "header": None},
    {"origin": None},
    {"name": "mail"},
]


@pytest.mark.parametrize("tampered", TAMPERED, ids=str)
@pytest.mark.parametrize("authenticated", [True, False], ids=["authenticated", "control"])
@on_either
def test_who_writes_the_row_cannot_redirect_a_bound_secret(
    database, keyring, rows, tampered, authenticated, monkeypatch
):
    """In the control the sealing leaves the row out, and the value goes where the row says."""
    if not authenticated:
        monkeypatch.setattr(sealing, "_place_of_secret", lambda *place: ("org secret",))
    bound = {"origin": OPENAI, "header": "x-api-key"}
    add_secret(database, keyring, "org_a", "openai", KEY, **bound, actor="ops")
    with database.transaction() as connection:
        connection.execute(update(tables.org_secrets).values(**tampered))
    name = tampered.get("name", "openai")

    if not authenticated:
        [found] = secrets_of(database, keyring, rows, name).values()
        origin, header = ({**bound, **tampered}[key] for key in ("origin", "header"))
        assert found == OrgSecret(KEY, None if origin is None else Binding(origin, header))
        return
    with pytest.raises(ConfigurationError, match="its binding was changed in the row"):
        secrets_of(database, keyring, rows, name)
    [found] = doctor.org_secrets(database, keyring)
    assert not found.ok
    # Nor does a person seal a new value for that origin, or this one for another.
    before = rows.org_secrets
    for change in (
        lambda: rotate_secret(database, keyring, "org_a", name, f"{KEY}-2", actor="ops"),
        lambda: bind_secret(database, keyring, "org_a", name, origin=EVIL, actor="ops"),
        lambda: bind_secret(database, keyring, "org_a", name, origin=None, actor="ops"),
    ):
        with pytest.raises(ConfigurationError) as fault:
            change()
        assert f"secrets remove ORG {name}" in fault.value.fix
    assert rekey(database, keyring, actor="ops")["unopened"] == 1
    assert rows.org_secrets == before


@on_either
def test_a_new_key_seals_a_bound_secret_with_its_binding(database, keyring, rows):
    add_secret(database, keyring, "org_a", "openai", KEY, origin=OPENAI, header="x-api-key", actor="ops")
    add_secret(database, keyring, "org_a", "mail", "mail-0123456789", actor="ops")

    assert rekey(database, keyring, actor="ops")["resealed"] == 2

    ring = KeyRing.load(keyring.path)
    assert {row["key_id"] for row in rows.org_secrets} == {ring.sealing_key_id}
    assert secrets_of(database, ring, rows, "openai", "mail") == {
        "openai": OrgSecret(KEY, Binding(OPENAI, "x-api-key")),
        "mail": OrgSecret("mail-0123456789"),
    }


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"origin": "api.openai.com"}, "^origin: "),
        ({"origin": "http://api.openai.com"}, "^origin: "),
        ({"origin": "https://*.openai.com"}, "^origin: "),
        ({"origin": OPENAI, "header": "host"}, "^header: "),
        ({"origin": OPENAI, "header": "x api"}, "^header: "),
        ({"header": "x-api-key"}, "^header: "),
    ],
)
def test_a_wrong_binding_is_refused_with_its_field(database, keyring, rows, given, match):
    with pytest.raises(UsageError, match=match) as fault:
        add_secret(database, keyring, "org_a", "openai", KEY, **given, actor="ops")
    assert fault.value.fix
    assert rows.org_secrets == []
    add_secret(database, keyring, "org_a", "openai", KEY, actor="ops")
    with pytest.raises(UsageError, match=match):
        bind_secret(database, keyring, "org_a", "openai", **{"origin": None} | given, actor="ops")


def test_a_value_that_no_header_carries_is_not_bound(database, keyring, rows):
    lines = f"{KEY}\nx-evil: 1"
    with pytest.raises(UsageError, match="a header cannot carry it") as fault:
        add_secret(database, keyring, "org_a", "openai", lines, origin=OPENAI, actor="ops")
    assert "canary" not in str(fault.value)
    # Handlers may get it in clear.
    add_secret(database, keyring, "org_a", "openai", lines, actor="ops")
    with pytest.raises(UsageError, match="a header cannot carry it"):
        bind_secret(database, keyring, "org_a", "openai", origin=OPENAI, actor="ops")
    add_secret(database, keyring, "org_a", "mail", KEY, origin=OPENAI, actor="ops")
    with pytest.raises(UsageError, match="a header cannot carry it"):
        rotate_secret(database, keyring, "org_a", "mail", lines, actor="ops")
    assert [row["generation"] for row in rows.org_secrets] == [1, 1]
    with pytest.raises(NotFound):
        bind_secret(database, keyring, "org_a", "stripe", origin=OPENAI, actor="ops")


@on_either
def test_doctor_lists_what_handlers_get_in_clear(database, keyring):
    """And not what no handler declares."""
    with database.transaction() as connection:
        catalogue.put(connection, [ASK], at=database.now(connection))
    for name in ("openai", "unused"):
        add_secret(database, keyring, "org_a", name, KEY, actor="ops")
    add_secret(database, keyring, "org_a", "mail", KEY, origin=OPENAI, actor="ops")

    [opens, clear] = doctor.org_secrets(database, keyring)

    assert (opens.ok, clear.ok) == (True, True)
    assert clear.detail == "handlers get secrets in clear, and could send them anywhere: openai of org_a"
    assert clear.fix == "bind each to its service: `secrets bind org_a openai --for ORIGIN`"
    bind_secret(database, keyring, "org_a", "openai", origin=OPENAI, actor="ops")
    assert [found.detail for found in doctor.org_secrets(database, keyring)] == [opens.detail]


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
        assert "`secrets remove org_a openai` and `secrets add org_a openai`" in found.fix
    assert rekey(database, other, actor="ops")["unopened"] == 1
    with pytest.raises(ConfigurationError, match="has 1 sealed secrets"):
        check_ring(database, None, tmp_path / "lost")


FILE = definition("org_a", "ask", "acme.ask", "@yearly") + definition(
    "org_b", "plain", "acme.plain", "@yearly"
)


@on_either
def test_an_org_that_lacks_a_secret_of_its_handlers_is_found(database, keyring, apply):
    with database.transaction() as connection:
        catalogue.put(connection, [ASK], at=database.now(connection))
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


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("secret_missing", lambda *of: add_secret(*of, "mail", KEY, actor="ops")),
        ("secret_bound", lambda *of: bind_secret(*of, "openai", origin=None, actor="ops")),
    ],
)
def test_why_says_when_a_retry_helps(database, keyring, rows, apply, reason, cure):
    plain = HandlerEntry("acme.plain", "acme-jobs", "1.0", "acme_jobs:plain")
    with database.transaction() as connection:
        catalogue.put(connection, [ASK, plain], at=database.now(connection))
    apply(FILE)
    add_secret(database, keyring, "org_a", "openai", KEY, origin=OPENAI, actor="ops")
    run = run_now(database, "org_a", "ask", actor="ops")["id"]
    detail = "mail" if reason == "secret_missing" else "openai"
    rows.set_ended(run, state="refused", reason=reason, detail=detail)
    before = reading(database, why, run)

    cure(database, keyring, "org_a")

    assert (before.step.verb, reading(database, why, run).step.verb) == (
        "add_secret" if reason == "secret_missing" else "list_secrets",
        "retry",
    )
