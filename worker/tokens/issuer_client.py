"""Issuer client: requests tokens (RFC 6749, section 4.4) within an issuer's rate and behind its breaker."""

from __future__ import annotations

import random
import re
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_plus, urlencode

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from worker.clock import Clock
from worker.errors import (
    AnswerTooLarge,
    CredentialsRejected,
    IssuerUnavailable,
    RequestRejected,
    Throttled,
    TokenError,
)
from worker.guard.http import TOKEN_LIMIT, TOO_LARGE, Reply, exchange, what_failed
from worker.guard.issuer import Issuer
from worker.guard.jwks import KeySet
from worker.guard.profile import FailureClass
from worker.guard.strict_json import MalformedJson
from worker.guard.verify import MAX_TOKEN, read, verify, verify_message
from worker.model.throttling import retry_delay, room_left
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.tokens.breaker import Breaker, IssuerPaused
from worker.tokens.budget import RequestBudget
from worker.tokens.credentials import Credential

# Seconds; full jitter: a retry waits between 0 and these, doubling.
RETRY_FIRST = 0.5
RETRY_LAST = 4.0
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_LIFETIME = 60  # seconds
_PRINTABLE = re.compile(r"[!-~]+")
_ERROR_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class GrantedToken:
    """A token as the issuer returned it, not verified; `expires_in` is in seconds from `received_at`."""

    text: str = field(repr=False)
    credential: Credential
    asked_at: float  # monotonic, as is the next
    received_at: float
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request for a token, without how it is sent."""

    credential: Credential
    audience: str
    scopes: frozenset[str]
    resource: bool


class IssuerClient:
    """One issuer's endpoints, keys, budget and breaker."""

    def __init__(self, issuer: Issuer, client: httpx.AsyncClient, *, clock: Clock) -> None:
        self.issuer = issuer
        self._client = client
        self._clock = clock
        self._keys = KeySet(issuer, client, clock=clock, report=emit)
        self.endpoints = self._keys.endpoints
        self.budget = RequestBudget(issuer, clock=clock)
        self._breaker = Breaker(issuer.name, clock=clock)

    @property
    def is_free(self) -> bool:
        """Whether a request that can wait may be sent now: the issuer is not paused, the breaker closed."""
        return not (self.budget.is_paused or self._breaker.is_open)

    async def grant(
        self,
        credential: Credential,
        *,
        audience: str,
        scopes: frozenset[str],
        tries: int,
        ahead: bool = False,
        resource: bool = False,
    ) -> GrantedToken:
        """Request a token for one org, at most `tries` times while the issuer fails for this org alone.

        `ahead` of a run that needs it, the request lets all others pass. An audience that is a `resource` is
        asked for by that parameter (RFC 8707, section 2).

        Raises:
            CredentialsRejected: the issuer does not know this client or secret; retrying does not help.
            RequestRejected: it refuses the request itself; `detail` is its error code.
            Throttled: it asks for fewer requests, now or earlier; `retry_after` is in seconds.
            AnswerTooLarge: the response is larger than a token may be; retrying does not help.
            IssuerUnavailable: no response, a 5xx, or a malformed token response; retrying may help.
            IssuerPaused: nothing was sent; the breaker is open, and it is not this org's turn.
        """
        masker.hold(credential.secret.reveal(), credential.org_id)
        try:
            granted = await self._request_again(tries, _Asked(credential, audience, scopes, resource), ahead)
        finally:
            masker.release(credential.secret.reveal(), credential.org_id)
        masker.note(granted.text, credential.org_id)
        return granted

    async def verify(self, text: str, audience: str) -> Mapping[str, Any]:
        """The payload of a token of this issuer; raises as `verify.verify` does."""
        return await verify(text, issuer=self.issuer, audience=audience, keys=self._keys, clock=self._clock)

    def verify_at_once(self, text: str, audience: str) -> Mapping[str, Any] | None:
        """As `verify`, without waiting: None if the key is not in the set that was read last."""
        self._keys.document.refresh_if_old()
        token = read(text, issuer=self.issuer, audience=audience, clock=self._clock)
        key = self._keys.known(token.kid)
        return None if key is None else token.verified_by(key)

    async def verify_message(
        self, text: str, check: Callable[[Mapping[str, Any]], object]
    ) -> Mapping[str, Any]:
        """The payload of a message signed by this issuer; raises as `verify.verify_message` does."""
        return await verify_message(text, issuer=self.issuer, keys=self._keys, check=check)

    async def close(self) -> None:
        await self._keys.close()

    async def _request_again(self, tries: int, asked: _Asked, ahead: bool) -> GrantedToken:
        """As `_request`, at most `tries` times while the failure may pass."""
        # Without a library: building its retries costs as much as verifying a token.
        longest = RETRY_FIRST
        for _ in range(tries - 1):
            try:
                return await self._request(asked, ahead)
            except IssuerUnavailable as error:
                if not (_may_pass(error) and self._breaker.fails_alone(asked.credential.org_code)):
                    raise
            await self._clock.sleep(random.uniform(0, longest))  # noqa: S311
            longest = min(longest * 2, RETRY_LAST)
        return await self._request(asked, ahead)

    async def _request(self, asked: _Asked, ahead: bool) -> GrantedToken:
        org = asked.credential.org_code
        doubtful = self._breaker.doubts(org)
        # The breaker first: a slot of the budget must not be spent on a request that it then refuses.
        with self._breaker.watch(org):
            async with self.budget.request(org, doubtful=doubtful, ahead=ahead):
                asked_at = self._clock.monotonic()
                # In two steps, so that the frames of the error hold no secret in a variable.
                reply = await self._send(asked)
                result = self._judge(reply, asked.credential, asked_at)
                if isinstance(reply, Reply):
                    names, now = self.issuer.profile.reset_headers, self._clock.now().timestamp()
                    self.budget.note_room(*room_left(reply.headers, names, now))
                if isinstance(result, GrantedToken):
                    return result
                raise result

    async def _send(self, asked: _Asked) -> Reply | str:
        profile, endpoint = self.issuer.profile, await self.endpoints.token()
        credential, audience, scopes = asked.credential, asked.audience, asked.scopes
        form = {"grant_type": "client_credentials"}
        form |= {name: value.replace("{audience}", audience) for name, value in profile.parameters.items()}
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
                    "client_assertion": self._assertion(credential, endpoint),
                }
        is_org = profile.org_prefix and audience.startswith(profile.org_prefix)
        if asked.resource:
            form["resource"] = audience
        elif profile.audience_parameter and not is_org:
            form[profile.audience_parameter] = audience
        if profile.org_parameter and credential.org_code:
            form[profile.org_parameter] = credential.org_code
        if profile.ask_scopes and scopes:
            form["scope"] = " ".join(sorted(scopes))
        body = urlencode(form).encode()
        return await exchange(
            self._client, "POST", endpoint, clock=self._clock, limit=TOKEN_LIMIT, headers=headers, form=body
        )

    def _assertion(self, credential: Credential, endpoint: str) -> str:
        """A signed statement that we are this client, for one request (RFC 7523, section 2.2)."""
        key, algorithm = _read_private_key(credential)
        if key is None:
            raise CredentialsRejected(
                f"the private key of {_named(credential)} is unusable",
                fix="add an RSA, P-256 or Ed25519 private key in PEM, without a passphrase",
                detail="private_key",
            )
        profile, issued_at = self.issuer.profile, int(self._clock.now().timestamp())
        claims = {
            "iss": credential.client_id,
            "sub": credential.client_id,
            "aud": endpoint if profile.assertion_audience == "token_endpoint" else self.issuer.iss,
            "iat": issued_at,
            "exp": issued_at + ASSERTION_LIFETIME,
            "jti": secrets.token_hex(16),
        }
        return jwt.encode(claims, key, algorithm=algorithm, headers={"typ": profile.assertion_type})

    def _judge(
        self, reply: Reply | str, credential: Credential, asked_at: float
    ) -> GrantedToken | TokenError | IssuerUnavailable:
        """The token of a response, or what to raise."""
        name = self.issuer.name
        if reply == TOO_LARGE:
            return self._too_large(credential)
        if isinstance(reply, str):
            return IssuerUnavailable(f"issuer {name} {what_failed(reply)}")
        try:
            body = reply.json_object()
        except MalformedJson:
            body = {}
        if reply.status != 200:
            return self._failure(reply, body.get("error"), credential)
        text, kind, expires_in = body.get("access_token"), body.get("token_type"), body.get("expires_in")
        longest = self.issuer.profile.max_lifetime.total_seconds()
        if isinstance(text, str) and len(text) > MAX_TOKEN:
            return self._too_large(credential)
        # Section 5.1.
        if not isinstance(text, str) or not _PRINTABLE.fullmatch(text):
            fault = "access_token"
        elif not isinstance(kind, str) or kind.lower() != "bearer":
            fault = "token_type"
        elif expires_in is None:
            return GrantedToken(text, credential, asked_at, self._clock.monotonic())
        elif type(expires_in) in (int, float) and 0 < expires_in <= longest:
            return GrantedToken(text, credential, asked_at, self._clock.monotonic(), float(expires_in))
        else:
            fault = "expires_in"
        return IssuerUnavailable(f"issuer {name} sent a malformed token response: {fault}")

    def _too_large(self, credential: Credential) -> AnswerTooLarge:
        name, title = self.issuer.name, self.issuer.profile.title
        return AnswerTooLarge(
            f"issuer {name} gives org {credential.org_code} no usable token: {what_failed(TOO_LARGE)}",
            fix=f"let {title} put fewer permissions and properties into tokens of the client"
            f" {credential.client_id}: a token has at most {MAX_TOKEN // 1024} KiB",
        )

    def _failure(self, reply: Reply, error: Any, credential: Credential) -> TokenError | IssuerUnavailable:
        """What a response without a token means (section 5.2). The issuer's own prose is never repeated."""
        profile, name = self.issuer.profile, self.issuer.name
        org, client_id = credential.org_code, credential.client_id
        code = error if isinstance(error, str) and _ERROR_CODE.fullmatch(error) else ""
        # It is stored with the run for longer than the secret is masked.
        code = code if masker.mask(code, credential.org_id) == code else ""
        wait = retry_delay(reply.headers, profile.reset_headers, self._clock.now().timestamp())
        match _classify(reply.status, code, profile.errors):
            case "throttle":
                return Throttled(f"issuer {name} asks for fewer requests", retry_after=wait or 0.0)
            case "credential":
                return CredentialsRejected(
                    f"issuer {name} rejects the credentials of {_named(credential)}",
                    fix=f"add the org's current secret: `python -m worker credentials add {org}"
                    f" --client-id {client_id} --secret-file FILE`",
                    detail=code or "invalid_client",
                )
            case "configuration":
                return RequestRejected(
                    f"issuer {name} refuses to give org {org} such a token: {code}",
                    fix=f"compare the audience and scopes with what {profile.title} grants"
                    f" to the client {client_id}",
                    detail=code,
                )
            case "transient":
                return IssuerUnavailable(
                    f"issuer {name} responded with status {reply.status}", retry_after=wait
                )


