"""A client that proves itself with a private key: private_key_jwt, RFC 7523, section 2.2."""

from __future__ import annotations

import re
import secrets
from base64 import b64encode
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote_plus, urlencode

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from worker.clock import Clock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, Throttled, TokenError
from worker.providers.profile import FailureClass
from worker.tokens.credentials import Credential
from worker.tokens.http import TOKEN_LIMIT, NoReply, Reply, asked_wait, exchange
from worker.tokens.issuer import Issuer
from worker.tokens.jws import MAX_TOKEN
from worker.tokens.strict_json import Malformed, loads

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
LIFETIME = 60  # seconds
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def client_assertion(credential: Credential, issuer: Issuer, endpoint: str, *, now: datetime) -> str:
    """A signed statement that we are this client, for one request.

    Raises:
        CredentialsRejected: the private key cannot be used.
    """
    key = _read_key(credential)
    if key is None:
        rejected = CredentialsRejected(
            f"the private key of org {credential.org_code} (generation {credential.generation}) is no good",
            fix="add an RSA, P-256 or Ed25519 private key in PEM, without a passphrase",
        )
        rejected.detail = "private_key"
        raise rejected
    issued_at = int(now.timestamp())
    headers = {"typ": issuer.profile.assertion_type}
    if credential.signing_key_id:
        headers["kid"] = credential.signing_key_id
    claims = {
        "iss": credential.client_id,
        "sub": credential.client_id,
        "aud": endpoint if issuer.profile.assertion_audience == "token_endpoint" else issuer.iss,
        "iat": issued_at,
        "exp": issued_at + LIFETIME,
        "jti": secrets.token_hex(16),
    }
    return jwt.encode(claims, key, algorithm=_algorithm_of(key), headers=headers)


def _read_key(credential: Credential) -> PrivateKey | None:
    try:
        key = load_pem_private_key(credential.secret.reveal().encode(), password=None)
    except (ValueError, TypeError):
        return None
    if isinstance(key, ec.EllipticCurvePrivateKey) and not isinstance(key.curve, ec.SECP256R1):
        return None
    return key if isinstance(key, PrivateKey) else None


def _algorithm_of(key: PrivateKey) -> str:
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256"
    return "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "EdDSA"


_PRINTABLE = re.compile(r"[!-~]+")
_ERROR_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class GrantedToken:
    """A token as the issuer gave it, not verified; `expires_in` is in seconds from the answer."""

    text: str = field(repr=False)
    expires_in: float | None = None


async def request_token(
    client: httpx.AsyncClient,
    issuer: Issuer,
    credential: Credential,
    *,
    endpoint: str,
    audience: str,
    scopes: frozenset[str],
    clock: Clock,
) -> GrantedToken:
    """Ask the issuer for a token scoped to one org, once.

    Raises:
        CredentialsRejected: the issuer does not know this client or secret; another try does not help.
        RequestRejected: it refuses the request itself; `detail` is its error code.
        Throttled: it asks for fewer requests; `retry_after` is 0 where it does not say how long.
        IssuerUnavailable: no answer, a 5xx, or no well-formed token response; another try may help.
    """
    reply = await _ask(client, issuer, credential, endpoint, audience, scopes, clock)
    answer = _judge(reply, issuer, credential, clock.now().timestamp())
    if isinstance(answer, GrantedToken):
        return answer
    raise answer


