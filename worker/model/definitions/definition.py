"""Definition: what an org asked to run and when; read from a file's entry or a stored spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from datetime import date, datetime, time, timedelta
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from worker.clock import to_text
from worker.errors import InvalidTrigger
from worker.model.definitions import (
    CALENDAR_DATES,
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
    fields,
)
from worker.model.definitions.calendars import read_dates
from worker.model.definitions.deadline import Deadline, deadline, is_always_at, read_time, write_time
from worker.model.definitions.fields import Fields, refusal, text
from worker.model.definitions.flags import (
    FlagCondition,
    read_condition,
    read_flag,
    write_condition,
    write_flag,
)
from worker.model.definitions.pools import parse_pool
from worker.model.definitions.triggers import Trigger, parse_schedule, without_dates
from worker.model.definitions.units import format_duration, format_memory, parse_duration, parse_memory
from worker.model.definitions.zones import parse_zone
from worker.model.egress import check_wildcards, parse_audiences, parse_items

Spread = Literal["auto", "off"] | timedelta
_SHORTEST = timedelta(milliseconds=1)
_VARIANT = '{ flag = "agent-v2", handler = "acme.digest_v2" }'


@dataclass(frozen=True, slots=True)
class Variant:
    """The handler that runs instead of the definition's if the condition is met."""

    flag: FlagCondition
    handler: str


