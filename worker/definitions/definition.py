"""Conditions on feature flags: what a definition requires, and which variant of its handler runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from worker.clock import to_text
from worker.definitions import fields
from worker.definitions.fields import Fields, refusal, text
from worker.definitions.policies import (
    CANCEL_GRACE,
    MAX_ATTEMPTS,
    MAX_RECOVERIES,
    MISFIRE_GRACE,
    MISFIRE_LIMIT,
    MISFIRE_MODES,
    OVERLAPS,
    RETRY_BACKOFF,
    RETRY_BACKOFF_MAX,
    TIMEOUT,
    MisfireMode,
    MisfirePolicy,
    Overlap,
    RetryPolicy,
)
from worker.definitions.triggers import Trigger, parse_schedule
from worker.definitions.units import format_duration, format_memory, parse_duration
from worker.definitions.zones import parse_zone
from worker.errors import InvalidTrigger


@dataclass(frozen=True, slots=True)
class FlagCondition:
    """Holds where the flag `name` has the value `equals`; an absent flag is off."""

    name: str
    equals: Any = True


@dataclass(frozen=True, slots=True)
class Variant:
    """The handler that runs instead of the definition's where `flag` holds."""

    flag: FlagCondition
    handler: str


def read_flag(value: Any) -> FlagCondition:
    """`"agent-v2"`, or `{ flag = "model", equals = "new" }`; ValueError for anything else."""
    if isinstance(value, str):
        return FlagCondition(text(value))
    if not isinstance(value, Mapping) or not {"flag"} <= set(value) <= {"flag", "equals"}:
        raise ValueError('a flag is expected: "agent-v2", or { flag = "model", equals = "new" }')
    return _condition(value)


