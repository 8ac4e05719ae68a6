"""Token probe: requests an org's token and reports how it differs from what its definitions need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpx

from worker.claims.claims import Claims
from worker.claims.decode import decode
from worker.clock import Clock
from worker.errors import (
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    TokenError,
    TokenRefused,
    Unavailable,
    WorkerError,
)
from worker.tokens.credentials import Credential
from worker.tokens.endpoints import Endpoints
from worker.tokens.issuer import Issuer
from worker.tokens.issuer_client import IssuerClient

COMMAND = "python -m worker"
# Seconds by which this machine's clock and the issuer's may differ before it is worth a word.
SKEW = 10.0


@dataclass(frozen=True, slots=True)
class Need:
    """What the definitions of an org need of a token for one audience; `may` are scopes of variants."""

    audience: str
    scopes: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    properties: frozenset[str] = frozenset()
    definitions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing that was looked at; `fix` says what to do, also where it is `ok` and could be better."""

    check: str
    ok: bool
    detail: str
    fix: str = ""


def of_failure(error: WorkerError, credential: Credential, issuer: Issuer, need: Need) -> Diagnostic:
    """Why there is no token, or no verdict on it."""
    check = "verification" if isinstance(error, TokenRefused) else "token"
    return Diagnostic(check, False, error.message, _advice(error, credential, issuer, need))


def of_claims(claims: Claims, credential: Credential, need: Need) -> Iterator[Diagnostic]:
    """What a verified token says, held against what is needed of it."""
    org, client = credential.org_code, credential.client_id
    yield _compared("org", claims.org_code, org, f"the client {client} is another org's: {_renew(org)}")
    yield _compared("client", claims.client_id, client, _renew(org))
    yield from _scopes(claims, credential, need)
    missing = sorted(need.properties - claims.properties.keys())
    yield Diagnostic(
        "properties",
        not missing,
        f"missing: {', '.join(missing)}" if missing else _kinds(claims.properties.items()),
        f"set {', '.join(missing)} for the client {client} at the provider, then {_check(org)}"
        if missing
        else "",
    )
    yield Diagnostic(
        "flags", True, ", ".join(f"{n} ({f.type})" for n, f in sorted(claims.flags.items())) or "none"
    )


def of_times(claims: Claims, expires_in: float | None, asked_at: float) -> Iterator[Diagnostic]:
    """The token's lifetime, and how far this machine's clock is from the issuer's; instants in seconds."""
    lifetime = (claims.expires_at - claims.issued_at).total_seconds()
    said = "" if expires_in in (None, lifetime) else f"; the answer says {expires_in:g} s"
    yield Diagnostic("lifetime", True, f"{lifetime:g} s{said}")
    ahead = asked_at - claims.issued_at.timestamp()
    direction = "ahead of" if ahead > 0 else "behind"
    yield Diagnostic(
        "clock",
        abs(ahead) <= SKEW,
        f"this machine is {abs(ahead):.0f} s {direction} the issuer",
        "" if abs(ahead) <= SKEW else "let this machine follow a time server: `timedatectl set-ntp true`",
    )


def of_rate(headers: Mapping[str, str]) -> Diagnostic:
    """The rate headers of the token endpoint's last answer."""
    return Diagnostic(
        "rate", True, ", ".join(f"{name}: {value}" for name, value in headers.items()) or "not said"
    )


def _compared(check: str, said: str, expected: str, fix: str) -> Diagnostic:
    if said == expected:
        return Diagnostic(check, True, said)
    return Diagnostic(check, False, f"the token says {said[:64]!r}, not {expected!r}", fix)


def _scopes(claims: Claims, credential: Credential, need: Need) -> Iterator[Diagnostic]:
    org, client = credential.org_code, credential.client_id
    missing = sorted(need.scopes - claims.scopes)
    variants = sorted(need.may - claims.scopes - need.scopes)
    unused = sorted(claims.scopes - need.scopes - need.may)
    granted = ", ".join(sorted(claims.scopes)) or "none"
    if missing:
        names = ", ".join(missing)
        fix = f"grant {names} to the client {client} at the provider, then {_check(org)}"
        yield Diagnostic("scopes", False, f"missing: {names}; granted: {granted}", fix)
    else:
        lacking = f"; variants lack {', '.join(variants)}" if variants else ""
        yield Diagnostic("scopes", True, f"granted: {granted}{lacking}")
    if unused and need.definitions:
        fix = f"no definition of {org} needs them: take them from the client {client} at the provider"
        yield Diagnostic("unused", True, ", ".join(unused), fix)


def _advice(error: WorkerError, credential: Credential, issuer: Issuer, need: Need) -> str:
    org, client, title = credential.org_code, credential.client_id, issuer.profile.title
    code = getattr(error, "detail", "")
    section = f"[issuers.{issuer.name}] of worker.toml"
    if isinstance(error, TokenRefused):
        match code:
            case "issuer":
                return f"set url in {section} to what {title} writes as iss, then {_check(org)}"
            case "audience" | "audience_missing" | "audience_wider":
                return f"let {title} give {client} tokens for {need.audience} alone, then {_check(org)}"
            case "expired" | "issued_in_future" | "not_yet_valid":
                return "compare this machine's clock with a time server: `timedatectl`"
        return f"compare the profile of {section} with {title}'s tokens, then {_check(org)}"
    if isinstance(error, Unavailable):
        return f"is {issuer.base} reachable from here? `curl -sS {issuer.base}{issuer.profile.discovery}`"
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


def _kinds(items: Iterable[tuple[str, Any]]) -> str:
    """Names with the types of their values, never the values."""
    return ", ".join(f"{name} ({kind_of(value)})" for name, value in sorted(items)) or "none"


def kind_of(value: Any) -> str:
    """The type of a claim's value in words."""
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"


RATE_HEADERS = ("ratelimit", "x-ratelimit", "retry-after")
_answers: ContextVar[list[httpx.Headers] | None] = ContextVar("answers", default=None)


@dataclass(frozen=True, slots=True)
class Found:
    """All that a look found: claims of a verified token, or the failure that there is none for."""

    findings: tuple[Diagnostic, ...]
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


class TokenProbe:
    """Looks at the tokens of one issuer, within its budget; `watch` was called with the client."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._clock = clock
        self._channel = IssuerClient(issuer, client, clock=clock)
        self._endpoints = Endpoints(issuer, client, clock=clock)

    async def discovery(self) -> Diagnostic:
        """Whether the discovery document can be read, and agrees with the endpoints that are used."""
        issuer, profile = self.issuer, self.issuer.profile
        try:
            said = await self._endpoints.discovered()
        except IssuerUnavailable as error:
            if (issuer.token_endpoint or profile.token) and (issuer.keys_url or profile.keys):
                return Diagnostic("discovery", True, f"not used; {error.message}")
            fix = f"compare url in [issuers.{issuer.name}] of worker.toml with {profile.title}'s issuer"
            return Diagnostic("discovery", False, error.message, fix)
        used = (await self._endpoints.token(), await self._endpoints.keys())
        if used == (said.token_endpoint, said.keys_url):
            return Diagnostic("discovery", True, "it names the endpoints that are used")
        return Diagnostic("discovery", True, f"it names {said.token_endpoint}, and {used[0]} is asked")

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
                Diagnostic("token", True, f"{self.issuer.profile.title} gave one for {need.audience}"),
                Diagnostic("key", True, "its signature is that of a published key"),
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
