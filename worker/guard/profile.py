"""Profile: the token requests of one identity provider, and the layout of its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigurationError

ClaimPath = tuple[str, ...]
FailureClass = Literal["credential", "configuration", "throttle", "transient"]

# Only public-key algorithms: a shared key would let each verifier sign (RFC 8725, section 3.1).
ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
STANDARD_ERRORS: Mapping[str, FailureClass] = {
    "invalid_client": "credential",
    "unauthorized_client": "configuration",
    "invalid_request": "configuration",
    "invalid_grant": "credential",
    "invalid_scope": "configuration",
    "invalid_target": "configuration",
    "access_denied": "configuration",
    "unsupported_grant_type": "configuration",
    "slow_down": "throttle",
    "temporarily_unavailable": "transient",
    "server_error": "transient",
}


_SHIPPED = Path(__file__).with_name("profiles")


@dataclass(frozen=True, slots=True)
class Profile:
    """What one provider's token endpoint takes and what its tokens look like.

    A claim's path is a list of keys, empty if the provider has no such claim; `{audience}`
    in a key is the token's audience, in `parameters` the requested one. An endpoint's path is
    relative to the issuer's URL; an empty one is discovered. `org_prefix` precedes the org in
    the `prefixed` item of a list, else in `aud` if no other claim names the org. `login_org` is
    the claim of a person's ID token with a list of orgs, where that is another one than `org`.
    """

    name: str
    title: str
    org_asserted_by: Literal["client", "grant", "caller"]
    issuer_suffix: str = ""
    discovery: str = "/.well-known/openid-configuration"
    token: str = ""
    keys: str = ""

    client_authentication: Literal["post", "basic", "private_key_jwt"] = "post"
    assertion_audience: Literal["token_endpoint", "issuer"] = "token_endpoint"
    assertion_type: str = "JWT"
    audience_parameter: str = ""
    org_parameter: str = ""
    ask_scopes: bool = True
    parameters: Mapping[str, str] = field(default_factory=dict)
    logout_parameter: str = "post_logout_redirect_uri"
    login_org_parameter: str = ""
    reset_headers: tuple[str, ...] = ("RateLimit-Reset", "X-RateLimit-Reset")
    errors: Mapping[str, FailureClass] = field(default_factory=lambda: STANDARD_ERRORS)

    algorithms: frozenset[str] = frozenset({"RS256"})
    types: frozenset[str] = frozenset({"jwt", "at+jwt"})
    type_required: bool = False
    max_lifetime: timedelta = timedelta(days=1)
    leeway: timedelta = timedelta(seconds=30)

    org: ClaimPath = ()
    org_shape: Literal["text", "list", "keys", "prefixed"] = "text"
    org_prefix: str = ""
    login_org: ClaimPath = ()
    client: ClaimPath = ()
    scopes: ClaimPath = ("scope",)
    scopes_shape: Literal["text", "list", "orgs"] = "text"
    properties: ClaimPath = ()
    properties_shape: Literal["v", "plain"] = "plain"
    flags: ClaimPath = ()
    flags_shape: Literal["t_v", "plain", "names"] = "plain"


@cache
def load(name: str) -> Profile:
    """The built-in profile of that name, or one in a TOML file if `name` is a path.

    Raises ConfigurationError if it does not exist, or a key or value is invalid.
    """
    is_path, known = "/" in name or name.endswith(".toml"), ", ".join(shipped())
    if not is_path and name not in shipped():
        fix = f"name one of {known}, or the path of your own TOML file"
        raise ConfigurationError(f"unknown profile {name!r}", fix=fix)
    try:
        text = (Path(name) if is_path else _SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"the profile {name} cannot be read: {error.strerror}",
            fix=f"name a readable file, or one of {known}",
        ) from error
    return parse(text, source=name)


@cache
def shipped() -> tuple[str, ...]:
    """The names of the built-in profiles."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.toml")))


def parse(text: str, *, source: str) -> Profile:
    """The profile in a TOML text; `source` names it in errors. Raises as `load` does."""
    import tomllib

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            f"the profile {source} is not valid TOML: {error}", fix="correct it there"
        ) from error
    values = {key: _read(key, value, source) for key, value in data.items()}
    missing = [key for key in ("name", "title", "org_asserted_by", "org", "client") if not values.get(key)]
    if missing:
        raise ConfigurationError(f"the profile {source} lacks {', '.join(missing)}", fix=_SEE)
    profile = Profile(**values)
    if profile.org_asserted_by == "caller":
        raise ConfigurationError(
            f"the profile {source} does not separate orgs: its callers choose the org themselves",
            fix="use a claim that the provider binds to the client or to its grants",
        )
    if profile.org_shape == "prefixed" and not profile.org_prefix:
        raise ConfigurationError(f'{source}: org_shape "prefixed" needs an org_prefix', fix=_SEE)
    if not profile.algorithms or not profile.algorithms <= ALGORITHMS:
        raise ConfigurationError(
            f"the profile {source} names unsupported algorithms",
            fix=f"algorithms must be some of {', '.join(sorted(ALGORITHMS))}",
        )
    if not profile.max_lifetime > timedelta() or not timedelta() <= profile.leeway <= timedelta(minutes=5):
        raise ConfigurationError(
            f"the profile {source} needs a max_lifetime above 0 and a leeway between 0s and 5m", fix=_SEE
        )
    return profile


_SEE = "the documentation's page Any other provider explains each key of a profile"
_TYPES = get_type_hints(Profile)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _read(key: str, value: Any, source: str) -> Any:
    """One value of the file, converted to the type of its field."""
    if key not in _TYPES:
        raise ConfigurationError(f"{source}: unknown key {key!r}", fix=_SEE)
    read, fix = _converted(key, value), _SEE
    if get_origin(_TYPES[key]) is Literal:
        choices = get_args(_TYPES[key])
        read, fix = value if value in choices else None, f"use one of {', '.join(choices)}"
    if read is None:
        raise ConfigurationError(f"{source}: {key} cannot be {value!r}", fix=fix)
    return read


def _converted(key: str, value: Any) -> Any:
    """The value as its field's type, or None if it does not fit."""
    kind = _TYPES[key]
    if kind in (str, bool):
        return value if isinstance(value, kind) else None
    if kind is timedelta and isinstance(value, str):
        found = re.fullmatch(r"(\d{1,6})([smhd])", value)
        return timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else None
    if kind == tuple[str, ...] and is_texts(value):
        return tuple(value)
    if kind == frozenset[str] and is_texts(value):
        return frozenset(item.lower() if key == "types" else item for item in value)
    if key == "parameters" and isinstance(value, dict) and is_texts(list(value.values())):
        return value
    if key == "errors" and isinstance(value, dict):
        known = all(each in get_args(FailureClass) for each in value.values())
        return {**STANDARD_ERRORS, **value} if known else None
    return None


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
