"""Prices: what the use of a model costs, in nano-units of one currency. Pure.

    prices.price(ModelUsage("openai", "gpt-5-mini", (("input", 1200), ("output", 80))), at=now)

Own prices, from `[prices]`, come before those of the price list. Amounts are exact, and rounded up to a whole
nano-unit for each kind: what has a price never costs 0, however small its parts are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from fractions import Fraction
from functools import cached_property
from typing import Literal, Protocol, get_args

from worker.model.money import DEFAULT_CURRENCY, MAX_MONEY, NANO

Kind = Literal[
    "input",
    "cache_read",
    "cache_write",
    "cache_write_1h",
    "output",
    "reasoning",
    "web_search",
    "file_search",
    "code_execution",
    "request",
]
Tariff = Literal["standard", "batch"]

KINDS: tuple[Kind, ...] = get_args(Kind)
TARIFFS: tuple[Tariff, ...] = get_args(Tariff)
# The kinds are disjoint: a token is of one of them. `input` is without cache, `output` without reasoning.
INPUT_KINDS: tuple[Kind, ...] = ("input", "cache_read", "cache_write", "cache_write_1h")
TOKEN_KINDS: tuple[Kind, ...] = (*INPUT_KINDS, "output", "reasoning")
# Billed calls of a provider's tools, and requests, where a model has a fee for each.
CALL_KINDS: tuple[Kind, ...] = ("web_search", "file_search", "code_execution", "request")
# Tokens that a price is for.
PER_TOKENS = 10**6
# Whose price counts for a kind that has none of its own.
_FALLBACK: Mapping[Kind, Kind] = {
    "cache_read": "input",
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "reasoning": "output",
}
NAME_LIMIT = 200
_NAME = re.compile(r"[!-~]{1,200}")
OWN = "worker.toml"


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """What requests to one model used: units by kind, tokens or calls. The run named provider and model."""

    provider: str | None
    model: str
    kinds: tuple[tuple[Kind, int], ...]

    def join(self, other: ModelUsage) -> ModelUsage:
        """Both as one usage; it counts as one request with a prompt as long as both."""
        units = Counter(dict(self.kinds))
        units.update(dict(other.kinds))
        return ModelUsage(self.provider, self.model, tuple(units.items()))

    @property
    def tokens(self) -> int:
        return sum(units for kind, units in self.kinds if kind in TOKEN_KINDS)

    @property
    def prompt(self) -> int:
        """The tokens of the prompt, on whose number the price of some models depends."""
        return sum(units for kind, units in self.kinds if kind in INPUT_KINDS)

    @property
    def amount(self) -> int:
        """What a meter counts of it: its tokens, or its calls if it has no tokens."""
        return self.tokens or sum(units for _, units in self.kinds)


def token_kinds(
    prompt: int, output: int, *, read: int = 0, written: int = 0, hour: int = 0, reasoning: int = 0
) -> dict[Kind, int]:
    """The tokens of a request by kind, which add up to prompt and output.

    What was `read` from a cache or `written` to one is part of the prompt, `hour` of what was written, and
    reasoning of the output. Parts that contradict that count at the full price.
    """
    if read + written > prompt or hour > written:
        read = written = hour = 0
    if reasoning > output:
        reasoning = 0
    return {
        "input": prompt - read - written,
        "cache_read": read,
        "cache_write": written - hour,
        "cache_write_1h": hour,
        "output": output - reasoning,
        "reasoning": reasoning,
    }


def model_name(value: object) -> str:
    """The name of a model or a provider; raises ValueError."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"{str(value)[:60]!r} is not the name of a model or provider; use 1 to {NAME_LIMIT} "
            "printable characters without spaces"
        )
    return value


