"""Installation: whether the database belongs to it, and how a copy or a restore is adopted."""

from __future__ import annotations

from typing import Literal, TypedDict

from sqlalchemy import Connection

from worker.errors import Busy, ConfigurationError, InstallationMismatch
from worker.ids import ALL_ORGS
from worker.store import applications, audit
from worker.store import installation as stored
from worker.store.database import Database
from worker.store.installation import Installation, State

NO_WORD = 'add a line such as installation = "production" at the top of worker.toml'
ADOPT = (
    "if the database is not the one that was meant, correct database.url; otherwise "
    "`installation adopt --same` after a restore, `installation adopt --new` for a copy"
)

How = Literal["same", "new"]


class InstallationRow(TypedDict):
    """The words of worker.toml (`installation`) and of the database, and how they compare."""

    installation: str | None
    database: str | None
    key: str | None
    state: State


class Adopted(InstallationRow):
    """After an adoption: the `database`'s word `before`, and how many applications it knows no more."""

    before: str | None
    forgotten: int


class Ownership:
    """Whether this process may change what belongs to the installation, asked before each change.

    It may if worker.toml and database have the same word, or one has none, and if the key is still the one
    that the first question found: rows that were read before `adopt --new` are another installation's.
    """

    def __init__(self, database: Database, word: str, *, key: str | None = None) -> None:
        self.database = database
        self.word = word
        self.key = key

    def require(self) -> None:
        """Check it in a statement of its own.

        Raises:
            InstallationMismatch: the database may be a copy, or was adopted since this process began.
        """
        with self.database.autocommit() as connection:
            self.check(connection)

    async def permit(self) -> None:
        """As `require`, in a thread of the database."""
        await self.database.call_autocommit(self.check)

    def check(self, connection: Connection) -> None:
        """As `require`, in the caller's transaction."""
        found = stored.read(connection)
        if found.state(self.word) == "differs":
            raise InstallationMismatch(difference(self.word, found), fix=ADOPT)
        if self.key is None:
            self.key = found.key
        elif found.key != self.key:
            raise InstallationMismatch(
                "the database was adopted as a new installation since this process began",
                fix="start it again",
            )


def difference(word: str, found: Installation) -> str:
    """What differs, and what that stops, in words."""
    return (
        f'worker.toml has installation = "{word}", and the database belongs to "{found.word}": nothing is '
        "provisioned, rotated or deleted at a provider, and Temporal places no runs"
    )


def lock_of(issuer: str) -> str:
    """The name of the lock under which one process at a time provisions an issuer."""
    return f"provisioning-{issuer}"


def show(database: Database, word: str) -> InstallationRow:
    """The words and the key."""
    with database.autocommit() as connection:
        found = stored.read(connection)
    return _row(word, found)


def adopt(database: Database, word: str, how: How, *, actor: str, issuers: list[str]) -> Adopted:
    """Give the database the word of worker.toml.

    `same` keeps the key: what it made at a provider stays its own. `new` replaces it, and forgets all
    applications; their credentials stay in use. No issuer of `issuers` is provisioned meanwhile.

    Raises:
        ConfigurationError: worker.toml has no word.
        Busy: another process provisions an issuer.
    """
    if not word:
        raise ConfigurationError("worker.toml does not name this installation", fix=NO_WORD)
    with database.exclusively(*map(lock_of, sorted(issuers))) as held:
        if not held:
            raise Busy(
                "another process provisions the orgs of an issuer", fix="stop `provision`, or try again"
            )
        with database.transaction() as connection:
            before = stored.read(connection)
            at = database.now(connection)
            forgotten = 0
            if how == "new":
                stored.renew(connection, word, at=at)
                forgotten = applications.forget(connection, ALL_ORGS, at=at)
            elif before.word != word:
                stored.change_word(connection, word)
            after = stored.read(connection)
            if after != before:
                detail = {
                    "how": how,
                    "before": before.word,
                    "key": after.key,
                    "key_before": before.key,
                    "forgotten": forgotten,
                }
                audit.note(connection, None, "installation.adopt", word, detail, at=at, actor=actor)
    return Adopted(**_row(word, after), before=before.word, forgotten=forgotten)


def _row(word: str, found: Installation) -> InstallationRow:
    return InstallationRow(
        installation=word or None, database=found.word, key=found.key, state=found.state(word)
    )
