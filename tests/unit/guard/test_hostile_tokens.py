"""Hostile tokens: from RFC 8725, from the known holes of JWT libraries, and from what our verifier promises.

Each must be refused with its own code, by no other exception, within 50 ms.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE, URL, b64, b64_json, jwk, kinde_issuer, make_token, rsa_key, sign_text
from worker.errors import TokenRefused
from worker.guard.claims import Claims
from worker.guard.decode import decode, enforce, invalid
from worker.guard.jwks import read_keys
from worker.guard.verify import Key, verify

NOW = 1893456000  # 2030-01-01T00:00:00Z
DAY = 86400
Build = Callable[[], str]


class Published:
    """The issuer's key set, as it stands."""

    def __init__(self) -> None:
        self.keys = read_keys([jwk("k1"), jwk("k2")], frozenset({"RS256"}))

    async def find(self, kid: str) -> Key:
        if kid not in self.keys:
            raise invalid("unknown_kid", "no such key")
        return self.keys[kid]


PUBLISHED = Published()


def claims(**changes: Any) -> dict[str, Any]:
    """The claims of a good token; a change to None leaves one out."""
    good = {
        "iss": URL,
        "aud": [AUDIENCE],
        "azp": "client-a",
        "iat": NOW - 60,
        "exp": NOW + DAY - 60,
        "gty": ["client_credentials"],
        "jti": "f95ed3e0",
        "scope": "read:kb write:kb",
        "scp": ["read:kb", "write:kb"],
        "org_code": "org_a",
        "application_properties": {"model_version": {"v": "gpt-4"}},
        "feature_flags": {"agent-v2": {"t": "b", "v": True}},
        "v": "2",
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def good() -> str:
    return make_token(claims())


async def judge(text: str, clock: ManualClock) -> Claims:
    """The whole way of a token before it is cached."""
    issuer = kinde_issuer()
    payload = await verify(text, issuer=issuer, audience=AUDIENCE, keys=PUBLISHED, clock=clock)
    decoded = decode(payload, issuer.profile)
    enforce(decoded, org_code="org_a", client_id="client-a", scopes={"read:kb"})
    return decoded


HOSTILE: list[tuple[str, str, Build]] = []


def hostile(name: str, code: str, build: Build) -> None:
    HOSTILE.append((name, code, build))


def header(name: str, code: str, **changes: Any) -> None:
    hostile(name, code, lambda: make_token(claims(), changes))


def payload(name: str, code: str, **changes: Any) -> None:
    hostile(name, code, lambda: make_token(claims(**changes)))


def raw(name: str, code: str, *, head: str | bytes = b"", body: str | bytes = b"") -> None:
    """Header or payload as given, signed by the issuer's own key."""

    def build() -> str:
        good_head = json.dumps({"alg": "RS256", "typ": "JWT", "kid": "k1"})
        parts = (head or good_head, body or json.dumps(claims()))
        encoded = (b64(part.encode() if isinstance(part, str) else part) for part in parts)
        return sign_text(".".join(encoded))

    hostile(name, code, build)


def spliced(change: str) -> str:
    """A good payload's JSON with text of its own put before the last brace."""
    return json.dumps(claims())[:-1] + change + "}"


def with_hmac(secret: bytes, **head: Any) -> str:
    signed = f"{b64_json({'alg': 'HS256', 'typ': 'JWT', 'kid': 'k1'} | head)}.{b64_json(claims())}"
    return f"{signed}.{b64(hmac.digest(secret, signed.encode(), 'sha256'))}"


def public_pem(form: serialization.PublicFormat) -> bytes:
    return rsa_key("k1").public_key().public_bytes(serialization.Encoding.PEM, form)


def resigned(part: int, change: Callable[[str], str]) -> Build:
    """A good token with one part changed after it was signed."""

    def build() -> str:
        parts = good().split(".")
        parts[part] = change(parts[part])
        return ".".join(parts)

    return build


def signed_with_pss() -> str:
    signed = f"{b64_json({'alg': 'PS256', 'typ': 'JWT', 'kid': 'k1'})}.{b64_json(claims())}"
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
    return f"{signed}.{b64(rsa_key('k1').sign(signed.encode(), pss, hashes.SHA256()))}"


def signed_with_ec() -> str:
    signed = f"{b64_json({'alg': 'ES256', 'typ': 'JWT', 'kid': 'k1'})}.{b64_json(claims())}"
    key = ec.generate_private_key(ec.SECP256R1())
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def unsigned(alg: str, signature: str = "") -> Build:
    return lambda: f"{b64_json({'alg': alg, 'typ': 'JWT', 'kid': 'k1'})}.{b64_json(claims())}.{signature}"


# No signature, or not a public-key one: RFC 8725, section 3.1; CVE-2015-9235, CVE-2016-10555, CVE-2022-29217.
for spelling in ("none", "None", "NONE", "nOnE"):
    hostile(f"alg {spelling} without a signature", "signature_missing", unsigned(spelling))
    hostile(f"alg {spelling} with one", "algorithm", unsigned(spelling, "AAAA"))
hostile("RS256 with the signature cut off", "signature_missing", unsigned("RS256"))
hostile("HS256 with an empty key", "algorithm", lambda: with_hmac(b""))
hostile(
    "HS256 with the public key as PEM",
    "algorithm",
    lambda: with_hmac(public_pem(serialization.PublicFormat.SubjectPublicKeyInfo)),
)
hostile(
    "HS256 with the public key as PKCS1",
    "algorithm",
    lambda: with_hmac(public_pem(serialization.PublicFormat.PKCS1)),
)
hostile("HS256 with the JWK as key", "algorithm", lambda: with_hmac(json.dumps(jwk("k1")).encode()))
hostile("HS512", "algorithm", lambda: with_hmac(b"x", alg="HS512"))
hostile("PS256 by the issuer's own RSA key", "algorithm", signed_with_pss)
hostile("ES256 by a key of its own", "algorithm", signed_with_ec)
header("RS512 in the header of an RS256 signature", "algorithm", alg="RS512")
header("alg in lower case", "algorithm", alg="rs256")
header("alg with a space", "algorithm", alg="RS256 ")
header("alg as a list", "algorithm", alg=["RS256"])
header("alg as a number", "algorithm", alg=256)
header("alg absent", "algorithm", alg=None)
header("alg ES256K", "algorithm", alg="ES256K")
header("alg dir", "algorithm", alg="dir")

# Keys that the token brings along: RFC 8725, section 3.10; CVE-2018-0114.
header("jwk of the attacker", "embedded_key", jwk=jwk("evil"))
hostile(
    "jwk and signed by it",
    "embedded_key",
    lambda: make_token(claims(), {"jwk": jwk("evil"), "kid": "k1"}, key="evil"),
)
header("jku", "embedded_key", jku="https://evil.example/jwks")
header("x5u", "embedded_key", x5u="https://evil.example/cert")
header("x5c", "embedded_key", x5c=["MIIB"])
header("jku empty", "embedded_key", jku="")
header("crit unknown", "crit", crit=["exp-strict"], **{"exp-strict": True})
header("crit empty", "crit", crit=[])
header("crit with b64", "crit", crit=["b64"], b64=False)
header("b64 alone", "b64", b64=False)
header("zip", "zip", zip="DEF")
header("nested, cty JWT", "nested", cty="JWT")
header("enc in a signed token", "encrypted", enc="A128GCM")

# Which key.
header("kid absent", "kid", kid=None)
header("kid empty", "kid", kid="")
header("kid a number", "kid", kid=1)
header("kid a list", "kid", kid=["k1"])
header("kid of 300 letters", "kid", kid="k" * 300)
header("kid a path", "unknown_kid", kid="../../../../dev/null")
header("kid with SQL", "unknown_kid", kid="k1' UNION SELECT 'x")
header("kid unknown", "unknown_kid", kid="k3")
header("kid with a NUL", "text", kid="k1\0")
hostile(
    "signed by another key under a known kid",
    "signature",
    lambda: make_token(claims(), {"kid": "k1"}, key="evil"),
)
hostile(
    "signed by the issuer's other key", "signature", lambda: make_token(claims(), {"kid": "k1"}, key="k2")
)

# What kind of token: RFC 8725, section 3.11.
header("typ of a logout token", "type", typ="logout+jwt")
header("typ of an event", "type", typ="secevent+jwt")
header("typ a number", "type", typ=1)
header("typ empty", "type", typ="")
raw("typ null", "type", head='{"alg":"RS256","kid":"k1","typ":null}')

# The text itself.
hostile("empty", "parts", lambda: "")
hostile("one part", "parts", lambda: "abc")
hostile("two parts", "parts", lambda: good().rpartition(".")[0])
hostile("four parts", "parts", lambda: good() + ".AAAA")
hostile("five parts, as an encrypted token", "parts", lambda: good() + ".AAAA.AAAA")
hostile("two dots", "signature_missing", lambda: "..")
hostile("padding on the signature", "base64url", lambda: good() + "==")
hostile("standard base64", "base64url", resigned(2, lambda part: part[:-4] + "+/+/"))
hostile("a space before it", "base64url", lambda: " " + good())
hostile("a line break after it", "base64url", lambda: good() + "\n")
hostile("a NUL in it", "base64url", resigned(1, lambda part: part + "\0"))
hostile("letters beyond ASCII", "base64url", resigned(1, lambda part: part + "é"))
hostile("a digit beyond ASCII", "base64url", resigned(2, lambda part: part + "٣"))
hostile(
    "leftover bits in the signature",
    "base64url",
    resigned(2, lambda part: part[:-1] + chr(ord(part[-1]) + 1)),
)
hostile("one letter too many", "base64url", resigned(1, lambda part: part[: len(part) // 4 * 4] + "A"))
hostile("a signature cut short", "signature", resigned(2, lambda part: part[: 4 * 80]))
hostile("a signature of zeros", "signature", resigned(2, lambda part: b64(bytes(256))))
hostile("a signature of one byte", "signature", resigned(2, lambda part: "AA"))
hostile("a signature twice as long", "signature", resigned(2, lambda part: b64(bytes(512))))
hostile(
    "a payload changed after signing", "signature", resigned(1, lambda part: b64_json(claims(jti="another")))
)
hostile("17 KiB", "oversize", lambda: make_token(claims(pad="x" * 13_000)))
hostile("2 MB", "oversize", lambda: "a" * 2_000_000)
hostile("a million dots", "oversize", lambda: "." * 1_000_000)

# JSON: RFC 8725, sections 2.4 and 3.7; parser differences.
raw("org twice", "duplicate_member", body=spliced(', "org_code": "org_a"'))
raw("org twice, another first", "duplicate_member", body='{"org_code": "org_b", ' + json.dumps(claims())[1:])
raw("a member twice deep inside", "duplicate_member", body=spliced(', "x": {"a": 1, "a": 2}'))
raw("alg twice", "duplicate_member", head='{"alg":"none","alg":"RS256","typ":"JWT","kid":"k1"}')
raw("a member twice by an escape", "duplicate_member", body=spliced(', "org\\u005fcode": "org_b"'))
raw("payload a list", "payload", body=json.dumps([claims()]))
raw("payload text", "payload", body='"org_a"')
raw("payload null", "payload", body="null")
raw("payload not JSON", "json", body="org_code=org_a")
raw("payload cut short", "json", body=json.dumps(claims())[:-1])
raw("payload and more", "json", body=json.dumps(claims()) + "{}")
raw("header a list", "header", head='["RS256"]')
raw("header a number", "header", head="1")
raw("UTF-16", "text", body=json.dumps(claims()).encode("utf-16"))
raw("a byte order mark", "json", body=b"\xef\xbb\xbf" + json.dumps(claims()).encode())
raw("no UTF-8", "text", body=b'{"org_code": "\xff\xfe"}')
raw("half a surrogate pair", "text", body=spliced(', "x": "\\ud800"'))
raw("a NUL in a property", "text", body=spliced(', "x": "a\\u0000b"'))
raw("NaN", "number", body=spliced(', "x": NaN'))
raw("Infinity", "number", body=spliced(', "x": -Infinity'))
raw("1e999", "number", body=spliced(', "x": 1e999'))
raw("5,000 digits", "number", body=spliced(', "x": ' + "9" * 5000))
raw("5,000 lists deep", "depth", body=spliced(', "x": ' + "[" * 5000 + "]" * 5000))
raw("1,500 objects deep", "depth", body=spliced(', "x": ' + '{"a":' * 1500 + "1" + "}" * 1500))
raw("13 deep", "depth", body=spliced(', "x": ' + "[" * 12 + "]" * 12))
raw("4,000 members", "members", body=spliced(', "x": [' + "0," * 4000 + "0]"))
raw("a comment", "json", body="/* */" + json.dumps(claims()))

# Who issued it, and for whom: RFC 8725, sections 3.8 and 3.9.
payload("another issuer", "issuer", iss="https://evil.kinde.com")
payload("the issuer with a slash", "issuer", iss=URL + "/")
payload("the issuer in capitals", "issuer", iss=URL.upper())
payload("the issuer as a prefix", "issuer", iss=URL + ".evil.example")
payload("the issuer in a list", "issuer", iss=[URL])
payload("no issuer", "issuer", iss=None)
payload("another audience", "audience", aud=["https://api.other.com"])
payload("the audience as a prefix", "audience", aud=[AUDIENCE + "/v2"])
payload("no audience", "audience_missing", aud=None)
payload("an empty audience", "audience", aud=[])
payload("an audience of numbers", "audience", aud=[1])
payload("an audience as an object", "audience", aud={AUDIENCE: True})
payload("the audience beside an object", "audience", aud=[AUDIENCE, {}])
payload("a wider audience", "audience_wider", aud=[AUDIENCE, "https://api.other.com"])
payload("the audience twice", "audience_wider", aud=[AUDIENCE, AUDIENCE])

# When.
payload("expired a day ago", "expired", iat=NOW - 2 * DAY, exp=NOW - DAY)
payload("expired this very second", "expired", exp=NOW)
payload("no exp", "exp_missing", exp=None)
payload("exp as text", "exp_type", exp=str(NOW + DAY))
payload("exp true", "exp_type", exp=True)
payload("exp in a list", "exp_type", exp=[NOW + DAY])
payload("exp in milliseconds", "exp_range", exp=(NOW + DAY) * 1000)
payload("exp below zero", "exp_range", exp=-1)
raw("exp 1e308", "exp_range", body=spliced("").replace(str(NOW + DAY - 60), "1e308"))
payload("exp in ten years", "lifetime", exp=NOW + 3650 * DAY)
payload("exp before iat", "lifetime", iat=NOW + 20, exp=NOW + 10)
payload("no iat", "iat_missing", iat=None)
payload("iat as text", "iat_type", iat=str(NOW))
payload("iat in an hour", "issued_in_future", iat=NOW + 3600, exp=NOW + 7200)
payload("nbf in an hour", "not_yet_valid", nbf=NOW + 3600)
payload("nbf as text", "nbf_type", nbf="0")
payload("nbf true", "nbf_type", nbf=True)

# Whose, and what it may do.
payload("another org", "org_mismatch/other_org", org_code="org_b")
payload("no org", "org_mismatch/org_missing", org_code=None)
payload("an empty org", "org_mismatch/org_missing", org_code="")
payload("the org in capitals", "org_mismatch/other_org", org_code="ORG_A")
payload("the org with a space", "org_mismatch/other_org", org_code="org_a ")
payload("the org in look-alike letters", "org_mismatch/other_org", org_code="оrg_a")
payload("the org in a list", "org_type", org_code=["org_a"])
payload("the org a number", "org_type", org_code=1)
payload("the org true", "org_type", org_code=True)
payload("the org an object", "org_type", org_code={"v": "org_a"})
payload("another client", "client_mismatch/other_client", azp="client-b")
payload("no client", "client_mismatch/client_missing", azp=None)
payload("the client in a list", "client_type", azp=["client-a"])
payload("no scope", "scope_missing/read:kb", scope=None)
payload("a scope that contains it", "scope_missing/read:kb", scope="read:kbs")
payload("the scope in scp alone", "scope_missing/read:kb", scope="write:kb")
payload("scopes parted by commas", "scope_missing/read:kb", scope="read:kb,write:kb")
payload("scopes parted by tabs", "scope_missing/read:kb", scope="write:kb\tread:kb")
payload("scopes as a list", "scope_type", scope=["read:kb"])
payload("properties as a list", "property_shape", application_properties=[{"v": 1}])
payload("a property without v", "property_shape", application_properties={"model": "gpt-4"})
payload("a property that is a list", "property_shape", application_properties={"model": {"v": ["gpt-4"]}})
payload("flags as a list", "flag_shape", feature_flags=["agent-v2"])
payload("a flag without v", "flag_shape", feature_flags={"agent-v2": {"t": "b"}})
payload("a flag without t", "flag_shape", feature_flags={"agent-v2": {"v": True}})
payload("a flag's t as a list", "flag_shape", feature_flags={"agent-v2": {"t": ["b"], "v": True}})
payload("a flag b with text", "flag_type", feature_flags={"agent-v2": {"t": "b", "v": "false"}})
payload("a flag b with a number", "flag_type", feature_flags={"agent-v2": {"t": "b", "v": 1}})
payload("a flag s with a boolean", "flag_type", feature_flags={"agent-v2": {"t": "s", "v": True}})
payload("a flag i with a boolean", "flag_type", feature_flags={"agent-v2": {"t": "i", "v": True}})
payload("a flag i with text", "flag_type", feature_flags={"agent-v2": {"t": "i", "v": "1"}})
payload("jti a number", "jti_type", jti=7)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("code", "build"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
async def test_a_hostile_token_is_refused_with_its_own_code(
    code: str, build: Build, clock: ManualClock
) -> None:
    """Never another exception, and never so slow that it takes seconds."""
    text = build()
    await judge(good(), clock)

    with pytest.raises(TokenRefused) as refused:
        await judge(text, clock)

    reason, _, detail = code.rpartition("/")
    assert (refused.value.reason, refused.value.detail) == (reason or "token_invalid", detail)
    assert text[:200] not in f"{refused.value}" or not text


def test_there_are_enough_of_them() -> None:
    """At least ninety, each of a name of its own."""
    assert len({name for name, _, _ in HOSTILE}) == len(HOSTILE) >= 90


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, {}),
        ({}, {"typ": "jwt"}),
        ({}, {"typ": "at+jwt"}),
        ({}, {"typ": "application/at+jwt"}),
        ({}, {"typ": None}),
        ({}, {"x5t": "thumbprint"}),
        ({"aud": AUDIENCE}, {}),
        ({"nbf": NOW + 10}, {}),
        ({"iat": NOW + 10}, {}),
        ({"exp": NOW + 0.5}, {}),
        ({"scope": "read:kb", "scp": None}, {}),
        ({"application_properties": None, "feature_flags": None}, {}),
        ({"feature_flags": {"x": {"t": "z", "v": [1]}}}, {}),
        ({"sub": "anything"}, {}),
    ],
)
async def test_an_honest_token_is_accepted(changes: dict, head: dict, clock: ManualClock) -> None:
    """Strictness must not refuse what Kinde may well write."""
    decoded = await judge(make_token(claims(**changes), head), clock)

    assert decoded.org_code == "org_a"


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**63,
    "",
    "x",
    "\x7f",
    [],
    [[]],
    [None],
    {},
    {"v": None},
    {"t": {}},
]


async def test_no_odd_value_of_any_claim_raises_anything_else(clock: ManualClock) -> None:
    """Each claim and header parameter with each odd value: refused, or accepted where it does not matter."""
    for name in claims():
        for value in ODD:
            await refuse_or_accept(make_token(claims() | {name: value}), clock)
    for name in ("alg", "typ", "kid", "crit", "jwk", "x5c", "cty", "x"):
        for value in ODD:
            signed = f"{b64_json({'alg': 'RS256', 'typ': 'JWT', 'kid': 'k1'} | {name: value})}.e30"
            await refuse_or_accept(f"{signed}.AAAA", clock)
    for value in ODD:
        for place in ("application_properties", "feature_flags"):
            await refuse_or_accept(make_token(claims() | {place: {"x": value, "": value}}), clock)
            await refuse_or_accept(make_token(claims() | {place: {"x": {"t": "b", "v": value}}}), clock)


async def test_no_changed_letter_raises_anything_else(clock: ManualClock) -> None:
    """A good token with a letter changed, lost or doubled, at every seventh place: refused, always."""
    text = good()
    for at in range(0, len(text), 7):
        other = "B" if text[at] == "A" else "A"
        for changed in (
            text[:at] + other + text[at + 1 :],
            text[:at] + text[at + 1 :],
            text[:at] + text[at:] * 2,
        ):
            with pytest.raises(TokenRefused):
                await judge(changed, clock)


async def refuse_or_accept(text: str, clock: ManualClock) -> None:
    with suppress(TokenRefused):
        await judge(text, clock)
