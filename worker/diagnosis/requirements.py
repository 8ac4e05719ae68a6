"""Requirements: what orgs' definitions require of their tokens, and the token requests a day they imply."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import Connection

from worker.clock import from_text
from worker.diagnosis.load import Load, Peak, Stream
from worker.engine.loops.token_renewal import MARGIN_SHARE as MARGIN_AHEAD
from worker.errors import DefinitionError, Diagnostic
from worker.guard.issuer import Issuer
from worker.ids import ALL_ORGS, DefinitionId
from worker.model.claims import MIN_CLAIMS_AGE, usable_life
from worker.model.definitions.definition import Definition, from_spec
from worker.model.definitions.triggers import Trigger
from worker.model.definitions.units import format_duration
from worker.model.orgs import OrgRef
from worker.model.runs.fire import window_of
from worker.operations.handlers import Handlers
from worker.settings.sections import TokenSettings
from worker.store import definitions, health, history, org_secrets, orgs
from worker.store.database import Database
from worker.store.dialect import Row
from worker.tokens.acquirer import RENEW_FROM, RENEW_UNTIL

COMMAND = "python -m worker"
PAGE = 500
DAY = timedelta(days=1)
# The lifetime of tokens of an issuer that has issued none yet.
ASSUMED_LIFETIME = timedelta(hours=1)
# Orgs whose last token is used to estimate an issuer's token lifetime.
SAMPLE = 20


@dataclass(frozen=True, slots=True)
class OrgDefinitions:
    """An org with its open definitions, the names of the paused ones, and ids by name."""

    org: OrgRef
    issuer: str
    state: str
    timezone: str | None
    max_concurrent_runs: int
    definitions: list[Definition] = field(default_factory=list)
    paused: set[str] = field(default_factory=set)
    ids: dict[str, DefinitionId] = field(default_factory=dict)
    pool: str | None = None

    @property
    def due(self) -> list[Definition]:
        """The definitions that are due now and then: none if the org is not active."""
        return [each for each in self.definitions if self.state == "active" and each.name not in self.paused]


def load_org(connection: Connection, code: str) -> OrgDefinitions:
    """One org, in any state.

    Raises:
        NotFound: no such org.
    """
    return _load(connection, [orgs.require(connection, code)])[0]


def load_all_orgs(connection: Connection) -> Iterator[OrgDefinitions]:
    """Every org that can run something, by code."""
    after: str | None = ""
    while after is not None:
        found, after = load_next_orgs(connection, after, PAGE)
        yield from found


def load_next_orgs(connection: Connection, after: str, limit: int) -> tuple[list[OrgDefinitions], str | None]:
    """The next orgs by code that can run something, and the last one's code, None at the end."""
    rows = orgs.active(connection, ALL_ORGS, after=after, limit=limit)
    return _load(connection, rows), rows[-1]["code"] if rows else None


def _load(connection: Connection, rows: list[dict[str, Any]]) -> list[OrgDefinitions]:
    found = {
        row["id"]: OrgDefinitions(
            OrgRef(row["id"], row["code"]),
            row["issuer"],
            row["state"],
            row["timezone"],
            row["max_concurrent_runs"],
            pool=row["pool"],
        )
        for row in rows
    }
    for stored in definitions.active(connection, list(found)):
        org, name = found[stored["org_id"]], stored["name"]
        try:
            org.definitions.append(from_spec(org.org.code, name, stored["spec"]))
        except DefinitionError:
            # Written by another release, whose worker understands it.
            continue
        org.ids[name] = DefinitionId(stored["id"])
        if stored["paused_at"] is not None:
            org.paused.add(name)
    return list(found.values())


