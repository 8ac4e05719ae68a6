"""What is to run, and when next."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from worker.store.tables.columns import UPDATED, Id, Instant, json_type, metadata

templates = Table(
    "templates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True, doc="Also that of the definitions it makes."),
    Column("revision", Integer, nullable=False),
    Column("selector", json_type(), nullable=False, doc="Which orgs it means."),
    Column("spec", json_type(), nullable=False, doc="The keys of the definition."),
    Column("change", BigInteger, nullable=False, doc="Its place among the changes of all templates."),
    Column(
        "orgs_total",
        Integer,
        nullable=False,
        server_default="0",
        doc="How many orgs its last change concerns.",
    ),
    Column("orgs_done", Integer, nullable=False, server_default="0", doc="How many of them it has reached."),
    Column("materialised_at", Instant, doc="When it had reached all."),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("updated_by", Text, nullable=False),
    Column("closed_at", Instant, doc="No definition is made of it any more."),
    info={"meaning": "One definition for many orgs."},
)

definitions = Table(
    "definitions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("name", Text, nullable=False, doc="Unique within the org."),
    Column("revision", Integer, nullable=False, doc="The one in force."),
    Column("enabled", Boolean, nullable=False, doc="While false nothing is due."),
    Column("paused_at", Instant, doc="Nothing is due from then on, until it is resumed."),
    Column("paused_by", Text, doc="Who paused it."),
    Column("pause_note", Text, doc="And why, in their words."),
    Column(
        "consecutive_failures",
        Integer,
        nullable=False,
        server_default="0",
        doc="Runs that failed or were refused, one after the other.",
    ),
    Column("template_id", Id, ForeignKey("templates.id"), doc="The template that made it."),
    Column("template_revision", Integer, doc="And which of its revisions."),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("closed_at", Instant, doc="Nothing runs any more; a row is never deleted."),
    UniqueConstraint("org_id", "name"),
    Index(
        "ix_definitions_template_id",
        "template_id",
        postgresql_where=text("template_id IS NOT NULL"),
        sqlite_where=text("template_id IS NOT NULL"),
    ),
    info={"meaning": "What an org asked for. Its keys are in `definition_revisions`."},
)

definition_revisions = Table(
    "definition_revisions",
    metadata,
    Column("definition_id", Id, ForeignKey("definitions.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("spec", json_type(), nullable=False, doc="The keys of the definition, as `apply` reads them."),
    Column("at", Instant, nullable=False, doc="When it was changed."),
    Column("by", Text, nullable=False, doc="By whom."),
    info={"meaning": "Each change of a definition."},
)

schedule = Table(
    "schedule",
    metadata,
    Column("definition_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("next_scheduled_for", Instant, doc="The nominal instant; null when nothing is due any more."),
    Column("next_fire_at", Instant, doc="The same plus spread: when it is fired."),
    Index(
        "ix_schedule_next_fire_at",
        "next_fire_at",
        postgresql_where=text("next_fire_at IS NOT NULL"),
        sqlite_where=text("next_fire_at IS NOT NULL"),
    ),
    Index("ix_schedule_org_id", "org_id"),
    postgresql_with=UPDATED,
    info={"meaning": "The next instant of each definition that is active."},
)

backfills = Table(
    "backfills",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("definition_id", Id, ForeignKey("definitions.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("range_from", Instant, nullable=False, doc="The first instant may be this."),
    Column("range_until", Instant, nullable=False, doc="The last is before this."),
    Column(
        "next_scheduled_for", Instant, doc="The first instant that has no run yet; null when each has one."
    ),
    Column(
        "max_concurrent",
        Integer,
        nullable=False,
        server_default="1",
        doc="How many of its runs may be unfinished at once.",
    ),
    Column("instants", BigInteger, nullable=False, doc="How many there are in the range."),
    Column("made", BigInteger, nullable=False, server_default="0", doc="How many have their run."),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("cancelled_at", Instant, doc="It was stopped."),
    Column("finished_at", Instant, doc="All its runs have ended."),
    UniqueConstraint("definition_id", "range_from", "range_until"),
    Index(
        "ix_backfills_unfinished",
        "id",
        postgresql_where=text("finished_at IS NULL"),
        sqlite_where=text("finished_at IS NULL"),
    ),
    info={"meaning": "Ranges of the past that run again."},
)
