"""The incarnations of workers, and what they say of themselves."""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, Table, Text, text

from worker.store.tables.columns import UPDATED, Id, Instant, json_type, metadata

workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("host", Text, nullable=False, doc="The machine."),
    Column("pid", Integer, nullable=False, doc="The process."),
    Column("version", Text, nullable=False, doc="Of orgworker."),
    Column("started_at", Instant, nullable=False, doc="When it started."),
    Column("renewed_at", Instant, nullable=False, doc="When its lease was last renewed."),
    Column("lease_until", Instant, nullable=False, doc="Until when it owns its runs."),
    Column("ended_at", Instant, doc="When it stopped in order, or was found dead."),
    Column("handlers", json_type(), nullable=False, doc="What it offers."),
    Column("capacity", json_type(), nullable=False, doc="How many runs at once: `children`, `inline`."),
    Index(
        "ix_workers_lease_until",
        "lease_until",
        postgresql_where=text("ended_at IS NULL"),
        sqlite_where=text("ended_at IS NULL"),
    ),
    postgresql_with=UPDATED,
    info={
        "meaning": "A row an incarnation: each start of a worker. Its lease is its right to the runs it owns."
    },
)

catalogue = Table(
    "catalogue",
    metadata,
    Column("name", Text, primary_key=True, doc="The handler's."),
    Column("distribution", Text, primary_key=True, doc="The plug-in."),
    Column("version", Text, nullable=False, doc="And its version."),
    Column("entry_point", Text, nullable=False, doc="Where its code is."),
    Column(
        "isolation",
        Text,
        nullable=False,
        server_default="child",
        doc="`child` or `inline`, as `@job` says.",
    ),
    Column("scopes", json_type(), nullable=False, doc="Those that its token must have."),
    Column("params_schema", json_type(), doc="The JSON Schema of its params."),
    Column("settings_schema", json_type(), doc="And of its settings."),
    Column("timeout", Text, doc="How long an attempt may take."),
    Column("max_attempts", Integer, doc="Attempts that may fail."),
    Column("memory", Text, doc="The cap on a run's memory."),
    Column("max_concurrent", Integer, doc="The handler's runs at once, over all workers."),
    Column("error", Text, doc="Why it does not load."),
    Column("seen_at", Instant, nullable=False, doc="When a worker last looked."),
    info={"meaning": "What the installed plug-ins offer."},
)

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True, doc="Which."),
    Column("value", Text, nullable=False, doc="What it is."),
    info={"meaning": "Facts of the whole database, such as the tzdata release in use."},
)
