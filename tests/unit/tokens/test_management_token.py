"""The management token: cached until shortly before its end, replaced once it is rejected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.fakes.clock import ManualClock, settle
from tests.fakes.issuer import App, FakeIssuer, kinde_issuer
from worker.errors import ConfigurationError, IssuerUnavailable
from worker.features.provisioning.management_wiring import BRAND_NEW, ManagementToken
from worker.ids import ALL_ORGS
from worker.secret import Secret
from worker.telemetry.masking import masker
from worker.tokens.issuer_client import IssuerClient

AUDIENCE = "https://acme.kinde.com/api"
SECRET = "canary-management-secret"


@pytest.fixture
def issuer(clock: ManualClock) -> FakeIssuer:
    made = FakeIssuer(clock)
    made.add(App("", "manager", SECRET, scopes=("read:organizations",), lifetime=600))
    return made


@pytest.fixture
async def token(issuer: FakeIssuer, clock: ManualClock) -> AsyncIterator[ManagementToken]:
    async with issuer.client() as http:
        client = IssuerClient(kinde_issuer(), http, clock=clock)
        yield ManagementToken(
            client, client_id="manager", secret=Secret(SECRET), audience=AUDIENCE, clock=clock
        )
        await client.close()


async def test_concurrent_callers_share_one_request_for_the_audience_without_an_org(
    token: ManagementToken, issuer: FakeIssuer, clock: ManualClock
):
    tokens = await asyncio.gather(*(token() for _ in range(20)))
    clock.advance(539)
    again = await token()

    assert len({each.reveal() for each in [*tokens, again]}) == 1
    (_, _, form) = issuer.requests[0]
    assert (form["audience"], form["client_id"]) == (AUDIENCE, "manager")
    assert not {"scope", "org_code"} & form.keys()
    assert issuer.count() == 1

    clock.advance(2)  # a minute before the end
    assert await token() != again
    assert issuer.count() == 2


async def test_a_rejected_token_is_replaced_once_and_a_brand_new_one_is_not(
    token: ManagementToken, issuer: FakeIssuer, clock: ManualClock
):
    first = await token()
    assert await token(rejected=first) == first  # what rejects this one would reject the next, too
    clock.advance(BRAND_NEW)

    renewed = await asyncio.gather(*(token(rejected=first) for _ in range(8)))

    assert len({each.reveal() for each in renewed}) == 1
    assert renewed[0] != first
    assert issuer.count() == 2


@pytest.mark.parametrize(
    ("answer", "fix"),
    [
        (httpx.Response(401, json={"error": "invalid_client"}), "management__main"),
        (httpx.Response(400, json={"error": "unauthorized_client"}), AUDIENCE),
        (httpx.Response(200, content=b" " * 70_000), "fewer permissions"),
    ],
    ids=["credentials", "audience", "too large"],
)
async def test_a_refusal_says_what_to_correct(
    token: ManagementToken, issuer: FakeIssuer, answer: httpx.Response, fix: str
):
    issuer.answer = lambda form: answer

    with pytest.raises(ConfigurationError) as raised:
        await token()

    assert fix in raised.value.fix
    assert SECRET not in f"{raised.value!r}{raised.value}{raised.value.fix}"
    assert "credentials add" not in raised.value.fix
    assert SECRET not in masker.mask(f"said {SECRET}", ALL_ORGS)


async def test_an_issuer_that_does_not_respond_is_asked_again_then_reported(
    token: ManagementToken, issuer: FakeIssuer, clock: ManualClock
):
    issuer.answer = lambda form: httpx.Response(503)
    asking = asyncio.ensure_future(token())
    for _ in range(100):
        await settle()
        clock.advance(0.5)

    with pytest.raises(IssuerUnavailable):
        await asking
    assert issuer.count() == 4
