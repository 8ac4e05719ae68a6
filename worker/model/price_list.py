"""The price list: prices of `genai-prices`, of its release or of a file with newer ones.

Its data is loaded when it is first needed. Only the newest lookups are kept: the names come from runs, and
the caches of the package have no limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from genai_prices.data_snapshot import find_provider_by_id
from genai_prices.types import (
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    TieredPrices,
    _providers_from_raw,
)
from pydantic import ValidationError

from worker.model.prices import Kind, ListedModel, Tariff

# The key of each kind's price in the list, and the number of units that it is for.
_KEYS: Mapping[Kind, tuple[str, int]] = {
    "input": ("input_mtok", 1),
    "cache_read": ("cache_read_mtok", 1),
    "cache_write": ("cache_write_mtok", 1),
    "cache_write_1h": ("cache_write_1h_mtok", 1),
    "output": ("output_mtok", 1),
    "reasoning": ("output_reasoning_mtok", 1),
    "web_search": ("web_searches_kcount", 1000),
    "file_search": ("storage_searches_kcount", 1000),
    "code_execution": ("code_executions_kcount", 1000),
    "request": ("requests_kcount", 1000),
}
_BATCH = {"processing": "batch"}
_KEPT = 1000
# Bytes of a file with prices.
MAX_BYTES = 32 * 1024 * 1024


class GenaiPrices:
    """The price list of `genai-prices`: that of the release, or of other data in its form."""

    def __init__(self, providers: Sequence[Provider], version: str) -> None:
        self._providers = list(providers)
        self.version = version
        self._find = lru_cache(_KEPT)(self._looked_up)

    @classmethod
    def released(cls) -> GenaiPrices:
        """The prices of the installed release."""
        from genai_prices.data import providers

        return cls(providers, f"genai-prices {version('genai-prices')}")

    @classmethod
    def parse(cls, data: bytes, version: str) -> GenaiPrices:
        """The prices of a file: `data.json` or `data_slim.json` of genai-prices. Raises ValueError."""
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
        try:
            raw = json.loads(data)
            providers = _providers_from_raw(raw) if isinstance(raw, list) else []
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"it is not a price list of genai-prices: {place}: {first['msg']}") from None
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not a price list of genai-prices: {str(error)[:200]}") from None
        if not providers:
            raise ValueError("it is not a price list of genai-prices: it has no list of providers")
        return cls(providers, version)

    def models(self, provider: str | None = None) -> list[tuple[str, str]]:
        """Provider and model of all that is listed, in order."""
        return sorted(
            (each.id, model.id)
            for each in self._providers
            if provider in (None, each.id)
            for model in each.models
        )

    def find(
        self, provider: str | None, model: str, *, tariff: Tariff, at: datetime, prompt: int
    ) -> ListedModel | None:
        """As PriceList.find."""
        found = self._find(provider, model)
        if found is None:
            return None
        of, info, is_its_own = found
        # A provider that resells another's models has no batches of them, as in the package.
        prices = info.get_prices(at, _BATCH if tariff == "batch" and is_its_own else None)
        rates = {
            kind: _amount(value, prompt) / per
            for kind, (key, per) in _KEYS.items()
            if (value := getattr(prices, key)) is not None
        }
        return ListedModel(of.id, info.id, _since(info, at, tariff), rates)

    def has_batch(self, provider: str | None, model: str, at: datetime) -> bool:
        """As PriceList.has_batch."""
        found = self._find(provider, model)
        if found is None or not found[2]:
            return False
        return found[1].get_prices(at, _BATCH) != found[1].get_prices(at)

    def _looked_up(self, provider: str | None, model: str) -> tuple[Provider, ModelInfo, bool] | None:
        of = self._provider(provider, model)
        if of is None:
            return None
        info = of.find_model(model, all_providers=self._providers)
        return None if info is None else (of, info, any(each is info for each in of.models))

    def _provider(self, provider: str | None, model: str) -> Provider | None:
        if provider is not None:
            return find_provider_by_id(self._providers, provider)
        named = model.lower()
        for each in self._providers:
            if each.model_match is not None and each.model_match.is_match(named):
                return each
        return None


def provider_of_url(providers: Sequence[Provider], url: str) -> str | None:
    """The provider whose API is at this URL."""
    return next((each.id for each in providers if re.match(each.api_pattern, url)), None)


def _amount(value: Any, prompt: int) -> Fraction:
    """A price, that of a step of the prompt's length if it has steps."""
    if not isinstance(value, TieredPrices):
        return Fraction(value)
    reached = [tier.price for tier in value.tiers if prompt > tier.start]
    return Fraction(reached[-1] if reached else value.base)


def _since(info: ModelInfo, at: datetime, tariff: Tariff) -> date | None:
    """The day from which the prices of a model at this time hold; None if they always have."""
    days = [date.min]
    if not isinstance(info.prices, ModelPrice):
        for each in reversed(info.prices):
            if each.constraint is None or each.constraint.active(at):
                days += _first_day(each.constraint)
                break
    for variant in info.price_variants or () if tariff == "batch" else ():
        if variant.when == _BATCH and (variant.constraint is None or variant.constraint.active(at)):
            days += _first_day(variant.constraint)
            break
    latest = max(days)
    return None if latest == date.min else latest


def _first_day(constraint: Any) -> list[date]:
    return [constraint.start_date] if isinstance(constraint, StartDateConstraint) else []
