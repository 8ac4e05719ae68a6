"""Drop the words of an org whose name changes, so that the search never finds it by its old name.

A worker of an older release changes the name and not the words. A chore of this release adds the words of
orgs that have none: those that such a worker adds or renames during a rolling deploy.

Expand first: the workers of the previous release, which write the words themselves, do not notice it.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0011"
branch_labels = None
depends_on = None

RENAMED = {
    "sqlite": (
        "CREATE TRIGGER orgs_renamed AFTER UPDATE OF name ON orgs WHEN NEW.name <> OLD.name "
        "BEGIN DELETE FROM org_words WHERE org_id = NEW.id; END",
    ),
    "postgresql": (
        "CREATE FUNCTION orgs_renamed() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN DELETE FROM org_words WHERE org_id = NEW.id; RETURN NULL; END $$",
        "CREATE TRIGGER orgs_renamed AFTER UPDATE OF name ON orgs FOR EACH ROW "
        "WHEN (NEW.name <> OLD.name) EXECUTE FUNCTION orgs_renamed()",
    ),
}


def upgrade() -> None:
    for statement in RENAMED[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER orgs_renamed")
        return
    op.execute("DROP TRIGGER orgs_renamed ON orgs")
    op.execute("DROP FUNCTION orgs_renamed()")
