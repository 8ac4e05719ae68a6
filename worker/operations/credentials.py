"""An org's credentials: a new generation beside the old one, and the end of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from worker.errors import Conflict, NotFound, UsageError
from worker.ids import OrgId, new_id
from worker.store import audit, credentials, listing, orgs
from worker.store.database import Database
from worker.telemetry.masking import masker
from worker.tokens.credentials import REFERENCE_FIX, fault_of_reference

Row = dict[str, Any]


class Sealer(Protocol):
    """The key ring, as far as it is needed here."""

    def seal(self, secret: str, *, org_id: str, credential_id: str) -> tuple[bytes, str]:
        """The sealed secret, bound to its row, and the id of the key that sealed it."""
        ...


def add_credential(
    database: Database,
    sealer: Sealer | None,
    org: str,
    *,
    client_id: str,
    actor: str,
    secret: str | None = None,
    reference: str | None = None,
    secrets_dir: Path | None = None,
    kind: str = "client_secret",
) -> Row:
    """Add a generation, which is tried first from now on; the ones before stay until they are retired.

    Either `secret` (a client secret, or a private key in PEM with `kind` private_key),
    which `sealer` seals, or `reference`, the name of a file in `secrets_dir`. Where that
    folder is given, the file is looked at too: it may be no link to another secret.
    Returns the row of `credentials list`.

    Raises:
        NotFound: there is no such org.
        Conflict: the org was removed.
        UsageError: no client id, not exactly one of secret and reference, or a reference to
            the key ring, to a setting's secret or out of `secrets_dir`.
    """
    check_client(client_id, secret, reference, secrets_dir)
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        if row["state"] == "removed":
            raise Conflict(f"org {org} was removed", fix="`orgs add` brings it back")
        now = database.now(connection)
        generation = credentials.last_generation(connection, row["id"]) + 1
        new = credential_row(
            sealer,
            row["id"],
            generation,
            client_id=client_id,
            secret=secret,
            reference=reference,
            kind=kind,
        ) | {"created_at": now, "created_by": actor}
        credentials.insert_for_all_orgs(connection, [new])
        entry = audit.Entry(
            row["id"], "credential.add", f"{org} {generation}", {"client_id": client_id, "kind": kind}
        )
        audit.record(connection, [entry], at=now, actor=actor)
        return listing.credentials(connection, org)[0]


def retire_credential(database: Database, org: str, generation: int, *, actor: str, now: bool = False) -> Row:
    """End one generation: no token is asked for with it any more. Returns its row.

    Workers drop what they hold of it within two seconds. With `now` it has leaked:
    its secret is destroyed here too, also where it was retired before.

    Raises:
        NotFound: there is no such org or generation.
        Conflict: it is retired already.
    """
    with database.transaction() as connection:
        row = orgs.require(connection, org, lock=True)
        found = credentials.find(connection, row["id"], generation)
        if found is None:
            raise NotFound(
                f"org {org} has no credential of generation {generation}",
                fix=f"`credentials list {org}` names them",
            )
        at = database.now(connection)
        has_secret = found["sealed"] is not None or found["reference"] is not None
        retired = credentials.retire(connection, row["id"], generation, at=at)
        if not retired and not (now and has_secret):
            raise Conflict(
                f"generation {generation} of org {org} is retired already",
                fix=f"`credentials list {org} --state active` names those that are not",
            )
        if now:
            credentials.destroy_one(connection, row["id"], generation)
        entry = audit.Entry(row["id"], "credential.retire", f"{org} {generation}", {"now": now})
        audit.record(connection, [entry], at=at, actor=actor)
        return next(
            entry for entry in listing.credentials(connection, org) if entry["generation"] == generation
        )


def check_client(
    client_id: str, secret: str | None, reference: str | None, secrets_dir: Path | None = None
) -> None:
    """Refuse what can never work or must not, before anything is written.

    Raises:
        UsageError: no client id, not exactly one of secret and reference, or a reference that
            `fault_of_reference` finds fault with.
    """
    if not client_id or not client_id.isprintable():
        raise UsageError(
            "a credential needs a client id of printable characters",
            fix="copy it from the provider's console",
        )
    if (secret is None) == (reference is None):
        raise UsageError(
            "a credential is either a secret or the name of a file that holds it", fix="give one of the two"
        )
    if reference is not None and (fault := fault_of_reference(reference, secrets_dir)) is not None:
        raise UsageError(f"reference: {reference!r} {fault}", fix=REFERENCE_FIX)
    if secret is not None and not secret.strip():
        raise UsageError("the secret is empty", fix="is the file the right one?")


def credential_row(
    sealer: Sealer | None,
    org_id: OrgId,
    generation: int,
    *,
    client_id: str,
    secret: str | None,
    reference: str | None = None,
    kind: str = "client_secret",
) -> Row:
    """A row of `credentials` without its creation, the secret sealed for this row alone."""
    credential_id = new_id()
    sealed, key_id = None, None
    if secret is not None:
        if sealer is None:
            raise UsageError("a secret needs a key ring", fix="`keys generate` makes one")
        masker.register(secret)
        sealed, key_id = sealer.seal(secret, org_id=org_id, credential_id=credential_id)
    return {
        "id": credential_id,
        "org_id": org_id,
        "generation": generation,
        "client_id": client_id,
        "sealed": sealed,
        "reference": reference,
        "key_id": key_id,
        "kind": kind,
    }
