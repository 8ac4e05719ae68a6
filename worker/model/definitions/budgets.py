"""Budgets: what an org may spend of a meter in a run, a day or a month; and the calendar of their periods."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from worker.model.definitions import fields
from worker.model.definitions.fields import Fields, refusal
from worker.model.definitions.zones import zone_name
from worker.model.money import MAX_MONEY, money_text, nano_of, parse_money
from worker.model.orgs import Selector, parse_selector

Per = Literal["run", "day", "month"]
AtLimit = Literal["wait", "fail", "ask"]

PERS: tuple[Per, ...] = ("run", "day", "month")
AT_LIMIT: tuple[AtLimit, ...] = ("wait", "fail", "ask")
WARN_AT = 0.8
# Meters that orgworker fills itself. They hold admission; nothing else happens at their limit.
RUNS = "runs"
RUN_SECONDS = "run_seconds"
OWN_METERS = (RUNS, RUN_SECONDS)
# Meters that orgworker only records, for usage: the requests of runs, and how long they waited for a limit.
EGRESS_REQUESTS = "egress_requests"
EGRESS_WAIT_SECONDS = "egress_wait_seconds"
RECORDED_METERS = (EGRESS_REQUESTS, EGRESS_WAIT_SECONDS)
# What models cost, in nano-units of the installation's currency: the worker computes it from what runs used.
MONEY = "money"
# No handler spends these.
RESERVED_METERS = frozenset({*OWN_METERS, *RECORDED_METERS, MONEY})
MAX_AMOUNT = 10**15
# The largest sum that is counted: what one batch adds to it still fits into a column of 64 bits.
MAX_SUM = 10**18
"""The largest limit, and the largest amount of one spend."""

_METER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,199}")
# A limit, and the currency of one of money.
_Limit = tuple[int | None, str | None]
_TICK = timedelta(microseconds=1)
_PROPERTY = "property:"
# Properties with limits of money are stored in nano-units.
_OF_MONEY = "nano:"
_UNITS = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?")
_KEYS = ("org", "orgs", "meter", "limit", "limit_from", "per", "zone", "at_limit", "warn_at")


@dataclass(frozen=True, slots=True)
class BudgetEntry:
    """A table `[[budget]]` of a file for `apply`."""

    meter: str
    """What is counted: a name that handlers pass to `ctx.spend`, or `money`, `runs` or `run_seconds`."""
    per: Per
    """The period that the limit is for: `run`, `day` or `month`."""
    org: str | None = None
    """The org's code. Instead, `orgs` selects orgs as in a template; each has its own meter."""
    orgs: Selector | None = None
    """The orgs that it applies to: `"all"`, `{ tags = ["pro"] }` or `{ issuer = "main" }`."""
    limit: int | None = None
    """How much may be spent in a period: a number, or of money a text such as `"20 USD"`."""
    limit_from: str | None = None
    """Instead of `limit`: `property:NAME`, the property of the org's newest token that has the limit."""
    zone: str | None = None
    """The IANA zone of its days and months; default the org's, else UTC."""
    at_limit: AtLimit = "wait"
    """What happens at the limit: the run waits until the period ends or the limit is raised (`wait`), it
    fails (`fail`), or it waits for an operator (`ask`).
    """
    warn_at: float = WARN_AT
    """The part of the limit at which the event `budget.warned` is emitted."""
    currency: str | None = None

    @property
    def target(self) -> str:
        """Whom it applies to, as text that is equal for the same orgs."""
        if self.org is not None:
            return f"org:{self.org}"
        selector = Selector() if self.orgs is None else self.orgs
        return "orgs:" + json.dumps(selector.as_json(), sort_keys=True, separators=(",", ":"))

    @property
    def property_name(self) -> str | None:
        """The property of the token that has the limit."""
        return None if self.limit_from is None else self.limit_from.removeprefix(_PROPERTY)


def parse_budget(values: Any, entry: str) -> BudgetEntry:
    """The budget of an entry of a file; raises DefinitionError."""
    reader = Fields(values, entry)
    reader.only(_KEYS)
    _one_of_two(reader, "org", "orgs", 'org = "CODE", or orgs = "all"')
    _one_of_two(reader, "limit", "limit_from", 'limit = 100000, or limit_from = "property:daily_tokens"')
    orgs = reader.take("orgs", lambda value: value, None)
    zone = reader.take("zone", zone_name, None)
    meter = reader.take("meter", meter_name)
    read: Callable[[Any], _Limit] = parse_money if meter == MONEY else _counted
    unlimited: _Limit = (None, None)
    limit, currency = reader.take("limit", read, unlimited)
    budget = BudgetEntry(
        meter=meter,
        per=reader.take("per", fields.one_of(PERS)),
        org=reader.take("org", fields.name, None),
        orgs=None if orgs is None else parse_selector(orgs, entry=entry),
        limit=limit,
        limit_from=reader.take("limit_from", _limit_from, None),
        zone=zone,
        at_limit=reader.take("at_limit", fields.one_of(AT_LIMIT), "wait"),
        warn_at=reader.take("warn_at", _part, WARN_AT),
        currency=currency,
    )
    _check(budget, entry)
    return budget


