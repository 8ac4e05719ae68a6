"""Who changed what, sums by day and hour, and the alerts."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Date, Index, Integer, Table, Text

from worker.store.tables.columns import UPDATED, Id, Instant, json_type, metadata, one_of

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
