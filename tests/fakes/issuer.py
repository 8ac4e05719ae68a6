"""An issuer behind httpx.MockTransport with real keys, and a source of credentials."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import httpx
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.utils import base64url_encode

from tests.fakes.clock import ManualClock
from worker.guard.issuer import Issuer
from worker.guard.profile import Profile, load
from worker.ids import OrgId
from worker.model.orgs import OrgRef
from worker.outbound import open_client
from worker.secret import Secret
from worker.tokens.credentials import Credential

URL = "https://acme.kinde.com"
AUDIENCE = "https://api.acme.com"
ORG = OrgRef(OrgId("0190-org-a"), "org_a")
Answer = httpx.Response | Awaitable[httpx.Response]
# A key for simulations that sign thousands of tokens: RSA takes twenty times as long.
EC_KEY = "ec"


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    """A private key of that name, generated once per test session."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def b64(raw: bytes) -> str:
    return base64url_encode(raw).decode()


def b64_json(value: Any) -> str:
    return b64(json.dumps(value).encode())


def jwk(name: str = "k1", **changes: Any) -> dict[str, Any]:
    """The public part of a key, as in a key set; a change to None leaves that member out."""
    if name == EC_KEY:
        public = ECAlgorithm.to_jwk(ec_key().public_key(), as_dict=True)
    else:
        public = RSAAlgorithm.to_jwk(rsa_key(name).public_key(), as_dict=True)
    entry = public | {"use": "sig", "alg": algorithm_of(name), "kid": name, "key_ops": None} | changes
    return {key: value for key, value in entry.items() if value is not None}


def algorithm_of(key: str) -> str:
    return "ES256" if key == EC_KEY else "RS256"


def sign_text(signed: str, key: str = "k1") -> str:
    """The first two parts of a token with the signature of a key added."""
    if key == EC_KEY:
        signature = ECAlgorithm(ECAlgorithm.SHA256).sign(signed.encode(), ec_key())
    else:
        signature = RSAAlgorithm(RSAAlgorithm.SHA256).sign(signed.encode(), rsa_key(key))
    return f"{signed}.{b64(signature)}"


def make_token(payload: Any, header: Mapping[str, Any] | None = None, *, key: str = "k1") -> str:
    """A token signed with a key, under its kid unless the header has another."""
    head = {"alg": algorithm_of(key), "typ": "JWT", "kid": key} | dict(header or {})
    head = {name: value for name, value in head.items() if value is not None}
    return sign_text(f"{b64_json(head)}.{b64_json(payload)}", key)


@dataclass
class App:
    """An application of one org at the fake issuer."""

    org_code: str
    client_id: str
    secret: str
    scopes: tuple[str, ...] = ("read:kb", "write:kb")
    properties: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    lifetime: int = 86400
    replace: dict[str, Any] = field(default_factory=dict)


