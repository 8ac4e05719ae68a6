"""Prices as rows: the price list of the installation, its currency, and what runs used of models."""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from worker.errors import ConfigurationError
from worker.ids import DefinitionId, OrgId, RunId
from worker.model.definitions.budgets import MAX_SUM
from worker.model.prices import ModelUsage, Priced, PricedKind, Prices, Tariff
from worker.store import schema, tables
from worker.store.dialect import Row, first_row, insert_into
from worker.store.sums import Capped
from worker.telemetry.events import emit

_spends, _days, _lists, _orgs = tables.model_spends, tables.model_days, tables.price_lists, tables.orgs

# The fact that holds the currency of all money in the database.
CURRENCY = "money.currency"
# Models without a price of one org that are reported: a run may name any number.
MAX_REPORTED = 20


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What a run used of a model; the same key and place of the same run count once."""

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    key: str
    usage: ModelUsage
    place: int = 0
    tariff: Tariff = "standard"
    is_child: bool = False


@dataclass(frozen=True, slots=True)
class Costed:
    """A use with its price."""

    used: ModelUse
    priced: Priced


@dataclass(frozen=True, slots=True)
class Unpriced:
    """A model without a price that an org's runs used for the first time."""

    org: str
    provider: str | None
    model: str


# --- The price list, and the currency. ---


def currency_of(connection: Connection) -> str | None:
    """The currency of the money in the database; None before there is any."""
    return schema.read(connection, CURRENCY)


def keep_currency(connection: Connection, currency: str) -> None:
    """Store the currency if the database has none.

    Raises:
        ConfigurationError: it has another one.
    """
    stored = currency_of(connection)
    if stored is None:
        schema.write_new(connection, CURRENCY, currency)
        stored = currency_of(connection)
    if stored != currency:
        raise ConfigurationError(
            f"[prices] currency is {currency}, and the money in the database is {stored}",
            fix=f'set currency = "{stored}"; amounts that are stored cannot be converted',
        )


def newest_list(connection: Connection) -> Row | None:
    """The price list that was read from a file, without its data."""
    columns = (column for column in _lists.c if column.name != "data")
    return first_row(connection, select(*columns).order_by(_lists.c.created_at.desc()).limit(1))


def put_list(connection: Connection, data: bytes, *, models: int, at: datetime, actor: str) -> Row:
    """Replace the price list by another; returns its row."""
    digest = hashlib.sha256(data).hexdigest()
    row = {"digest": digest, "models": models, "created_at": at, "created_by": actor}
    connection.execute(delete(_lists))
    connection.execute(insert(_lists).values(**row, data=zlib.compress(data, 9)))
    return row


def load(connection: Connection, own: Prices) -> tuple[Prices, str | None]:
    """The prices with the newest price list, and its digest; None for that of the release."""
    # Here, because a process that prices nothing does not need the data.
    from worker.model.price_list import MAX_BYTES, GenaiPrices

    row = newest_list(connection)
    if row is None:
        return replace(own, listed=GenaiPrices.released()), None
    data = connection.execute(select(_lists.c.data).where(_lists.c.digest == row["digest"])).scalar_one()
    name = f"file of {row['created_at']:%Y-%m-%d}"
    try:
        listed = GenaiPrices.parse(zlib.decompressobj().decompress(data, MAX_BYTES + 1), name)
    except (ValueError, zlib.error) as error:
        # The release that read the file understood it.
        emit("prices.unreadable", error=str(error), digest=row["digest"])
        listed = GenaiPrices.released()
    return replace(own, listed=listed), row["digest"]


# --- What runs used. ---


def cost(connection: Connection, used: Sequence[ModelUse], prices: Prices, now: datetime) -> list[Costed]:
    """What each of these costs now."""
    codes = _codes(connection, {each.org_id for each in used}) if prices.has_org_prices else {}
    return [
        Costed(each, prices.price(each.usage, at=now, tariff=each.tariff, org=codes.get(each.org_id)))
        for each in used
    ]


