"""Measures Authlib and httpx-auth as `bench.tokens` does, in a separate environment.

It imports nothing of orgworker. Standard input has the provider's URL and its applications as JSON.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

AUDIENCE = "https://api.bench.example"
VERIFICATIONS = 1_000
ROUNDS = 5


def report(peer: str, what: str, seconds: float) -> None:
    print(json.dumps({"by": peer, "what": what, "seconds": seconds}), flush=True)


async def authlib(url: str, apps: list[dict[str, Any]], lookups: int) -> None:
    """One Authlib client per org; it does not verify tokens by default."""
    from authlib.integrations.httpx_client import AsyncOAuth2Client
    from joserfc import jwt
    from joserfc.jwk import KeySet

    name = f"Authlib {importlib.metadata.version('authlib')}"
    method = "client_secret_post"
    cold, warm, verified = [], [], []
    for _ in range(ROUNDS):
        clients = [
            AsyncOAuth2Client(app["client_id"], app["client_secret"], token_endpoint_auth_method=method)
            for app in apps
        ]
        began = time.perf_counter()
        for client in clients:
            await client.fetch_token(
                f"{url}/oauth2/token", grant_type="client_credentials", audience=AUDIENCE
            )
        cold.append((time.perf_counter() - began) / len(clients))
        began = time.perf_counter()
        for number in range(lookups):
            client = clients[number % len(clients)]
            await client.ensure_active_token(client.token)
        warm.append((time.perf_counter() - began) / lookups)
        text = clients[0].token["access_token"]
        for client in clients:
            await client.aclose()

    async with httpx.AsyncClient() as fetching:
        keys = KeySet.import_key_set((await fetching.get(f"{url}/.well-known/jwks")).json())
    registry = jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": url},
        aud={"essential": True, "value": AUDIENCE},
        exp={"essential": True},
    )
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(VERIFICATIONS):
            registry.validate(jwt.decode(text, keys, algorithms=["RS256"]).claims)
        verified.append((time.perf_counter() - began) / VERIFICATIONS)
    report(name, "cold acquisition", min(cold))
    report(name, "cached look-up", min(warm))
    report(f"joserfc {importlib.metadata.version('joserfc')} (Authlib's)", "verification", min(verified))


async def httpx_auth(url: str, apps: list[dict[str, Any]], lookups: int) -> None:
    """One auth per org over a shared token cache; it verifies nothing and requests tokens synchronously."""
    from httpx_auth import OAuth2, OAuth2ClientCredentials

    name = f"httpx-auth {importlib.metadata.version('httpx-auth')}"
    request = httpx.Request("GET", "https://api.bench.example/")
    cold, warm = [], []
    for _ in range(ROUNDS):
        OAuth2.token_cache.clear()
        auths = [
            OAuth2ClientCredentials(
                f"{url}/oauth2/token",
                client_id=app["client_id"],
                client_secret=app["client_secret"],
                audience=AUDIENCE,
            )
            for app in apps
        ]
        for auth, app in zip(auths, apps, strict=True):
            # It supports only Basic authentication; this provider, like Kinde, reads the body.
            auth.data |= {"client_id": app["client_id"], "client_secret": app["client_secret"]}
        began = time.perf_counter()
        for auth in auths:
            # Without a token it requests one here, with its own client, and blocks.
            next(auth.sync_auth_flow(request))
        cold.append((time.perf_counter() - began) / len(auths))
        began = time.perf_counter()
        for number in range(lookups):
            next(auths[number % len(auths)].sync_auth_flow(request))
        warm.append((time.perf_counter() - began) / lookups)
    report(name, "cold acquisition", min(cold))
    report(name, "cached look-up", min(warm))


async def main() -> None:
    given = json.load(sys.stdin)
    peers: list[Callable[..., Awaitable[None]]] = [authlib, httpx_auth]
    for peer in peers:
        await peer(given["url"], given["apps"], given["lookups"])


if __name__ == "__main__":
    asyncio.run(main())
