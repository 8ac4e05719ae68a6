"""The tables of limits of calls to other services: the limits, what workers use of them, and pauses."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, Index, Integer, Text, UniqueConstraint

from worker.model.limits import PERS
from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import UPDATED, one_of, required, table

limits = table(
    "limits",
    "Limits of calls to other services, for all orgs.",
    Column("id", Id, primary_key=True),
    required("origin", Text, "The service: scheme, host and port."),
    required("per", Text, "`org`: each org has it for itself; `all`: all orgs share it."),
    Column("rate", Text, doc="Requests in a time, such as `40/s`; null for any number."),
    Column("burst", Integer, doc="How many may be sent at once after a pause; null without a rate."),
    Column("concurrent", Integer, doc="How many may be under way at once; null for any number."),
    required("max_wait", Text, "How long a request waits, such as `10s`."),
    required("created_at", Instant),
    required("updated_at", Instant),
    required("updated_by", Text, "Who changed it."),
    UniqueConstraint("origin", "per"),
    CheckConstraint(one_of("per", PERS), name="per"),
    CheckConstraint("rate IS NOT NULL OR concurrent IS NOT NULL", name="limits"),
    CheckConstraint("(rate IS NULL) = (burst IS NULL)", name="burst"),
    readers="operators",
)

limit_shares = table(
    "limit_shares",
    "What workers use of a limit. A key that is not in use has no row.",
    Column("id", Id, primary_key=True, doc="Follows from the limit and the org."),
    required("limit_id", Id, "A row of `limits`."),
    Column("org_id", Id, doc="The org, of a limit by org."),
    required("bucket", json_type(), "Tokens, their time, and what each worker holds and waits for."),
    required("idle_at", Instant, "When the row is of no use, unless a worker asks."),
    Index("ix_limit_shares_idle_at", "idle_at"),
    Index("ix_limit_shares_limit_id", "limit_id"),
    Index("ix_limit_shares_org_id", "org_id"),
    postgresql_with=UPDATED,
    readers="operators",
)

origin_pauses = table(
    "origin_pauses",
    "Orgs whose requests to a service pause, because it answered 429 or 503.",
    Column("org_id", Id, primary_key=True),
    Column("origin", Text, primary_key=True, doc="The service: scheme, host and port."),
    required("until", Instant, "When the pause ends."),
    required("paused_at", Instant, "When it was last told."),
    Index("ix_origin_pauses_until", "until"),
    postgresql_with=UPDATED,
    readers="operators",
)
