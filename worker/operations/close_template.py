"""Close a template: the definitions that it made are closed as well, their history stays."""

from __future__ import annotations

from typing import Any

from worker.errors import Conflict, NotFound
from worker.operations.materialise import materialise_first
from worker.operations.plan_templates import TemplateChange, audit_entry, write_templates
from worker.store import audit, template_listing, templates
from worker.store.database import Database

Row = dict[str, Any]


def close_template(database: Database, name: str, *, actor: str) -> Row:
    """Close a template and return it; its definitions follow, org by org. `apply` opens it again.

    Raises:
        NotFound: there is no such template.
        Conflict: it is closed already.
    """
    with database.transaction() as connection:
        before = templates.find(connection, name)
        if before is None:
            raise NotFound(f"there is no template {name}", fix="`templates list` names the templates")
        if before["closed_at"] is not None:
            raise Conflict(
                f"template {name} is closed already", fix="`apply` a file that has it opens it again"
            )
        now = database.now(connection)
        change = TemplateChange("close", before["id"], name, before, before["selector"], before["spec"])
        write_templates(connection, [change], actor=actor, at=now)
        audit.record(connection, [audit_entry(change)], at=now, actor=actor)
        materialise_first(connection, actor=actor, at=now)
        return template_listing.template_for_all_orgs(connection, name)
