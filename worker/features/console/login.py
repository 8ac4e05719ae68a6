"""Logins of people at an identity provider: OpenID Connect, authorization code with PKCE (RFC 7636).

Authlib writes the requests; they are sent as every request of ours is, with limits. Both tokens are
verified by our own verifier.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote_plus, urlsplit

import httpx

from worker.clock import Clock
from worker.errors import AccessDenied, ConfigurationError, IssuerUnavailable, TokenError, TokenRefused
from worker.features.console.callers import Caller, Role
from worker.features.console.operators import make_link
from worker.guard.decode import client_of, invalid, org_of
from worker.guard.http import TOKEN_LIMIT, Reply, exchange, what_failed
from worker.guard.issuer import Issuer
from worker.guard.jwks import KeySet
from worker.guard.strict_json import MalformedJson
from worker.guard.verify import verify
from worker.settings.sections import OVER_ALL_ORGS, LoginSettings
from worker.store import roles, sign_in
from worker.store.database import Database
from worker.telemetry.events import emit
from worker.telemetry.masking import masker
from worker.wiring import os_user

# How long a login may take at the provider, and a link is valid.
LASTS = timedelta(minutes=10)
# Logins that have begun, of one client; another one ends its oldest.
MAX_TRANSACTIONS = 50
_CODE = re.compile(r"[!-~]{1,2048}")
_ERROR = re.compile(r"[a-z][a-z0-9_]{0,63}")
# A person's `sub`: at most 255 ASCII characters (OpenID Connect Core, section 2).
_SUBJECT = re.compile(r"[!-~]{1,255}")
# Highest first: roles over all orgs, then those in one org.
_ORDER: tuple[Role, ...] = ("admin", "operator", "viewer", "manager", "member")


@dataclass(frozen=True, slots=True)
class Begun:
    """A login that has begun: what its callback is compared with."""

    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    return_to: str


class Transactions:
    """Logins that have begun, as rows that all processes share; each is used once."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def begin(self, begun: Begun, *, browser: str, client: str) -> str:
        """Store it for the browser with this cookie, and return its `state`."""
        state = secrets.token_urlsafe(32)
        now = self._clock.now()
        row = {
            "key_sha256": sign_in.sha256(state),
            "kind": "provider",
            "client": client,
            "browser_sha256": sign_in.sha256(browser),
            "nonce": begun.nonce,
            "verifier": begun.verifier,
            "return_to": begun.return_to,
            "created_at": now,
            "until": now + LASTS,
        }
        await self._acting().call(sign_in.begin_login, row, most=MAX_TRANSACTIONS)
        return state

    async def use(self, state: str, *, browser: str) -> Begun:
        """The login with this state, if this browser began it; only once.

        Raises:
            AccessDenied: this browser began none, it was used already, or it has expired.
        """
        row = await self._acting().call(
            sign_in.use_login,
            sign_in.sha256(state),
            kind="provider",
            browser_sha256=sign_in.sha256(browser),
            at=self._clock.now(),
        )
        if row is None:
            raise AccessDenied(
                "this browser has begun no such login, or it was completed already, or took too long",
                fix="open /login and log in again",
            )
        return Begun(row["nonce"], row["verifier"], row["return_to"])

    async def use_link(self, code: str) -> str:
        """The name of the person for whom this link was made; only once.

        Raises:
            AccessDenied: there is no such link, it was used already, or it has expired.
        """
        row = await self._acting().call(
            sign_in.use_login, sign_in.sha256(code), kind="link", at=self._clock.now()
        )
        if row is None:
            raise AccessDenied(
                "the link was used already, or it has expired: it is valid once, for ten minutes",
                fix="restart the worker in its terminal for a new link, or log in with a token",
            )
        return str(row["client"])

    def _acting(self) -> Database:
        return self._database.acting(roles.ALL_ORGS)


