"""Prices: the list that workers use, read from a file, and what a model costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from typing import Any

from sqlalchemy import Connection

from worker.errors import NotFound, UsageError
from worker.model.price_list import GenaiPrices
from worker.model.prices import (
    NAME_LIMIT,
    PER_TOKENS,
    TOKEN_KINDS,
    Kind,
    ModelUsage,
    Prices,
    Rate,
    Tariff,
    model_name,
)
from worker.store import audit, orgs, prices
from worker.store.database import Database


def update_list(database: Database, data: bytes, *, actor: str) -> Mapping[str, Any]:
    """Store a price list for all workers, and return its row. The same list again changes nothing.

    Raises:
        UsageError: it is not a price list of genai-prices.
    """
    try:
        listed = GenaiPrices.parse(data, "file")
    except ValueError as error:
        raise UsageError(
            f"the price list cannot be used: {error}",
            fix="name data.json or data_slim.json from the folder prices of github.com/pydantic/genai-prices",
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    with database.transaction() as connection:
        stored = prices.newest_list(connection)
        if stored is not None and stored["digest"] == digest:
            return stored
        now = database.now(connection)
        row = prices.put_list(connection, data, models=len(listed.models()), at=now, actor=actor)
        detail = {"digest": digest, "models": row["models"]}
        audit.note(connection, None, "prices.update", "prices", detail, at=now, actor=actor)
    return row


def listed_models(
    connection: Connection,
    own: Prices,
    *,
    at: datetime,
    provider: str | None = None,
    limit: int,
    after: str | None = None,
) -> list[dict[str, Any]]:
    """The models of the price list with what a million tokens cost at a time, by provider and model."""
    known, _ = prices.load(connection, own)
    place = tuple(after.split("/", 1)) if after is not None else ("",)
    names = [each for each in known.listed.models(provider) if each > place]
    if provider is not None and not names and after is None:
        raise NotFound(f"the price list has no provider {provider}", fix="`prices list` has those it has")
    rows = []
    for of, model in names[:limit]:
        rates = known.rates(ModelUsage(of, model, ()), at=at)
        shown: dict[str, Any] = {
            kind: _text(rates[kind].amount) if kind in rates else None for kind in TOKEN_KINDS
        }
        first = next(iter(rates.values()), None)
        since, source = (None, None) if first is None else (first.since, first.source)
        named: dict[str, Any] = {"id": f"{of}/{model}", "provider": of, "model": model}
        rows.append({**named, **shown, "currency": known.currency, "since": since, "source": source})
    return rows


def prices_of(
    connection: Connection,
    own: Prices,
    model: str,
    *,
    at: datetime,
    provider: str | None = None,
    org: str | None = None,
    tariff: Tariff = "standard",
) -> list[dict[str, Any]]:
    """What each kind of a model's use costs at a time; of one with steps, for a short prompt.

    Raises:
        NotFound: no such org, or the model has no price.
        UsageError: not the name of a model.
    """
    try:
        usage = ModelUsage(None if provider is None else model_name(provider), model_name(model), ())
    except ValueError as error:
        raise UsageError(str(error), fix=f"at most {NAME_LIMIT} characters, such as gpt-5-mini") from None
    if org is not None:
        orgs.require(connection, org)
    known, _ = prices.load(connection, own)
    rates = known.rates(usage, at=at, tariff=tariff, org=org)
    if not rates:
        of = "" if provider is None else f" of {provider}"
        raise NotFound(
            f"{model}{of} has no price: its use counts as unpriced",
            fix="add a table [[prices.own]] to worker.toml, or read a newer list: `prices update FILE`",
        )
    return [_row(kind, rate, known.currency) for kind, rate in rates.items()]


def _row(kind: Kind, rate: Rate, currency: str) -> dict[str, Any]:
    per = f"{PER_TOKENS:,} tokens" if kind in TOKEN_KINDS else "1 request" if kind == "request" else "1 call"
    return {
        "kind": kind,
        "price": _text(rate.amount),
        "per": per,
        "currency": currency,
        "since": rate.since,
        "source": rate.source,
    }


def _text(amount: Fraction) -> str:
    """A price with at most 12 decimals."""
    text = f"{round(amount * 10**12):013d}"
    return f"{text[:-12]}.{text[-12:].rstrip('0').ljust(2, '0')}"
