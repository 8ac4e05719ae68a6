"""Verification with each algorithm, and keys that must fit it."""

from __future__ import annotations

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE, URL, b64, jwk, kinde_issuer, profile, rsa_key
from worker.errors import TokenRefused
from worker.guard.jwks import read_key, read_keys
from worker.guard.verify import Key, verify

CURVES = {
    "ES256": ("P-256", ec.SECP256R1()),
    "ES384": ("P-384", ec.SECP384R1()),
    "ES512": ("P-521", ec.SECP521R1()),
}
ALL = frozenset(["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA", *CURVES])


def pair(algorithm: str) -> tuple[Any, dict[str, Any]]:
    """A private key for an algorithm, and the public one as a key set has it."""
    if algorithm in CURVES:
        name, curve = CURVES[algorithm]
        private = ec.generate_private_key(curve)
        numbers = private.public_key().public_numbers()
        size = (curve.key_size + 7) // 8
        x, y = (b64(number.to_bytes(size, "big")) for number in (numbers.x, numbers.y))
        return private, {"kty": "EC", "kid": "k", "crv": name, "x": x, "y": y}
    if algorithm == "EdDSA":
        edwards = ed25519.Ed25519PrivateKey.generate()
        raw = edwards.public_key().public_bytes_raw()
        return edwards, {"kty": "OKP", "kid": "k", "crv": "Ed25519", "x": b64(raw)}
    return rsa_key("k1"), jwk(kid="k", alg=None)


class One:
    """A key set of one key."""

    def __init__(self, key: Key) -> None:
        self._key = key

    async def find(self, kid: str) -> Key:
        return self._key


async def judge(text: str, entry: dict[str, Any], clock: ManualClock) -> Any:
    key = read_key(entry, ALL)
    assert key is not None
    issuer = kinde_issuer(profile=profile(algorithms=ALL))
    return await verify(text, issuer=issuer, audience=AUDIENCE, keys=One(key), clock=clock)


def claims(clock: ManualClock) -> dict[str, Any]:
    now = int(clock.now().timestamp())
    return {"iss": URL, "aud": AUDIENCE, "iat": now, "exp": now + 60}


@pytest.mark.parametrize("algorithm", sorted(ALL))
async def test_each_algorithm_verifies_what_its_key_signed(algorithm: str, clock: ManualClock) -> None:
    """Signed by PyJWT, verified by us."""
    private, entry = pair(algorithm)
    text = jwt.encode(claims(clock), private, algorithm=algorithm, headers={"kid": "k"})

    assert (await judge(text, entry, clock))["iss"] == URL


@pytest.mark.parametrize("algorithm", sorted(ALL))
async def test_each_algorithm_refuses_another_key(algorithm: str, clock: ManualClock) -> None:
    """And a changed payload."""
    private, entry = pair(algorithm)
    text = jwt.encode(claims(clock), private, algorithm=algorithm, headers={"kid": "k"})
    head, _, signature = text.split(".")
    changed = jwt.encode(claims(clock) | {"x": 1}, private, algorithm=algorithm, headers={"kid": "k"})
    forged = f"{head}.{changed.split('.')[1]}.{signature}"

    with pytest.raises(TokenRefused) as refused:
        await judge(forged, entry, clock)
    assert refused.value.detail == "signature"


async def test_a_key_is_used_with_its_own_algorithm_only(clock: ManualClock) -> None:
    """An RSA key said to be for RS256 verifies no PS256."""
    text = jwt.encode(claims(clock), rsa_key("k1"), algorithm="PS256", headers={"kid": "k"})

    with pytest.raises(TokenRefused) as refused:
        await judge(text, jwk(kid="k"), clock)
    assert refused.value.detail == "key_algorithm"


def test_a_key_of_a_curve_is_for_that_curves_algorithm() -> None:
    """P-256 is ES256 and nothing else (RFC 7518, section 3.4)."""
    _, entry = pair("ES256")
    key = read_key(entry, ALL)

    assert key is not None and key.algorithms == {"ES256"}
    assert read_key(entry | {"alg": "ES384"}, ALL) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"x": "AQ", "y": "AQ"},
        {"crv": "secp256k1"},
        {"crv": ["P-256"]},
        {"crv": None},
        {"x": 7},
        {"kty": "oct"},
        {"kty": ["EC"]},
        {"use": "enc"},
        {"key_ops": "verify"},
        {"kid": 7},
        {"kid": ""},
    ],
    ids=str,
)
def test_a_key_that_cannot_be_used_is_passed_over(changes: dict) -> None:
    """A point off the curve, an unknown curve, another use: never an exception."""
    _, entry = pair("ES256")

    assert read_key(entry | changes, ALL) is None


def test_a_key_listed_twice_is_one_key() -> None:
    """Only two different ones make a kid ambiguous."""
    assert list(read_keys([jwk(), jwk()], ALL)) == ["k1"]
    assert read_keys([jwk(), jwk("k2", kid="k1")], ALL) == {}


async def test_a_profile_that_needs_the_type_refuses_a_token_without_it(clock: ManualClock) -> None:
    """RFC 9068: at+jwt, always."""
    strict = kinde_issuer(profile=profile(types=frozenset({"at+jwt"}), type_required=True))
    key = read_key(jwk(), ALL)
    assert key is not None
    for head in ({"typ": None}, {"typ": "JWT"}):
        text = jwt.encode(claims(clock), rsa_key("k1"), algorithm="RS256", headers={"kid": "k1"} | head)
        with pytest.raises(TokenRefused) as refused:
            await verify(text, issuer=strict, audience=AUDIENCE, keys=One(key), clock=clock)
        assert refused.value.detail == "type"
