"""Decode a verified payload into claims by the issuer's profile, and enforce org, client and scopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from worker.claims.claims import Claims, Flag
from worker.errors import TokenRefused
from worker.providers.profile import ClaimPath, Profile

FLAG_TYPES = {
    "b": "boolean",
    "boolean": "boolean",
    "s": "string",
    "string": "string",
    "i": "number",
    "n": "number",
    "integer": "number",
    "number": "number",
}


def decode(payload: Mapping[str, Any], profile: Profile) -> Claims:
    """What the payload says of an org, in the provider's own layout.

    An absent claim is empty; absent instants are 1970, which is long expired. The
    payload must have been verified: nothing here makes it true.

    Raises:
        TokenRefused: token_invalid; a claim has another type or shape than the provider gives it.
    """
    return Claims(
        org_code=_org(payload, profile),
        client_id=_text(_at(payload, profile.client), "client_type"),
        scopes=_scopes(_at(payload, profile.scopes), profile),
        properties=_properties(_at(payload, profile.properties), profile),
        flags=_flags(_at(payload, profile.flags), profile),
        issued_at=_instant(payload.get("iat")),
        expires_at=_instant(payload.get("exp")),
        issuer=_text(payload.get("iss"), "iss_type"),
        jti=_text(payload.get("jti"), "jti_type") or None,
    )


def _invalid(code: str, what: str) -> TokenRefused:
    return TokenRefused("token_invalid", code, f"token refused: {what} ({code})")


def _at(payload: Mapping[str, Any], path: ClaimPath) -> Any:
    """The value at a path of keys; None where a key is absent, or the provider has no such claim."""
    value: Any = payload if path else None
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any, code: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _invalid(code, "a claim that must be text is something else")
    return value


def _org(payload: Mapping[str, Any], profile: Profile) -> str:
    value = _at(payload, profile.org)
    if value is None:
        return _org_in_audience(payload, profile)
    if profile.org_shape == "text":
        return _text(value, "org_type")
    if profile.org_shape == "keys" and isinstance(value, Mapping):
        # Keycloak: a list of names, or a map whose keys they are.
        value = list(value)
    if not _is_texts(value):
        raise _invalid("org_type", "its org is not in the provider's shape")
    if len(value) > 1:
        raise _invalid("org_ambiguous", "it names several orgs")
    return str(value[0]) if value else ""


def _org_in_audience(payload: Mapping[str, Any], profile: Profile) -> str:
    """The org of a token whose audience is the org itself, as Logto has it."""
    audience = payload.get("aud")
    if isinstance(audience, list) and len(audience) == 1:
        audience = audience[0]
    if profile.org_prefix and isinstance(audience, str) and audience.startswith(profile.org_prefix):
        return audience.removeprefix(profile.org_prefix)
    return ""


def _scopes(value: Any, profile: Profile) -> frozenset[str]:
    if value is None:
        return frozenset()
    if profile.scopes_shape == "text" and isinstance(value, str):
        return frozenset(value.split(" ")) - {""}
    if profile.scopes_shape == "list" and _is_texts(value):
        return frozenset(value)
    raise _invalid("scope_type", "its scopes are not in the provider's shape")


def _properties(value: Any, profile: Profile) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _invalid("property_shape", "its properties are not in the provider's shape")
    if profile.properties_shape == "v":
        if not all(isinstance(entry, Mapping) and "v" in entry for entry in value.values()):
            raise _invalid("property_shape", "a property of it is not in the provider's shape")
        value = {name: entry["v"] for name, entry in value.items()}
    if not all(_is_plain(item) for item in value.values()):
        raise _invalid("property_shape", "a property of it is neither text, number nor boolean")
    # Null is how a provider writes a property that was never set.
    return {name: item for name, item in value.items() if item is not None}


def _flags(value: Any, profile: Profile) -> dict[str, Flag]:
    if value is None:
        return {}
    if profile.flags_shape == "names":
        if not _is_texts(value):
            raise _invalid("flag_shape", "its flags are not in the provider's shape")
        return {name: Flag("boolean", True) for name in value}
    if not isinstance(value, Mapping):
        raise _invalid("flag_shape", "its flags are not in the provider's shape")
    read = _flag if profile.flags_shape == "t_v" else _plain_flag
    return {name: read(entry) for name, entry in value.items()}


def _flag(entry: Any) -> Flag:
    """A flag as `{t, v}`: of a known type, `v` must be of it; of an unknown one it is kept as it is."""
    if not isinstance(entry, Mapping) or "v" not in entry or not isinstance(entry.get("t"), str):
        raise _invalid("flag_shape", "a flag of it is not in the provider's shape")
    kind, value = FLAG_TYPES.get(entry["t"]), entry["v"]
    if kind is None:
        return Flag(entry["t"], value)
    if not _TYPED[kind](value):
        raise _invalid("flag_type", "the value of a flag is not of the flag's type")
    return Flag(kind, value)


def _plain_flag(value: Any) -> Flag:
    for kind, fits in _TYPED.items():
        if fits(value):
            return Flag(kind, value)
    raise _invalid("flag_shape", "a flag of it is neither boolean, text nor number")


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPED: Mapping[str, Callable[[Any], bool]] = {
    "boolean": _is_boolean,
    "string": _is_text,
    "number": _is_number,
}


def _is_plain(value: Any) -> bool:
    return value is None or _is_boolean(value) or _is_text(value) or _is_number(value)


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, str) for item in value)
    )


def _instant(value: Any) -> datetime:
    if value is None:
        value = 0
    try:
        if _is_number(value):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise _invalid("time_type", "an instant of it is no number of seconds")


def enforce(
    claims: Claims,
    *,
    org_code: str,
    client_id: str | None,
    scopes: Iterable[str] = (),
    properties: Iterable[str] = (),
) -> None:
    """Compare what a verified token says with what the run needs, byte for byte.

    `client_id` is None only where whoever checks cannot know it, as an API behind
    the guard. Scopes the token has beyond the needed ones do not matter.

    Raises:
        TokenRefused: org_mismatch, client_mismatch, scope_missing or property_missing; for the last
            two, `detail` names the first one that is missing.
    """
    # An empty code or client never holds, whatever the other side is.
    if not claims.org_code:
        raise TokenRefused("org_mismatch", "org_missing", f"the token names no org, not {org_code}")
    if claims.org_code != org_code:
        raise TokenRefused(
            "org_mismatch",
            "other_org",
            f"the token is for the org {_shown(claims.org_code)}, not for {org_code}",
        )
    if client_id is not None and (not claims.client_id or claims.client_id != client_id):
        raise TokenRefused(
            "client_mismatch",
            "other_client" if claims.client_id else "client_missing",
            f"the token was issued to another client than {org_code}'s",
        )
    if missing := frozenset(scopes) - claims.scopes:
        scope = min(missing)
        raise TokenRefused("scope_missing", scope, f"the token of {org_code} lacks the scope {scope}")
    if absent := frozenset(properties) - claims.properties.keys():
        name = min(absent)
        raise TokenRefused("property_missing", name, f"the token of {org_code} lacks the property {name}")


def _shown(text: str) -> str:
    """A claim as a message may show it: short, and nothing that a terminal would obey."""
    return repr(text[:64])
