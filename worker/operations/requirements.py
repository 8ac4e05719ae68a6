"""Requirements: what each org's tokens need, as its definitions and their handlers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import Definition, from_spec
from worker.errors import DefinitionError
from worker.ids import DefinitionId
from worker.operations.handlers import Handlers
from worker.orgs import OrgRef
from worker.store import orgs, requirements

PAGE = 500


@dataclass(frozen=True, slots=True)
class OrgNeeds:
    """An org with its definitions in force; `paused` are the names of those that are paused."""

    org: OrgRef
    issuer: str
    state: str
    timezone: str | None
    definitions: tuple[Definition, ...]
    paused: frozenset[str] = frozenset()
    max_concurrent_runs: int = 1
    ids: Mapping[str, DefinitionId] = field(default_factory=dict)
    """Of each definition, by its name."""

    @property
    def due(self) -> tuple[Definition, ...]:
        """The definitions of which anything is due now: none while the org is paused."""
        return tuple(
            each for each in self.definitions if self.state == "active" and each.name not in self.paused
        )


def of_org(connection: Connection, code: str) -> OrgNeeds:
    """One org, whatever its state.

    Raises:
        NotFound: there is no such org.
    """
    return _needs(connection, [orgs.require(connection, code)])[0]


def of_all_orgs(connection: Connection) -> Iterator[OrgNeeds]:
    """Every org that may run something, by code."""
    after: str | None = None
    while rows := requirements.orgs_for_all_orgs(connection, after=after, limit=PAGE):
        yield from _needs(connection, rows)
        after = rows[-1]["code"]


def scopes_of(definition: Definition, handlers: Handlers) -> tuple[frozenset[str], frozenset[str]]:
    """The scopes that a definition's token must have, and those that its variants would have beside them."""
    own = handlers.scopes_of(definition.handler) if definition.scopes is None else definition.scopes
    variants = [handlers.scopes_of(variant.handler) for variant in definition.variants]
    return own, frozenset().union(*variants) - own


def _needs(connection: Connection, rows: list[dict[str, Any]]) -> list[OrgNeeds]:
    found: dict[str, list[Definition]] = {row["id"]: [] for row in rows}
    paused: dict[str, set[str]] = {row["id"]: set() for row in rows}
    ids: dict[str, dict[str, DefinitionId]] = {row["id"]: {} for row in rows}
    codes = {row["id"]: row["code"] for row in rows}
    for stored in requirements.definitions_for_all_orgs(connection, list(codes)):
        org_id = stored["org_id"]
        try:
            found[org_id].append(from_spec(codes[org_id], stored["name"], stored["spec"]))
        except DefinitionError:
            # Written by another release; its worker knows what it means.
            continue
        ids[org_id][stored["name"]] = DefinitionId(stored["id"])
        if stored["paused_at"] is not None:
            paused[org_id].add(stored["name"])
    return [
        OrgNeeds(
            OrgRef(row["id"], row["code"]),
            row["issuer"],
            row["state"],
            row["timezone"],
            tuple(found[row["id"]]),
            frozenset(paused[row["id"]]),
            row["max_concurrent_runs"],
            ids[row["id"]],
        )
        for row in rows
    ]
