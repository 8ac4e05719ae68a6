"""Secrets have no readable form, and credentials are read once for all who ask."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import ORG, FakeCredentials, org
from worker.errors import ConfigurationError, CredentialsRejected, StoreUnavailable
from worker.model.orgs import OrgRef
from worker.secret import Secret
from worker.tokens.credentials import READ_AGAIN, Generations, fault_of_reference, read_reference


def test_a_secret_is_not_shown_pickled_or_copied() -> None:
    """Only `reveal` gives it."""
    secret = Secret("s3cret")

    assert secret.reveal() == "s3cret"
    assert "s3cret" not in f"{secret} {secret!r} {[secret]}"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(secret)


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    """A folder of secrets as Kubernetes mounts it: names are links through `..data`."""
    folder = tmp_path / "secrets"
    (folder / "..2030_01_01").mkdir(parents=True)
    (folder / "..data").symlink_to("..2030_01_01")
    for name in ("acme", "keyring", "database__url"):
        (folder / "..2030_01_01" / name).write_text(f"content of {name}\n")
        (folder / name).symlink_to(f"..data/{name}")
    (tmp_path / "outside").write_text("content of outside")
    return folder


HOSTILE = {
    "file:keyring": "key ring",
    "keyring": "key ring",
    "file:database__url": "setting",
    "file:alerts__webhook_secret": "setting",
    "file:../outside": "bare name",
    "file:/etc/passwd": "bare name",
    "file:..data/keyring": "bare name",
    "file:..": "bare name",
    "file:.": "bare name",
    "file:": "bare name",
    "file:.keyring.0123456789abcdef": "bare name",
    "file:acme\n": "bare name",
}
LINKS = {
    "to_outside": "../outside",
    "to_passwd": "/etc/passwd",
    "to_keyring": "keyring",
    "to_link": "to_setting",
    "to_setting": "..data/database__url",
}


@pytest.mark.parametrize("reference", HOSTILE)
def test_a_reference_to_what_is_no_orgs_secret_has_a_fault(reference: str, secrets_dir: Path) -> None:
    for folder in (None, secrets_dir):
        assert HOSTILE[reference] in (fault_of_reference(reference, folder) or "")
    with pytest.raises(ConfigurationError, match=HOSTILE[reference]) as caught:
        read_reference(reference, secrets_dir)
    assert "content of" not in str(caught.value)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_to_what_is_no_orgs_secret_has_a_fault(name: str, secrets_dir: Path) -> None:
    for link, target in LINKS.items():
        (secrets_dir / link).symlink_to(target)
    assert (secrets_dir / name).read_text(), "the control: without the check its content is read"

    assert fault_of_reference(f"file:{name}", secrets_dir)
    with pytest.raises(ConfigurationError, match=name):
        read_reference(f"file:{name}", secrets_dir)


def test_a_second_name_of_the_key_ring_has_a_fault(secrets_dir: Path) -> None:
    (secrets_dir / "plain").mkdir()
    for name in ("keyring", "acme"):
        (secrets_dir / "plain" / name).write_text("content")
    os.link(secrets_dir / "plain" / "keyring", secrets_dir / "plain" / "second")
    os.link(secrets_dir / "plain" / "acme", secrets_dir / "plain" / "third")

    assert fault_of_reference("file:second", secrets_dir / "plain") == "names the key ring"
    assert fault_of_reference("file:third", secrets_dir / "plain") is None


def test_a_file_of_an_org_is_read_through_the_links_of_a_mount(secrets_dir: Path) -> None:
    assert read_reference("file:acme", secrets_dir) == "content of acme"
    assert fault_of_reference("file:not_yet_there", secrets_dir) is None
    with pytest.raises(ConfigurationError, match="not_yet_there cannot be read: No such file"):
        read_reference("file:not_yet_there", secrets_dir)


def test_secrets_are_equal_by_their_text() -> None:
    """So that a changed one releases its org."""
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"


async def test_credentials_are_read_once_for_all_who_ask(clock: ManualClock) -> None:
    """And again after two seconds."""
    source = FakeCredentials()
    source.add(ORG, "client", "a")
    generations = Generations(source, clock=clock)
    await asyncio.gather(*(generations.of(ORG) for _ in range(100)))
    clock.advance(1.9)
    await generations.of(ORG)
    assert source.reads == 1

    source.add(ORG, "client", "b")
    clock.advance(0.1)
    assert [known.generation for known in await generations.of(ORG)] == [2, 1]


async def test_the_newest_are_read_at_once_where_that_is_asked(clock: ManualClock) -> None:
    """As for an org that is parked."""
    source = FakeCredentials()
    source.add(ORG, "client", "a")
    generations = Generations(source, clock=clock)
    await generations.of(ORG)
    source.add(ORG, "client", "b")

    assert len(await generations.of(ORG, newest=True)) == 2


async def test_a_database_that_is_away_matters_to_who_was_never_read(clock: ManualClock) -> None:
    """The others go on with what is known."""
    source = FakeCredentials()
    source.fault = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        await Generations(source, clock=clock).of(ORG)


async def test_an_org_whose_last_generation_was_retired_has_none(clock: ManualClock) -> None:
    """What was known of it does not come back."""
    source = FakeCredentials()
    source.add(ORG, "client", "a")
    generations = Generations(source, clock=clock)
    await generations.of(ORG)
    source.orgs.clear()
    clock.advance(2)

    for _ in range(2):
        with pytest.raises(CredentialsRejected):
            await generations.of(ORG)


async def known_generations(clock: ManualClock, **changes: object) -> tuple[Generations, FakeCredentials]:
    """Credentials of one org that were read long enough ago to be read again."""
    source = FakeCredentials()
    source.add(ORG, "client-a", "secret-a")
    source.orgs[ORG.id] = [replace(each, **changes) for each in source.orgs[ORG.id]]
    generations = Generations(source, clock=clock)
    await generations.of(ORG)
    clock.advance(READ_AGAIN)
    return generations, source


async def test_credentials_that_are_the_same_are_confirmed_without_opening_a_secret(clock: ManualClock):
    generations, source = await known_generations(clock)
    known = await generations.of(ORG)
    clock.advance(READ_AGAIN)
    reads = source.reads

    await generations.load([ORG])
    await generations.load([ORG])

    assert await generations.of(ORG) is known
    assert (source.looks, source.reads) == (1, reads)


@pytest.mark.parametrize("change", ["added", "retired", "other code", "file"])
async def test_credentials_that_may_have_changed_are_read_again(clock: ManualClock, change: str):
    generations, source = await known_generations(clock, from_file=change == "file")
    ref = ORG
    match change:
        case "added":
            source.add(ORG, "client-a", "secret-b")
        case "retired":
            source.orgs[ORG.id] = [replace(source.orgs[ORG.id][0], id="another")]
        case "other code":
            ref = OrgRef(ORG.id, "renamed")
    reads = source.reads

    await generations.load([ref])
    found = await generations.of(ref)

    assert source.reads == reads + 1
    assert list(found) == source.orgs[ORG.id]


async def test_without_a_database_what_is_known_is_used(clock: ManualClock):
    generations, source = await known_generations(clock)
    source.fault = StoreUnavailable("away")

    await generations.load([ORG])

    assert [each.client_id for each in await generations.of(ORG)] == ["client-a"]


def held_back(source: FakeCredentials, name: str) -> asyncio.Event:
    """Have a query of the source return what it found only after the event."""
    asked, answer = getattr(source, name), asyncio.Event()

    async def slow(org_ids):
        found = await asked(org_ids)
        await answer.wait()
        return found

    setattr(source, name, slow)
    return answer


async def test_credentials_retired_while_they_are_confirmed_are_not_kept(clock: ManualClock):
    """`forget` comes while the query runs."""
    generations, source = await known_generations(clock)
    answer = held_back(source, "active_ids")
    loading = asyncio.ensure_future(generations.load([ORG]))
    await settle()
    generations.forget(ORG.id)
    source.orgs[ORG.id] = []
    answer.set()
    await loading

    with pytest.raises(CredentialsRejected):
        await generations.of(ORG)


async def test_unknown_credentials_of_many_orgs_are_read_together(clock: ManualClock):
    source = FakeCredentials()
    for number in range(3):
        source.add(org(number), f"client-{number}", "secret")
    generations = Generations(source, clock=clock)

    await generations.load([org(number) for number in range(4)])

    assert source.reads == 1
    assert [(await generations.of(org(number)))[0].client_id for number in range(3)] == [
        f"client-{number}" for number in range(3)
    ]
    assert source.reads == 1
    with pytest.raises(CredentialsRejected, match="no active credential"):
        await generations.of(org(3))


async def test_credentials_that_were_read_meanwhile_are_not_replaced_by_older_ones(clock: ManualClock):
    source = FakeCredentials()
    source.add(ORG, "client-old", "secret")
    generations = Generations(source, clock=clock)
    answer = held_back(source, "active_of")
    loading = asyncio.ensure_future(generations.load([ORG]))
    await settle()
    source.add(ORG, "client-new", "secret")
    await generations.of(ORG)
    answer.set()
    await loading

    assert (await generations.of(ORG))[0].client_id == "client-new"