def _check(budget: BudgetEntry, entry: str) -> None:
    own = budget.meter in OWN_METERS
    if budget.meter in RECORDED_METERS:
        problem = f"{budget.meter} is only recorded: no budget holds it back"
        raise refusal(problem, entry, "meter", fix="limit requests to an origin with a table [[limit]]")
    if budget.per == "run":
        if own:
            problem = f"{budget.meter} is counted by day or month"
            raise refusal(problem, entry, "per", fix='write per = "day" or per = "month"')
        if budget.at_limit == "wait":
            problem = "a run would wait forever: the period of its budget is the run itself"
            raise refusal(problem, entry, "at_limit", fix='write at_limit = "fail" or at_limit = "ask"')
        if budget.zone is not None:
            raise refusal("a budget per run has no zone", entry, "zone", fix="leave zone out")
    if own and budget.at_limit != "wait":
        problem = f"{budget.meter} only holds runs back before they start"
        raise refusal(problem, entry, "at_limit", fix='write at_limit = "wait", or leave it out')


def _one_of_two(reader: Fields, one: str, other: str, fix: str) -> None:
    given = reader.given((one, other))
    if len(given) != 1:
        problem = f"{one} and {other} are both given" if given else f"{one} or {other} is missing"
        raise refusal(problem, reader.entry, given[-1] if given else one, fix=f"write {fix}")


def meter_name(value: Any) -> str:
    """The name of a meter; raises ValueError."""
    read = fields.text(value)
    if not _METER.fullmatch(read):
        raise ValueError(
            f"{read[:60]!r} is not the name of a meter; use 1 to 200 of A-Z a-z 0-9 _ . : / -, "
            "with a letter or a digit first"
        )
    return read


def amount(what: str, least: int = 0) -> Callable[[Any], int]:
    """Reads a whole number from `least` to MAX_AMOUNT; it raises ValueError."""

    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{what} is a whole number, not {str(value)[:60]}")
        if not least <= value <= MAX_AMOUNT:
            raise ValueError(f"{what} is {value}, which is not between {least} and {MAX_AMOUNT}")
        return value

    return read


def _counted(value: Any) -> _Limit:
    return amount("the limit")(value), None


def _part(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"warn_at is a part of the limit, above 0 and at most 1, not {str(value)[:60]}")
    return float(value)


def _limit_from(value: Any) -> str:
    read = fields.text(value)
    if not read.startswith(_PROPERTY) or not read.removeprefix(_PROPERTY).strip():
        raise ValueError(f'{read[:60]!r} names no property; write it as "property:NAME"')
    return read


def limit_of_property(value: Any) -> int | None:
    """The limit that a token's property has: a whole number, or text of digits; None for anything else."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal():
        value = int(value.strip()[:20])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return None
    return min(value, MAX_AMOUNT)


def money_of_property(value: Any) -> int | None:
    """The limit of money that a token's property has, in nano-units: a number, or its digits as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    found = _UNITS.fullmatch(str(value).strip())
    return None if found is None else min(nano_of(found[0]), MAX_MONEY)


def property_key(meter: str, name: str) -> str:
    """The name under which the limit in a token's property is stored: money has other units."""
    return f"{_OF_MONEY}{name}" if meter == MONEY else name


def limit_in(properties: Mapping[str, Any], key: str) -> int | None:
    """The limit that a token's properties have under such a name; None if they have none."""
    if key.startswith(_OF_MONEY):
        return money_of_property(properties.get(key.removeprefix(_OF_MONEY)))
    return limit_of_property(properties.get(key))


class Period(NamedTuple):
    """A day or a month of a zone's calendar in UTC; `end` belongs to the next one."""

    start: datetime
    end: datetime


def period_of(per: Per, zone: ZoneInfo, at: datetime) -> Period:
    """The day or month of the zone that contains `at`; raises ValueError for `run`."""
    today = at.astimezone(zone).date()
    if per == "day":
        return Period(_midnight(today, zone), _midnight(today + timedelta(days=1), zone))
    if per == "month":
        first = today.replace(day=1)
        following = (first + timedelta(days=31)).replace(day=1)
        return Period(_midnight(first, zone), _midnight(following, zone))
    raise ValueError("the period of a budget per run is the run")


def reaches_at(period: Period, used: int, limit: int, now: datetime) -> datetime | None:
    """When the pace of a period so far reaches its limit; None if that is after its end, or was.

    The first tenth of a period says nothing yet.
    """
    elapsed, whole = now - period.start, period.end - period.start
    if elapsed * 10 < whole or not 0 < used < limit:
        return None
    needed = (elapsed // _TICK) * limit // used
    return period.start + needed * _TICK if needed < whole // _TICK else None


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    """The first moment of a day: if its midnight does not exist, that of the change; if twice, the first."""
    return datetime.combine(day, time(), zone).astimezone(UTC)


def amount_text(meter: str, amount: int, currency: str = "") -> str:
    """An amount of a meter for people: money in units of the currency."""
    return money_text(amount, currency) if meter == MONEY else f"{amount:,}"


def shown(values: Mapping[str, Any]) -> str:
    """A budget in a few words, from its row: `llm_tokens per day`."""
    return f"{values['meter']} per {values['per']}"
