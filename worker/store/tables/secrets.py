"""The tables with sealed columns: credentials, the access tokens that workers share, and secrets of orgs."""

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

from worker.store.dialect import Id, Instant
from worker.store.tables.runs import UPDATED, count, metadata, one_of, partial, required

CREDENTIAL_STATES = ("pending", "active", "retired")

credentials = Table(
    "credentials",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("generation", Integer, "1 for the first, then counting up."),
    required("client_id", Text, "The machine-to-machine application."),
    Column("sealed", LargeBinary, doc="The sealed secret or private key; null with a `reference`."),
    Column("reference", Text, doc="`file:NAME` in `secrets_dir`."),
    Column("key_id", Text, doc="The key of the key ring that seals it."),
    required("kind", Text, "`client_secret` or `private_key`.", server_default="client_secret"),
    required("state", Text, "`pending` (not used yet), `active` or `retired`.", server_default="active"),
    required("created_at", Instant),
    required("created_by", Text),
    Column("retired_at", Instant, doc="When it was retired; `retire --now` also destroys the secret."),
    Column("last_used_at", Instant, doc="When it was last used to request a token."),
    count("uses", "The number of token requests with it.", type_=BigInteger),
    Column("last_error", Text, doc="The issuer's answer, if the last request failed."),
    UniqueConstraint("org_id", "generation"),
    CheckConstraint(one_of("state", CREDENTIAL_STATES), name="state"),
    CheckConstraint(one_of("kind", ("client_secret", "private_key")), name="kind"),
    Index(
        "ix_credentials_rejected_org_id", "org_id", **partial("last_error IS NOT NULL AND state = 'active'")
    ),
    Index("ix_credentials_client_id", "client_id"),
    info={"meaning": "An org's client ids and secrets at its issuer."},
)

access_tokens = Table(
    "access_tokens",
    metadata,
    Column("id", Text, primary_key=True, doc="A digest of issuer, org, audience and scopes."),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("issuer", Text, "The issuer, a table of `worker.toml`."),
    count("version", "The number of tokens that were stored here.", type_=BigInteger),
    Column("credential_id", Id, doc="The credential that it was requested with."),
    Column("sealed", LargeBinary, doc="The sealed token; null while the first one is requested."),
    Column("key_id", Text, doc="The key of the key ring that seals it."),
    Column("received_at", Instant, doc="When it was received."),
    Column("expires_at", Instant, doc="When it expires."),
    Column("reserved_by", Text, doc="The process that requests a new one."),
    Column("reserved_until", Instant, doc="When that reservation ends."),
    Index("ix_access_tokens_org_id", "org_id"),
    Index("ix_access_tokens_expires_at", "expires_at"),
    postgresql_with=UPDATED,
    info={"meaning": "The verified access tokens that all workers share, sealed. Only workers read it."},
)

org_secrets = Table(
    "org_secrets",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("name", Text, "As handlers ask for it: `ctx.secret(NAME)`."),
    required("generation", Integer, "1 for the first value, then counting up."),
    required("sealed", LargeBinary, "The sealed value."),
    required("key_id", Text, "The key of the key ring that seals it."),
    required("created_at", Instant),
    required("created_by", Text),
    Column("rotated_at", Instant, doc="When its value was last replaced."),
    Column("rotated_by", Text, doc="Who replaced it."),
    UniqueConstraint("org_id", "name"),
    Index("ix_org_secrets_key_id", "key_id"),
    info={"meaning": "Secrets of orgs for their handlers, such as an org's own model key."},
)
