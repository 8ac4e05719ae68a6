"""Examine: ask for one org's token as a worker would, and find out what is right and wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import httpx

from worker.claims.claims import Claims
from worker.claims.decode import decode
from worker.clock import Clock
from worker.errors import (
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    TokenError,
    Unavailable,
)
from worker.tokens.channel import Channel
from worker.tokens.credentials import Credential
from worker.tokens.endpoints import Endpoints
from worker.tokens.findings import Finding, Need, of_claims, of_failure, of_rate, of_times
from worker.tokens.issuer import Issuer

RATE_HEADERS = ("ratelimit", "x-ratelimit", "retry-after")
_answers: ContextVar[list[httpx.Headers] | None] = ContextVar("answers", default=None)


@dataclass(frozen=True, slots=True)
class Found:
    """All that a look found: claims of a verified token, or the failure that there is none for."""

    findings: tuple[Finding, ...]
    claims: Claims | None = field(default=None, repr=False)
    failure: TokenError | Unavailable | None = None

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def transient(self) -> bool:
        """Whether there is no token, or no verdict on it, for a reason that may pass."""
        return self.failure is not None and self.failure.transient

    @property
    def rejected(self) -> str | None:
        """The issuer's code where it did not accept the credential or the request."""
        if isinstance(self.failure, CredentialsRejected | RequestRejected):
            return self.failure.detail or self.failure.code
        return None


class Examiner:
    """Looks at the tokens of one issuer, within its budget; `watch` was called with the client."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._clock = clock
        self._channel = Channel(issuer, client, clock=clock)
        self._endpoints = Endpoints(issuer, client, clock=clock)

    async def discovery(self) -> Finding:
        """Whether the discovery document can be read, and agrees with the endpoints that are used."""
        issuer, profile = self.issuer, self.issuer.profile
        try:
            said = await self._endpoints.discovered()
        except IssuerUnavailable as error:
            if (issuer.token_endpoint or profile.token) and (issuer.keys_url or profile.keys):
                return Finding("discovery", True, f"not used; {error.message}")
            fix = f"compare url in [issuers.{issuer.name}] of worker.toml with {profile.title}'s issuer"
            return Finding("discovery", False, error.message, fix)
        used = (await self._endpoints.token(), await self._endpoints.keys())
        if used == (said.token_endpoint, said.keys_url):
            return Finding("discovery", True, "it names the endpoints that are used")
        return Finding("discovery", True, f"it names {said.token_endpoint}, and {used[0]} is asked")

    async def examine(self, credential: Credential, need: Need) -> Found:
        """Ask for a token with this credential, and hold it against what is needed.

        First without naming scopes, which shows all that the client has; where needed
        ones are missing, once more with them, since some providers give only what is
        asked for.
        """
        found = await self._look(credential, need, frozenset())
        if found.claims is None:
            again = isinstance(found.failure, RequestRejected) and bool(need.scopes)
            return await self._look(credential, need, need.scopes) if again else found
        if not need.scopes <= found.claims.scopes and self.issuer.profile.ask_scopes:
            asked = await self._look(credential, need, need.scopes)
            if asked.claims is not None and need.scopes <= asked.claims.scopes:
                return asked
        return found

    async def close(self) -> None:
        """End what is under way."""
        await self._channel.close()
        await self._endpoints.close()

    async def _look(self, credential: Credential, need: Need, scopes: frozenset[str]) -> Found:
        answers: list[httpx.Headers] = []
        mark = _answers.set(answers)
        asked_at = self._clock.now().timestamp()
        try:
            token = await self._channel.grant(credential, audience=need.audience, scopes=scopes, tries=1)
            asked_at = (asked_at + self._clock.now().timestamp()) / 2
            payload = await self._channel.verify(token.text, need.audience)
            claims = decode(payload, self.issuer.profile)
        except (TokenError, Unavailable) as error:
            finding = of_failure(error, credential, self.issuer, need)
            return Found((finding, of_rate(_rate(answers))), failure=error)
        finally:
            _answers.reset(mark)
        return Found(
            (
                Finding("token", True, f"{self.issuer.profile.title} gave one for {need.audience}"),
                Finding("key", True, "its signature is that of a published key"),
                *of_claims(claims, credential, need),
                *of_times(claims, token.expires_in, asked_at),
                of_rate(_rate(answers)),
            ),
            claims,
        )


def watch(client: httpx.AsyncClient) -> None:
    """Let the client's answers be seen by whoever looks: their rate headers are part of what is found."""

    async def see(response: httpx.Response) -> None:
        answers = _answers.get()
        if answers is not None:
            answers.append(response.headers)

    client.event_hooks["response"].append(see)


def _rate(answers: list[httpx.Headers]) -> Mapping[str, str]:
    """The rate headers of the first answer, which is the token endpoint's."""
    headers = answers[0].items() if answers else ()
    return {name: value[:64] for name, value in headers if name.lower().startswith(RATE_HEADERS)}
