"""The tables of logins: operators, the sessions of browsers, and logins that have begun.

No column holds a token, a session's key or the code of a link: rows are found by SHA-256, in lower-case
hexadecimal. No org reads these tables.
"""

from __future__ import annotations

from sqlalchemy import Boolean, CheckConstraint, Column, Index, Table, Text

from worker.store.dialect import Id, Instant
from worker.store.tables.runs import metadata, one_of, required

OPERATOR_ROLES = ("viewer", "operator", "admin")
ROLES = (*OPERATOR_ROLES, "member", "manager")
SESSION_KINDS = ("operator", "org", "person", "link")
LOGIN_KINDS = ("provider", "link")

operators = Table(
    "operators",
    metadata,
    Column("id", Id, primary_key=True),
    required("name", Text, "The name in audit rows: `operator:NAME`.", unique=True),
    required("role", Text, "`viewer`, `operator` or `admin`."),
    required("token_sha256", Text, "The SHA-256 of the token.", unique=True),
    required("created_at", Instant),
    required("created_by", Text),
    CheckConstraint(one_of("role", OPERATOR_ROLES), name="role"),
    info={"meaning": "Operators added with `operators add`, beside those of `[[web.operators]]`."},
)

sessions = Table(
    "sessions",
    metadata,
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
    info={"meaning": "Browsers that are logged in to the console."},
)

login_transactions = Table(
    "login_transactions",
    metadata,
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
    info={"meaning": "Logins that have begun; each row is used once."},
)