async def _ask(
    client: httpx.AsyncClient,
    issuer: Issuer,
    credential: Credential,
    endpoint: str,
    audience: str,
    scopes: frozenset[str],
    clock: Clock,
) -> Reply | NoReply:
    # On its own, as `_judge` is: what `request_token` raises has no secret in the variables of its frames.
    profile = issuer.profile
    form = {"grant_type": "client_credentials", **profile.parameters}
    headers: dict[str, str] = {}
    match profile.client_authentication:
        case "post":
            form |= {"client_id": credential.client_id, "client_secret": credential.secret.reveal()}
        case "basic":
            # Each half is form-encoded before the two are joined (section 2.3.1).
            pair = f"{quote_plus(credential.client_id)}:{quote_plus(credential.secret.reveal())}"
            headers["Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        case "private_key_jwt":
            form |= {
                "client_id": credential.client_id,
                "client_assertion_type": ASSERTION_TYPE,
                "client_assertion": client_assertion(credential, issuer, endpoint, now=clock.now()),
            }
    is_org = profile.org_prefix and audience.startswith(profile.org_prefix)
    if profile.audience_parameter and not is_org:
        form[profile.audience_parameter] = audience
    if profile.org_parameter:
        form[profile.org_parameter] = credential.org_code
    if profile.ask_scopes and scopes:
        form["scope"] = " ".join(sorted(scopes))
    return await exchange(
        client,
        "POST",
        endpoint,
        clock=clock,
        limit=TOKEN_LIMIT,
        headers=headers,
        form=urlencode(form).encode(),
    )


def _judge(
    reply: Reply | NoReply, issuer: Issuer, credential: Credential, now: float
) -> GrantedToken | TokenError | IssuerUnavailable:
    """The token of an answer, or what to raise."""
    if isinstance(reply, NoReply):
        return IssuerUnavailable(f"issuer {issuer.name} gave no answer: {reply.why}")
    body = _json_object(reply)
    if reply.status != 200:
        return _failure(reply, body, issuer, credential, now)
    fault, granted = _read(body, issuer)
    if granted is None:
        return IssuerUnavailable(f"issuer {issuer.name} gave no well-formed token response: {fault}")
    return granted


def _json_object(reply: Reply) -> dict[str, Any]:
    """The answer's JSON object; empty where it is none."""
    try:
        body = loads(reply.content)
    except Malformed:
        return {}
    return body if isinstance(body, dict) else {}


def _read(body: dict[str, Any], issuer: Issuer) -> tuple[str, GrantedToken | None]:
    """The token of a successful answer (section 5.1), or the member that is wrong."""
    text, kind, expires_in = body.get("access_token"), body.get("token_type"), body.get("expires_in")
    if not isinstance(text, str) or len(text) > MAX_TOKEN or not _PRINTABLE.fullmatch(text):
        return "access_token", None
    if not isinstance(kind, str) or kind.lower() != "bearer":
        return "token_type", None
    if expires_in is None:
        return "", GrantedToken(text)
    longest = issuer.profile.max_lifetime.total_seconds()
    if (
        isinstance(expires_in, bool)
        or not isinstance(expires_in, int | float)
        or not 0 < expires_in <= longest
    ):
        return "expires_in", None
    return "", GrantedToken(text, float(expires_in))


def _failure(
    reply: Reply, body: dict[str, Any], issuer: Issuer, credential: Credential, now: float
) -> TokenError | IssuerUnavailable:
    """What an answer without a token means (section 5.2). The issuer's own prose is never repeated."""
    stated = body.get("error")
    code = stated if isinstance(stated, str) and _ERROR_CODE.fullmatch(stated) else ""
    wait = asked_wait(reply.headers, issuer.profile.reset_headers, now)
    org, name = credential.org_code, issuer.name
    match _classify(reply.status, code, issuer):
        case "throttle":
            return Throttled(f"issuer {name} asks for fewer requests", retry_after=wait or 0.0)
        case "credential":
            rejected = CredentialsRejected(
                f"issuer {name} rejects the credentials of org {org} (generation {credential.generation})",
                fix=f"add the org's current secret: `python -m worker credentials add {org}"
                f" --client-id {credential.client_id} --secret-file FILE`",
            )
            rejected.detail = code or "invalid_client"
            return rejected
        case "configuration":
            refused = RequestRejected(
                f"issuer {name} refuses to give org {org} such a token: {code}",
                fix=f"compare the audience and scopes with what {issuer.profile.title} grants"
                f" to the client {credential.client_id}",
            )
            refused.detail = code
            return refused
        case "transient":
            unavailable = IssuerUnavailable(f"issuer {name} answered with status {reply.status}")
            unavailable.retry_after = wait
            return unavailable


def _classify(status: int, code: str, issuer: Issuer) -> FailureClass:
    if status == 429:
        return "throttle"
    if not 400 <= status < 500 or status in (408, 425):
        return "transient"
    if status == 401:
        # Whatever they call it: access_denied at Auth0, unauthorized_client at Keycloak.
        return "credential"
    if code in issuer.profile.errors:
        return issuer.profile.errors[code]
    # Without an error code it is nobody's answer to a token request: a proxy's page, or a wrong address.
    return "configuration" if code else "transient"
