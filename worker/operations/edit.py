"""Edit one definition: some of its keys, and only if nobody else has changed it since it was read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from worker.definitions.definition import parse_definition, to_spec
from worker.definitions.origins import check_encrypted
from worker.errors import Conflict
from worker.operations.changes import differing
from worker.operations.handlers import Handlers
from worker.operations.plan import DefinitionChange
from worker.operations.write_definitions import audit_entry, settle_touched, write_definitions
from worker.store import audit, definition_listing, definitions, orgs
from worker.store.database import Database

Row = dict[str, Any]


def edit_definition(
    database: Database,
    org: str,
    name: str,
    changes: Mapping[str, Any],
    *,
    actor: str,
    revision: int | None = None,
    allow_unknown_handlers: bool = False,
    inline: Collection[str] = (),
    insecure_origins: Collection[str] = (),
) -> Row:
    """Change keys of a definition as a file would write them, None for the default; returns it.

    What was due before is settled by the old revision, and what runs goes on with it.
    With `revision` the definition must still be at that one.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: it is at another revision, closed, or made by a template.
        DefinitionError: names the key that cannot be accepted.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        _check(row, revision)
        values = {**row["spec"], "enabled": row["enabled"], **changes, "org": org, "name": name}
        entry = f"definition {org}/{name}"
        wanted = parse_definition(values, entry=entry)
        spec = to_spec(wanted)
        if differing(row["spec"], spec) or row["enabled"] != wanted.enabled:
            Handlers(connection).check(wanted, entry, inline=inline, allow_unknown=allow_unknown_handlers)
            check_encrypted(wanted.api_origins, insecure_origins, entry=entry)
            now = database.now(connection)
            change = DefinitionChange("change", org_id, org, name, row, spec, wanted.enabled)
            settled = settle_touched(connection, [change], at=now)
            write_definitions(connection, [change], settled=settled, actor=actor, at=now)
            audit.record(connection, [audit_entry(change)], at=now, actor=actor)
        return definition_listing.definition(connection, org, name)


def _check(row: Row, revision: int | None) -> None:
    named = f"definition {row['org']}/{row['name']}"
    if row["closed_at"] is not None:
        raise Conflict(f"{named} is closed", fix="`apply` a file that has it")
    if row["template_id"] is not None:
        raise Conflict(
            f"{named} is made by a template", fix="change the template, for every org that it means"
        )
    if revision is not None and revision != row["revision"]:
        raise Conflict(
            f"{named} is at revision {row['revision']} by now, not at {revision}: somebody has changed it",
            fix=f"look at it with `definitions show {row['org']} {row['name']}` and try again",
        )
