"""Webhooks: only a recent one that the issuer signed counts, and it says only which org it is about."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.clock import START, ManualClock
from tests.fakes.issuer import App, FakeIssuer, jwk, kinde_issuer, make_token, rsa_key
from tests.fakes.kinde.webhooks import payload
from worker.clock import to_text
from worker.errors import IssuerUnavailable, WebhookRefused
from worker.features.provisioning.management import webhooks
from worker.features.provisioning.management.contract import Notice
from worker.guard.decode import invalid
from worker.tokens.issuer_client import IssuerClient

ORG = "org_acme"


@pytest.fixture
def issuer(clock: ManualClock) -> FakeIssuer:
    return FakeIssuer(clock)


@pytest.fixture
async def client(issuer: FakeIssuer, clock: ManualClock) -> AsyncIterator[IssuerClient]:
    async with issuer.client() as http:
        made = IssuerClient(kinde_issuer(), http, clock=clock)
        yield made
        await made.close()


async def read(client: IssuerClient, message: str | bytes, clock: ManualClock) -> Notice:
    body = message.encode() if isinstance(message, str) else message
    return await webhooks.read_notice(body, client.verify_message, now=clock.now())


def created(**changes: Any) -> dict[str, Any]:
    return payload("organization.created", ORG, at=START, **changes)


@pytest.mark.parametrize(
    ("kind", "notice"),
    [
        ("organization.created", ("org_created", ORG)),
        ("organization.updated", ("org_updated", ORG)),
        ("organization.deleted", ("org_deleted", ORG)),
        ("user.created", ("other", None)),
    ],
)
async def test_a_genuine_webhook_names_its_org_and_kind(
    client: IssuerClient, clock: ManualClock, kind: str, notice: tuple[str, str | None]
):
    message = make_token(payload(kind, ORG, at=START))

    # With a line end, as some proxies send it, and again, as Kinde does: it says the same.
    assert await read(client, f"{message}\n", clock) == Notice(*notice, START)
    assert await read(client, message, clock) == Notice(*notice, START)


async def test_one_of_kindes_last_repetition_counts_and_an_older_one_does_not(
    client: IssuerClient, clock: ManualClock
):
    message = make_token(created())
    clock.advance(timedelta(hours=36, minutes=59))
    assert (await read(client, message, clock)).org == ORG

    clock.advance(timedelta(minutes=2))

    with pytest.raises(WebhookRefused) as raised:
        await read(client, message, clock)
    assert raised.value.detail == "old"


TOKEN_CLAIMS = ("iss", "aud", "exp", "iat", "azp", "gty", "scp", "scope", "jti", "sub", "nbf")
AHEAD = to_text(START + timedelta(minutes=6))
REFUSED = {
    "future": (created(timestamp=AHEAD), {}, "future"),
    "no timestamp": (created(timestamp=None), {}, "timestamp"),
    "no offset": (created(timestamp="2030-01-01T00:00:00"), {}, "timestamp"),
    "a number": (created(timestamp=1893456000), {}, "timestamp"),
    "no type": (created(type=None), {}, "payload"),
    "no data": (created(data=None), {}, "payload"),
    "no event": (created(event_id=None), {}, "payload"),
    "no org": (created(data={"organization": {"name": "Acme"}}), {}, "org"),
    "org of another type": (created(data={"organization": {"code": ["org_acme"]}}), {}, "org"),
    "an empty object": ({}, {}, "payload"),
    "typ of a token": (created(), {"typ": "at+jwt"}, "type"),
    "another algorithm": (created(), {"alg": "HS256"}, "algorithm"),
    "no algorithm": (created(), {"alg": "none"}, "algorithm"),
    "a key in the header": (created(), {"jwk": jwk()}, "embedded_key"),
    "no kid": (created(), {"kid": None}, "kid"),
    **{f"claim {name}": (created(**{name: 1}), {}, "token") for name in TOKEN_CLAIMS},
}


@pytest.mark.parametrize(("content", "header", "detail"), REFUSED.values(), ids=REFUSED)
async def test_what_is_no_recent_webhook_is_refused_without_a_look_for_keys(
    client: IssuerClient, clock: ManualClock, issuer: FakeIssuer, content: Any, header: Any, detail: str
):
    with pytest.raises(WebhookRefused) as raised:
        await read(client, make_token(content, header), clock)

    assert raised.value.detail == detail
    assert issuer.count("/.well-known/jwks") == 0


async def test_an_access_token_of_the_same_issuer_is_no_webhook(
    client: IssuerClient, clock: ManualClock, issuer: FakeIssuer
):
    """Its signature is genuine: with an org's token that org could otherwise post any event."""
    app = issuer.add(App(ORG, "client-a", "secret"))
    token = issuer.token(app, **created())

    # The control: with a check that lets everything through, the signature alone would do.
    passed = await client.verify_message(token, lambda claims: None)
    assert passed["type"] == "organization.created"

    with pytest.raises(WebhookRefused) as raised:
        await read(client, token, clock)
    assert raised.value.detail == "token"
    assert token not in f"{raised.value!r}{raised.value}"


