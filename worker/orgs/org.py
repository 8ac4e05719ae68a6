"""Org: a customer organisation as the worker knows it; its states and what each one stops."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from worker.ids import OrgId

OrgState = Literal["active", "paused", "suspended", "removed"]

MAX_CONCURRENT_RUNS = 10
WEIGHT = 1


class OrgRef(NamedTuple):
    """An org by its key in the database and by its code in the issuer's tokens."""

    id: OrgId
    code: str


@dataclass(frozen=True, slots=True)
class Org:
    """A row of `orgs`. `timezone` is an IANA name, the zone of definitions that name none."""

    id: OrgId
    code: str
    name: str
    issuer: str
    state: OrgState = "active"
    max_concurrent_runs: int = MAX_CONCURRENT_RUNS
    weight: int = WEIGHT
    tags: frozenset[str] = frozenset()
    timezone: str | None = None
    state_by: str | None = None
    state_at: datetime | None = None
    state_note: str | None = None

    @property
    def ref(self) -> OrgRef:
        return OrgRef(self.id, self.code)


@dataclass(frozen=True, slots=True)
class OrgEntry:
    """An org as a file for `apply` or a line for `orgs import` names it."""

    code: str
    """As in its tokens (`org_code`); at most 200 characters, no slash."""
    name: str
    """For people."""
    issuer: str
    """A table `[issuers.NAME]` of worker.toml."""
    max_concurrent_runs: int = MAX_CONCURRENT_RUNS
    """Its runs at once, over all workers."""
    weight: int = WEIGHT
    """Its share of the slots beside other orgs': with 2 it gets twice as many."""
    tags: frozenset[str] = frozenset()
    """What templates select by."""
    timezone: str | None = None
    """The IANA zone of its definitions that name none; else UTC."""


@dataclass(frozen=True, slots=True)
class Stops:
    """What a state of an org stops.

    `firing`: nothing is due and nothing waiting starts. `waiting`: waiting runs are
    cancelled at once. `running`: running runs are cancelled within one renewal.
    `tokens`: its tokens are dropped. `secrets`: its credentials are destroyed.
    """

    firing: bool = False
    waiting: bool = False
    running: bool = False
    tokens: bool = False
    secrets: bool = False


STOPS: dict[OrgState, Stops] = {
    "active": Stops(),
    "paused": Stops(firing=True),
    "suspended": Stops(firing=True, waiting=True, running=True, tokens=True),
    "removed": Stops(firing=True, waiting=True, running=True, tokens=True, secrets=True),
}

# From a state to those an operator may move it to; `removed` is final.
MOVES: dict[OrgState, frozenset[OrgState]] = {
    "active": frozenset({"paused", "suspended", "removed"}),
    "paused": frozenset({"active", "suspended", "removed"}),
    "suspended": frozenset({"active", "paused", "removed"}),
    "removed": frozenset(),
}


def may_move(state: OrgState, to: OrgState) -> bool:
    """Whether an org in `state` may be set to `to`; to stay where it is always may."""
    return state == to or to in MOVES[state]
