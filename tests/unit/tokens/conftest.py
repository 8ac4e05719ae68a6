"""An issuer with one org's application, its credentials, and the cache before them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import ORG, App, FakeCredentials, FakeIssuer, add_org, kinde_issuer
from worker.model.claims import Enforced
from worker.model.orgs import OrgRef, TokenWant
from worker.tokens.cache import Tokens


@dataclass
class World:
    """All that a test of the cache touches."""

    clock: ManualClock
    issuer: FakeIssuer
    credentials: FakeCredentials
    tokens: Tokens
    app: App

    def add_org(self, number: int) -> OrgRef:
        """Another org with an application and a credential of its own."""
        return add_org(self.issuer, self.credentials, number)

    async def ensure(self, of: OrgRef = ORG, **asked: Any) -> Enforced:
        at_hand = None if "fresh" in asked else self.tokens.at_hand(TokenWant(of, "main", **asked))
        enforced = await self.tokens.ensure(TokenWant(of, "main", **asked))
        assert at_hand is None or at_hand is enforced
        return enforced


@pytest.fixture
async def world(clock: ManualClock) -> AsyncIterator[World]:
    issuer, credentials = FakeIssuer(clock), FakeCredentials()
    app = issuer.add(App("org_a", "client-a", "secret-a"))
    credentials.add(ORG, "client-a", "secret-a")
    async with issuer.client() as client:
        tokens = Tokens(
            {"main": kinde_issuer()}, credentials, client=client, clock=clock, rng=random.Random(7)
        )
        yield World(clock, issuer, credentials, tokens, app)
        await tokens.close()
