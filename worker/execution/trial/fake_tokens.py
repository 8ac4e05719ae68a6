"""Fake tokens: what a trial runs under in place of an issuer's, decoded as Kinde's would be."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from worker.claims.claims import AccessToken, Claims
from worker.claims.decode import decode
from worker.clock import Clock
from worker.orgs import OrgRef
from worker.providers import profile
from worker.telemetry.masking import masker

LIFETIME = timedelta(hours=1)
CLIENT = "made-up-client"
# A token with less life left is not handed out.
MARGIN = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class FakeToken:
    """A token that no API but a test's own takes, and the claims that it stands for."""

    token: AccessToken
    claims: Claims = field(repr=False)


class FakeTokens:
    """Satisfies `link.TokenSource`; of the scopes that are asked for it grants all, or those named."""

    def __init__(
        self,
        clock: Clock,
        *,
        properties: Mapping[str, Any] | None = None,
        flags: Mapping[str, Any] | None = None,
        scopes: Iterable[str] | None = None,
        lifetime: timedelta = LIFETIME,
    ) -> None:
        self._clock = clock
        self._properties = dict(properties or {})
        self._flags = dict(flags or {})
        self._scopes = None if scopes is None else frozenset(scopes)
        self._lifetime = lifetime
        self._newest: FakeToken | None = None

    async def ensure(
        self,
        org: OrgRef,
        issuer: str,
        *,
        audience: str | None,
        scopes: frozenset[str],
        also_ask: frozenset[str] = frozenset(),
        max_claims_age: timedelta | None = None,
        fresh: bool = False,
    ) -> FakeToken:
        """The newest token while it serves, else another.

        Raises:
            TokenRefused: a property or flag that no token could have.
        """
        newest, now = self._newest, self._clock.now()
        if newest is not None and not fresh:
            old = max_claims_age is not None and now - newest.claims.issued_at >= max_claims_age
            if not old and newest.token.expires_at - now > min(MARGIN, self._lifetime / 5):
                return newest
        self._newest = newest = self.mint(org, scopes | also_ask)
        return newest

    def mint(self, org: OrgRef, scopes: frozenset[str]) -> FakeToken:
        """A new token of an org; `scopes` are those asked for."""
        issued_at = self._clock.now()
        granted = scopes if self._scopes is None else self._scopes
        payload = {
            "iss": "https://made-up.invalid",
            "azp": CLIENT,
            "org_code": org.code,
            "scope": " ".join(sorted(granted)),
            "application_properties": {name: {"v": value} for name, value in self._properties.items()},
            "feature_flags": {name: {"t": _kind(value), "v": value} for name, value in self._flags.items()},
            "iat": issued_at.timestamp(),
            "exp": (issued_at + self._lifetime).timestamp(),
        }
        claims = decode(payload, profile.load("kinde"))
        text = f"made-up.{secrets.token_urlsafe(32)}"
        # As a real one is: a handler that prints it is to see that it does not get far.
        masker.register(text)
        return FakeToken(AccessToken(text, claims.expires_at), claims)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "b"
    return "s" if isinstance(value, str) else "i"
