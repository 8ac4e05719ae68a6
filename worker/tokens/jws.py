"""A signed token taken apart, strictly: JWS compact serialisation, RFC 7515, section 7.1."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from worker.errors import TokenRefused
from worker.tokens.strict_json import Malformed, loads

MAX_TOKEN = 16 * 1024
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of a token, none of which is verified."""

    header: Mapping[str, Any] = field(repr=False)
    payload: Mapping[str, Any] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def invalid(code: str, what: str) -> TokenRefused:
    """A token that is refused as invalid, for a reason with a code of its own."""
    return TokenRefused("token_invalid", code, f"token refused: {what} ({code})")


def parse(text: str) -> Parsed:
    """Take a token apart, and refuse what is no plain JWS of two JSON objects.

    Raises:
        TokenRefused: token_invalid, with one of the codes oversize, parts, base64url, signature_missing,
            header, payload, json, duplicate_member, depth, members, number, text.
    """
    if len(text) > MAX_TOKEN:
        raise invalid("oversize", "it is larger than 16 KiB")
    parts = text.split(".")
    if len(parts) != 3:
        raise invalid("parts", "it has not three parts")
    header, payload, signature = (decode_base64url(part) for part in parts)
    if header is None or payload is None or signature is None:
        raise invalid("base64url", "a part of it is no unpadded base64url")
    if not signature:
        raise invalid("signature_missing", "it is not signed")
    return Parsed(
        header=_json_object(header, "header"),
        payload=_json_object(payload, "payload"),
        signed=text.rpartition(".")[0].encode("ascii"),
        signature=signature,
    )


def decode_base64url(text: str) -> bytes | None:
    """The bytes of unpadded base64url (RFC 7515, section 2), or None.

    Each text has one way to be written: leftover bits must be zero, else one token
    would have many texts.
    """
    if not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        return None
    decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return decoded if encode_base64url(decoded) == text else None


def encode_base64url(raw: bytes) -> str:
    """Unpadded base64url (RFC 7515, section 2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _json_object(raw: bytes, part: str) -> Mapping[str, Any]:
    try:
        value = loads(raw)
    except Malformed as fault:
        raise invalid(fault.code, f"its {part} is no JSON that can be trusted") from None
    if not isinstance(value, dict):
        raise invalid(part, f"its {part} is no JSON object")
    return value