async def test_a_forged_webhook_is_refused(client: IssuerClient, clock: ManualClock):
    """Signed by another key under the kid of the issuer, or changed after it was signed."""
    genuine = make_token(created()).split(".")
    other = make_token(payload("organization.deleted", ORG, at=START)).split(".")
    forged = [make_token(created(), {"kid": "k1"}, key="k2"), ".".join((genuine[0], other[1], genuine[2]))]
    assert (await read(client, ".".join(genuine), clock)).org == ORG

    for message in forged:
        with pytest.raises(WebhookRefused) as raised:
            await read(client, message, clock)
        assert raised.value.detail == "signature"


async def test_a_webhook_of_another_issuer_is_never_accepted(
    client: IssuerClient, clock: ManualClock, issuer: FakeIssuer
):
    """Its key is not in the key set: no verdict for a minute, as after a rotation of keys; then refused."""
    rsa_key("foreign")
    message = make_token(created(), key="foreign")
    with pytest.raises(IssuerUnavailable):
        await read(client, message, clock)
    for _ in range(7):
        await clock.pass_time(10)
        with pytest.raises((IssuerUnavailable, WebhookRefused)) as raised:
            await read(client, message, clock)
    assert getattr(raised.value, "detail", "") == "unknown_kid"

    # The same message is genuine for the issuer whose key that is.
    issuer.published = ["k1", "foreign"]
    await clock.pass_time(11)
    assert (await read(client, message, clock)).org == ORG


async def test_without_keys_there_is_no_verdict(client: IssuerClient, clock: ManualClock, issuer: FakeIssuer):
    import httpx

    issuer.keys = lambda: httpx.Response(503)
    with pytest.raises(IssuerUnavailable):
        await read(client, make_token(created()), clock)


async def test_an_unknown_kid_is_no_verdict_while_the_keys_cannot_be_read(
    client: IssuerClient, clock: ManualClock, issuer: FakeIssuer
):
    """It is answered 503, and not as one that is not genuine."""
    import httpx

    await read(client, make_token(created()), clock)
    issuer.keys = lambda: httpx.Response(503)

    with pytest.raises(IssuerUnavailable) as raised:
        await read(client, make_token(created(), {"kid": "k2"}, key="k2"), clock)
    assert raised.value.code == "issuer_unavailable"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "parts"),
        (b"{}", "parts"),
        (b"a.b", "parts"),
        ("ä.b.c".encode(), "text"),
        (b"x" * 20_000, "oversize"),
        (b"!.b.c", "base64url"),
    ],
    ids=["empty", "json", "two parts", "not ascii", "oversize", "no base64url"],
)
async def test_bytes_that_are_no_message_are_refused(
    client: IssuerClient, clock: ManualClock, body: bytes, detail: str
):
    with pytest.raises(WebhookRefused) as raised:
        await read(client, body, clock)

    assert raised.value.detail == detail


async def test_a_refusal_of_the_check_itself_is_one(clock: ManualClock):
    async def verify(text: str, check: Any) -> Any:
        raise invalid("duplicate_member", "its payload is not acceptable JSON")

    with pytest.raises(WebhookRefused) as raised:
        await webhooks.read_notice(b"a.b.c", verify, now=clock.now())
    assert raised.value.detail == "duplicate_member"
