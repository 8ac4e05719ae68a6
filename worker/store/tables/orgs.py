"""Orgs and credentials, definitions and templates, worker incarnations, audit, sums and alerts."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from worker.store.tables.columns import UPDATED, Id, Instant, json_type, metadata, one_of

ORG_STATES = ("active", "paused", "suspended", "removed")

orgs = Table(
    "orgs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("code", Text, nullable=False, unique=True, doc="As its tokens have it."),
    Column("name", Text, nullable=False, doc="For people."),
    Column("issuer", Text, nullable=False, doc="A table `[issuers.NAME]` of worker.toml."),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="active",
        doc="`active`, `paused`, `suspended` or `removed`.",
    ),
    Column("state_by", Text, doc="Who put it into this state."),
    Column("state_at", Instant, doc="When."),
    Column("state_note", Text, doc="And why, in their words."),
    Column(
        "max_concurrent_runs",
        Integer,
        nullable=False,
        server_default="10",
        doc="Its runs at once, over all workers.",
    ),
    Column(
        "weight",
        Integer,
        nullable=False,
        server_default="1",
        doc="Its share of the slots beside other orgs'.",
    ),
    Column("tags", json_type(), nullable=False, doc="What templates select by."),
    Column("timezone", Text, doc="Of its definitions that name none; else UTC."),
    Column(
        "templates_seen",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="The newest change of a template that it has taken up; 0: look at them all again.",
    ),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Index("ix_orgs_templates_seen", "templates_seen", "id"),
    CheckConstraint(one_of("state", ORG_STATES), name="state"),
    CheckConstraint("max_concurrent_runs >= 1", name="max_concurrent_runs"),
    CheckConstraint("weight >= 1", name="weight"),
    info={"meaning": "The customer organisations."},
)

credentials = Table(
    "credentials",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("generation", Integer, nullable=False, doc="1, then one more with each."),
    Column("client_id", Text, nullable=False, doc="The machine-to-machine application."),
    Column(
        "sealed",
        LargeBinary,
        doc="The secret or private key, sealed for this row; null where `reference` is used.",
    ),
    Column("reference", Text, doc="`file:NAME` in `secrets_dir`."),
    Column("key_id", Text, doc="The key of the key ring that seals it."),
    Column(
        "kind", Text, nullable=False, server_default="client_secret", doc="`client_secret` or `private_key`."
    ),
    Column("state", Text, nullable=False, server_default="active", doc="`active` or `retired`."),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("retired_at", Instant, doc="When it was retired; `retire --now` also destroys the secret."),
    Column("last_used_at", Instant, doc="When a token was last asked for with it."),
    Column(
        "uses", BigInteger, nullable=False, server_default="0", doc="How many tokens were asked for with it."
    ),
    Column("last_error", Text, doc="The issuer's answer, where the last request failed."),
    UniqueConstraint("org_id", "generation"),
    CheckConstraint(one_of("state", ("active", "retired")), name="state"),
    CheckConstraint(one_of("kind", ("client_secret", "private_key")), name="kind"),
    info={"meaning": "An org's client ids and secrets at its issuer."},
)

# Whose token a request shows, asked by a role that sees no row of any org yet.
FIND_CALLER = {
    "sqlite": (),
    "postgresql": (
        """
        CREATE FUNCTION find_caller(code text, client_id text, OUT id uuid, OUT issuer text, OUT state text,
                                    OUT is_credential boolean)
        RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
          SELECT o.id, o.issuer, o.state,
                 EXISTS (SELECT 1 FROM credentials c
                         WHERE c.org_id = o.id AND c.client_id = $2 AND c.client_id <> ''
                           AND c.state = 'active')
          FROM orgs o WHERE o.code = $1
        $$
        """,
        "REVOKE ALL ON FUNCTION find_caller(text, text) FROM PUBLIC",
    ),
}


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


audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", Instant, nullable=False, doc="When."),
    Column("actor", Text, nullable=False, doc="The user of the operating system, or the caller of the API."),
    Column("action", Text, nullable=False, doc="What was done."),
    Column("org_id", Id),
    Column("subject", Text, nullable=False, doc="To what."),
    Column("detail", json_type(), doc="With which values; never a secret."),
    Index("ix_audit_org_id_id", "org_id", "id"),
    info={"meaning": "Who changed what. `org_id` is null for what concerns no org or all."},
)

# An audit row never changes and is never deleted, whatever the role. SQLite's REPLACE fires no trigger
# of DELETE.
APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row is never deleted'); END",
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'an audit row is never changed or deleted'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()",
    ),
}

rollup_days = Table(
    "rollup_days",
    metadata,
    Column("day", Date, primary_key=True, doc="The UTC day of the end."),
    Column("org_id", Id, primary_key=True),
    Column("runs", BigInteger, nullable=False, server_default="0", doc="Runs that ended."),
    Column("attempts", BigInteger, nullable=False, server_default="0", doc="Attempts that ended."),
    Column(
        "handler_seconds",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="How long their handlers ran, all together.",
    ),
    postgresql_with=UPDATED,
    info={"meaning": "Sums by UTC day and org, which outlive the runs they count."},
)

rollup_hours = Table(
    "rollup_hours",
    metadata,
    Column("hour", Instant, primary_key=True, doc="The hour of the end."),
    Column("org_id", Id, primary_key=True),
    Column("state", Text, primary_key=True, doc="That they ended in."),
    Column("runs", BigInteger, nullable=False, server_default="0", doc="Runs that ended."),
    postgresql_with=UPDATED,
    info={"meaning": "Sums by hour, org and state, likewise."},
)

ALERT_KINDS = ("failed", "refused", "overdue", "paused", "credential_dead")

alerts = Table(
    "alerts",
    metadata,
    Column("cause", Text, primary_key=True, doc="Which trouble it is."),
    Column("id", Text, nullable=False, doc="That of its posts."),
    Column(
        "kind", Text, nullable=False, doc="`failed`, `refused`, `overdue`, `paused` or `credential_dead`."
    ),
    Column("summary", Text, nullable=False, doc="A sentence for people."),
    Column("fields", json_type(), nullable=False, doc="Those of the event that it was first told by."),
    Column("since", Instant, nullable=False, doc="When it first struck."),
    Column("struck_at", Instant, nullable=False, doc="When it last struck."),
    Column("count", BigInteger, nullable=False, doc="How often."),
    Column("over_at", Instant, doc="When it was over."),
    Column("over_how", Text, doc="And by what."),
    Column("told", Text, doc="What receivers know of: `firing`, or nothing yet."),
    Column("tries", Integer, nullable=False, server_default="0", doc="Posts that nobody took."),
    Column("try_at", Instant, doc="When there is something to tell; null while there is nothing."),
    CheckConstraint(one_of("kind", ALERT_KINDS), name="kind"),
    CheckConstraint("told IS NULL OR told = 'firing'", name="told"),
    CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name="over"),
    info={
        "meaning": "A row a cause of trouble, shared by all workers, until receivers know that it is over."
    },
)

alert_strikes = Table(
    "alert_strikes",
    metadata,
    Column("cause", Text, primary_key=True, doc="A row of `alerts`."),
    Column("subject_id", Id, primary_key=True, doc="A definition or an org."),
    Column("struck_at", Instant, nullable=False, doc="When it was last struck."),
    Column("well", Boolean, nullable=False, doc="Whether it has done well since."),
    info={"meaning": "Whom a cause has struck."},
)
