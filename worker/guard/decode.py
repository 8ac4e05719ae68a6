"""Decode a verified payload into claims by the issuer's profile, and enforce org, client and scopes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from math import isfinite
from typing import Any

from .claims import Claims, Flag
from .errors import TokenRefused
from .profile import ClaimPath, Profile, is_texts

FLAG_TYPES = {
    **dict.fromkeys(("b", "boolean"), "boolean"),
    **dict.fromkeys(("s", "string"), "string"),
    **dict.fromkeys(("i", "n", "integer", "number"), "number"),
}


# Thousands of orgs have the same names, scopes and flags: they share the objects.
ON = Flag("boolean", True)
OFF = Flag("boolean", False)


@lru_cache(1024)
def _shared(scopes: frozenset[str]) -> frozenset[str]:
    return scopes


def decode(payload: Mapping[str, Any], profile: Profile) -> Claims:
    """The claims of a payload in the provider's layout. Verify the payload first.

    An absent claim is empty; absent times are 1970, which is long expired.

    Raises:
        TokenRefused: token_invalid; a claim has another type or shape than the provider gives it.
    """
    org_code = org_of(payload, profile)
    return Claims(
        org_code=org_code,
        client_id=client_of(payload, profile),
        scopes=_scopes(_at(payload, profile.scopes), profile, org_code),
        properties=_properties(_at(payload, profile.properties), profile),
        flags=_flags(_at(payload, profile.flags), profile),
        issued_at=_time(payload.get("iat")),
        expires_at=_time(payload.get("exp")),
        issuer=sys.intern(_text(payload.get("iss"), "iss_type")),
        jti=_text(payload.get("jti"), "jti_type") or None,
    )


def invalid(code: str, what: str) -> TokenRefused:
    """The refusal of an invalid token; `code` names the check that failed."""
    return TokenRefused("token_invalid", code, f"token refused: {what} ({code})")


def client_of(payload: Mapping[str, Any], profile: Profile) -> str:
    """The client that a payload was issued to, or empty; raises as `decode`."""
    return _text(_at(payload, profile.client), "client_type")


def _at(payload: Mapping[str, Any], path: ClaimPath) -> Any:
    """The value at a path of keys; None if a key is absent or the path empty."""
    value: Any = payload if path else None
    for key in path:
        if "{audience}" in key:
            key = key.replace("{audience}", _audience(payload))
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _audience(payload: Mapping[str, Any]) -> str:
    """The only audience of a payload, or empty."""
    audience = payload.get("aud")
    if isinstance(audience, list) and len(audience) == 1:
        audience = audience[0]
    return audience if isinstance(audience, str) else ""


def _text(value: Any, code: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise invalid(code, "a claim that must be text has another type")
    return value


def org_of(payload: Mapping[str, Any], profile: Profile) -> str:
    """The code of the org in a payload, or empty; raises as `decode`."""
    value = _at(payload, profile.org)
    if value is None:
        return "" if profile.org_shape == "prefixed" else _org_in_audience(payload, profile)
    if profile.org_shape == "text":
        return _text(value, "org_type")
    if profile.org_shape == "keys" and isinstance(value, Mapping):
        # Keycloak sends a list of names, or a map with the names as keys.
        value = list(value)
    if not is_texts(value):
        raise invalid("org_type", "its org is not in the provider's shape")
    if profile.org_shape == "prefixed":
        prefix = profile.org_prefix
        value = [item.removeprefix(prefix) for item in value if item.startswith(prefix)]
    if len(value) > 1:
        raise invalid("org_ambiguous", "it names several orgs")
    return str(value[0]) if value else ""


def _org_in_audience(payload: Mapping[str, Any], profile: Profile) -> str:
    """The org of a token whose audience is the org itself, as at Logto."""
    audience = _audience(payload)
    if profile.org_prefix and audience.startswith(profile.org_prefix):
        return audience.removeprefix(profile.org_prefix)
    return ""


def _scopes(value: Any, profile: Profile, org_code: str) -> frozenset[str]:
    if value is None:
        return frozenset()
    if profile.scopes_shape == "text" and isinstance(value, str):
        return _shared(frozenset(value.split(" ")) - {""})
    if profile.scopes_shape == "list" and is_texts(value):
        if profile.org_shape == "prefixed":
            value = [item for item in value if not item.startswith(profile.org_prefix)]
        return _shared(frozenset(value))
    if profile.scopes_shape == "orgs" and isinstance(value, Mapping):
        # A role that another org granted to this client does not count in its own org.
        return _shared(frozenset(name for name, orgs in value.items() if _grants(orgs, org_code)))
    raise invalid("scope_type", "its scopes are not in the provider's shape")


def _grants(orgs: Any, org_code: str) -> bool:
    if not isinstance(orgs, Mapping):
        raise invalid("scope_type", "one of its scopes does not name the orgs that granted it")
    return org_code in orgs


def _properties(value: Any, profile: Profile) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid("property_shape", "its properties are not in the provider's shape")
    if profile.properties_shape == "v":
        if not all(isinstance(entry, Mapping) and "v" in entry for entry in value.values()):
            raise invalid("property_shape", "one of its properties is not in the provider's shape")
        value = {name: entry["v"] for name, entry in value.items()}
    if not all(item is None or _type_of(item) for item in value.values()):
        raise invalid("property_shape", "one of its properties is neither text, number nor boolean")
    # Providers write null for a property that was never set.
    return {sys.intern(name): item for name, item in value.items() if item is not None}


def _flags(value: Any, profile: Profile) -> dict[str, Flag]:
    if value is None:
        return {}
    if profile.flags_shape == "names" and is_texts(value):
        return {sys.intern(name): ON for name in value}
    if profile.flags_shape == "names" or not isinstance(value, Mapping):
        raise invalid("flag_shape", "its flags are not in the provider's shape")
    read = _flag if profile.flags_shape == "t_v" else _plain_flag
    return {sys.intern(name): read(entry) for name, entry in value.items()}


def _flag(entry: Any) -> Flag:
    """A flag as `{t, v}`: `v` must have a known type `t`; a flag of an unknown type is kept unchanged."""
    if not isinstance(entry, Mapping) or "v" not in entry or not isinstance(entry.get("t"), str):
        raise invalid("flag_shape", "one of its flags is not in the provider's shape")
    kind, value = FLAG_TYPES.get(entry["t"]), entry["v"]
    if kind is None:
        return Flag(entry["t"], value)
    if kind != _type_of(value):
        raise invalid("flag_type", "the value of a flag does not have the flag's type")
    return _known_flag(kind, value)


def _plain_flag(value: Any) -> Flag:
    kind = _type_of(value)
    if not kind:
        raise invalid("flag_shape", "one of its flags is neither boolean, text nor number")
    return _known_flag(kind, value)


def _known_flag(kind: str, value: Any) -> Flag:
    return Flag(kind, value) if kind != "boolean" else ON if value else OFF


def _type_of(value: Any) -> str:
    """boolean, string, number, or an empty text for anything else."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, int | float) and isfinite(value) else ""