@dataclass(frozen=True, slots=True)
class Definition:
    """One definition of one org. None means the default of the handler, the org or the issuer.

    `memory` is in bytes.
    """

    org: str
    """The org's code. A template has `orgs` instead."""
    name: str
    """Unique within the org; at most 200 characters, no slash."""
    handler: str
    """The handler to run: a name from `handlers list`."""
    schedule: str
    """When: `0 3 * * *`, `@hourly`, `every 15m`, `at 2027-01-01T08:00:00Z`."""
    timezone: str | None = None
    """The IANA zone of crontab lines and `@…`; default the org's, else UTC."""
    scopes: frozenset[str] | None = None
    """The scopes that the token must have; default the handler's."""
    audience: str | None = None
    """The audience that the token must have; default the issuer's."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The handler's params, validated against its schema by `apply`."""
    params_by_hand: tuple[str, ...] = ()
    """Params that an org may set when it runs the definition by hand; operators may set any."""
    requires_flag: FlagCondition | None = None
    """A flag without which a run is `skipped(flag_off)`: a name, or `{ flag, equals }`."""
    requires_properties: tuple[str, ...] = ()
    """Properties without which a run is `refused(property_missing)`."""
    variants: tuple[Variant, ...] = ()
    """`[{ flag, equals, handler }]`: the first whose flag matches runs instead of `handler`."""
    overlap: Overlap = "skip"
    """What a scheduled time does while a run is unfinished: `skip`, `queue_one`, `replace` or `allow`."""
    misfire: MisfireMode = "once"
    """Which missed scheduled times run: `once` (the newest), `skip` (none) or `all`."""
    misfire_grace: timedelta = MISFIRE_GRACE
    """A scheduled time first seen later than this is missed."""
    misfire_within: timedelta | None = None
    """Missed scheduled times older than this never run; default one period, at least `1h`."""
    misfire_limit: int = MISFIRE_LIMIT
    """The maximum of missed scheduled times that `all` runs, the newest."""
    start_deadline: timedelta | None = None
    """A scheduled run whose handler has not started after this is `skipped(expired)`; default one period,
    at least `1h`.
    """
    done_by: time | None = None
    """The time of day, such as `06:00`, by which the run of a scheduled time must have succeeded: the next
    one that is not on a date of the calendar. Else the definition is late; no run is stopped by it.
    """
    done_within: timedelta | None = None
    """How long after its scheduled time a run must have succeeded, such as `2h`; with `done_by`, the earlier
    deadline counts.
    """
    timeout: timedelta | None = None
    """The maximum duration of an attempt; default the handler's, else `1h`."""
    cancel_grace: timedelta = CANCEL_GRACE
    """The time between asking a handler to stop and killing it."""
    max_attempts: int | None = None
    """Attempts that may fail, time out or ask for a retry; default the handler's, else 3."""
    retry_backoff: timedelta = RETRY_BACKOFF
    """The longest delay before the second attempt; it doubles with each further one."""
    retry_backoff_max: timedelta = RETRY_BACKOFF_MAX
    """The upper limit of that delay."""
    max_recoveries: int = MAX_RECOVERIES
    """How often its worker may die without a new checkpoint before the run is `failed(lost)`."""
    isolation: Literal["child", "inline"] | None = None
    """`child` or `inline`; default the handler's. The operator must allow `inline`."""
    memory: int | None = None
    """The limit of a run's memory, such as `512MiB`; default the handler's, else none."""
    pool: str | None = None
    """The pool whose workers or hosts run it, such as `eu-gpu`; default the handler's, the org's, else
    `default`.
    """
    priority: int = 0
    """Of an org's waiting runs, those with a higher priority start first."""
    max_concurrent: int | None = None
    """The maximum of concurrent runs, over all workers."""
    parked_counts: bool = False
    """Whether a run that sleeps or waits for an answer counts against `max_concurrent` and the limit of the
    handler.
    """
    spread: Spread = "auto"
    """The delay that spreads firing: `auto`, `off` or a maximum duration."""
    pause_after_failures: int | None = None
    """This many failed or refused runs in a row pause the definition."""
    starts_at: datetime | None = None
    """No run is due before this time."""
    ends_at: datetime | None = None
    """No run is due at or after this time."""
    calendar: str | None = None
    """The `[[calendar]]` on whose dates nothing runs: what is due then is a skip, reason `calendar`."""
    max_claims_age: timedelta | None = None
    """The maximum age of a token at the start of a run; at least `60s`."""
    api_origins: tuple[str, ...] | None = None
    """The origins to which `ctx.http` sends the token; default the issuer's. `http://` only for loopback
    addresses and `[execution] insecure_origins`.
    """
    api_base_url: str | None = None
    """The base of relative URLs of `ctx.http`; default the issuer's. Its origin is one of `api_origins`."""
    egress: tuple[str, ...] | None = None
    """What its runs may reach, of what the handler lists: `"api"`, `"public"`, `"open"` and origins; default
    the handler's. With `[execution] egress` a request must be in that list, too.
    """
    audiences: tuple[str, ...] | None = None
    """The audiences for which its runs may ask for another token; default the handler's."""
    reveal_token: bool = False
    """Whether a sealed run gets the org's token itself; by default it gets a placeholder."""
    meter_usage: bool = False
    """Whether `ctx.http` counts the `usage` of answers in OpenAI's form, as the meter `llm_tokens`."""
    model_requests: Literal["sync", "batch"] = "sync"
    """`batch`: model requests of `durable` agents and `ctx.complete` go into batches, for half the price, and
    the run waits for them without a process.
    """
    batch_until: time | None = None
    """The time of day, such as `06:00`, by which a run should have ended: a request that would miss it in a
    batch is sent on its own.
    """
    batch_within: timedelta | None = None
    """The same as a time after the scheduled time, such as `8h`; the earlier one counts."""
    enabled: bool = True
    """If false, no run is due."""
    calendar_dates: tuple[date, ...] = ()
    """The dates of `calendar`, as it was when this revision was made. Not a key of a file."""

    @property
    def serial(self) -> bool:
        """Whether at most one run may be unfinished, besides one held back."""
        return self.overlap != "allow"

    @property
    def misfire_policy(self) -> MisfirePolicy:
        return MisfirePolicy(self.misfire, self.misfire_grace, self.misfire_within, self.misfire_limit)

    @property
    def handlers(self) -> tuple[str, ...]:
        """All handlers that an attempt may select, the definition's own first."""
        return tuple(dict.fromkeys((self.handler, *(variant.handler for variant in self.variants))))

    def variants_of(self, origin: str) -> tuple[Variant, ...]:
        """The variants that a run of this origin may use instead of its handler: a child uses its own."""
        return () if origin == "child" else self.variants

    def retry_policy(self, handler_max_attempts: int | None = None) -> RetryPolicy:
        """The retry policy, with the handler's value as a default."""
        attempts = self.max_attempts or handler_max_attempts or MAX_ATTEMPTS
        return RetryPolicy(attempts, self.retry_backoff, self.retry_backoff_max, self.max_recoveries)

    def timeout_or(self, handler_timeout: timedelta | None) -> timedelta:
        """The definition's timeout, else the handler's, else an hour."""
        return self.timeout or handler_timeout or TIMEOUT

    def trigger(self, org_timezone: str | None = None) -> Trigger:
        """The trigger in the definition's zone, else the org's, else UTC; raises InvalidTrigger."""
        zone = self._zone(org_timezone)
        trigger = parse_schedule(self.schedule, zone, starts_at=self.starts_at, ends_at=self.ends_at)
        return without_dates(trigger, self.calendar_dates, zone) if self.calendar_dates else trigger

    @property
    def has_deadline(self) -> bool:
        """Whether a scheduled time of it may be late."""
        return self.done_by is not None or self.done_within is not None

    def deadline(self, org_timezone: str | None = None) -> Deadline | None:
        """The deadlines in the definition's zone, else the org's, else UTC; None without any."""
        return deadline(self.done_by, self.done_within, self._zone(org_timezone), self.calendar_dates)

    def batch_deadline(self, scheduled_for: datetime, org_timezone: str | None = None) -> datetime | None:
        """When the run of a scheduled time should have ended, by `batch_until` and `batch_within`."""
        found = deadline(self.batch_until, self.batch_within, self._zone(org_timezone))
        return None if found is None else found.of(scheduled_for)

    def _zone(self, org_timezone: str | None) -> ZoneInfo:
        return parse_zone(self.timezone or org_timezone or "UTC")