def scopes_of(
    definition: Definition, handlers: Handlers, org_pool: str | None
) -> tuple[frozenset[str], frozenset[str]]:
    """The scopes that a definition's token must have, and those that its variants add."""
    pool = handlers.pool_of(definition, org_pool)
    own = handlers.scopes_of(definition.handler, pool) if definition.scopes is None else definition.scopes
    variants = [handlers.scopes_of(variant.handler, pool) for variant in definition.variants]
    return own, frozenset().union(*variants) - own


@dataclass(slots=True)
class TokenForecast:
    """The tokens and requests that the definitions of one issuer's orgs need in the 24 hours from now."""

    issuer: str
    orgs: int = 0
    definitions: int = 0
    runs: int = 0
    tokens: int = 0
    requests: int = 0
    lifetimes: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=lambda: Peak(0.0, 0))
    _streams: Counter[tuple[Trigger, timedelta]] = field(default_factory=Counter)

    @property
    def lifetime(self) -> float:
        """Seconds that a token lives, as the last ones did."""
        return median(self.lifetimes) if self.lifetimes else ASSUMED_LIFETIME.total_seconds()

    def as_row(self, issuer: Issuer | None, now: datetime, settings: TokenSettings) -> dict[str, Any]:
        """As `check` prints it. `now` is the beginning of the day that it is about."""
        rate = issuer.max_requests_per_second if issuer else None
        needed = min(round(self.peak.amount), self.tokens)
        at = now + timedelta(seconds=self.peak.second)
        row: dict[str, Any] = {
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
            "tokens_at_once": needed,
            "tokens_at": at if needed else None,
            "tokens_ahead": None,
            "problem": None,
            "advice": None,
        }
        if rate is None:
            row["problem"] = f"worker.toml has no table [issuers.{self.issuer}], so its orgs get no tokens"
            return row
        if self.requests > rate * DAY.total_seconds():
            row["problem"] = "more requests than max_requests_per_second allows: runs will wait for tokens"
        if settings.shared:
            possible = self._possible(rate, settings.ahead)
            row["tokens_ahead"] = possible
            if needed > possible:
                row["advice"] = self._advice(needed, possible, rate, settings.ahead, at)
        return row

    def _possible(self, rate: float, ahead: timedelta) -> int:
        """The tokens that can be requested ahead of one time and are still usable then."""
        return int(rate * min(ahead.total_seconds() * (1 - MARGIN_AHEAD), usable_life(self.lifetime)))

    def _advice(self, needed: int, possible: int, rate: float, ahead: timedelta, at: datetime) -> str:
        late = format_duration(timedelta(seconds=math.ceil((needed - possible) / rate)))
        seconds = needed / rate / (1 - MARGIN_AHEAD)
        ways = [f"max_requests_per_second = {math.ceil(needed * rate / max(possible, 1))}"]
        if seconds < usable_life(self.lifetime):
            ways.append(f'[tokens] ahead = "{math.ceil(seconds / 60)}m"')
        elif usable_life(self.lifetime) < ahead.total_seconds():
            ways.append("a longer lifetime of the tokens")
        ways.append("spread in the definitions")
        return (
            f"{needed} tokens are needed at {at:%H:%M} UTC and {possible} can be ready by then: some runs "
            f"wait up to {late} for theirs. What helps: {'; '.join(ways)}"
        )

    def add(
        self, org: OrgDefinitions, issuer: Issuer | None, handlers: Handlers, now: datetime, workers: int
    ) -> None:
        self.orgs += 1
        self.definitions += len(org.definitions)
        shared: dict[tuple[object, ...], list[tuple[int, timedelta | None]]] = {}
        for definition in org.due:
            audience = definition.audience or (issuer.audience if issuer else None) or ""
            trigger = definition.trigger(org.timezone)
            count = trigger.count(now, now + DAY - timedelta(microseconds=1))
            token = (audience, *scopes_of(definition, handlers, org.pool))
            shared.setdefault(token, []).append((count, definition.max_claims_age))
            self._streams[trigger, window_of(definition.schedule, trigger, definition.spread)] += 1
        for runs in shared.values():
            self.runs += sum(count for count, _ in runs)
            self.tokens += 1
            self.requests += requests_a_day(runs, self.lifetime, workers)

    def add_up(self, now: datetime, ahead: timedelta) -> None:
        """Find the time at which most tokens are needed that are prepared `ahead` of it."""
        load = Load(now)
        for (trigger, window), count in self._streams.items():
            load.add(Stream(trigger, count, window, ahead.total_seconds(), serial=False))
        self.peak = load.at_once()


