"""Endpoints of an issuer: configured, from its provider's profile, or discovered (RFC 8414)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from .clock import Clock
from .errors import IssuerUnavailable
from .http import KEYS_LIMIT, TOKEN_LIMIT, fetch_json
from .issuer import Issuer
from .report import Report, log
from .single_flight import Document
from .urls import fault_of_url, origin_of

PAUSES = (5.0, 5.0)  # seconds, after the discovery document could not be read


@dataclass(frozen=True, slots=True)
class Discovered:
    """The members of a discovery document that are used; the last two are empty if they are unusable."""

    token_endpoint: str
    keys_url: str
    authorization_endpoint: str = ""
    end_session_endpoint: str = ""


class Endpoints:
    """Token endpoint and key set URL of one issuer: configured, from its profile, or discovered."""

    def __init__(
        self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock, report: Report = log
    ) -> None:
        self._issuer = issuer
        self._client = client
        self._clock = clock
        self._document = Document(self._read_document, PAUSES, clock=clock, report=report)

    async def token(self) -> str:
        """The URL of the token endpoint; raises as `discovered` does, if it needs the document."""
        known = self._issuer.token_endpoint or self._from_profile(self._issuer.profile.token)
        return known or (await self.discovered()).token_endpoint

    async def authorization(self) -> str:
        """The URL of the login page.

        Raises:
            IssuerUnavailable: there is no usable discovery document, or it names none.
        """
        found = (await self.discovered()).authorization_endpoint
        if not found:
            raise IssuerUnavailable(
                f"issuer {self._issuer.name}: its discovery document names no authorization endpoint at its "
                "own origin"
            )
        return found

    async def end_session(self) -> str:
        """The URL that logs people out, or empty if the issuer has none; raises as `discovered`."""
        return (await self.discovered()).end_session_endpoint

    async def keys(self) -> str:
        """The URL of the key set; raises as `token` does."""
        known = self._issuer.keys_url or self._from_profile(self._issuer.profile.keys)
        return known or (await self.discovered()).keys_url

    async def read_keys(self) -> dict[str, Any] | str:
        """The key set as a JSON object, not validated, or a code for what is wrong."""
        try:
            url = await self.keys()
        except IssuerUnavailable as error:
            return error.code
        return await fetch_json(self._client, url, clock=self._clock, limit=KEYS_LIMIT)

    def _from_profile(self, path: str) -> str:
        return self._issuer.base + path if path else ""

    async def discovered(self) -> Discovered:
        """The issuer's discovery document; raises IssuerUnavailable if it cannot be used."""
        self._document.refresh_if_old()
        found = self._document.content or await self._document.fetch()
        if found is None:
            raise IssuerUnavailable(
                f"issuer {self._issuer.name}: its discovery document cannot be used: {self._document.fault}",
                retry_after=self._document.retry_after,
            )
        return found

    async def close(self) -> None:
        await self._document.close()

    async def _read_document(self) -> Discovered | str:
        """The document's content, or what is wrong with it."""
        url = self._issuer.base + self._issuer.profile.discovery
        document = await fetch_json(self._client, url, clock=self._clock, limit=TOKEN_LIMIT)
        if isinstance(document, str):
            return document
        if document.get("issuer") != self._issuer.iss:
            return f"it is not the document of {self._issuer.iss}"

        def at_its_origin(name: str) -> str:
            found = document.get(name)
            if isinstance(found, str) and not fault_of_url(found) and origin_of(found) == origin_of(url):
                return found
            return ""

        # The first receives secrets, the second decides which tokens are trusted.
        endpoint, keys_url = at_its_origin("token_endpoint"), at_its_origin("jwks_uri")
        if not (endpoint and keys_url):
            return "one of its endpoints is not at the issuer's own origin"
        # Only logins need these. People are sent there, so they must not be elsewhere either.
        pages = map(at_its_origin, ("authorization_endpoint", "end_session_endpoint"))
        return Discovered(endpoint, keys_url, *pages)