class Login:
    """Logs people in at one issuer, by the rules of `[web.login]`.

    `secret` reads the client's secret at each use. Raises ConfigurationError if the issuer's
    profile authenticates clients in another way than by a secret.
    """

    def __init__(
        self,
        rules: LoginSettings,
        issuer: Issuer,
        client: httpx.AsyncClient,
        secret: Callable[[], str],
        *,
        clock: Clock,
    ) -> None:
        if issuer.profile.client_authentication == "private_key_jwt":
            raise ConfigurationError(
                f"web.login.issuer: the profile of {issuer.name} authenticates clients with a private key",
                fix='use a profile whose client_authentication is "post" or "basic" for logins',
            )
        self._rules = rules
        self._issuer = issuer
        # An access token never passes as an ID token (RFC 8725, section 3.12).
        profile = replace(issuer.profile, types=frozenset({"jwt"}), type_required=False)
        self._id_issuer = replace(issuer, profile=profile)
        self._client = client
        self._secret = secret
        self._clock = clock
        self._keys = KeySet(issuer, client, clock=clock, report=emit)

    @property
    def title(self) -> str:
        """The provider's name, for people."""
        return self._issuer.profile.title

    @property
    def origin(self) -> str:
        """The provider's origin, which pages may send people to."""
        parts = urlsplit(self._issuer.base)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def takes_org(self) -> bool:
        """Whether the provider's login page can be asked for one org."""
        return bool(self._issuer.profile.login_org_parameter)

    async def start(self, state: str, begun: Begun, redirect_uri: str, *, org: str = "") -> str:
        """The URL that begins a login at the provider; raises IssuerUnavailable.

        `org` is a wish: which org the person is logged in to is what the token says.
        """
        # Where people cannot log in, Authlib need not be imported.
        from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
        from authlib.oauth2.rfc7636 import create_s256_code_challenge

        rules, profile = self._rules, self._issuer.profile
        more: dict[str, str] = {}
        if rules.claims_from == "access_token" and profile.audience_parameter:
            more[profile.audience_parameter] = self._issuer.audience or ""
        if org and self.takes_org:
            more[profile.login_org_parameter] = org
        if rules.acr:
            more["acr_values"] = " ".join(rules.acr)
        if rules.max_age:
            more["max_age"] = str(int(rules.max_age.total_seconds()))
        url: str = prepare_grant_uri(
            await self._keys.endpoints.authorization(),
            rules.client_id,
            "code",
            redirect_uri=redirect_uri,
            scope=list(rules.scopes),
            state=state,
            nonce=begun.nonce,
            code_challenge=create_s256_code_challenge(begun.verifier),
            code_challenge_method="S256",
            **more,
        )
        return url

    async def finish(self, parameters: Mapping[str, str], begun: Begun, redirect_uri: str) -> Caller:
        """The person who has logged in, by the parameters of the callback.

        Raises:
            AccessDenied: the provider did not log the person in, or the person has no role here.
            TokenRefused: a token is not the one that was asked for.
            TokenError: the provider does not accept the client or the code.
            IssuerUnavailable: the provider does not respond.
        """
        # RFC 9207: another provider must not complete the login of this one.
        if parameters.get("iss", self._issuer.iss) != self._issuer.iss:
            raise TokenRefused("token_invalid", "issuer", "another provider has answered this login")
        if "error" in parameters:
            error = parameters["error"]
            code = error if _ERROR.fullmatch(error) else "an unknown error"
            raise AccessDenied(f"{self.title} did not log you in: {code}", fix="open /login and log in again")
        code = parameters.get("code", "")
        if not _CODE.fullmatch(code):
            raise AccessDenied("the provider sent no code", fix="open /login and log in again")
        tokens = await self._exchange(code, begun.verifier, redirect_uri)
        identity = await self._verified_id(tokens, begun.nonce)
        claims = identity
        if self._rules.claims_from == "access_token":
            claims = await self._verified_access(tokens, identity)
        return self._caller(identity, claims)

    async def end_url(self, return_to: str) -> str | None:
        """The URL that logs a person out at the provider, or None if it has none, or does not respond."""
        try:
            url = await self._keys.endpoints.end_session()
        except IssuerUnavailable:
            return None
        if not url:
            return None
        parameters = {
            "client_id": self._rules.client_id,
            self._issuer.profile.logout_parameter: return_to,
        }
        mark = "&" if "?" in url else "?"
        return url + mark + "&".join(f"{name}={quote_plus(value)}" for name, value in parameters.items())

    async def close(self) -> None:
        await self._keys.close()

    async def _exchange(self, code: str, verifier: str, redirect_uri: str) -> Mapping[str, Any]:
        """The tokens for a code."""
        from authlib.oauth2.rfc6749.parameters import prepare_token_request

        endpoint, secret = await self._keys.endpoints.token(), self._secret()
        for text in (code, verifier, secret):
            masker.register(text)
        headers: dict[str, str] = {}
        client = {"client_id": self._rules.client_id}
        if self._issuer.profile.client_authentication == "basic":
            pair = f"{quote_plus(self._rules.client_id)}:{quote_plus(secret)}"
            headers["Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        else:
            client["client_secret"] = secret
        body: str = prepare_token_request(
            "authorization_code", redirect_uri=redirect_uri, code=code, code_verifier=verifier, **client
        )
        reply = await exchange(
            self._client,
            "POST",
            endpoint,
            clock=self._clock,
            limit=TOKEN_LIMIT,
            headers=headers,
            form=body.encode(),
        )
        return self._judge(reply)

    def _judge(self, reply: Reply | str) -> Mapping[str, Any]:
        name = self._issuer.name
        if isinstance(reply, str):
            raise IssuerUnavailable(f"issuer {name} {what_failed(reply)}")
        try:
            body = reply.json_object()
        except MalformedJson:
            body = {}
        if reply.status == 200 and body:
            return body
        error = body.get("error")
        code = error if isinstance(error, str) and _ERROR.fullmatch(error) else f"status {reply.status}"
        if reply.status >= 500 or reply.status == 429 or not 400 <= reply.status < 500:
            raise IssuerUnavailable(f"issuer {name} responded with status {reply.status}")
        if code == "invalid_grant":
            raise TokenError("the provider does not accept the code of this login", fix="log in again")
        raise TokenError(
            f"the provider does not accept this application: {code}",
            fix=f"an operator can compare web.login.client_id and the secret login__{name} with the provider",
        )

    async def _verified_id(self, tokens: Mapping[str, Any], nonce: str) -> Mapping[str, Any]:
        """The payload of the ID token (OpenID Connect Core, section 3.1.3.7)."""
        text = tokens.get("id_token")
        if not isinstance(text, str):
            raise invalid("id_token_missing", "the provider sent no ID token; is openid among the scopes?")
        masker.register(text)
        rules = self._rules
        payload = await verify(
            text,
            issuer=self._id_issuer,
            audience=rules.client_id,
            keys=self._keys,
            clock=self._clock,
            beside=frozenset({self._issuer.iss}),
        )
        given = payload.get("nonce")
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), nonce.encode()):
            raise invalid("nonce", "it was not made for this login")
        if payload.get("azp", rules.client_id) != rules.client_id:
            raise invalid("azp", "it was issued to another client")
        subject = payload.get("sub")
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise invalid("sub", "it names no person")
        if rules.acr and payload.get("acr") not in rules.acr:
            raise invalid("acr", "the way of logging in was not strong enough")
        if rules.max_age:
            at, leeway = payload.get("auth_time"), self._issuer.profile.leeway
            longest = (rules.max_age + leeway).total_seconds()
            is_time = isinstance(at, int | float) and not isinstance(at, bool)
            if not (is_time and self._clock.now().timestamp() - float(at or 0) <= longest):
                raise invalid("auth_time", "the person logged in at the provider too long ago")
        return payload

    async def _verified_access(
        self, tokens: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The payload of the access token of the same person and client."""
        text = tokens.get("access_token")
        if not isinstance(text, str):
            raise invalid("access_token_missing", "the provider sent no access token")
        masker.register(text)
        payload = await verify(
            text,
            issuer=self._issuer,
            audience=self._issuer.audience or "",
            keys=self._keys,
            clock=self._clock,
            beside=frozenset({self._issuer.iss, f"{self._issuer.base}/userinfo"}),
        )
        if payload.get("sub") != identity["sub"]:
            raise invalid("sub", "it is another person's")
        if client_of(payload, self._issuer.profile) != self._rules.client_id:
            raise invalid("client", "it was issued to another client")
        return payload

    def _caller(self, identity: Mapping[str, Any], claims: Mapping[str, Any]) -> Caller:
        """Who this is here; `Access.confirm` then checks that the org has access."""
        profile = self._issuer.profile
        if profile.login_org and self._rules.claims_from == "id_token":
            profile = replace(profile, org=profile.login_org, org_shape="list")
        org = org_of(claims, profile)
        if not org:
            raise AccessDenied(
                "your login names no organisation",
                fix=f"log in at {self.title} as a member of one; web.login.claims_from names the token that "
                "must say it",
            )
        role = self._role(org, claims)
        if role is None:
            raise AccessDenied(
                f"you have no role here as a member of {org}",
                fix="ask the administrator of your organisation, or the people who run this service",
            )
        names = (identity.get(name) for name in ("email", "name", "preferred_username"))
        shown = next((name for name in names if isinstance(name, str) and name.isprintable() and name), "")
        return Caller(
            shown[:100] or identity["sub"],
            role,
            org=None if role in OVER_ALL_ORGS else org,
            kind="person",
            issuer=self._issuer.name,
            client_id=self._rules.client_id,
            subject=identity["sub"],
            home=org,
            basis=basis_of(self._rules),
        )

    def _role(self, org: str, claims: Mapping[str, Any]) -> Role | None:
        """The highest role that the rules give."""
        found: set[Role] = {
            rule.role
            for rule in self._rules.roles
            if rule.org in ("", org) and rule.value in _texts(claims, rule.claim)
        }
        if self._rules.default_role == "member":
            found.add("member")
        return next((role for role in _ORDER if role in found), None)


def basis_of(rules: LoginSettings) -> str:
    """A hash of the rules, or empty if people cannot log in: when they change, sessions end."""
    if not rules.issuer:
        return ""
    text = json.dumps(rules.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(claims: Mapping[str, Any], name: str) -> frozenset[str]:
    """The texts of a claim: its own, those of a list, or the `key` of each object in a list.

    If no claim has this name, its dots separate a path, such as `realm_access.roles`.
    """
    value: Any = claims.get(name)
    if value is None and "." in name:
        value = claims
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if name == "scope" and isinstance(value, str):
        return frozenset(value.split())
    entries = value if isinstance(value, list) else [value]
    found = (entry.get("key") if isinstance(entry, Mapping) else entry for entry in entries)
    return frozenset(entry for entry in found if isinstance(entry, str))


def new_login(return_to: str) -> Begun:
    """What a new login is compared with."""
    return Begun(secrets.token_urlsafe(32), secrets.token_urlsafe(48), local_path(return_to))


def local_path(text: str) -> str:
    """The text if it is a path of this console, else `/`: a login never leads to another site."""
    is_path = re.fullmatch(r"/(?![/\\])[!-\[\]-~]{0,500}", text) is not None
    parts = urlsplit(text) if is_path else None
    inside = (
        parts is not None
        and not parts.scheme
        and not parts.netloc
        and not parts.path.startswith(("/login", "/logout"))
    )
    return text if inside else "/"


def local_origin(public_url: str, address: str, port: int) -> str | None:
    """The console's address on the loopback interface, or None."""
    host = urlsplit(public_url).hostname
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        # A form from another address than public_url would be refused.
        return None
    if host is not None:
        return public_url.rstrip("/")
    bound = ip_address(address)
    if not (bound.is_loopback or bound.is_unspecified):
        return None
    shown = "127.0.0.1" if bound.is_unspecified else str(bound)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def print_login_link(database: Database, origin: str | None, *, at: datetime) -> None:
    """Print the link of this OS user if there is an origin and a terminal."""
    if origin is None or not sys.stderr.isatty():
        return
    path = make_link(database, os_user(), at=at)
    print(f"log in once, within ten minutes, on this machine: {origin}{path}", file=sys.stderr, flush=True)