@dataclass(frozen=True, slots=True)
class Rate:
    """A price: units of the currency for a million tokens, or for one call; exact."""

    amount: Fraction
    since: date | None
    """The day from which the price holds; None if it always has."""
    source: str
    """The price list or the file that it is from."""

    def of(self, kind: Kind, units: int) -> int:
        """Nano-units, rounded up, at most MAX_MONEY."""
        per = PER_TOKENS if kind in TOKEN_KINDS else 1
        return min(-(-units * self.amount * NANO // per), MAX_MONEY)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model as a price list names it, with its prices at a time in USD."""

    provider: str
    model: str
    since: date | None
    rates: Mapping[Kind, Fraction]


class PriceList(Protocol):
    """Prices of models, in USD."""

    @property
    def version(self) -> str: ...

    def find(
        self, provider: str | None, model: str, *, tariff: Tariff, at: datetime, prompt: int
    ) -> ListedModel | None:
        """The prices of a model for a request with `prompt` tokens of input; None if it is not listed.

        A kind without a price at a tariff has the standard one.
        """

    def has_batch(self, provider: str | None, model: str, at: datetime) -> bool:
        """Whether the model has prices at the tariff `batch`."""

    def models(self, provider: str | None = None) -> list[tuple[str, str]]:
        """Provider and model of all that is listed, in order."""


@dataclass(frozen=True, slots=True)
class OwnPrice:
    """A table `[[prices.own]]`: prices that come before those of the price list.

    `model` may contain `*`. Without an org, provider, tariff or first day the entry is for all of them.
    """

    model: str
    rates: Mapping[Kind, Fraction] = field(default_factory=dict)
    factor: Fraction | None = None
    """What the prices of the list are multiplied by, for kinds without a rate."""
    provider: str | None = None
    org: str | None = None
    tariff: Tariff | None = None
    start: date | None = None

    def applies(self, usage: ModelUsage, tariff: Tariff, day: date, org: str | None) -> bool:
        return (
            self.org in (None, org)
            and self.provider in (None, usage.provider)
            and self.tariff in (None, tariff)
            and (self.start is None or self.start <= day)
            and (self.model == usage.model or _matches(self.model, usage.model))
        )

    @property
    def rank(self) -> tuple[bool, bool, bool, bool, date]:
        """Of two entries that apply, the one with the higher rank counts; of equal ones the later."""
        return (
            self.org is not None,
            "*" not in self.model,
            self.provider is not None,
            self.tariff is not None,
            self.start or date.min,
        )


def _matches(pattern: str, model: str) -> bool:
    """Whether a name matches a pattern with `*`, in time that grows with their lengths only."""
    first, *rest = pattern.split("*")
    if not rest or not model.startswith(first):
        return False
    place = len(first)
    for part in rest[:-1]:
        if (found := model.find(part, place)) < 0:
            return False
        place = found + len(part)
    return len(model) - len(rest[-1]) >= place and model.endswith(rest[-1])


@dataclass(frozen=True, slots=True)
class PricedKind:
    """What the units of one kind cost: `money` in nano-units, None without a price."""

    kind: Kind
    units: int
    money: int | None
    since: date | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Priced:
    """What a usage costs. `provider` and `model` as the price list names them, else as the run did."""

    provider: str | None
    model: str
    tariff: Tariff
    kinds: tuple[PricedKind, ...]

    @property
    def money(self) -> int | None:
        """Nano-units of all kinds that have a price; None if none has."""
        known = [each.money for each in self.kinds if each.money is not None]
        return min(sum(known), MAX_MONEY) if known else None

    @property
    def unpriced(self) -> tuple[Kind, ...]:
        return tuple(each.kind for each in self.kinds if each.money is None)


class NoList:
    """A price list without models."""

    version = "none"

    def find(
        self, provider: str | None, model: str, *, tariff: Tariff, at: datetime, prompt: int
    ) -> ListedModel | None:
        return None

    def has_batch(self, provider: str | None, model: str, at: datetime) -> bool:
        return False

    def models(self, provider: str | None = None) -> list[tuple[str, str]]:
        return []


@dataclass(frozen=True)
class Prices:
    """The prices of an installation, in its one currency."""

    listed: PriceList = field(default_factory=NoList)
    own: Sequence[OwnPrice] = ()
    currency: str = DEFAULT_CURRENCY
    per_usd: Fraction | None = None
    """What one USD of the price list is in the currency; None if the list does not count."""

    @cached_property
    def has_org_prices(self) -> bool:
        """Whether the price depends on the org."""
        return any(entry.org is not None for entry in self.own)

    @cached_property
    def _ordered(self) -> Sequence[OwnPrice]:
        """Own prices, the one that counts first."""
        return sorted(reversed(self.own), key=lambda entry: entry.rank, reverse=True)

    def price(
        self, usage: ModelUsage, *, at: datetime, tariff: Tariff = "standard", org: str | None = None
    ) -> Priced:
        """What a usage costs at a time, for an org by its code. Requests without a fee are left out."""
        listed = self._listed(usage, tariff, at)
        kinds = []
        for kind, units in usage.kinds:
            rate = self._rate(usage, kind, tariff, at, org, listed)
            if rate is not None:
                kinds.append(PricedKind(kind, units, rate.of(kind, units), rate.since, rate.source))
            elif kind != "request" and units:
                kinds.append(PricedKind(kind, units, None))
        provider = usage.provider if listed is None else listed.provider
        model = usage.model if listed is None else listed.model
        return Priced(provider, model, tariff, tuple(kinds))

    def rates(
        self, usage: ModelUsage, *, at: datetime, tariff: Tariff = "standard", org: str | None = None
    ) -> dict[Kind, Rate]:
        """The price of each kind that has one, for a request as long as this one."""
        listed = self._listed(usage, tariff, at)
        found = ((kind, self._rate(usage, kind, tariff, at, org, listed)) for kind in KINDS)
        return {kind: rate for kind, rate in found if rate is not None}

    def has_batch(self, provider: str | None, model: str, at: datetime) -> bool:
        """Whether requests to a model cost less, or something else, at the tariff `batch`."""
        usage = ModelUsage(provider, model, ())
        day = at.astimezone(UTC).date()
        own = any(
            entry.tariff == "batch" and entry.applies(usage, "batch", day, entry.org) for entry in self.own
        )
        return own or self.listed.has_batch(provider, model, at)

    def _listed(self, usage: ModelUsage, tariff: Tariff, at: datetime) -> ListedModel | None:
        return self.listed.find(usage.provider, usage.model, tariff=tariff, at=at, prompt=usage.prompt)

    def _rate(
        self,
        usage: ModelUsage,
        kind: Kind,
        tariff: Tariff,
        at: datetime,
        org: str | None,
        listed: ListedModel | None,
    ) -> Rate | None:
        in_list = None
        if listed is not None and self.per_usd is not None:
            amount = _of(listed.rates, kind)
            if amount is not None:
                in_list = Rate(amount * self.per_usd, listed.since, self.listed.version)
        day = at.astimezone(UTC).date()
        for entry in self._ordered:
            if not entry.applies(usage, tariff, day, org):
                continue
            if (own := _of(entry.rates, kind)) is not None:
                return Rate(own, entry.start, OWN)
            if entry.factor is not None and in_list is not None:
                return Rate(in_list.amount * entry.factor, in_list.since or entry.start, OWN)
        return in_list


def _of(rates: Mapping[Kind, Fraction], kind: Kind) -> Fraction | None:
    """The price of a kind, or of the one that it is counted as."""
    wanted: Kind | None = kind
    while wanted is not None:
        if wanted in rates:
            return rates[wanted]
        wanted = _FALLBACK.get(wanted)
    return None
