"""What is in force for a definition: each key's value, and where the value comes from. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.model.definitions import MAX_ATTEMPTS, TIMEOUT
from worker.model.definitions.definition import from_spec, values_of
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.definitions.units import format_duration

Source = Literal["definition", "template", "handler", "org", "issuer", "default"]

GROUPS: Mapping[str, tuple[str, ...]] = {
    "What runs": ("handler", "params", "params_by_hand", "variants", "enabled"),
    "When": (
        *("schedule", "timezone", "spread", "starts_at", "ends_at", "overlap", "misfire", "misfire_grace"),
        *("misfire_within", "misfire_limit", "start_deadline", "done_by", "done_within", "calendar"),
    ),
    "Limits and retries": (
        *("timeout", "cancel_grace", "max_attempts", "retry_backoff", "retry_backoff_max", "max_recoveries"),
        *("pause_after_failures", "max_concurrent", "parked_counts", "priority", "memory", "isolation"),
        "pool",
    ),
    "Token and claims": (
        *("scopes", "audience", "requires_flag", "requires_properties", "max_claims_age", "api_origins"),
        *("api_base_url", "egress", "audiences", "reveal_token", "meter_usage"),
    ),
    "Model requests": ("model_requests", "batch_until", "batch_within"),
}
# What no value means, for keys whose default is not in the handler.
_WITHOUT: Mapping[str, tuple[Any, Source]] = {
    "timezone": ("UTC", "default"),
    "scopes": ([], "default"),
    "audience": ("the issuer's", "issuer"),
    "api_origins": ("the issuer's", "issuer"),
    "api_base_url": ("the issuer's", "issuer"),
    "egress": ("not listed", "default"),
    "audiences": ([], "default"),
    "timeout": (format_duration(TIMEOUT), "default"),
    "max_attempts": (MAX_ATTEMPTS, "default"),
    "isolation": ("child", "default"),
    "pool": (DEFAULT_POOL, "default"),
    "misfire_within": ("one period, at least 1h", "default"),
    "start_deadline": ("one period, at least 1h", "default"),
}
# Keys whose default is the handler's value.
_OF_HANDLER = ("scopes", "timeout", "max_attempts", "isolation", "memory", "pool", "egress", "audiences")
# What the handler has where it says nothing; an empty egress says that nothing is reached.
_NOTHING: Mapping[str, Any] = {"scopes": [], "audiences": []}


@dataclass(frozen=True, slots=True)
class Effective:
    """A key of a definition: its value as in a file (None for nothing), and where that comes from."""

    key: str
    value: Any
    source: Source


def effective(
    spec: Mapping[str, Any],
    *,
    enabled: bool,
    is_of_template: bool = False,
    handler: Mapping[str, Any] | None = None,
    org_timezone: str | None = None,
    org_pool: str | None = None,
) -> dict[str, list[Effective]]:
    """The value in force of each key, by group.

    `handler` is the handler's row of the catalogue, if it is known.

    Raises:
        DefinitionError: this version cannot read the spec.
    """
    values = values_of(from_spec("", "", spec, enabled=enabled))
    own: Source = "template" if is_of_template else "definition"

    def one(key: str) -> Effective:
        if key in spec or (key == "enabled" and not enabled):
            return Effective(key, values[key], own)
        if key == "timezone" and org_timezone:
            return Effective(key, org_timezone, "org")
        if key in _OF_HANDLER and handler is not None and handler[key] not in (None, _NOTHING.get(key)):
            return Effective(key, handler[key], "handler")
        if key == "pool" and org_pool:
            return Effective(key, org_pool, "org")
        if values[key] is None and key in _WITHOUT:
            return Effective(key, *_WITHOUT[key])
        return Effective(key, values[key], "default")

    return {name: [one(key) for key in keys] for name, keys in GROUPS.items()}
