"""Issuers: where a secret may be sent, and what an issuer identifier is."""

from __future__ import annotations

import httpx
import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import kinde_issuer, profile
from worker.errors import ConfigurationError
from worker.guard.endpoints import Endpoints
from worker.guard.profile import load
from worker.outbound import open_client


@pytest.mark.parametrize(
    "url",
    [
        "https://acme.kinde.com",
        "https://acme.kinde.com:8443/realms/x",
        "http://127.0.0.1:8080",
        "http://127.8.9.1",
        "http://[::1]:8080",
        "http://localhost:9000",
    ],
)
def test_https_and_loopback_are_accepted(url: str) -> None:
    """Loopback needs no setting."""
    assert kinde_issuer(url=url).base == url


@pytest.mark.parametrize(
    "url",
    [
        "http://acme.kinde.com",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://0.0.0.0",
        "http://10.0.0.1",
        "ftp://acme.kinde.com",
        "acme.kinde.com",
        "https://",
        "https://user:pw@acme.kinde.com",
        "https://acme.kinde.com?x=1",
        "https://acme.kinde.com#x",
        "https://acme.kinde.com:99999",
        "https://[::1",
    ],
)
def test_anything_else_is_refused(url: str) -> None:
    """Before a secret is sent there."""
    with pytest.raises(ConfigurationError, match="issuer main"):
        kinde_issuer(url=url)


@pytest.mark.parametrize("name", ["token_endpoint", "keys_url"])
def test_endpoints_that_are_configured_are_held_to_the_same(name: str) -> None:
    """They get the secret, or the trust."""
    with pytest.raises(ConfigurationError):
        kinde_issuer(**{name: "http://acme.kinde.com/x"})


@pytest.mark.parametrize("rate", [0, -1, 10_001])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    """Nothing could ever be asked, or anything."""
    with pytest.raises(ConfigurationError, match="max_requests_per_second"):
        kinde_issuer(max_requests_per_second=rate)


def test_a_slash_in_worker_toml_does_not_matter() -> None:
    """`iss` is what the profile makes of the URL."""
    assert kinde_issuer(url="https://acme.kinde.com/").iss == "https://acme.kinde.com"
    assert kinde_issuer(profile=profile(issuer_suffix="/")).iss == "https://acme.kinde.com/"


TENANT = "https://login.microsoftonline.com/aaaabbbb-0000-cccc-1111-dddd2222eeee"


async def test_the_endpoints_of_entra_are_discovered_beside_its_url(clock: ManualClock) -> None:
    """The token endpoint is below the tenant, not below the issuer, so no path of a profile could name it."""
    document = {
        "issuer": f"{TENANT}/v2.0",
        "token_endpoint": f"{TENANT}/oauth2/v2.0/token",
        "jwks_uri": f"{TENANT}/discovery/v2.0/keys",
    }
    asked: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json=document)

    issuer = kinde_issuer(profile=load("entra"), url=f"{TENANT}/v2.0")
    async with open_client(httpx.MockTransport(respond)) as client:
        endpoints = Endpoints(issuer, client, clock=clock)

        assert (await endpoints.token(), await endpoints.keys()) == (
            document["token_endpoint"],
            document["jwks_uri"],
        )
    assert asked == [f"{TENANT}/v2.0/.well-known/openid-configuration"]
