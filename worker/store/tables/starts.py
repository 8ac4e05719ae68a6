"""The tables of starts: what a product asked for in its own transactions, and which logins may ask."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Text, UniqueConstraint

from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import UPDATED, one_of, partial, required, table

# `later` until its `not_before`, `due` until a worker makes its run, then `made`: only the key is left.
START_STATES = ("later", "due", "made")

starts = table(
    "starts",
    "Runs that a product started in its own transactions. Workers make each run, and leave the key behind.",
    Column("id", Id, primary_key=True, doc="Also the id of its run."),
    required("org_id", Id),
    required("definition_id", Id),
    required("key", Text, "The product's key: the same one makes one run of a definition."),
    required("state", Text, "`later`, `due`, or `made` once its run exists."),
    required("login", Text, "The login that asked for it."),
    required("created_at", Instant, "When it was asked for, by the clock of the database."),
    Column("not_before", Instant, doc="The earliest time of its run; null: at once."),
    Column("params", json_type(), doc="As given; null if none were, and once its run is made."),
    Column("made_at", Instant, doc="When its run was made."),
    # No foreign keys: a transaction of the product would lock the rows that they name.
    UniqueConstraint("org_id", "definition_id", "key"),
    CheckConstraint(one_of("state", START_STATES), name="state"),
    CheckConstraint("(state = 'made') = (made_at IS NOT NULL)", name="made"),
    # An id begins with the time at which the run is due: its order is that in which runs are made.
    Index("ix_starts_due", "definition_id", "id", **partial("state = 'due'")),
    Index("ix_starts_later", "not_before", **partial("state = 'later'")),
    Index("ix_starts_made_at", "made_at", **partial("state = 'made'")),
    postgresql_with=UPDATED,
    readers="orgs",
)

product_logins = table(
    "product_logins",
    "The logins of products, and the orgs whose definitions each may start. Without a row, none.",
    Column("id", Id, primary_key=True),
    required("login", Text, "The name of the database login (`session_user`)."),
    Column("org_id", Id, ForeignKey("orgs.id"), doc="An org that it may start; null: all of them."),
    required("created_at", Instant),
    required("created_by", Text),
    UniqueConstraint("login", "org_id"),
    Index("uq_product_logins_all", "login", unique=True, **partial("org_id IS NULL")),
    Index("ix_product_logins_org_id", "org_id"),
    readers="operators",
)
