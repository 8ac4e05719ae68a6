"""A run made by hand: what run-now and retry have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection

from worker.definitions import fields
from worker.definitions.definition import Definition, from_spec
from worker.errors import AccessDenied, Conflict
from worker.ids import RunId, new_id
from worker.operations.handlers import Handlers
from worker.runs.run import NewRun

Row = Mapping[str, Any]


def refuse_what_is_not_active(row: Row) -> None:
    """Refuse a definition of which nothing starts.

    Raises:
        Conflict: it is closed, or its org is not active.
    """
    if row["org_state"] != "active":
        back = "add" if row["org_state"] == "removed" else "resume"
        raise Conflict(
            f"org {row['org']} is {row['org_state']}: nothing of it starts",
            fix=f"`orgs {back} {row['org']}` lets it",
        )
    if row["closed_at"] is not None:
        raise Conflict(f"definition {row['org']}/{row['name']} is closed", fix="`apply` a file that has it")


def refuse_params_of_an_org(definition: Definition, given: Collection[str]) -> None:
    """Refuse params that the definition does not let its org give by hand; an operator may give any.

    Raises:
        AccessDenied: names the first one that is not among `params_by_hand`.
    """
    barred = sorted(set(given) - set(definition.params_by_hand))
    if barred:
        allowed = ", ".join(definition.params_by_hand) or "no params"
        raise AccessDenied(
            f"definition {definition.org}/{definition.name}: an org may not give the param {barred[0]!r}",
            fix=f"leave it out: the definition's params_by_hand names {allowed}; an operator may give any",
        )


def make_run(
    connection: Connection,
    row: Row,
    *,
    origin: Literal["manual", "retry"],
    scheduled_for: datetime,
    at: datetime,
    actor: str,
    params: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
    request_key: str | None = None,
    retry_of: RunId | None = None,
    idempotency_key: str | None = None,
) -> NewRun:
    """A run of the current revision of a definition, available at once.

    `params` are all it gets, if given; those `typed` on a command line as their handler takes them.

    Raises:
        Conflict: the definition is closed, or its org is not active.
        DefinitionError: params that the handler does not take.
    """
    refuse_what_is_not_active(row)
    named = f"{row['org']}/{row['name']}"
    definition = from_spec(row["org"], row["name"], row["spec"])
    handlers = Handlers(connection)
    if params is not None:
        params = _kept(params, f"definition {named}")
        for handler in definition.handlers:
            params = handlers.as_taken(handler, params, typed or {})
            handlers.check_params(handler, params, f"definition {named}")
    run_id = RunId(new_id())
    return NewRun(
        id=run_id,
        org_id=row["org_id"],
        definition_id=row["id"],
        revision=row["revision"],
        handler=definition.handler,
        origin=origin,
        scheduled_for=scheduled_for,
        available_at=at,
        idempotency_key=idempotency_key or run_id,
        isolation=definition.isolation or handlers.isolation_of(definition.handler),
        serial=definition.serial,
        overlap=definition.overlap,
        priority=definition.priority,
        variant_handlers=definition.handlers if definition.variants else (),
        max_concurrent=definition.max_concurrent,
        request_key=request_key,
        retry_of=retry_of,
        created_by=actor,
        params=params,
    )


def _kept(params: Mapping[str, Any], entry: str) -> Mapping[str, Any]:
    """The params, if a database can keep them."""
    try:
        return fields.json_table(params)
    except ValueError as error:
        raise fields.refusal(str(error), entry, "params") from error
