"""Token probe: requests an org's token and reports how it differs from what its definitions require."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpx

from worker.clock import Clock
from worker.errors import (
    AnswerTooLarge,
    CredentialsRejected,
    Diagnostic,
    IssuerUnavailable,
    RequestRejected,
    TokenError,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.guard.claims import Claims
from worker.guard.decode import decode
from worker.guard.issuer import Issuer
from worker.tokens.credentials import Credential
from worker.tokens.issuer_client import IssuerClient

COMMAND = "python -m worker"
# Seconds; a larger difference between this machine's clock and the issuer's is a problem.
MAX_SKEW = 10.0
RATE_HEADERS = ("ratelimit", "x-ratelimit", "retry-after")
_responses: ContextVar[list[httpx.Headers] | None] = ContextVar("responses", default=None)


@dataclass(frozen=True, slots=True)
class Need:
    """What the definitions of an org require of a token for one audience.

    `may` are scopes of variants, `elsewhere` those that other audiences need: some providers grant all
    scopes of a client, whatever the audience.
    """

    audience: str
    scopes: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    properties: frozenset[str] = frozenset()
    definitions: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The diagnostics of one org and audience, with the claims of the verified token or the failure."""

    diagnostics: tuple[Diagnostic, ...]
    claims: Claims | None = field(default=None, repr=False)
    failure: TokenError | Unavailable | None = None

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.diagnostics)

    @property
    def transient(self) -> bool:
        """Whether there is no token, or no verdict on it, and retrying may help."""
        return self.failure is not None and self.failure.transient

    @property
    def rejected(self) -> str | None:
        """The issuer's error code if it rejected the credential or the request."""
        if isinstance(self.failure, CredentialsRejected | RequestRejected | AnswerTooLarge):
            return self.failure.detail or self.failure.code
        return None


class TokenProbe:
    """Probes the tokens of one issuer, within its budget. Call `watch` with the client first."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._clock = clock
        self._client = IssuerClient(issuer, client, clock=clock)

    async def discovery(self) -> Diagnostic:
        """Whether the discovery document can be read, and agrees with the endpoints in use."""
        issuer, profile, endpoints = self.issuer, self.issuer.profile, self._client.endpoints
        try:
            document = await endpoints.discovered()
        except IssuerUnavailable as error:
            if (issuer.token_endpoint or profile.token) and (issuer.keys_url or profile.keys):
                return Diagnostic("discovery", True, f"not used; {error.message}")
            fix = f"compare url in [issuers.{issuer.name}] of worker.toml with {profile.title}'s issuer"
            return Diagnostic("discovery", False, error.message, fix)
        used = (await endpoints.token(), await endpoints.keys())
        if used == (document.token_endpoint, document.keys_url):
            return Diagnostic("discovery", True, "it names the endpoints in use")
        return Diagnostic("discovery", True, f"it names {document.token_endpoint}, but {used[0]} is used")

    async def probe(self, credential: Credential, need: Need) -> ProbeResult:
        """Request a token with this credential, and compare it with what is required.

        The first request names no scopes, which shows all that the client has. If required
        ones are missing, a second request names them: some providers grant only those.
        """
        result = await self._probe_once(credential, need, frozenset())
        if result.claims is None:
            again = isinstance(result.failure, RequestRejected) and bool(need.scopes)
            return await self._probe_once(credential, need, need.scopes) if again else result
        if not need.scopes <= result.claims.scopes and self.issuer.profile.ask_scopes:
            named = await self._probe_once(credential, need, need.scopes)
            if named.claims is not None and need.scopes <= named.claims.scopes:
                return named
        return result

    async def close(self) -> None:
        await self._client.close()

    async def _probe_once(self, credential: Credential, need: Need, scopes: frozenset[str]) -> ProbeResult:
        responses: list[httpx.Headers] = []
        mark = _responses.set(responses)
        asked_at = self._clock.now().timestamp()
        try:
            token = await self._client.grant(credential, audience=need.audience, scopes=scopes, tries=1)
            asked_at = (asked_at + self._clock.now().timestamp()) / 2
            payload = await self._client.verify(token.text, need.audience)
            claims = decode(payload, self.issuer.profile)
        except (TokenError, Unavailable) as error:
            check = "verification" if isinstance(error, TokenRefused) else "token"
            failure = Diagnostic(check, False, error.message, _advice(error, credential, self.issuer, need))
            return ProbeResult((failure, _rate(responses)), failure=error)
        finally:
            _responses.reset(mark)
        return ProbeResult(
            (
                Diagnostic("token", True, f"{self.issuer.profile.title} granted one for {need.audience}"),
                Diagnostic("key", True, "it is signed with a published key"),
                *_compare(claims, credential, need),
                *_times(claims, token.expires_in, asked_at),
                _rate(responses),
            ),
            claims,
        )


def watch(client: httpx.AsyncClient) -> None:
    """Let probes see the headers of the client's responses, for the issuer's rate limit."""

    async def see(response: httpx.Response) -> None:
        responses = _responses.get()
        if responses is not None:
            responses.append(response.headers)

    client.event_hooks["response"].append(see)


def _rate(responses: list[httpx.Headers]) -> Diagnostic:
    """The rate headers of the first response, which is the token endpoint's."""
    headers = responses[0].items() if responses else ()
    named = (f"{name}: {value[:64]}" for name, value in headers if name.lower().startswith(RATE_HEADERS))
    return Diagnostic("rate", True, ", ".join(named) or "not stated")