class FakeIssuer:
    """Kinde's token endpoint and key set; `answer` replaces the token response, `keys` the key set."""

    def __init__(self, clock: ManualClock, *, key: str = "k1") -> None:
        self.clock = clock
        self.apps: dict[str, App] = {}
        self.key = key
        self.published = [key]
        self.requests: list[tuple[float, str, dict[str, str]]] = []
        self.seen: list[httpx.Request] = []
        self.answer: Callable[[dict[str, str]], Answer | None] | None = None
        self.keys: Callable[[], Answer | None] | None = None
        self.open = 0
        self.most_open = 0

    def client(self) -> httpx.AsyncClient:
        return open_client(httpx.MockTransport(self._handle))

    def add(self, app: App) -> App:
        self.apps[app.client_id] = app
        return app

    def hold(self) -> asyncio.Event:
        """Keep token requests waiting until the event is set."""
        gate = asyncio.Event()

        async def answer(form: dict[str, str]) -> httpx.Response:
            await gate.wait()
            return self.grant(form)

        self.answer = answer
        return gate

    def count(self, path: str = "/oauth2/token") -> int:
        return sum(path == seen for _, seen, _ in self.requests)

    def payload(self, app: App, scopes: Sequence[str] | None = None, **changes: Any) -> dict[str, Any]:
        """The claims of a token of this app; a change to None leaves a claim out."""
        now = int(self.clock.now().timestamp())
        granted = list(app.scopes if scopes is None else scopes)
        claims = {
            "iss": URL,
            "aud": [AUDIENCE],
            "azp": app.client_id,
            "iat": now,
            "exp": now + app.lifetime,
            "gty": ["client_credentials"],
            "jti": f"jti-{len(self.requests)}",
            "scope": " ".join(granted),
            "scp": granted,
            "org_code": app.org_code,
            "application_properties": {name: {"v": value} for name, value in app.properties.items()},
            "feature_flags": dict(app.flags),
            "v": "2",
        }
        return {key: value for key, value in (claims | app.replace | changes).items() if value is not None}

    def token(self, app: App, **changes: Any) -> str:
        return make_token(self.payload(app, **changes), key=self.key)

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        form = dict(parse_qsl((await request.aread()).decode()))
        self.requests.append((self.clock.monotonic(), request.url.path, form))
        self.seen.append(request)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            answer = self._answer(request, form)
            return answer if isinstance(answer, httpx.Response) else await answer
        finally:
            self.open -= 1

    def _answer(self, request: httpx.Request, form: dict[str, str]) -> Answer:
        match request.url.path:
            case "/oauth2/token":
                return (self.answer and self.answer(form)) or self.grant(form)
            case "/.well-known/jwks":
                return (self.keys and self.keys()) or httpx.Response(
                    200, json={"keys": [jwk(name) for name in self.published]}
                )
        return httpx.Response(404)

    def grant(self, form: Mapping[str, str]) -> httpx.Response:
        """The token endpoint's response without faults."""
        app = self.apps.get(form.get("client_id", ""))
        if app is None or form.get("client_secret") != app.secret:
            return httpx.Response(401, json={"error": "invalid_client"})
        scopes = form["scope"].split() if "scope" in form else list(app.scopes)
        if set(scopes) - set(app.scopes):
            return httpx.Response(400, json={"error": "invalid_scope"})
        text = make_token(self.payload(app, scopes), key=self.key)
        body = {"access_token": text, "expires_in": app.lifetime, "token_type": "bearer"}
        return httpx.Response(200, json=body)


class FakeCredentials:
    """Satisfies `CredentialSource`; counts reads and uses."""

    def __init__(self) -> None:
        self.orgs: dict[str, list[Credential]] = {}
        self.uses: list[tuple[str, str | None]] = []
        self.reads = self.looks = 0
        self.fault: Exception | None = None

    def add(self, org: OrgRef, client_id: str, secret: str) -> Credential:
        """Add a generation, which becomes the newest."""
        generations = self.orgs.setdefault(org.id, [])
        generation = max((known.generation for known in generations), default=0) + 1
        credential = Credential(
            id=f"{org.code}-{generation}",
            org_id=org.id,
            org_code=org.code,
            generation=generation,
            client_id=client_id,
            secret=Secret(secret),
        )
        generations.insert(0, credential)
        return credential

    async def active(self, org_id: OrgId) -> Sequence[Credential]:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return list(self.orgs.get(org_id, []))

    async def active_of(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[Credential]]:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        return {org_id: list(self.orgs[org_id]) for org_id in org_ids if self.orgs.get(org_id)}

    async def active_ids(self, org_ids: Sequence[OrgId]) -> Mapping[OrgId, Sequence[str]]:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        return {org_id: [each.id for each in self.orgs.get(org_id, [])] for org_id in org_ids}

    async def used(self, credential: Credential, error: str | None) -> None:
        self.uses.append((credential.id, error))


def kinde_issuer(**changes: Any) -> Issuer:
    """The issuer as worker.toml configures it."""
    values: dict[str, Any] = {
        "name": "main",
        "profile": load("kinde"),
        "url": URL,
        "audience": AUDIENCE,
        "max_requests_per_second": 10.0,
    }
    return Issuer(**(values | changes))


def org(number: int) -> OrgRef:
    return OrgRef(OrgId(f"id-{number:05}"), f"org_{number:05}")


def add_org(issuer: FakeIssuer, credentials: FakeCredentials, number: int) -> OrgRef:
    """Another org with an application and a credential of its own."""
    added = org(number)
    issuer.add(App(added.code, f"client-{number}", f"secret-{number}"))
    credentials.add(added, f"client-{number}", f"secret-{number}")
    return added


def profile(**changes: Any) -> Profile:
    """Kinde's profile with other values."""
    return replace(load("kinde"), **changes)


def ec_issuer(**changes: Any) -> Issuer:
    """As `kinde_issuer`, for tokens that EC_KEY signs."""
    return kinde_issuer(profile=profile(algorithms=frozenset({"ES256"})), **changes)