def parse_definition(values: Mapping[str, Any], entry: str) -> Definition:
    """The definition of an entry of a file, without the dates of its calendar.

    Raises:
        DefinitionError: a key is unknown or invalid; InvalidTrigger for the schedule or zone.
    """
    reader = Fields(values, entry)
    reader.only(["org", "name", "enabled", *_KEYS])
    definition = _read(
        reader,
        org=reader.take("org", fields.name),
        name=reader.take("name", fields.name),
        enabled=reader.take("enabled", fields.boolean, True),
    )
    try:
        check_wildcards(definition.egress or ())
    except ValueError as error:
        raise refusal(str(error), entry, "egress") from error
    if definition.model_requests == "sync":
        for key in ("batch_until", "batch_within"):
            if getattr(definition, key) is not None:
                fix = f'add model_requests = "batch", or remove {key}'
                raise refusal("its model requests go into no batches", entry, key, fix=fix)
    if definition.starts_at and definition.ends_at and definition.ends_at <= definition.starts_at:
        raise refusal("ends_at is not after starts_at", entry, "ends_at")
    try:
        nominal = definition.trigger().nominal
    except InvalidTrigger as error:
        problem = f"{entry}, {error.field}: {error.message}" if entry else error.message
        raise InvalidTrigger(problem, entry=entry, field=error.field, fix=error.fix) from error
    _check_done_by(definition, nominal, entry)
    return definition


def _check_done_by(definition: Definition, nominal: Trigger, entry: str) -> None:
    """Refuse a `done_by` that is the time of the schedule itself; raises DefinitionError."""
    done_by = definition.done_by
    # Without a zone of its own, only times of day of the schedule itself are known.
    known = definition.timezone is not None or not definition.schedule.lstrip().startswith(("every", "at"))
    if done_by is None or not known:
        return
    if is_always_at(done_by, nominal, parse_zone(definition.timezone or "UTC")):
        shown = write_time(done_by)
        raise refusal(
            f"{shown} is the time of the schedule itself, so a run would be late when the next one is due",
            entry,
            "done_by",
            fix=f'write a time of day after {shown}, or how long a run may take, as done_within = "2h"',
        )


def from_spec(org: str, name: str, spec: Mapping[str, Any], *, enabled: bool = True) -> Definition:
    """The definition of a stored revision; raises DefinitionError if this version cannot read it."""
    reader = Fields(spec, f"definition {org}/{name}")
    reader.only(_STORED)
    no_dates: tuple[date, ...] = ()
    definition = _read(reader, org=org, name=name, enabled=enabled)
    dates = reader.take(CALENDAR_DATES, read_dates, no_dates)
    return replace(definition, calendar_dates=dates) if dates else definition


def to_spec(definition: Definition) -> dict[str, Any]:
    """The canonical spec for JSON: the keys that differ from their defaults, without org, name, enabled.

    It has the dates of the calendar, so that a revision alone says what was due.
    """
    values = {key: getattr(definition, key) for key in _KEYS}
    spec = {
        key: _KEYS[key].write(value)
        for key, value in values.items()
        if key not in _DEFAULTS or value != _DEFAULTS[key]
    }
    if definition.calendar_dates:
        spec[CALENDAR_DATES] = [day.isoformat() for day in definition.calendar_dates]
    return spec


def keys_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stored spec as a file has them: without the dates of the calendar."""
    return {key: value for key, value in spec.items() if key != CALENDAR_DATES}


def values_of(definition: Definition) -> dict[str, Any]:
    """Every key but org and name, written as in a file; None where the default is not the definition's."""
    values = {key: getattr(definition, key) for key in _KEYS}
    written = {key: None if value is None else _KEYS[key].write(value) for key, value in values.items()}
    return written | {"enabled": definition.enabled}