def _compare(claims: Claims, credential: Credential, need: Need) -> Iterator[Diagnostic]:
    """Org, client, scopes, properties and flags of a verified token."""
    org, client = credential.org_code, credential.client_id
    yield _equal("org", claims.org_code, org, f"the client {client} belongs to another org: {_renew(org)}")
    yield _equal("client", claims.client_id, client, _renew(org))
    yield from _scopes(claims, credential, need)
    # Names and types only: a value may be a secret.
    if missing := ", ".join(sorted(need.properties - claims.properties.keys())):
        fix = f"set {missing} for the client {client} at the provider, then {_check(org)}"
        yield Diagnostic("properties", False, f"missing: {missing}", fix)
    else:
        named = (f"{name} ({kind_of(value)})" for name, value in sorted(claims.properties.items()))
        yield Diagnostic("properties", True, ", ".join(named) or "none")
    flags = (f"{name} ({flag.type})" for name, flag in sorted(claims.flags.items()))
    yield Diagnostic("flags", True, ", ".join(flags) or "none")


def _equal(check: str, actual: str, expected: str, fix: str) -> Diagnostic:
    if actual == expected:
        return Diagnostic(check, True, actual)
    return Diagnostic(check, False, f"the token says {actual[:64]!r}, not {expected!r}", fix)


def _scopes(claims: Claims, credential: Credential, need: Need) -> Iterator[Diagnostic]:
    org, client = credential.org_code, credential.client_id
    missing, lacking, unused, granted = (
        ", ".join(sorted(scopes))
        for scopes in (
            need.scopes - claims.scopes,
            need.may - claims.scopes - need.scopes,
            claims.scopes - need.scopes - need.may - need.elsewhere,
            claims.scopes,
        )
    )
    if missing:
        fix = f"grant {missing} to the client {client} at the provider, then {_check(org)}"
        yield Diagnostic("scopes", False, f"missing: {missing}; granted: {granted or 'none'}", fix)
    else:
        variants = f"; variants lack {lacking}" if lacking else ""
        yield Diagnostic("scopes", True, f"granted: {granted or 'none'}{variants}")
    if unused and need.definitions:
        fix = f"no definition of {org} requires them: remove them from the client {client} at the provider"
        yield Diagnostic("unused", True, unused, fix)


def _times(claims: Claims, expires_in: float | None, asked_at: float) -> Iterator[Diagnostic]:
    """The token's lifetime, and how far this machine's clock is from the issuer's; in seconds."""
    lifetime = (claims.expires_at - claims.issued_at).total_seconds()
    stated = "" if expires_in in (None, lifetime) else f"; the response says {expires_in:g} s"
    yield Diagnostic("lifetime", True, f"{lifetime:g} s{stated}")
    ahead = asked_at - claims.issued_at.timestamp()
    ok, direction = abs(ahead) <= MAX_SKEW, "ahead of" if ahead > 0 else "behind"
    fix = "" if ok else "synchronize this machine with a time server: `timedatectl set-ntp true`"
    yield Diagnostic("clock", ok, f"this machine is {abs(ahead):.0f} s {direction} the issuer", fix)


def _advice(error: WorkerError, credential: Credential, issuer: Issuer, need: Need) -> str:
    org, client, title = credential.org_code, credential.client_id, issuer.profile.title
    section = f"[issuers.{issuer.name}] of worker.toml"
    if isinstance(error, AnswerTooLarge):
        return f"{error.fix}; then {_check(org)}"
    if isinstance(error, Unavailable):
        return f"is {issuer.base} reachable from here? `curl -sS {issuer.base}{issuer.profile.discovery}`"
    code = getattr(error, "detail", "")
    if isinstance(error, TokenRefused):
        match code:
            case "issuer":
                return f"set url in {section} to what {title} writes as iss, then {_check(org)}"
            case "audience" | "audience_missing" | "audience_wider":
                return f"let {title} give {client} tokens for {need.audience} alone, then {_check(org)}"
            case "expired" | "issued_in_future" | "not_yet_valid":
                return "compare this machine's clock with a time server: `timedatectl`"
        return f"compare the profile of {section} with {title}'s tokens, then {_check(org)}"
    match code:
        case "invalid_client" | "no_credential" | "private_key" | "invalid_grant":
            return _renew(org, client)
        case "invalid_scope":
            scopes = ", ".join(sorted(need.scopes)) or "the scopes"
            return f"grant {scopes} to the client {client} in {title}, then {_check(org)}"
    return f"authorise the client {client} for {need.audience} in {title}, then {_check(org)}"


def _renew(org: str, client: str = "ID") -> str:
    command = f"{COMMAND} credentials rotate {org} --client-id {client} --secret-file FILE"
    return f"give the org its own secret: `{command}`"


def _check(org: str) -> str:
    return f"`{COMMAND} orgs check {org}`"


def kind_of(value: Any) -> str:
    """The type of a claim's value in words."""
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"
