"""The installation that a database belongs to: its word, and the key in the names of its applications.

A copy of a database has both. The word differs from that of the copy's own `worker.toml`, which is how a
process notices that the applications in its rows may be another installation's.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, select

from worker.clock import from_text, to_text
from worker.store import schema, tables

# Facts: the key, the word, and since when a copy has a key of its own.
KEY = "installation"
WORD = "installation.word"
NEW_SINCE = "installation.new_since"

# `unset`: worker.toml or the database has no word, so they are not compared.
State = Literal["matches", "unset", "differs"]


@dataclass(frozen=True, slots=True)
class Installation:
    """What the database holds. `key` is None until something is provisioned or placed."""

    word: str | None
    key: str | None
    new_since: datetime | None

    def state(self, word: str) -> State:
        """How it compares with the word of worker.toml, which is empty if that has none."""
        if not word or self.word is None:
            return "unset"
        return "matches" if word == self.word else "differs"


def read(connection: Connection) -> Installation:
    """What the database holds now, in one statement."""
    facts = tables.facts
    query = select(facts.c.name, facts.c.value).where(facts.c.name.in_((KEY, WORD, NEW_SINCE))).limit(3)
    found: dict[str, str] = {name: value for name, value in connection.execute(query)}
    since = found.get(NEW_SINCE)
    return Installation(found.get(WORD), found.get(KEY), None if since is None else from_text(since))


def key_of(connection: Connection) -> str:
    """The key, made at the first call."""
    schema.write_new(connection, KEY, _new_key())
    return schema.read(connection, KEY) or ""


def store_word(connection: Connection, word: str) -> bool:
    """Store the word if the database has none; returns whether it had none."""
    return schema.write_new(connection, WORD, word)


def change_word(connection: Connection, word: str) -> None:
    """Replace the word; the key stays, and with it what is this installation's at a provider."""
    schema.write(connection, WORD, word)


def renew(connection: Connection, word: str, *, at: datetime) -> str:
    """Replace word and key, and return the key; nothing made before `at` is this installation's any more."""
    key = _new_key()
    for name, value in ((WORD, word), (KEY, key), (NEW_SINCE, to_text(at))):
        schema.write(connection, name, value)
    return key


def _new_key() -> str:
    return secrets.token_hex(6)
