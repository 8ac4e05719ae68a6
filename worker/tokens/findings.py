"""Findings: what a look at an org's token showed, each problem with a sentence and a command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.claims.claims import Claims
from worker.errors import TokenRefused, Unavailable, WorkerError
from worker.tokens.credentials import Credential
from worker.tokens.issuer import Issuer

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
class Finding:
    """One thing that was looked at; `fix` says what to do, also where it is `ok` and could be better."""

    check: str
    ok: bool
    detail: str
    fix: str = ""


def of_failure(error: WorkerError, credential: Credential, issuer: Issuer, need: Need) -> Finding:
    """Why there is no token, or no verdict on it."""
    check = "verification" if isinstance(error, TokenRefused) else "token"
    return Finding(check, False, error.message, _advice(error, credential, issuer, need))


def of_claims(claims: Claims, credential: Credential, need: Need) -> Iterator[Finding]:
    """What a verified token says, held against what is needed of it."""
    org, client = credential.org_code, credential.client_id
    yield _compared("org", claims.org_code, org, f"the client {client} is another org's: {_renew(org)}")
    yield _compared("client", claims.client_id, client, _renew(org))
    yield from _scopes(claims, credential, need)
    missing = sorted(need.properties - claims.properties.keys())
    yield Finding(
        "properties",
        not missing,
        f"missing: {', '.join(missing)}" if missing else _kinds(claims.properties.items()),
        f"set {', '.join(missing)} for the client {client} at the provider, then {_check(org)}"
        if missing
        else "",
    )
    yield Finding(
        "flags", True, ", ".join(f"{n} ({f.type})" for n, f in sorted(claims.flags.items())) or "none"
    )


def of_times(claims: Claims, expires_in: float | None, asked_at: float) -> Iterator[Finding]:
    """The token's lifetime, and how far this machine's clock is from the issuer's; instants in seconds."""
    lifetime = (claims.expires_at - claims.issued_at).total_seconds()
    said = "" if expires_in in (None, lifetime) else f"; the answer says {expires_in:g} s"
    yield Finding("lifetime", True, f"{lifetime:g} s{said}")
    ahead = asked_at - claims.issued_at.timestamp()
    direction = "ahead of" if ahead > 0 else "behind"
    yield Finding(
        "clock",
        abs(ahead) <= SKEW,
        f"this machine is {abs(ahead):.0f} s {direction} the issuer",
        "" if abs(ahead) <= SKEW else "let this machine follow a time server: `timedatectl set-ntp true`",
    )


def of_rate(headers: Mapping[str, str]) -> Finding:
    """The rate headers of the token endpoint's last answer."""
    return Finding(
        "rate", True, ", ".join(f"{name}: {value}" for name, value in headers.items()) or "not said"
    )


def _compared(check: str, said: str, expected: str, fix: str) -> Finding:
    if said == expected:
        return Finding(check, True, said)
    return Finding(check, False, f"the token says {said[:64]!r}, not {expected!r}", fix)


def _scopes(claims: Claims, credential: Credential, need: Need) -> Iterator[Finding]:
    org, client = credential.org_code, credential.client_id
    missing = sorted(need.scopes - claims.scopes)
    variants = sorted(need.may - claims.scopes - need.scopes)
    unused = sorted(claims.scopes - need.scopes - need.may)
    granted = ", ".join(sorted(claims.scopes)) or "none"
    if missing:
        names = ", ".join(missing)
        fix = f"grant {names} to the client {client} at the provider, then {_check(org)}"
        yield Finding("scopes", False, f"missing: {names}; granted: {granted}", fix)
    else:
        lacking = f"; variants lack {', '.join(variants)}" if variants else ""
        yield Finding("scopes", True, f"granted: {granted}{lacking}")
    if unused and need.definitions:
        fix = f"no definition of {org} needs them: take them from the client {client} at the provider"
        yield Finding("unused", True, ", ".join(unused), fix)


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
