"""Guard: verifies the tokens of one issuer for one audience, in coroutines and in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import httpx

from .claims import Claims
from .clock import Clock, SystemClock
from .decode import decode, enforce
from .errors import ConfigurationError
from .issuer import Issuer
from .profile import load
from .report import Report, log
from .urls import fault_of_url
from .verify import Unverified, read

if TYPE_CHECKING:
    from .jwks import KeySet


class Guard:
    """Verifies the tokens of one issuer for one audience.

    `profile` names a provider, or is the path of your own TOML file. `scopes` are
    required of every token. `{org}` in the audience is the code of the org that a
    request addresses. The keys are fetched at the first token and cached. Pass `client`
    to share an HTTP client, or a function that opens one: `check` opens one, and
    `check_sync` one in each process. `report` gets the events, by default the log.
    Raises ConfigurationError for an invalid URL or profile.
    """

    def __init__(
        self,
        issuer: str | Issuer,
        *,
        audience: str = "",
        profile: str = "kinde",
        scopes: Iterable[str] = (),
        client: httpx.AsyncClient | Callable[[], httpx.AsyncClient] | None = None,
        clock: Clock | None = None,
        report: Report = log,
    ) -> None:
        # These load asyncio; importing this module does not.
        from .threads import ThreadKeys

        if isinstance(issuer, str):
            if fault := fault_of_url(issuer):
                raise ConfigurationError(
                    f"the issuer of a guard {fault}", fix="pass the https URL of your identity provider"
                )
            issuer = Issuer(name=issuer, profile=load(profile), url=issuer, audience=audience or None)
        if not (audience or issuer.audience):
            raise ConfigurationError(
                "a guard needs an audience: without one it would accept any API's token",
                fix="name your API's audience as registered at the provider",
            )
        self._issuer = issuer
        self._audience = audience or issuer.audience or ""
        self._scopes = frozenset(texts("scopes", scopes))
        self._clock = clock or SystemClock()
        self._report = report
        self._given = client
        self._client: httpx.AsyncClient | None = None
        self._keys: KeySet | None = None
        self._thread_keys = ThreadKeys(issuer.name, lambda: self._key_set(self._open()))

    async def check(
        self,
        token_text: str,
        *,
        org_code: str | None = None,
        scopes: Iterable[str] = (),
        client_id: str | None = None,
    ) -> Claims:
        """The claims of a valid token; of this org, with these scopes and of this client if given.

        All calls must come from one event loop.

        Raises:
            TokenRefused: token_invalid; or org_mismatch, scope_missing, client_mismatch: a valid token
                without permission.
            IssuerUnavailable: the issuer's keys cannot be read, so there is no verdict.
        """
        token = self._read(token_text, org_code)
        if self._keys is None:
            self._client = self._open()
            self._keys = self._key_set(self._client)
        key = await self._keys.find(token.kid)
        return self._enforced(token.verified_by(key), org_code, scopes, client_id)

    def check_sync(
        self,
        token_text: str,
        *,
        org_code: str | None = None,
        scopes: Iterable[str] = (),
        client_id: str | None = None,
    ) -> Claims:
        """As `check`, on any thread, also after a fork; blocks while keys are fetched, for 25 s at most."""
        token = self._read(token_text, org_code)
        key = self._thread_keys.find(token.kid)
        return self._enforced(token.verified_by(key), org_code, scopes, client_id)

    async def check_threadsafe(
        self,
        token_text: str,
        *,
        org_code: str | None = None,
        scopes: Iterable[str] = (),
        client_id: str | None = None,
    ) -> Claims:
        """As `check`, on any event loop of the process; shares the keys of `check_sync`."""
        token = self._read(token_text, org_code)
        key = await self._thread_keys.find_async(token.kid)
        return self._enforced(token.verified_by(key), org_code, scopes, client_id)

    async def close(self) -> None:
        """Cancel reads of keys, and close the HTTP client if the guard opened it."""
        await self._thread_keys.close()
        if self._keys is not None:
            await self._keys.close()
        if self._client is not None and self._client is not self._given:
            await self._client.aclose()

    def _read(self, token_text: str, org_code: str | None) -> Unverified:
        audience = self._audience.replace("{org}", org_code or "")
        return read(token_text, issuer=self._issuer, audience=audience, clock=self._clock)

    def _enforced(
        self, payload: Mapping[str, Any], org_code: str | None, scopes: Iterable[str], client_id: str | None
    ) -> Claims:
        claims = decode(payload, self._issuer.profile)
        enforce(
            claims,
            org_code=claims.org_code if org_code is None else org_code,
            client_id=client_id,
            scopes=self._scopes.union(scopes),
        )
        return claims

    def _key_set(self, client: httpx.AsyncClient) -> KeySet:
        from .jwks import KeySet

        return KeySet(self._issuer, client, clock=self._clock, report=self._report, awaits=False)

    def _open(self) -> httpx.AsyncClient:
        if isinstance(self._given, httpx.AsyncClient):
            return self._given
        if self._given is not None:
            return self._given()
        from .http import open_client

        client = open_client()
        # Keys are fetched once an hour. A connection that is kept would be shared with a forked process.
        client.headers["Connection"] = "close"
        return client


async def check(token_text: str, guard: Guard) -> Claims:
    """The claims of a valid token; raises as `Guard.check` does."""
    return await guard.check(token_text)


def texts(name: str, values: Iterable[str]) -> Iterable[str]:
    """The values, unless they are one text; then raises ConfigurationError."""
    if isinstance(values, str):
        # Each letter would be a scope.
        raise ConfigurationError(
            f"{name} must be a list, not one text", fix=f'write a list, such as ["{values}"]'
        )
    return values
