"""A client that proves itself with a private key: private_key_jwt, RFC 7523, section 2.2."""

from __future__ import annotations

import secrets
from datetime import datetime

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from worker.errors import CredentialsRejected
from worker.tokens.credentials import Credential
from worker.tokens.issuer import Issuer

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