def store(connection: Connection, costed: Sequence[Costed], now: datetime) -> list[Unpriced]:
    """Store uses with their prices, and add them to the sums of the day; those that are stored do not count.

    Returns models without a price that are new for their org.
    """
    lines = {
        (each.used.run_id, each.used.key, each.used.place, line.kind): (each, line)
        for each in costed
        for line in each.priced.kinds
    }
    if not lines:
        return []
    rows = [_row(*key[:3], *lines[key], now) for key in sorted(lines)]
    statement = insert_into(connection, _spends).on_conflict_do_nothing()
    returned = statement.returning(_spends.c.run_id, _spends.c.key, _spends.c.place, _spends.c.kind)
    fresh = [lines[tuple(key)] for key in sorted(map(tuple, connection.execute(returned, rows)))]
    found = _new_unpriced(connection, fresh)
    _add_days(connection, fresh, now.astimezone(UTC).date())
    return found


def _row(
    run_id: RunId, key: str, place: int, costed: Costed, line: PricedKind, now: datetime
) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "key": key,
        "place": place,
        "kind": line.kind,
        "org_id": costed.used.org_id,
        "definition_id": costed.used.definition_id,
        "provider": costed.priced.provider,
        "model": costed.priced.model,
        "tariff": costed.priced.tariff,
        "units": line.units,
        "money": line.money,
        "price_since": line.since,
        "price_source": line.source,
        "at": now,
    }


_DAY = ("day", "org_id", "definition_id", "provider", "model", "kind", "tariff")
_COUNTED = ("units", "money", "unpriced")


def _add_days(connection: Connection, fresh: Sequence[tuple[Costed, PricedKind]], day: date) -> None:
    added: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for costed, line in fresh:
        used, priced = costed.used, costed.priced
        named = priced.provider or "", priced.model, line.kind, priced.tariff
        sums = added[day, used.org_id, used.definition_id, *named]
        sums[0] += line.units
        sums[1] += line.money or 0
        sums[2] += line.units if line.money is None else 0
    if not added:
        return
    statement = insert_into(connection, _days)
    statement = statement.on_conflict_do_update(
        index_elements=list(_DAY),
        set_={name: Capped(_days.c[name] + statement.excluded[name]) for name in _COUNTED},
    )
    rows = [
        dict(zip((*_DAY, *_COUNTED), (*key, *(min(each, MAX_SUM) for each in added[key])), strict=True))
        for key in sorted(added)
    ]
    connection.execute(statement, rows)


def _new_unpriced(connection: Connection, fresh: Sequence[tuple[Costed, PricedKind]]) -> list[Unpriced]:
    """Models without a price that their org had none of before; of each org at most MAX_REPORTED."""
    missing: dict[OrgId, dict[str, str | None]] = defaultdict(dict)
    for costed, line in fresh:
        if line.money is None:
            missing[costed.used.org_id].setdefault(costed.priced.model, costed.priced.provider)
    if not missing:
        return []
    codes, found = _codes(connection, missing), []
    for org_id, models in sorted(missing.items()):
        known = set(connection.execute(_unpriced_models(org_id)).scalars())
        for model, provider in models.items():
            if model not in known and len(known) < MAX_REPORTED:
                known.add(model)
                found.append(Unpriced(codes[org_id], provider, model))
    return found


def _unpriced_models(org_id: OrgId) -> Any:
    query = select(_days.c.model).where(_days.c.org_id == org_id, _days.c.unpriced > 0)
    return query.distinct().limit(MAX_REPORTED)


def _codes(connection: Connection, org_ids: Collection[OrgId]) -> Mapping[OrgId, str]:
    rows = connection.execute(select(_orgs.c.id, _orgs.c.code).where(_orgs.c.id.in_(org_ids)))
    return {org_id: code for org_id, code in rows}