def _named(credential: Credential) -> str:
    return f"org {credential.org_code} (generation {credential.generation})"


def _may_pass(error: IssuerUnavailable) -> bool:
    """Whether an immediate retry may help: the issuer failed and asked for no longer pause."""
    return not isinstance(error, IssuerPaused | AnswerTooLarge) and (error.retry_after or 0.0) <= 1.0


def _read_private_key(credential: Credential) -> tuple[PrivateKey | None, str]:
    """The key and its algorithm; None if it cannot be used."""
    try:
        key = load_pem_private_key(credential.secret.reveal().encode(), password=None)
    except (ValueError, TypeError):
        return None, ""
    match key:
        case rsa.RSAPrivateKey():
            return key, "RS256"
        case ec.EllipticCurvePrivateKey() if isinstance(key.curve, ec.SECP256R1):
            return key, "ES256"
        case ed25519.Ed25519PrivateKey():
            return key, "EdDSA"
    return None, ""


def _classify(status: int, code: str, errors: Mapping[str, FailureClass]) -> FailureClass:
    if status == 429:
        return "throttle"
    if not 400 <= status < 500 or status in (408, 425):
        return "transient"
    if status == 401:
        # Whatever the code: access_denied at Auth0, unauthorized_client at Keycloak.
        return "credential"
    # No token endpoint answers without an error code: it is a proxy's page, or a wrong address.
    return errors.get(code, "configuration") if code else "transient"
