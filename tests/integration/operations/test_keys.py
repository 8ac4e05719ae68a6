"""The keys that seal: a new one for everything, in batches; an old one goes only when it seals nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from worker import wiring
from worker.errors import ConfigurationError, Conflict, NotFound
from worker.operations.keys import rekey, remove_key
from worker.operations.orgs import import_orgs
from worker.settings import load
from worker.store import tables
from worker.tokens.sealing import KeyRing
from worker.wiring import check_ring, list_keys


def add_orgs(database, ring, count: int, prefix: str = "org") -> None:
    lines = [
        {"code": f"{prefix}_{n}", "name": "x", "issuer": "main"}
        | {"client_id": f"c{n}", "client_secret": f"secret-{n}"}
        for n in range(count)
    ]
    import_orgs(database, ring, map(json.dumps, lines), actor="ops")


def opened(rows, ring) -> list[str]:
    """All secrets, in the clear."""
    return sorted(
        ring.unseal(row["sealed"], row["key_id"], org_id=row["org_id"], credential_id=row["id"])
        for row in rows.credentials
    )


def test_every_secret_is_sealed_anew_in_batches_and_still_opens(database, keyring, rows):
    add_orgs(database, keyring, 5)
    old = keyring.sealing_key_id
    steps: list[int] = []

    done = rekey(database, keyring, actor="ops", batch=2, report=steps.append)

    ring = KeyRing.load(keyring.path)
    assert (done["new"], done["resealed"], done["unopened"], steps) == (True, 5, 0, [2, 4, 5])
    assert {row["key_id"] for row in rows.credentials} == {done["key_id"]} == {ring.sealing_key_id}
    assert opened(rows, ring) == [f"secret-{n}" for n in range(5)]
    assert [(row["id"], row["seals"], row["active"]) for row in list_keys(database, ring)] == [
        (old, False, 0),
        (done["key_id"], True, 5),
    ]


def test_a_ring_that_is_made_meanwhile_is_not_lost(database, keyring, tmp_path):
    """A worker looks for the ring, then for secrets; in between, a command makes both."""
    add_orgs(database, keyring, 1)

    check_ring(database, None, keyring.path)
    with pytest.raises(ConfigurationError, match="has 1 sealed secrets"):
        check_ring(database, None, tmp_path / "lost")


def test_an_interrupted_rekey_goes_on_with_the_same_key(database, keyring, rows):
    add_orgs(database, keyring, 5)

    def interrupt(resealed: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rekey(database, keyring, actor="ops", batch=2, report=interrupt)
    half = KeyRing.load(keyring.path)
    assert [row["active"] for row in list_keys(database, half)] == [3, 2]

    done = rekey(database, half, actor="ops", batch=2)

    assert (done["new"], done["resealed"], done["key_id"]) == (False, 3, half.sealing_key_id)
    assert len(KeyRing.load(keyring.path).key_ids) == 2
    assert opened(rows, half) == [f"secret-{n}" for n in range(5)]


def test_a_key_is_removed_only_when_it_seals_nothing(database, keyring, rows):
    add_orgs(database, keyring, 1)
    old = keyring.sealing_key_id
    ring = keyring.with_new_key()
    with pytest.raises(Conflict, match="still seals 1"):
        remove_key(database, ring, old, actor="ops")
    rekey(database, ring, actor="ops")

    remove_key(database, ring, old, actor="ops")

    left = KeyRing.load(keyring.path)
    assert left.key_ids == (ring.sealing_key_id,)
    assert opened(rows, left) == ["secret-0"]
    with pytest.raises(Conflict, match="still seals 1"):
        remove_key(database, left, ring.sealing_key_id, actor="ops")
    with pytest.raises(NotFound):
        remove_key(database, left, old, actor="ops")
    assert [row["action"] for row in rows.audit if row["action"].startswith("key")] == ["key.remove"]


def test_a_secret_that_no_key_opens_is_counted_and_stops_nothing(database, keyring, tmp_path):
    add_orgs(database, KeyRing.generate(tmp_path / "lost"), 1, prefix="lost")
    add_orgs(database, keyring, 2)

    done = rekey(database, keyring, actor="ops", batch=1)

    assert (done["resealed"], done["unopened"]) == (2, 1)
    assert [(row["in_ring"], row["active"]) for row in list_keys(database, KeyRing.load(keyring.path))] == [
        (True, 0),
        (True, 2),
        (False, 1),
    ]


@on_either
def test_a_ciphertext_pasted_into_another_orgs_row_does_not_open(database, keyring, rows):
    """Whoever can write to the database cannot give one org another's secret."""
    add_orgs(database, keyring, 2)
    mine, theirs = rows.credentials
    with database.transaction() as connection:
        connection.execute(
            update(tables.credentials)
            .where(tables.credentials.c.id == mine["id"])
            .values(sealed=theirs["sealed"], key_id=theirs["key_id"])
        )

    with pytest.raises(ConfigurationError, match="from another row"):
        opened(rows, keyring)
    assert rekey(database, keyring, actor="ops")["unopened"] == 1


def test_a_lost_key_ring_is_never_replaced_silently(database, tmp_path: Path, keyring):
    """On SQLite one is made at first need, but not where another one has sealed something."""
    settings = load(
        environ={
            "WORKER_DATABASE__URL": f"sqlite:///{tmp_path}/elsewhere/worker.db",
            "WORKER_SECRETS_DIR": str(tmp_path / "nothing"),
        }
    )
    add_orgs(database, keyring, 2)

    with pytest.raises(ConfigurationError, match="2 sealed secrets") as refused:
        wiring.open_keyring(settings, database=database)

    assert "put the key ring back" in refused.value.fix
    assert not settings.keyring_file.exists()
