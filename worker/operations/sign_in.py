"""Links that log in once: for the person at the terminal of a worker, before there is any operator."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

from worker.store import sign_in
from worker.store.database import Database

# How long a link is valid.
LASTS = timedelta(minutes=10)
# Links of one user at a time; another one replaces the oldest.
MOST = 5


def make_link(database: Database, user: str, *, at: datetime) -> str:
    """Store a link for one login as an administrator, and return its path; only its hash is stored."""
    code = secrets.token_urlsafe(32)
    row = {
        "key_sha256": sign_in.sha256(code),
        "kind": "link",
        "client": f"{user} (terminal)",
        "browser_sha256": "",
        "nonce": "",
        "verifier": "",
        "return_to": "/",
        "created_at": at,
        "until": at + LASTS,
    }
    with database.transaction() as connection:
        sign_in.begin_login(connection, row, most=MOST)
    return f"/login/once/{code}"
