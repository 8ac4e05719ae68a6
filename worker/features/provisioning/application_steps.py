"""The steps of an application after it was made: each is one transaction with its audit row and event.

A step first reads its row again, and does nothing if that is in another state by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from worker.errors import Conflict, WorkerError
from worker.ids import OrgId
from worker.store import applications, audit, credentials
from worker.store.database import Database
from worker.store.dialect import Row
from worker.telemetry.events import emit
from worker.telemetry.masking import masker


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of one issuer's applications; `actor` is in their audit rows."""

    database: Database
    issuer: str
    actor: str

    def read(self, row_id: str) -> Row:
        """The row as it is now; raises Conflict if it is gone."""
        with self.database.autocommit() as connection:
            row = applications.find(connection, row_id)
        if row is None:
            raise Conflict(f"application {row_id} is gone from the database", fix="call it again")
        return row

    def note(self, row_id: str, values: Mapping[str, object]) -> None:
        """Change columns that are not its state."""
        with self.database.transaction() as connection:
            applications.change(connection, row_id, values, at=self.database.now(connection))

    def note_error(self, row_id: str, error: WorkerError) -> None:
        """Store why the last step failed."""
        self.note(row_id, {"last_error": masker.mask(error.message, None)})

    def announce(self, row_id: str, after: timedelta) -> None:
        """Let a verified application be used `after` this; its client id is announced now."""
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] != "made":
                return
            _check_pending(row)
            at = self.database.now(connection)
            applications.change(connection, row_id, {"state": "announced", "not_before": at + after}, at=at)
            seconds = round(after.total_seconds())
            org, client = row["org"], row["client_id"]
            detail = {"client_id": client, "seconds": seconds}
            self._record(connection, row, "credential.announce", detail, at=at)
            # Before the commit: an announcement may be repeated, and must not be lost.
            emit("credential.pending", org=org, issuer=self.issuer, client=client, seconds=seconds)

    def activate(self, row_id: str, overlap: timedelta = timedelta()) -> None:
        """Let runs use a verified application; the org's earlier one ends after `overlap`.

        Raises:
            Conflict: the org was removed, or the new credential retired.
        """
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] not in ("made", "announced"):
                return
            org_id, at = OrgId(row["org_id"]), self.database.now(connection)
            _check_pending(row)
            credentials.activate(connection, org_id, row["credential_id"], at=at)
            for older in applications.of_orgs(connection, [org_id], ("active",)):
                ends = {"state": "overlapping", "not_before": at + overlap}
                applications.change(connection, older["id"], ends, at=at)
            applications.change(connection, row_id, {"state": "active"}, at=at)
            org, client, generation = row["org"], row["client_id"], row["generation"]
            self._record(connection, row, "credential.add", {"client_id": client}, at=at)
        emit("credential.activated", org=org, issuer=self.issuer, client=client, generation=generation)

    def retire(self, row_id: str) -> bool:
        """Retire the credential of an application whose overlap has ended; False if no other replaces it.

        Workers drop its tokens within two seconds.

        Raises:
            Conflict: the issuer rejects the credential that replaces it.
        """
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] != "overlapping":
                return True
            org_id, at = OrgId(row["org_id"]), self.database.now(connection)
            if row["org_state"] != "removed" and row["credential_state"] == "active":
                newest = next(iter(credentials.active(connection, org_id)))
                if newest["generation"] == row["generation"]:
                    return False
                if newest["last_error"] is not None:
                    raise Conflict(
                        f"the issuer rejects the new credential of org {row['org']} ({newest['last_error']});"
                        " the old one stays in use",
                        fix=f"`credentials verify {row['org']} {newest['generation']}` shows why",
                    )
            self._retire(connection, row, at=at)
            return True

    def abandon(self, row_id: str) -> None:
        """Give an application up that was made and is never going to be used; it is deleted later."""
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is not None and row["state"] in ("made", "announced"):
                self._retire(connection, row, at=self.database.now(connection))

    def gone(self, row_id: str) -> None:
        """Note that an application does not exist at the provider any more; its credential is retired."""
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] == "deleted":
                return
            at = self.database.now(connection)
            if row["credential_id"] is not None:
                self._retire(connection, row, at=at)
            self._deleted(connection, row, at=at)

    def deleted(self, row_id: str) -> None:
        """Note that an application was deleted at the provider."""
        with self.database.transaction() as connection:
            row = applications.find(connection, row_id, lock=True)
            if row is None or row["state"] == "deleted":
                return
            self._deleted(connection, row, at=self.database.now(connection))
        emit("application.deleted", org=row["org"], issuer=self.issuer, client=row["client_id"])

    def _deleted(self, connection: Connection, row: Row, *, at: datetime) -> None:
        applications.change(connection, row["id"], {"state": "deleted"}, at=at)
        org_id, detail = OrgId(row["org_id"]), {"id": row["application_id"]}
        audit.note(connection, org_id, "application.delete", row["name"], detail, at=at, actor=self.actor)

    def _retire(self, connection: Connection, row: Row, *, at: datetime) -> None:
        applications.change(connection, row["id"], {"state": "retired"}, at=at)
        if credentials.retire(connection, OrgId(row["org_id"]), row["generation"], at=at):
            self._record(connection, row, "credential.retire", {"client_id": row["client_id"]}, at=at)

    def _record(
        self, connection: Connection, row: Row, action: str, detail: Mapping[str, object], *, at: datetime
    ) -> None:
        subject = f"{row['org']} {row['generation']}"
        audit.note(connection, OrgId(row["org_id"]), action, subject, detail, at=at, actor=self.actor)


def _check_pending(row: Row) -> None:
    if row["org_state"] == "removed" or row["credential_state"] != "pending":
        raise Conflict(
            f"org {row['org']} was removed, or its new credential retired",
            fix="the same command deletes its application, and makes another if the org needs one",
        )
