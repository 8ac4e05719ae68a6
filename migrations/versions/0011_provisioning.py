"""Applications that this installation makes at identity providers, and credentials that are not used yet.

A credential is `pending` from when its secret is sealed until a token of it is verified. Workers read active
credentials only, those of the previous release too.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0010"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"

BEFORE = "state IN ('active', 'retired')"
NOW = "state IN ('pending', 'active', 'retired')"
REJECTED = "last_error IS NOT NULL AND state = 'active'"
UNFINISHED = "state IN ('making', 'made', 'announced')"
KINDS_BEFORE = "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead')"
KINDS = "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed')"
STATES = "state IN ('making', 'made', 'announced', 'active', 'overlapping', 'retired', 'deleted')"


def upgrade() -> None:
    allow_states(NOW)
    allow_kinds(KINDS)
    op.create_index("ix_credentials_client_id", "credentials", ["client_id"])
    op.create_table(
        "applications",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("issuer", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("application_id", sa.Text),
        sa.Column("client_id", sa.Text),
        sa.Column("credential_id", ID),
        sa.Column("scopes", JSON),
        sa.Column("token_seconds", sa.Integer),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("not_before", INSTANT),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_applications")),
        sa.UniqueConstraint("issuer", "application_id", name=op.f("uq_applications_issuer_application_id")),
        sa.CheckConstraint(STATES, name=op.f("ck_applications_state")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_applications_org_id_orgs")),
        sa.UniqueConstraint("name", name=op.f("uq_applications_name")),
    )
    op.create_index(
        "uq_applications_org_id_unfinished",
        "applications",
        ["org_id"],
        unique=True,
        postgresql_where=sa.text(UNFINISHED),
        sqlite_where=sa.text(UNFINISHED),
    )
    op.create_index("ix_applications_org_id_state", "applications", ["org_id", "state"])
    op.create_index("ix_applications_issuer_state_id", "applications", ["issuer", "state", "id"])
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        op.execute("ALTER TABLE applications ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE applications FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON applications USING (org_id = {ORG})")
        op.execute("CREATE POLICY owner ON applications TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("applications")
    op.drop_index("ix_credentials_client_id", "credentials")
    op.execute("UPDATE credentials SET state = 'retired' WHERE state = 'pending'")
    allow_states(BEFORE)
    op.execute("DELETE FROM alerts WHERE kind = 'provisioning_failed'")
    allow_kinds(KINDS_BEFORE)


def allow_states(condition: str) -> None:
    """Replace the condition on the states of credentials; SQLite can do it only with a new table."""
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_credentials_state"), "credentials", type_="check")
        op.create_check_constraint(op.f("ck_credentials_state"), "credentials", condition)
        return
    # In memory: the connections of a migration keep temporary tables there.
    op.execute("CREATE TEMP TABLE kept AS SELECT * FROM credentials")
    op.drop_table("credentials")
    op.create_table(
        "credentials",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("client_id", sa.Text, nullable=False),
        sa.Column("sealed", sa.LargeBinary),
        sa.Column("reference", sa.Text),
        sa.Column("key_id", sa.Text),
        sa.Column("kind", sa.Text, nullable=False, server_default="client_secret"),
        sa.Column("state", sa.Text, nullable=False, server_default="active"),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("retired_at", INSTANT),
        sa.Column("last_used_at", INSTANT),
        sa.Column("uses", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint("org_id", "generation", name=op.f("uq_credentials_org_id_generation")),
        sa.CheckConstraint(condition, name=op.f("ck_credentials_state")),
        sa.CheckConstraint("kind IN ('client_secret', 'private_key')", name=op.f("ck_credentials_kind")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_credentials_org_id_orgs")),
    )
    op.execute("INSERT INTO credentials SELECT * FROM kept")
    op.execute("DROP TABLE kept")
    op.create_index(
        "ix_credentials_rejected_org_id", "credentials", ["org_id"], sqlite_where=sa.text(REJECTED)
    )


def allow_kinds(condition: str) -> None:
    """Replace the condition on the kinds of alerts, as `allow_states` does."""
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_alerts_kind"), "alerts", type_="check")
        op.create_check_constraint(op.f("ck_alerts_kind"), "alerts", condition)
        return
    op.execute("CREATE TEMP TABLE kept AS SELECT * FROM alerts")
    op.drop_table("alerts")
    op.create_table(
        "alerts",
        sa.Column("cause", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("fields", JSON, nullable=False),
        sa.Column("since", INSTANT, nullable=False),
        sa.Column("struck_at", INSTANT, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("over_at", INSTANT),
        sa.Column("over_how", sa.Text),
        sa.Column("told", sa.Text),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("try_at", INSTANT),
        sa.PrimaryKeyConstraint("cause", name=op.f("pk_alerts")),
        sa.CheckConstraint(condition, name=op.f("ck_alerts_kind")),
        sa.CheckConstraint("told IS NULL OR told = 'firing'", name=op.f("ck_alerts_told")),
        sa.CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name=op.f("ck_alerts_over")),
    )
    op.execute("INSERT INTO alerts SELECT * FROM kept")
    op.execute("DROP TABLE kept")
