"""Token forecast: requests a day that definitions imply per issuer, against its rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from worker.clock import from_text
from worker.definitions.definition import Definition
from worker.operations.handlers import Handlers
from worker.operations.requirements import OrgNeeds, of_all_orgs, scopes_of
from worker.store import requirements
from worker.store.database import Database
from worker.tokens.cache import MARGIN, MARGIN_SHARE, MIN_CLAIMS_AGE, RENEW_FROM, RENEW_UNTIL
from worker.tokens.issuer import Issuer

Row = dict[str, Any]

DAY = timedelta(days=1)
ASSUMED = timedelta(hours=1)  # the life of tokens of an issuer that has given none yet
SAMPLE = 20  # orgs whose last token says how long an issuer's live
Key = tuple[str, frozenset[str], frozenset[str]]


@dataclass(slots=True)
class TokenForecast:
    """What the definitions of one issuer's orgs imply for a day, as from now."""

    issuer: str
    orgs: int = 0
    definitions: int = 0
    runs: int = 0
    tokens: int = 0
    requests: int = 0
    lifetimes: list[float] = field(default_factory=list)

    @property
    def lifetime(self) -> float:
        """Seconds that a token of it lives: as its last ones did, else as is assumed."""
        return median(self.lifetimes) if self.lifetimes else ASSUMED.total_seconds()

    def as_row(self, issuer: Issuer | None) -> Row:
        rate = issuer.max_requests_per_second if issuer else None
        return {
            "issuer": self.issuer,
            "orgs": self.orgs,
            "definitions": self.definitions,
            "runs_a_day": self.runs,
            "tokens": self.tokens,
            "token_requests_a_day": self.requests,
            "token_lifetime": timedelta(seconds=round(self.lifetime)),
            "lifetime_is_assumed": not self.lifetimes,
            "max_requests_per_second": rate,
            "cold_start": timedelta(seconds=math.ceil(self.tokens / rate)) if rate else None,
            "problem": self.problem(issuer),
        }

    def problem(self, issuer: Issuer | None) -> str | None:
        """Why the tokens of these orgs cannot all be had, if so."""
        if issuer is None:
            return f"worker.toml has no table [issuers.{self.issuer}], so none of its orgs gets a token"
        if self.requests > issuer.max_requests_per_second * DAY.total_seconds():
            return "more requests than max_requests_per_second lets through: runs will wait for tokens"
        return None


def demand(database: Database, issuers: Mapping[str, Issuer]) -> list[TokenForecast]:
    """The demand of each issuer that has orgs, and of each that is configured; by name.

    Each worker has a cache of its own, so those that are up now are counted in.
    """
    found = {name: TokenForecast(name) for name in issuers}
    with database.autocommit() as connection:
        now = database.now(connection)
        workers = max(1, len(requirements.live_workers(connection)))
        handlers = Handlers(connection)
        orgs = list(of_all_orgs(connection))
        for org in orgs:
            one = found.setdefault(org.issuer, TokenForecast(org.issuer))
            if len(one.lifetimes) < SAMPLE:
                one.lifetimes += _lifetime(requirements.last_claims(connection, org.org.id))
        for org in orgs:
            _add(found[org.issuer], org, issuers.get(org.issuer), handlers, now, workers)
    return [found[name] for name in sorted(found)]


def requests_a_day(runs: Iterable[tuple[int, timedelta | None]], lifetime: float, workers: int = 1) -> int:
    """Token requests a day of definitions that share a token: of each, its runs and its max_claims_age."""
    counts = list(runs)
    usable = lifetime - min(MARGIN, MARGIN_SHARE * lifetime)
    # It is renewed somewhere between these shares of its life, at a use.
    renewals = math.ceil(DAY.total_seconds() / (usable * (RENEW_FROM + RENEW_UNTIL) / 2))
    for count, max_age in counts:
        if max_age is not None:
            renewals += min(
                count, math.ceil(DAY.total_seconds() / max(max_age.total_seconds(), MIN_CLAIMS_AGE))
            )
    # A run never asks for more than one to begin with.
    return min(sum(count for count, _ in counts), renewals * workers)


def _add(
    one: TokenForecast, org: OrgNeeds, issuer: Issuer | None, handlers: Handlers, now: datetime, workers: int
) -> None:
    one.orgs += 1
    shared: dict[Key, list[tuple[int, timedelta | None]]] = {}
    for definition in org.definitions:
        one.definitions += 1
        if org.state != "active" or definition.name in org.paused:
            continue
        own, variants = scopes_of(definition, handlers)
        audience = definition.audience or (issuer.audience if issuer else None) or ""
        count = _runs_a_day(definition, org.timezone, now)
        shared.setdefault((audience, own, variants), []).append((count, definition.max_claims_age))
    for runs in shared.values():
        one.runs += sum(count for count, _ in runs)
        one.tokens += 1
        one.requests += requests_a_day(runs, one.lifetime, workers)


def _runs_a_day(definition: Definition, org_timezone: str | None, now: datetime) -> int:
    return definition.trigger(org_timezone).count(now, now + DAY - timedelta(microseconds=1))


def _lifetime(claims: Row | None) -> list[float]:
    """The lifetime that redacted claims tell of, if they do."""
    try:
        claims = claims or {}
        life = (from_text(claims["expires_at"]) - from_text(claims["issued_at"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return []
    return [life] if life > 0 else []