def _read(reader: Fields, *, org: str, name: str, enabled: bool) -> Definition:
    handler, schedule = reader.take("handler", text), reader.take("schedule", text)
    given = {key: reader.take(key, _KEYS[key].read) for key in reader.given(_OPTIONAL)}
    return Definition(org, name, handler, schedule, enabled=enabled, **given)


def _read_variants(value: Any) -> tuple[Variant, ...]:
    if not isinstance(value, list):
        raise ValueError(f"write it as a list: [{_VARIANT}]")
    conditions = [read_condition(item, {"flag", "handler"}, _VARIANT) for item in value]
    return tuple(Variant(flag, text(item["handler"])) for flag, item in zip(conditions, value, strict=True))


def _write_variants(variants: tuple[Variant, ...]) -> list[dict[str, Any]]:
    return [write_condition(variant.flag) | {"handler": variant.handler} for variant in variants]


def _read_egress(value: Any) -> tuple[str, ...]:
    return parse_items(fields.texts(value))


def _read_audiences(value: Any) -> tuple[str, ...]:
    return parse_audiences(fields.texts(value))


def _read_spread(value: Any) -> Spread:
    return value if value in ("auto", "off") else parse_duration(value)


def _write_spread(value: Spread) -> str:
    return format_duration(value) if isinstance(value, timedelta) else value


class _Form(NamedTuple):
    """How a key is read from a file or a spec, and written to a spec."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _duration(least: timedelta = timedelta(0), *, what: str = "") -> _Form:
    return _Form(fields.duration(least, what=what), format_duration)


_KEYS: dict[str, _Form] = {
    "handler": _Form(text),
    "schedule": _Form(text),
    "timezone": _Form(text),
    "scopes": _Form(lambda value: frozenset(fields.texts(value)), sorted),
    "audience": _Form(text),
    "params": _Form(fields.json_table, dict),
    "params_by_hand": _Form(fields.texts, list),
    "requires_flag": _Form(read_flag, write_flag),
    "requires_properties": _Form(fields.texts, list),
    "variants": _Form(_read_variants, _write_variants),
    "overlap": _Form(fields.one_of(OVERLAPS)),
    "misfire": _Form(fields.one_of(MISFIRE_MODES)),
    "misfire_grace": _duration(),
    "misfire_within": _duration(),
    "misfire_limit": _Form(fields.integer(1)),
    "start_deadline": _duration(_SHORTEST),
    "done_by": _Form(read_time, write_time),
    "done_within": _duration(_SHORTEST),
    "timeout": _duration(_SHORTEST),
    "cancel_grace": _duration(),
    "max_attempts": _Form(fields.integer(1)),
    "retry_backoff": _duration(),
    "retry_backoff_max": _duration(),
    "max_recoveries": _Form(fields.integer(0)),
    "isolation": _Form(fields.one_of(("child", "inline"))),
    "memory": _Form(parse_memory, format_memory),
    "pool": _Form(parse_pool),
    "priority": _Form(fields.integer(-(2**31))),
    "max_concurrent": _Form(fields.integer(1)),
    "parked_counts": _Form(fields.boolean),
    "spread": _Form(_read_spread, _write_spread),
    "pause_after_failures": _Form(fields.integer(1)),
    "starts_at": _Form(fields.timestamp, to_text),
    "ends_at": _Form(fields.timestamp, to_text),
    "calendar": _Form(fields.name),
    "max_claims_age": _duration(timedelta(seconds=60), what="at least 60s"),
    "api_origins": _Form(fields.origins, list),
    "api_base_url": _Form(fields.base_url),
    "egress": _Form(_read_egress, list),
    "audiences": _Form(_read_audiences, list),
    "reveal_token": _Form(fields.boolean),
    "meter_usage": _Form(fields.boolean),
    "model_requests": _Form(fields.one_of(("sync", "batch"))),
    "batch_until": _Form(read_time, write_time),
    "batch_within": _duration(_SHORTEST),
}
# The keys that an edit may change.
EDITABLE = (*_KEYS, "enabled")
# The keys whose values may be durations.
DURATIONS = frozenset({*(key for key, form in _KEYS.items() if form.write is format_duration), "spread"})
_STORED = (*_KEYS, CALENDAR_DATES)
_OPTIONAL = frozenset(_KEYS) - {"handler", "schedule"}
_DEFAULTS: dict[str, Any] = {
    each.name: {} if each.name == "params" else each.default
    for each in fields_of(Definition)
    if each.name in _OPTIONAL
}
