"""Sealing: a secret opens in its own row, with its own key, and nowhere else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from worker.errors import ConfigurationError, Conflict
from worker.tokens.sealing import KeyRing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "keyring"


def test_a_secret_opens_in_its_own_row(path: Path) -> None:
    """And is not to be seen in what is stored."""
    ring = KeyRing.generate(path)
    sealed, key_id = ring.seal("s3cret-ü", org_id="org", credential_id="cred")

    assert b"s3cret" not in sealed
    assert KeyRing.load(path).unseal(sealed, key_id, org_id="org", credential_id="cred") == "s3cret-ü"


@pytest.mark.parametrize(
    "row", [{"org_id": "other"}, {"credential_id": "other"}, {"org_id": "orgc", "credential_id": "red"}]
)
def test_a_ciphertext_pasted_into_another_row_does_not_open(path: Path, row: dict) -> None:
    """It is bound to org and credential, unambiguously."""
    ring = KeyRing.generate(path)
    sealed, key_id = ring.seal("secret", org_id="org", credential_id="cred")

    with pytest.raises(ConfigurationError, match="another row") as fault:
        ring.unseal(sealed, key_id, **({"org_id": "org", "credential_id": "cred"} | row))
    assert "credentials add" in fault.value.fix


def test_an_orgs_secret_opens_in_its_own_row_and_generation_only(path: Path) -> None:
    """And never as a credential, a token or the record of an attempt."""
    ring = KeyRing.generate(path)
    row = {"org_id": "org", "name": "openai", "generation": 2, "origin": None, "header": None}
    sealed, key_id = ring.seal_secret("sk-ü", **row)

    assert ring.unseal_secret(sealed, key_id, **row) == "sk-ü"
    for other in ({"org_id": "b"}, {"name": "mail"}, {"generation": 1}, {"org_id": "orgo", "name": "penai"}):
        with pytest.raises(ConfigurationError, match="another row") as fault:
            ring.unseal_secret(sealed, key_id, **row | other)
        assert "secrets remove ORG" in fault.value.fix
    with pytest.raises(ConfigurationError, match="not in"):
        ring.unseal_secret(sealed, "k00000000", **row)
    with pytest.raises(ConfigurationError):
        ring.unseal(sealed, key_id, org_id="org", credential_id="openai")
    assert ring.open_token(sealed, key_id, list(row.values())) is None


UNBOUND = {"org_id": "org", "name": "openai", "generation": 1, "origin": None, "header": None}
BOUND = UNBOUND | {"origin": "https://api.openai.com", "header": "x-api-key"}


@pytest.mark.parametrize(
    ("sealed_for", "opened_as"),
    [
        (BOUND, BOUND | {"origin": "https://evil.example"}),
        (BOUND, BOUND | {"header": "x-other"}),
        (BOUND, BOUND | {"header": None}),
        (BOUND, BOUND | {"origin": None}),
        (BOUND, UNBOUND),
        (UNBOUND, BOUND),
        (UNBOUND, UNBOUND | {"origin": ""}),
        (BOUND | {"header": None}, BOUND | {"header": ""}),
        (BOUND | {"header": None}, BOUND | {"origin": 'https://api.openai.com", "x-api-key'}),
    ],
)
def test_a_secret_opens_with_its_own_binding_only(path: Path, sealed_for: dict, opened_as: dict) -> None:
    ring = KeyRing.generate(path)
    sealed, key_id = ring.seal_secret("sk-0123456789", **sealed_for)

    assert ring.unseal_secret(sealed, key_id, **sealed_for) == "sk-0123456789"
    with pytest.raises(ConfigurationError, match="its binding was changed"):
        ring.unseal_secret(sealed, key_id, **opened_as)


def test_a_secret_of_a_release_without_bindings_opens_unbound(path: Path) -> None:
    ring = KeyRing.generate(path)
    sealed, key_id = ring._seal("sk-0123456789", "org secret", "org", "openai", 1)

    assert ring.unseal_secret(sealed, key_id, **UNBOUND) == "sk-0123456789"
    with pytest.raises(ConfigurationError):
        ring.unseal_secret(sealed, key_id, **BOUND)


def test_a_damaged_ciphertext_does_not_open(path: Path) -> None:
    """Each byte counts, and a short one is no crash."""
    ring = KeyRing.generate(path)
    sealed, key_id = ring.seal("secret", org_id="org", credential_id="cred")

    damaged = [sealed[:n] for n in (0, 1, 12, 13, 28)]
    damaged += [bytes([*sealed[:n], sealed[n] ^ 1, *sealed[n + 1 :]]) for n in range(len(sealed))]
    for text in damaged:
        with pytest.raises(ConfigurationError):
            ring.unseal(text, key_id, org_id="org", credential_id="cred")


def test_the_same_secret_is_sealed_differently_each_time(path: Path) -> None:
    """Equal secrets cannot be told from the table."""
    ring = KeyRing.generate(path)

    assert ring.seal("s", org_id="o", credential_id="c") != ring.seal("s", org_id="o", credential_id="c")


def test_the_file_is_its_owners_alone(path: Path) -> None:
    """0600, whatever the umask."""
    before = os.umask(0)
    try:
        KeyRing.generate(path)
    finally:
        os.umask(before)

    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["keyring"]


def test_a_key_ring_is_never_replaced(path: Path) -> None:
    """A new one would lose every secret that the old one sealed."""
    KeyRing.generate(path)
    text = path.read_text()

    with pytest.raises(Conflict):
        KeyRing.generate(path)
    assert path.read_text() == text


def test_two_that_need_it_first_agree(path: Path) -> None:
    """Worker and command line may both make it at first need."""
    rings: list[KeyRing] = []
    threads = [
        threading.Thread(target=lambda: rings.append(KeyRing.load_or_generate(path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {ring.sealing_key_id for ring in rings} == {KeyRing.load(path).sealing_key_id}
    assert len(rings) == 8


def test_a_new_key_seals_and_the_old_ones_still_open(path: Path) -> None:
    """So that rows can be moved to it one by one."""
    old = KeyRing.generate(path)
    sealed, key_id = old.seal("secret", org_id="o", credential_id="c")
    new = old.with_new_key()

    assert new.key_ids == (key_id, new.sealing_key_id)
    assert new.unseal(sealed, key_id, org_id="o", credential_id="c") == "secret"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_that_seals_nothing_any_more_is_taken_out(path: Path) -> None:
    """The one that seals stays, whoever asks."""
    ring = KeyRing.generate(path)
    newer = ring.with_new_key()

    left = newer.without(ring.sealing_key_id)

    assert left.key_ids == (newer.sealing_key_id,)
    assert path.read_text().startswith("#")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Conflict, match="seals new secrets"):
        left.without(newer.sealing_key_id)


def test_keys_added_by_two_at_once_are_both_kept(path: Path) -> None:
    """A key that is lost takes with it all that it sealed."""
    ring = KeyRing.generate(path)
    added: list[str] = []
    threads = [
        threading.Thread(target=lambda: added.append(ring.with_new_key().sealing_key_id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert set(added) <= set(KeyRing.load(path).key_ids)
    assert len(KeyRing.load(path).key_ids) == 9


def test_a_key_that_is_gone_is_named(path: Path) -> None:
    """With what can be done."""
    sealed, key_id = KeyRing.generate(path).seal("secret", org_id="o", credential_id="c")
    other = KeyRing.generate(path.with_name("other"))

    with pytest.raises(ConfigurationError, match=key_id):
        other.unseal(sealed, key_id, org_id="o", credential_id="c")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "k1\n",
        "k1 short\n",
        "k1 " + "A" * 43 + "=\nk1 " + "B" * 43 + "=\n",
        "k1 " + "!" * 44,
        "ü",
    ],
    ids=["empty", "comment", "no key", "short", "twice", "no base64", "no ascii"],
)
def test_a_damaged_key_ring_is_refused(path: Path, text: str) -> None:
    """Nothing is guessed."""
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError):
        KeyRing.load(path)


def test_a_missing_key_ring_says_what_to_do(path: Path) -> None:
    """By the command's name."""
    with pytest.raises(ConfigurationError) as missing:
        KeyRing.load(path)

    assert "keys generate" in missing.value.fix


def test_a_key_ring_shows_no_key(path: Path) -> None:
    """Not in its repr."""
    ring = KeyRing.generate(path)
    key = path.read_text().split()[-1]

    assert key not in repr(ring)
