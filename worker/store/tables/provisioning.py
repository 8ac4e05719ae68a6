"""The table of provisioning: the applications that this installation makes at identity providers.

A row is written before the provider is asked, so that a command that is interrupted finds what it made.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, Table, Text, UniqueConstraint

from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import metadata, one_of, partial, required

APPLICATION_STATES = ("making", "made", "announced", "active", "overlapping", "retired", "deleted")

applications = Table(
    "applications",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("issuer", Text, "A table `[issuers.NAME]` of worker.toml."),
    required("name", Text, "Its name at the provider: this installation, the org and a key.", unique=True),
    required(
        "state",
        Text,
        "`making` (the provider may not have it yet), `made`, `announced` (verified, not used yet), "
        "`active`, `overlapping` (a newer one is active), `retired`, `deleted`.",
    ),
    Column("application_id", Text, doc="Its id at the provider."),
    Column("client_id", Text, doc="Its client id."),
    Column("credential_id", Id, doc="The credential with its secret."),
    Column("scopes", json_type(), doc="The scopes that it was given, by audience."),
    Column("token_seconds", Integer, doc="The lifetime of the token that verified it."),
    required("created_at", Instant),
    required("created_by", Text),
    required("updated_at", Instant, "When it came into its state."),
    Column("not_before", Instant, doc="When `announced` or `overlapping` ends, at the earliest."),
    Column("last_error", Text, doc="Why the last step failed; null if it did not."),
    UniqueConstraint("issuer", "application_id"),
    # An org has one application that is not in use yet.
    Index(
        "uq_applications_org_id_unfinished",
        "org_id",
        unique=True,
        **partial("state IN ('making', 'made', 'announced')"),
    ),
    Index("ix_applications_org_id_state", "org_id", "state"),
    Index("ix_applications_issuer_state_id", "issuer", "state", "id"),
    CheckConstraint(one_of("state", APPLICATION_STATES), name="state"),
    info={"meaning": "The applications that `orgs sync --provision` and rotation made at a provider."},
)