def _time(value: Any) -> datetime:
    value = 0 if value is None else value
    try:
        if _type_of(value) == "number":
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise invalid("time_type", "one of its times is not a number of seconds")


def enforce(
    claims: Claims,
    *,
    org_code: str,
    client_id: str | None,
    scopes: Iterable[str] = (),
    properties: Iterable[str] = (),
) -> None:
    """Compare a verified token with what the run requires, byte for byte.

    `client_id` is None only if the caller cannot know it, such as an API behind the
    guard. Additional scopes of the token are allowed.

    Raises:
        TokenRefused: org_mismatch, client_mismatch, scope_missing or property_missing; for the last
            two, `detail` names the first missing one.
    """
    # An empty code or client never matches, whatever the other side is.
    if not claims.org_code:
        raise TokenRefused("org_mismatch", "org_missing", f"the token names no org, not {org_code}")
    if claims.org_code != org_code:
        # Short, and without anything that a terminal would obey.
        other = repr(claims.org_code[:64])
        message = f"the token is for the org {other}, not for {org_code}"
        raise TokenRefused("org_mismatch", "other_org", message)
    if client_id is not None and (not claims.client_id or claims.client_id != client_id):
        raise TokenRefused(
            "client_mismatch",
            "other_client" if claims.client_id else "client_missing",
            f"the token was issued to another client than {org_code}'s",
        )
    if missing := frozenset(scopes).difference(claims.scopes):
        scope = min(missing)
        raise TokenRefused("scope_missing", scope, f"the token of {org_code} lacks the scope {scope}")
    if absent := frozenset(properties).difference(claims.properties):
        name = min(absent)
        raise TokenRefused("property_missing", name, f"the token of {org_code} lacks the property {name}")