def read_variants(value: Any) -> tuple[Variant, ...]:
    """A list of `{ flag = "agent-v2", handler = "acme.digest_v2" }`; ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError('a list is expected: [{ flag = "agent-v2", handler = "acme.digest_v2" }]')
    found = []
    for item in value:
        keys = set(item) if isinstance(item, Mapping) else set()
        if not {"flag", "handler"} <= keys <= {"flag", "equals", "handler"}:
            raise ValueError('a variant is written { flag = "agent-v2", handler = "acme.digest_v2" }')
        found.append(Variant(_condition(item), text(item["handler"])))
    return tuple(found)


def write_flag(condition: FlagCondition) -> Any:
    """The shortest form that `read_flag` gives back."""
    return condition.name if condition.equals is True else _written(condition)


def write_variants(variants: tuple[Variant, ...]) -> list[dict[str, Any]]:
    """The form that `read_variants` gives back."""
    return [_written(variant.flag) | {"handler": variant.handler} for variant in variants]


def _condition(value: Mapping[str, Any]) -> FlagCondition:
    equals = value.get("equals", True)
    if not isinstance(equals, bool | str | int | float):
        raise ValueError("equals is true, false, a text or a number")
    return FlagCondition(text(value["flag"]), equals)


def _written(condition: FlagCondition) -> dict[str, Any]:
    written: dict[str, Any] = {"flag": condition.name}
    return written if condition.equals is True else written | {"equals": condition.equals}


Spread = Literal["auto", "off"] | timedelta
_MOMENT = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Definition:
    """One definition of one org; None means the handler's, the org's or no value, as documented.

    `memory` is in bytes; `starts_at` is inclusive, `ends_at` exclusive.
    """

    org: str
    """The org's code. A template has `orgs` instead."""
    name: str
    """Unique within the org; at most 200 characters, no slash."""
    handler: str
    """What runs: a name as `handlers list` prints it."""
    schedule: str
    """When: `0 3 * * *`, `@hourly`, `every 15m`, `at 2027-01-01T08:00:00Z`."""
    timezone: str | None = None
    """The IANA zone of crontab lines and `@…`; else the org's, else UTC."""
    scopes: frozenset[str] | None = None
    """The scopes that the token is asked for and must have; else the handler's."""
    audience: str | None = None
    """The audience that the token is asked for and must have; else the issuer's."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The handler's params, checked against its schema when the file is applied."""
    params_by_hand: tuple[str, ...] = ()
    """Params that an org may give when it runs the definition by hand; operators may give any."""
    requires_flag: FlagCondition | None = None
    """A flag without which a run is `skipped(flag_off)`: a name, or `{ flag, equals }`."""
    requires_properties: tuple[str, ...] = ()
    """Properties without which a run is `refused(property_missing)`."""
    variants: tuple[Variant, ...] = ()
    """`[{ flag, equals, handler }]`: the first whose flag holds runs instead of `handler`."""
    overlap: Overlap = "skip"
    """`skip`, `queue_one`, `replace` or `allow`: what an instant meets while a run is unfinished."""
    misfire: MisfireMode = "once"
    """`once`, `skip` or `all`: what runs of the instants that were missed."""
    misfire_grace: timedelta = MISFIRE_GRACE
    """An instant first seen later than this is missed."""
    misfire_within: timedelta | None = None
    """Missed instants older than this never run; default one period, at least `1h`."""
    misfire_limit: int = MISFIRE_LIMIT
    """How many missed instants `all` runs at most: the newest."""
    start_deadline: timedelta | None = None
    """A scheduled run whose handler has not started by then is `skipped(expired)`; default the distance to
    the next instant, at least `1h`.
    """
    timeout: timedelta | None = None
    """How long an attempt may take; else the handler's, else `1h`."""
    cancel_grace: timedelta = CANCEL_GRACE
    """How long a handler has, after it was asked to stop, before the kill."""
    max_attempts: int | None = None
    """Attempts that may fail, time out or ask for a retry; else the handler's, else 3."""
    retry_backoff: timedelta = RETRY_BACKOFF
    """The longest delay before the second attempt; it doubles with each one after."""
    retry_backoff_max: timedelta = RETRY_BACKOFF_MAX
    """The most that it doubles to."""
    max_recoveries: int = MAX_RECOVERIES
    """How often its worker may die without a new checkpoint, before the run is `failed(lost)`."""
    isolation: Literal["child", "inline"] | None = None
    """`child` or `inline`; else the handler's. `inline` needs the operator's word."""
    memory: int | None = None
    """The cap on a run's memory, such as `512MiB`; else the handler's, else none."""
    priority: int = 0
    """Among the waiting runs of its org the higher starts first."""
    max_concurrent: int | None = None
    """Its runs at once, over all workers."""
    spread: Spread = "auto"
    """How far the firing is spread: `auto`, `off` or a duration."""
    pause_after_failures: int | None = None
    """So many runs failed or refused, one after the other, pause the definition."""
    starts_at: datetime | None = None
    """Nothing is due before this instant."""
    ends_at: datetime | None = None
    """Nothing is due from this instant on."""
    max_claims_age: timedelta | None = None
    """A token older than this is renewed before a run; at least `60s`."""
    api_origins: tuple[str, ...] | None = None
    """Where `ctx.http` sends the token; else the issuer's. `http://` only for loopback addresses and for
    `[execution] insecure_origins`.
    """
    enabled: bool = True
    """While false nothing is due."""

    @property
    def serial(self) -> bool:
        """Whether at most one unfinished run may be on (beside one held back)."""
        return self.overlap != "allow"

    @property
    def misfire_policy(self) -> MisfirePolicy:
        return MisfirePolicy(self.misfire, self.misfire_grace, self.misfire_within, self.misfire_limit)

    @property
    def handlers(self) -> tuple[str, ...]:
        """Every handler that an attempt may choose, the definition's own first."""
        return tuple(dict.fromkeys((self.handler, *(variant.handler for variant in self.variants))))

    def retry_policy(self, handler_max_attempts: int | None = None) -> RetryPolicy:
        """The retry policy, given what the handler says where the definition does not."""
        attempts = self.max_attempts or handler_max_attempts or MAX_ATTEMPTS
        return RetryPolicy(attempts, self.retry_backoff, self.retry_backoff_max, self.max_recoveries)

    def timeout_or(self, handler_timeout: timedelta | None) -> timedelta:
        """The timeout: the definition's, else the handler's, else an hour."""
        return self.timeout or handler_timeout or TIMEOUT

    def trigger(self, org_timezone: str | None = None) -> Trigger:
        """The trigger in the definition's zone, else the org's, else UTC.

        Raises:
            InvalidTrigger: the schedule or the zone cannot be read.
        """
        zone = parse_zone(self.timezone or org_timezone or "UTC")
        return parse_schedule(self.schedule, zone, starts_at=self.starts_at, ends_at=self.ends_at)


