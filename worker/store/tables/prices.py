"""The tables of what models cost: each use with its price, the sums of days, and the price list."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Date, Index, Integer, LargeBinary, Text

from worker.store.dialect import Id, Instant
from worker.store.tables.runs import UPDATED, count, partial, required, table

model_spends = table(
    "model_spends",
    "What each run used of models, with its price when it was counted.",
    Column("run_id", Id, primary_key=True),
    Column("key", Text, primary_key=True, doc="What it belongs to, as in `spends`: it counts once."),
    Column("place", Integer, primary_key=True, autoincrement=False, doc="Its place among several of a key."),
    Column("kind", Text, primary_key=True, doc="Of what: `input`, `cache_read`, `output` and so on."),
    required("org_id", Id),
    required("definition_id", Id),
    Column("provider", Text, doc="As the price list names it, else as the run did; null if neither does."),
    required("model", Text, "As the price list names it, else as the run did."),
    required("tariff", Text, "`standard` or `batch`."),
    required("units", BigInteger, "Tokens, or calls."),
    Column("money", BigInteger, doc="What they cost, in nano-units of the currency; null without a price."),
    Column("price_since", Date, doc="The day from which the price holds; null if it always has."),
    Column("price_source", Text, doc="Where the price is from; null without a price."),
    required("at", Instant, "When it was counted."),
    readers="orgs",
)

model_days = table(
    "model_days",
    "What was used of models, by UTC day and definition. Kept when the runs are deleted.",
    Column("day", Date, primary_key=True, doc="The UTC day on which it was used."),
    Column("org_id", Id, primary_key=True),
    Column("definition_id", Id, primary_key=True),
    Column("provider", Text, primary_key=True, doc="As in `model_spends`; empty if it is unknown."),
    Column("model", Text, primary_key=True, doc="As in `model_spends`."),
    Column("kind", Text, primary_key=True, doc="As in `model_spends`."),
    Column("tariff", Text, primary_key=True, doc="`standard` or `batch`."),
    count("units", "Tokens, or calls.", type_=BigInteger),
    count("money", "What those with a price cost, in nano-units of the currency.", type_=BigInteger),
    count("unpriced", "Units without a price.", type_=BigInteger),
    Index("ix_model_days_org_id_day", "org_id", "day"),
    Index("ix_model_days_org_id_model", "org_id", "model", **partial("unpriced > 0")),
    postgresql_with=UPDATED,
    readers="orgs",
)

price_lists = table(
    "price_lists",
    "The price list that `prices update` has read; at most one.",
    Column("digest", Text, primary_key=True, doc="Its SHA-256."),
    required("data", LargeBinary, "The file, compressed by zlib."),
    required("models", Integer, "How many models it has."),
    required("created_at", Instant),
    required("created_by", Text),
    readers="operators",
)
