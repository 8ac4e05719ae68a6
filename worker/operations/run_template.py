"""Run a template's definition now, for each org that has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from worker.errors import Conflict, DefinitionError, NotFound
from worker.ids import ALL_ORGS, TemplateId
from worker.operations.runs import run_now
from worker.operations.walks import rows_of
from worker.store import templates
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import read as lists

# Definitions of a template that are read at a time.
PAGE = 500


def definitions_of(database: Database, template_id: TemplateId) -> Iterator[Row]:
    """The open definitions that a template made, a page at a time: id, org, name, paused_at."""
    return rows_of(database, templates.definitions_of_for_all_orgs, template_id, after=None, limit=PAGE)


def run_template(
    database: Database,
    name: str,
    *,
    actor: str,
    request_key: str,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Iterator[Row]:
    """Run each definition of a template as it is taken, and yield the outcomes; paused ones are left out.

    A row has `id` and `state` of the new run, and `left`: why an org was left out, else None. The same
    `request_key` makes no second run, so an interrupted call can be repeated. With `dry_run` nothing
    is made. `params` and `typed` are those of `run_now`.

    Raises:
        NotFound: no such template.
        UsageError: an invalid request key.
    """
    with database.autocommit() as connection:
        template_id = TemplateId(lists.template(connection, ALL_ORGS, name)["id"])
    for row in definitions_of(database, template_id):
        outcome: Row = {"id": None, "org": row["org"], "definition": row["name"], "state": None, "left": None}
        if row["paused_at"] is not None:
            yield outcome | {"left": f"definition {row['org']}/{row['name']} is paused"}
        elif dry_run:
            yield outcome
        else:
            try:
                run = run_now(
                    database,
                    row["org"],
                    row["name"],
                    actor=actor,
                    request_key=request_key,
                    params=params,
                    typed=typed,
                )
                yield outcome | {"id": run["id"], "state": run["state"]}
            except (Conflict, NotFound, DefinitionError) as error:
                yield outcome | {"left": error.message}