def parse_definition(values: Mapping[str, Any], *, entry: str) -> Definition:
    """The definition that an entry of a file describes, with its schedule and zone checked.

    Raises:
        DefinitionError: names entry and field of an unknown key or a value that does not fit.
        InvalidTrigger: likewise, of a schedule or zone.
    """
    reader = Fields(values, entry)
    reader.only(["org", "name", "enabled", *_KEYS])
    definition = _read(
        reader,
        org=reader.take("org", fields.name),
        name=reader.take("name", fields.name),
        enabled=reader.take("enabled", fields.boolean, True),
    )
    if definition.starts_at and definition.ends_at and definition.ends_at <= definition.starts_at:
        raise refusal("ends_at is not after starts_at", entry, "ends_at")
    try:
        definition.trigger()
    except InvalidTrigger as error:
        problem = f"{entry}, {error.field}: {error.message}" if entry else error.message
        raise InvalidTrigger(problem, entry=entry, field=error.field, fix=error.fix) from error
    return definition


def from_spec(org: str, name: str, spec: Mapping[str, Any], *, enabled: bool = True) -> Definition:
    """The definition that a stored revision describes.

    Raises:
        DefinitionError: this version does not understand the spec.
    """
    reader = Fields(spec, f"definition {org}/{name}")
    reader.only(_KEYS)
    return _read(reader, org=org, name=name, enabled=enabled)


def to_spec(definition: Definition) -> dict[str, Any]:
    """The canonical JSON-able spec: the keys that differ from their defaults, without org, name, enabled."""
    spec = {}
    for key, form in _KEYS.items():
        value = getattr(definition, key)
        if key not in _DEFAULTS or value != _DEFAULTS[key]:
            spec[key] = form.write(value)
    return spec


def _read(reader: Fields, *, org: str, name: str, enabled: bool) -> Definition:
    handler, schedule = reader.take("handler", fields.text), reader.take("schedule", fields.text)
    given = {key: reader.take(key, _KEYS[key].read) for key in reader.given(_OPTIONAL)}
    return Definition(org, name, handler, schedule, enabled=enabled, **given)


def _spread(value: Any) -> Spread:
    if value in ("auto", "off"):
        return "auto" if value == "auto" else "off"
    return parse_duration(value)


class _Form(NamedTuple):
    """How a key is read from a file or a spec, and written into one."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _duration(least: timedelta = timedelta(0), *, what: str = "") -> _Form:
    return _Form(fields.duration(least, what=what), format_duration)


_KEYS: dict[str, _Form] = {
    "handler": _Form(fields.text),
    "schedule": _Form(fields.text),
    "timezone": _Form(fields.text),
    "scopes": _Form(lambda value: frozenset(fields.texts(value)), sorted),
    "audience": _Form(fields.text),
    "params": _Form(fields.json_table, dict),
    "params_by_hand": _Form(fields.texts, list),
    "requires_flag": _Form(read_flag, write_flag),
    "requires_properties": _Form(fields.texts, list),
    "variants": _Form(read_variants, write_variants),
    "overlap": _Form(fields.one_of(OVERLAPS)),
    "misfire": _Form(fields.one_of(MISFIRE_MODES)),
    "misfire_grace": _duration(),
    "misfire_within": _duration(),
    "misfire_limit": _Form(fields.integer(1)),
    "start_deadline": _duration(_MOMENT),
    "timeout": _duration(_MOMENT),
    "cancel_grace": _duration(),
    "max_attempts": _Form(fields.integer(1)),
    "retry_backoff": _duration(),
    "retry_backoff_max": _duration(),
    "max_recoveries": _Form(fields.integer(0)),
    "isolation": _Form(fields.one_of(("child", "inline"))),
    "memory": _Form(fields.memory, format_memory),
    "priority": _Form(fields.integer(-(2**31))),
    "max_concurrent": _Form(fields.integer(1)),
    "spread": _Form(_spread, lambda value: format_duration(value) if isinstance(value, timedelta) else value),
    "pause_after_failures": _Form(fields.integer(1)),
    "starts_at": _Form(fields.instant, to_text),
    "ends_at": _Form(fields.instant, to_text),
    "max_claims_age": _duration(timedelta(seconds=60), what="at least 60s"),
    "api_origins": _Form(fields.origins, list),
}
_OPTIONAL = frozenset(_KEYS) - {"handler", "schedule"}
_DEFAULTS: dict[str, Any] = {
    each.name: {} if each.name == "params" else each.default
    for each in fields_of(Definition)
    if each.name in _OPTIONAL
}