def forecast_tokens(
    database: Database, issuers: Mapping[str, Issuer], settings: TokenSettings
) -> tuple[list[TokenForecast], datetime]:
    """The forecast of each issuer that has orgs or is configured, by name; and the time from which it counts.

    Unless tokens are shared, every live worker requests its own.
    """
    found = {name: TokenForecast(name) for name in issuers}
    with database.autocommit() as connection:
        now = database.now(connection)
        workers = 1 if settings.shared else max(1, len(health.live_workers(connection)))
        handlers = Handlers(connection)
        all_orgs = list(load_all_orgs(connection))
        for org in all_orgs:
            one = found.setdefault(org.issuer, TokenForecast(org.issuer))
            if len(one.lifetimes) < SAMPLE:
                one.lifetimes += _lifetime(history.last_claims(connection, org.org.id))
        for org in all_orgs:
            found[org.issuer].add(org, issuers.get(org.issuer), handlers, now, workers)
    for forecast in found.values():
        forecast.add_up(now, settings.ahead)
    return [found[name] for name in sorted(found)], now


def requests_a_day(runs: Iterable[tuple[int, timedelta | None]], lifetime: float, workers: int = 1) -> int:
    """Token requests a day of definitions that share a token, given their runs a day and max_claims_age."""
    counts = list(runs)
    usable = usable_life(lifetime)
    # A use renews it somewhere between these shares of its life.
    renewals = math.ceil(DAY.total_seconds() / (usable * (RENEW_FROM + RENEW_UNTIL) / 2))
    for count, max_age in counts:
        if max_age is not None:
            seconds = max(max_age.total_seconds(), MIN_CLAIMS_AGE)
            renewals += min(count, math.ceil(DAY.total_seconds() / seconds))
    # A run requests at most one token when it starts.
    return min(sum(count for count, _ in counts), renewals * workers)


def _lifetime(claims: Row | None) -> list[float]:
    """The lifetime that redacted claims show, if any."""
    try:
        claims = claims or {}
        lifetime = (from_text(claims["expires_at"]) - from_text(claims["issued_at"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        return []
    return [lifetime] if lifetime > 0 else []


def lacking(connection: Connection, org: OrgDefinitions, handlers: Handlers) -> Iterator[Diagnostic]:
    """The secrets that handlers declare and an org lacks, each once; reads them only if any declares one."""
    wanted = {
        name: (definition.name, handler)
        for definition in reversed(org.definitions)
        for handler in definition.handlers
        for name in handlers.secrets_of(handler, handlers.pool_of(definition, org.pool))
    }
    if not wanted:
        return
    has = org_secrets.names(connection, [org.org.id]).get(org.org.id, set())
    for name in sorted(wanted.keys() - has):
        definition_name, handler = wanted[name]
        yield Diagnostic(
            "secret",
            False,
            f"org {org.org.code} has no secret {name}: runs of {definition_name} by {handler} are refused",
            f"`{COMMAND} secrets add {org.org.code} {name}`",
        )


def lacking_of_all_orgs(database: Database) -> list[tuple[str, Diagnostic]]:
    """As `lacking`, with the org's code, of every org that can run something, by code."""
    with database.autocommit() as connection:
        handlers = Handlers(connection)
        if not handlers.declared_secrets():
            return []
        return [
            (org.org.code, found)
            for org in load_all_orgs(connection)
            for found in lacking(connection, org, handlers)
        ]
