"""The unfinished runs."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Index, Integer, Table, Text, text

from worker.store.tables.columns import HOT, Id, Instant, json_type, metadata, one_of

LIVE_STATES = ("waiting", "running", "held")

WAITING_REASONS = (
    "due",
    "held",
    "retry",
    "snoozed",
    "handed_back",
    "recovered",
    "no_token",
    "no_handler",
)

# How running rows are counted: those of an org, those of a definition, and on PostgreSQL those of a
# worker and along the workers those of a handler; on SQLite all are the one worker's. The words for
# running mean the same, as the constraints say; they differ so that PostgreSQL's planner, whose idea
# of this table is always old, cannot take one index for another.
# An admission costs an entry in each index on PostgreSQL, so there are as few as can be. On SQLite it
# costs those that change: what runs of a definition is parted from what does not.
ON_POSTGRESQL = (
    Index(
        "ix_live_runs_running_worker_id_handler",
        "worker_id",
        "handler",
        postgresql_where=text("worker_id IS NOT NULL"),
    ),
    Index("ix_live_runs_definition_id_started_at", "definition_id", "started_at"),
)
ON_SQLITE = (
    Index("ix_live_runs_definition_id", "definition_id"),
    Index("ix_live_runs_running_definition_id", "definition_id", sqlite_where=text("started_at IS NOT NULL")),
)

live_runs = Table(
    "live_runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("handler", Text, nullable=False, doc="The definition's."),
    Column(
        "variant_handlers",
        json_type(),
        doc="All handlers that an attempt may choose, where there are variants.",
    ),
    Column("isolation", Text, nullable=False, doc="`child` or `inline`."),
    Column("origin", Text, nullable=False, doc="As in `runs`."),
    Column("scheduled_for", Instant, nullable=False, doc="As in `runs`."),
    Column("idempotency_key", Id, nullable=False, doc="As in `runs`."),
    Column("params", json_type(), doc="As in `runs`."),
    Column("backfill_id", Id, doc="As in `runs`."),
    Column("max_concurrent", Integer, doc="The definition's."),
    Column("priority", Integer, nullable=False, server_default="0", doc="The definition's."),
    Column(
        "serial",
        Boolean,
        nullable=False,
        doc="Whether it is the only unfinished run of its definition beside a held one.",
    ),
    Column("state", Text, nullable=False, doc="`waiting`, `held` or `running`."),
    Column("reason", Text, doc="What it waits for; null while it runs."),
    Column("detail", Text, doc="And more of that."),
    Column("available_at", Instant, nullable=False, doc="It may start from then on."),
    Column(
        "start_by", Instant, doc="A scheduled run whose handler never started by then is skipped (`expired`)."
    ),
    Column(
        "attempt", Integer, nullable=False, server_default="0", doc="The attempt that is on, or was last."
    ),
    Column(
        "failures",
        Integer,
        nullable=False,
        server_default="0",
        doc="Attempts that count against `max_attempts`.",
    ),
    Column(
        "recoveries",
        Integer,
        nullable=False,
        server_default="0",
        doc="Those that count against `max_recoveries`.",
    ),
    Column(
        "fencing_token",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="Grows with each admission; every write compares it.",
    ),
    Column("worker_id", Id, doc="The worker that owns it, while it runs."),
    Column("started_at", Instant, doc="When it was admitted."),
    Column("progress", json_type(), doc="As in `runs`."),
    Column("cancel_requested_at", Instant, doc="It was asked to stop."),
    Column("cancel_reason", Text, doc="Why: `requested`, `replaced` or `closed`."),
    CheckConstraint(one_of("state", LIVE_STATES), name="state"),
    CheckConstraint(one_of("isolation", ("child", "inline")), name="isolation"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="owner"),
    CheckConstraint("(state = 'running') = (started_at IS NOT NULL)", name="started"),
    CheckConstraint("(state = 'running') = (reason IS NULL)", name="reason"),
    Index(
        "ix_live_runs_waiting",
        "org_id",
        text("priority DESC"),
        "available_at",
        "id",
        postgresql_where=text("state = 'waiting'"),
        sqlite_where=text("state = 'waiting'"),
    ),
    Index(
        "ix_live_runs_running_org_id",
        "org_id",
        postgresql_where=text("state = 'running'"),
        sqlite_where=text("state = 'running'"),
    ),
    *(index.ddl_if(dialect="postgresql") for index in ON_POSTGRESQL),
    *(index.ddl_if(dialect="sqlite") for index in ON_SQLITE),
    Index(
        "ix_live_runs_start_by",
        "start_by",
        postgresql_where=text("state = 'waiting' AND start_by IS NOT NULL"),
        sqlite_where=text("state = 'waiting' AND start_by IS NOT NULL"),
    ),
    Index(
        "ix_live_runs_backfill_id",
        "backfill_id",
        postgresql_where=text("backfill_id IS NOT NULL"),
        sqlite_where=text("backfill_id IS NOT NULL"),
    ),
    Index(
        "uq_live_runs_serial",
        "definition_id",
        unique=True,
        postgresql_where=text("serial AND state IN ('waiting', 'running')"),
        sqlite_where=text("serial AND state IN ('waiting', 'running')"),
    ),
    Index(
        "uq_live_runs_held",
        "definition_id",
        unique=True,
        postgresql_where=text("state = 'held'"),
        sqlite_where=text("state = 'held'"),
    ),
    postgresql_with=HOT,
    info={"meaning": "The unfinished runs only: what admission and running need, narrow and hot."},
)
