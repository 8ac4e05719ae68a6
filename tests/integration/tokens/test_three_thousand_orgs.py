"""A cold start with many orgs: a request each, within the issuer's rate and its connections."""

from __future__ import annotations

import asyncio
import random

import httpx

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import EC_KEY, App, FakeCredentials, FakeIssuer, ec_issuer, org
from worker.model.orgs import TokenWant
from worker.tokens.cache import Tokens

ORGS = 3_000


async def test_three_thousand_orgs_cold_make_as_many_requests_within_rate_and_connections(
    clock: ManualClock,
) -> None:
    issuer, credentials = FakeIssuer(clock, key=EC_KEY), FakeCredentials()
    orgs = [org(number) for number in range(ORGS)]
    for each in orgs:
        issuer.add(App(each.code, f"client-{each.code}", f"secret-{each.code}"))
        credentials.add(each, f"client-{each.code}", f"secret-{each.code}")

    async def slow(form: dict[str, str]) -> httpx.Response:
        await clock.sleep(0.2)
        return issuer.grant(form)

    issuer.answer = slow
    async with issuer.client() as client:
        tokens = Tokens({"main": ec_issuer()}, credentials, client=client, clock=clock, rng=random.Random(7))
        # Two runs of each org, at once.
        asking = asyncio.gather(*(tokens.ensure(TokenWant(of, "main")) for of in orgs for _ in range(2)))
        started = clock.monotonic()
        while not asking.done():
            clock.advance(0.1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        answers = await asking
        await tokens.close()

    times = [at for at, path, _ in issuer.requests if path == "/oauth2/token"]
    assert len(times) == ORGS
    assert {answer.claims.org_code for answer in answers} == {each.code for each in orgs}
    assert all(later - earlier >= 1.0 for earlier, later in zip(times, times[10:], strict=False))
    assert issuer.most_open <= 8
    # The rate is used, not only kept.
    assert clock.monotonic() - started <= ORGS / 10 * 1.4
    assert issuer.count("/.well-known/jwks") == 1
