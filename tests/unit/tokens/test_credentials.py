"""Secrets have no readable form, and credentials are read once for all who ask."""

from __future__ import annotations

import asyncio
import copy
import pickle

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import ORG, FakeCredentials
from worker.errors import CredentialsRejected, StoreUnavailable
from worker.tokens.credentials import Generations, Secret

pytestmark = pytest.mark.anyio


def test_a_secret_is_not_shown_pickled_or_copied() -> None:
    """Only `reveal` gives it."""
    secret = Secret("s3cret")

    assert secret.reveal() == "s3cret"
    assert "s3cret" not in f"{secret} {secret!r} {[secret]}"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(secret)


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
