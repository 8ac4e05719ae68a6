"""The orgs, and with what each asks for its tokens."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
)

from worker.store.tables.columns import Id, Instant, json_type, metadata, one_of

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
