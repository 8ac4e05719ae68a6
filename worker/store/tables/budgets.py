"""The tables of budgets: limits, what raises them, and what was spent.

A spend is a row of `spends`, whose key makes it count once. In the same transaction it is added to
`meter_days`, which people read, and to the rows of `meters` that the org's budgets compare with their limit.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    Float,
    ForeignKey,
    Index,
    Text,
    UniqueConstraint,
)

from worker.model.definitions.budgets import AT_LIMIT, PERS
from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import UPDATED, count, one_of, partial, required, table

budgets = table(
    "budgets",
    "What orgs may spend. Of several budgets of a meter, each applies.",
    Column("id", Id, primary_key=True),
    required("target", Text, "The orgs that it applies to, as text."),
    Column("org_id", Id, ForeignKey("orgs.id"), doc="Its org; null if it selects orgs."),
    Column("selector", json_type(), doc="The orgs that it selects, as in a template; null for one org."),
    required("meter", Text, "What it limits."),
    Column("limit", BigInteger, doc="How much may be spent in a period; null if a property has it."),
    Column("property", Text, doc="The property of the token that has the limit."),
    required("per", Text, "The period: `run`, `day` or `month`."),
    Column("zone", Text, doc="The zone of its days and months; null for the org's."),
    required("at_limit", Text, "`wait`, `fail` or `ask`."),
    required("warn_at", Float, "The part of the limit at which a warning is logged."),
    required("created_at", Instant),
    required("updated_at", Instant),
    required("updated_by", Text),
    UniqueConstraint("target", "meter", "per"),
    Index("ix_budgets_org_id", "org_id"),
    CheckConstraint("(org_id IS NULL) <> (selector IS NULL)", name="target"),
    CheckConstraint('("limit" IS NULL) <> (property IS NULL)', name="limit"),
    CheckConstraint(one_of("per", PERS), name="per"),
    CheckConstraint(one_of("at_limit", AT_LIMIT), name="at_limit"),
    readers="orgs",
)

budget_raises = table(
    "budget_raises",
    "Raises of an org's budgets by operators, each for a time.",
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("meter", Text, "As in `budgets`."),
    required("per", Text, "The budgets that it raises: `run`, `day` or `month`."),
    Column("run_id", Id, doc="The run that it is for, of a budget per run; null for all."),
    required("amount", BigInteger, "What it adds to the limit of each period."),
    required("until", Instant, "When it ends."),
    required("created_at", Instant),
    required("created_by", Text),
    Index("ix_budget_raises_org_id_meter", "org_id", "meter"),
    Index("ix_budget_raises_run_id", "run_id", **partial("run_id IS NOT NULL")),
    CheckConstraint(one_of("per", PERS), name="per"),
    readers="orgs",
)

meters = table(
    "meters",
    "What was spent in each period of an org's budgets.",
    Column("org_id", Id, primary_key=True),
    Column("meter", Text, primary_key=True, doc="What was spent: as in `budgets`."),
    Column("per", Text, primary_key=True, doc="`day` or `month`."),
    Column("starts_at", Instant, primary_key=True, doc="The start of the period."),
    count("used", "What was spent in it.", type_=BigInteger),
    Index("ix_meters_starts_at", "starts_at"),
    postgresql_with=UPDATED,
    readers="orgs",
)

meter_days = table(
    "meter_days",
    "What was spent, by UTC day and definition. Kept when the runs are deleted.",
    Column("day", Date, primary_key=True, doc="The UTC day on which it was spent."),
    Column("org_id", Id, primary_key=True),
    Column("meter", Text, primary_key=True, doc="What was spent: as in `budgets`."),
    Column("definition_id", Id, primary_key=True),
    count("used", "What its runs spent.", type_=BigInteger),
    Index("ix_meter_days_org_id_day", "org_id", "day"),
    Index("ix_meter_days_definition_id_meter", "definition_id", "meter"),
    postgresql_with=UPDATED,
    readers="orgs",
)

spends = table(
    "spends",
    "What each run spent.",
    Column("run_id", Id, primary_key=True),
    Column("meter", Text, primary_key=True, doc="What was spent: as in `budgets`."),
    Column(
        "key",
        Text,
        primary_key=True,
        doc="What it belongs to: `step:SEQ`, `batch:ID`, else `ATTEMPT:NUMBER`; the same key counts once.",
    ),
    required("org_id", Id),
    required("definition_id", Id),
    required("amount", BigInteger, "How much."),
    required("at", Instant, "When it was counted."),
    Index("ix_spends_org_id_meter_at", "org_id", "meter", "at"),
    readers="orgs",
)

tree_spends = table(
    "tree_spends",
    "What the runs below a run have spent, for budgets per run.",
    Column("run_id", Id, primary_key=True, doc="The run at the top of their tree."),
    Column("meter", Text, primary_key=True, doc="What was spent: as in `budgets`."),
    required("org_id", Id),
    count("used", "How much.", type_=BigInteger),
    postgresql_with=UPDATED,
    readers="orgs",
)

org_properties = table(
    "org_properties",
    "The properties that are limits of budgets, from the newest token of each org.",
    Column("org_id", Id, primary_key=True),
    Column("name", Text, primary_key=True, doc="The property's name."),
    Column("value", BigInteger, doc="Null if the token does not have it as a number of 0 or more."),
    required("issued_at", Instant, "When the token with it was issued."),
    readers="orgs",
)
