"""The tables of access: those with sealed columns, the applications at providers, and logins.

Sealed are credentials, the access tokens that workers share, and secrets of orgs. A row of `applications` is
written before the provider is asked, so that a command that is interrupted finds what it made. No column of
a login holds a token, a session's key or the code of a link: rows are found by SHA-256, in lower-case
hexadecimal. No org reads those tables.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Text,
    UniqueConstraint,
)

from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import UPDATED, count, one_of, partial, required, table

CREDENTIAL_STATES = ("pending", "active", "retired")

credentials = table(
    "credentials",
    "An org's client ids and secrets at its issuer.",
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
    readers="orgs",
)

access_tokens = table(
    "access_tokens",
    "The verified access tokens that all workers share, sealed. Only workers read it.",
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
    readers="operators",
)

org_secrets = table(
    "org_secrets",
    "Secrets of orgs for their handlers, such as an org's own model key.",
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
    Column("origin", Text, doc="The only origin it is sent to; null if handlers get it in clear."),
    Column("header", Text, doc="The header that the broker sets with it; null if handlers place it."),
    UniqueConstraint("org_id", "name"),
    Index("ix_org_secrets_key_id", "key_id"),
    readers="orgs",
)


APPLICATION_STATES = ("making", "made", "announced", "active", "overlapping", "retired", "deleted")

applications = table(
    "applications",
    "The applications that `orgs sync --provision` and rotation made at a provider.",
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
    readers="operators",
)


# Roles of a login; a starter has a token only.
ROLES = ("viewer", "operator", "admin", "member", "manager")
OPERATOR_ROLES = ("starter", "viewer", "operator", "admin")
SESSION_KINDS = ("operator", "org", "person", "link")
LOGIN_KINDS = ("provider", "link")

operators = table(
    "operators",
    "Operators added with `operators add`, beside those of `[[web.operators]]`.",
    Column("id", Id, primary_key=True),
    required("name", Text, "The name in audit rows: `operator:NAME`.", unique=True),
    required("role", Text, "`viewer`, `operator` or `admin`."),
    required("token_sha256", Text, "The SHA-256 of the token.", unique=True),
    required("created_at", Instant),
    required("created_by", Text),
    Column("mcp_token_sha256", Text, doc="The SHA-256 of the token of its MCP client; null without one."),
    Index("uq_operators_mcp_token_sha256", "mcp_token_sha256", unique=True),
    CheckConstraint(one_of("role", OPERATOR_ROLES), name="role"),
    readers="operators",
)

plans = table(
    "plans",
    "Changes that MCP clients have planned, until a person confirms them; each row is used once.",
    Column("id", Id, primary_key=True),
    required("operator", Text, "`operator:NAME`, who may confirm it."),
    required("token_sha256", Text, "The SHA-256 of the token with which it was planned."),
    required("change", Text, "What it does, by the operation of the API: `retry_run`."),
    required("arguments", Text, "What that is called with, as JSON."),
    required("shown", Text, "What there was and what it would be, as JSON: a person confirms just this."),
    required("created_at", Instant),
    required("until", Instant, "When it expires, ten minutes after it was made."),
    Index("ix_plans_operator_created_at", "operator", "created_at"),
    Index("ix_plans_until", "until"),
    readers="operators",
)

sessions = table(
    "sessions",
    "Browsers that are logged in to the console.",
    Column("key_sha256", Text, primary_key=True, doc="The SHA-256 of the key in the browser's cookie."),
    required("kind", Text, "Who logged in: `operator`, `org`, `person`, or by `link`."),
    required("caller", Text, "What sessions are counted by."),
    required("name", Text, "The operator, the org or the person, for people."),
    required("role", Text, "`viewer`, `operator`, `admin`, `member` or `manager`."),
    Column("org", Text, doc="The code of the only org that it sees; null: all orgs."),
    required("subject", Text, "A person's `sub` at the issuer; else empty."),
    required("home", Text, "The code of the org in a person's token; else empty."),
    required("issuer", Text, "A table `[issuers.NAME]` of worker.toml, or empty for an operator."),
    required("client_id", Text, "The client of an org's token; else empty."),
    required("has_org_scope", Boolean, "Whether an org's token has `web.org_scope`."),
    required(
        "basis",
        Text,
        "A hash of what gave access: the operator's token, the rules of `[web.login]`, or `web.org_scope`.",
    ),
    required("created_at", Instant),
    required("until", Instant, "When it ends."),
    Index("ix_sessions_caller_created_at", "caller", "created_at"),
    Index("ix_sessions_home", "home"),
    Index("ix_sessions_until", "until"),
    CheckConstraint(one_of("kind", SESSION_KINDS), name="kind"),
    CheckConstraint(one_of("role", ROLES), name="role"),
    readers="operators",
)

login_transactions = table(
    "login_transactions",
    "Logins that have begun; each row is used once.",
    Column("key_sha256", Text, primary_key=True, doc="The SHA-256 of the `state` or of the link's code."),
    required("kind", Text, "`provider`: begun at an identity provider; `link`: a link for one login."),
    required("client", Text, "What they are counted by: the address, or the user of the terminal."),
    required("browser_sha256", Text, "The SHA-256 of the cookie of the browser that began it; or empty."),
    required("nonce", Text, "The `nonce` that the ID token must have; empty for a link."),
    required("verifier", Text, "The PKCE verifier; empty for a link."),
    required("return_to", Text, "The path to open after the login."),
    required("created_at", Instant),
    required("until", Instant, "When it expires, ten minutes after it began."),
    Index("ix_login_transactions_client_created_at", "client", "created_at"),
    Index("ix_login_transactions_until", "until"),
    CheckConstraint(one_of("kind", LOGIN_KINDS), name="kind"),
    readers="operators",
)
