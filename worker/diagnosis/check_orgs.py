"""Check orgs: request a token of each and compare it with what its definitions require."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

from sqlalchemy import Connection

from worker.clock import Clock
from worker.diagnosis.requirements import (
    OrgDefinitions,
    lacking,
    load_all_orgs,
    load_next_orgs,
    load_org,
    scopes_of,
)
from worker.errors import ConfigurationError, Diagnostic, NotFound, Unavailable
from worker.guard.issuer import Issuer
from worker.ids import OrgId
from worker.kit.walks import for_each
from worker.model.claims import DIGESTS, ClaimChange, Digests, Rules, compare, pool_mismatch
from worker.operations.handlers import Handlers
from worker.outbound import open_client
from worker.settings import Settings
from worker.store import applications, history, pools
from worker.store.database import Database
from worker.store.dialect import Row
from worker.tokens.credentials import Credential, CredentialSource
from worker.tokens.token_probe import COMMAND, Need, ProbeResult, TokenProbe, kind_of, watch
from worker.wiring import find_keyring
from worker.wiring.issuers import issuers_of
from worker.wiring.secrets import OpenedCredentials


@dataclass(frozen=True, slots=True)
class Report:
    """The diagnostics of one org: `general` ones, and those of each audience."""

    org: str
    issuer: str
    credential: Credential | None
    needs: tuple[Need, ...] = ()
    probes: tuple[ProbeResult, ...] = ()
    general: tuple[Diagnostic, ...] = ()
    unread: tuple[str, ...] = ()
    """Properties and flags of its tokens that no handler of its definitions reads."""
    last: Row | None = None
    """Its last run with a token: `run`, `definition`, `at`, `claims`."""
    changes: tuple[ClaimChange, ...] = ()
    """What the next token changes against the last run."""

    @property
    def diagnostics(self) -> list[Diagnostic]:
        of_probes = (diagnostic for probe in self.probes for diagnostic in probe.diagnostics)
        return [*self.general, *of_probes, *self._of_claims()]

    def _of_claims(self) -> Iterator[Diagnostic]:
        """What is not wrong, but of use to know."""
        if self.unread:
            yield Diagnostic("unread", True, f"no handler reads {', '.join(self.unread)}")
        if self.last is not None and any(probe.claims is not None for probe in self.probes):
            changed = ", ".join(f"{each.kind} {each.name} {each.change}" for each in self.changes)
            yield Diagnostic("next token", True, f"against the last run: {changed or 'nothing changes'}")

    @property
    def ok(self) -> bool:
        return all(diagnostic.ok for diagnostic in self.diagnostics)

    @property
    def transient(self) -> bool:
        """Whether the issuer gave no response that says anything about the org."""
        return any(probe.transient for probe in self.probes)

    def problems(self) -> list[Diagnostic]:
        return [diagnostic for diagnostic in self.diagnostics if not diagnostic.ok]

    def as_row(self) -> Row:
        """The report as it is printed, with names and types of properties and flags but no values."""
        claims = [probe.claims for probe in self.probes if probe.claims is not None]
        granted = {scope for each in claims for scope in each.scopes}
        needed = {scope for need in self.needs for scope in need.scopes}
        allowed = needed | {scope for need in self.needs for scope in need.may}
        first = claims[0] if claims else None
        return {
            "org": self.org,
            "issuer": self.issuer,
            "ok": self.ok,
            "generation": self.credential.generation if self.credential else None,
            "client_id": self.credential.client_id if self.credential else None,
            "scopes": sorted(granted),
            "missing": sorted(needed - granted) if claims else [],
            "unused": sorted(granted - allowed),
            "properties": {name: kind_of(value) for name, value in first.properties.items()} if first else {},
            "flags": {name: flag.type for name, flag in first.flags.items()} if first else {},
            "unread": list(self.unread),
            "changes": [asdict(change) for change in self.changes],
            "lifetime": (first.expires_at - first.issued_at).total_seconds() if first else None,
            "problems": "; ".join(diagnostic.detail for diagnostic in self.problems()) or None,
            "diagnostics": [
                {"check": each.check, "ok": each.ok, "detail": each.detail, "fix": each.fix or None}
                for each in self.diagnostics
            ],
        }


@dataclass(slots=True, repr=False)
class Checks:
    """Checks orgs at their issuers; each request counts as a use of its credential."""

    database: Database
    source: CredentialSource
    probes: Mapping[str, TokenProbe]
    digests: Callable[[str], Digests | None] = lambda key_id: None
    """The digests of claims by the id of a key."""
    _discovered: dict[str, asyncio.Task[Diagnostic]] = field(default_factory=dict, init=False)

    async def check_all(
        self,
        codes: Sequence[str] | None,
        *,
        concurrency: int = 8,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Report]:
        """The reports of these orgs, or of all that can run something, in the order of their codes.

        `report` gets the number of orgs checked and of all orgs.

        Raises:
            NotFound: no such org.
        """
        orgs = self._read(codes)
        reports: list[Report | None] = [None] * len(orgs)
        done = 0

        async def check(place: int) -> None:
            nonlocal done
            reports[place] = await self._check(*orgs[place])
            done += 1
            report(done, len(orgs))

        await for_each(range(len(orgs)), check, concurrency=concurrency)
        return [each for each in reports if each is not None]

    async def verify(self, code: str, generation: int | None = None) -> Report:
        """The report of one org with one generation of its credentials, by default the newest.

        Raises:
            NotFound: no such org, or no such active generation.
            ConfigurationError: its secret cannot be opened.
        """
        org, needs = self.read(code)
        for credential in await self.source.active(org.org.id):
            if generation in (None, credential.generation):
                return await self.probe(org, needs, credential)
        if generation is None:
            raise NotFound(f"org {code} has no active credential", fix=_add_credential(code))
        raise NotFound(
            f"org {code} has no active credential of generation {generation}",
            fix=f"`{COMMAND} credentials list {code}` lists them",
        )

    async def try_out(self, code: str, candidate: Callable[[OrgId], Credential]) -> Report:
        """The report of one org with a credential that is not stored; raises NotFound without the org."""
        org, needs = self.read(code)
        return await self.probe(org, needs, candidate(org.org.id), counts=False)

    async def probe(
        self, org: OrgDefinitions, needs: Sequence[Need], credential: Credential, *, counts: bool = True
    ) -> Report:
        """The report of one org with this credential, which need not be stored."""
        code, issuer = org.org.code, org.issuer
        probe = self.probes.get(issuer)
        if probe is None:
            fix = f"add a table [issuers.{issuer}] to worker.toml"
            missing = Diagnostic("issuer", False, f"worker.toml has no issuer {issuer}", fix)
            return Report(code, issuer, credential, general=(missing,))
        if not needs:
            fix = f"set audience in [issuers.{issuer}] of worker.toml"
            missing = Diagnostic("audience", False, f"issuer {issuer} has no audience", fix)
            return Report(code, issuer, credential, general=(missing,))
        # One discovery for all orgs; cancelling its first caller does not cancel it for the others.
        if issuer not in self._discovered:
            self._discovered[issuer] = asyncio.create_task(probe.discovery())
        discovering = self._discovered[issuer]
        discovery = await asyncio.shield(discovering)
        if not discovery.ok and self._discovered.get(issuer) is discovering:
            # A process that runs for long tries again.
            del self._discovered[issuer]
        probes = []
        required = frozenset[str]().union(*(need.scopes | need.may for need in needs))
        for need in needs:
            found = await probe.probe(credential, replace(need, elsewhere=required))
            probes.append(found)
            if counts:
                # The count is informative only: no report is lost for it.
                with suppress(Unavailable):
                    await self.source.used(credential, found.rejected)
        report = Report(code, issuer, credential, tuple(needs), tuple(probes), (discovery,))
        return self._with_claims(report, org)

    def _with_claims(self, report: Report, org: OrgDefinitions) -> Report:
        """The report with what its tokens' claims mean for the org's definitions."""
        granted = [probe.claims for probe in report.probes if probe.claims is not None]
        if not granted:
            return report
        with self.database.autocommit() as connection:
            last = history.last_token(connection, org.org.id)
            handlers = Handlers(connection)
            readers, rules = handlers.readers(org.definitions, org.pool), pools.rules(connection)
        denied = tuple(_denied_pools(org, report, handlers, rules))
        report = replace(report, general=(*report.general, *denied))
        # A pool reads what its rules name.
        ruled = {f"property {name}" for required in rules.values() for name in required}
        unread = tuple(sorted({name for claims in granted for name in readers.unread(claims)} - ruled))
        if last is None:
            return replace(report, unread=unread)
        # The token that the definition of that run gets; audiences can have different ones.
        now = next(
            (
                probe.claims
                for need, probe in zip(report.needs, report.probes, strict=True)
                if last["definition"] in need.definitions and probe.claims is not None
            ),
            granted[0],
        )
        key_id = (last["claims"].get(DIGESTS) or {}).get("key", "")
        changes = tuple(compare(last["claims"], now, self.digests(key_id)))
        return replace(report, unread=unread, last=last, changes=changes)

    def read(self, code: str) -> tuple[OrgDefinitions, tuple[Need, ...]]:
        """One org and what its definitions require.

        Raises:
            NotFound: no such org.
        """
        return self._read([code])[0]

    def read_next(
        self, issuer: str, after: str, limit: int
    ) -> tuple[list[tuple[OrgDefinitions, tuple[Need, ...]]], str | None]:
        """As `read`, of the orgs of an issuer among the next `limit` orgs by code that can run something.

        Also the last of those codes, None at the end.
        """
        with self.database.autocommit() as connection:
            found, last = load_next_orgs(connection, after, limit)
            of_issuer = [org for org in found if org.issuer == issuer]
            handlers = Handlers(connection) if of_issuer else None
            probe = self.probes.get(issuer)
            used = probe.issuer if probe else None
            return [(org, _requirements_of(org, used, handlers)) for org in of_issuer if handlers], last

    def _read(self, codes: Iterable[str] | None) -> list[tuple[OrgDefinitions, tuple[Need, ...]]]:
        with self.database.autocommit() as connection:
            handlers = Handlers(connection)
            orgs = (
                load_all_orgs(connection) if codes is None else (load_org(connection, code) for code in codes)
            )
            issuers = {name: probe.issuer for name, probe in self.probes.items()}
            return [(org, _requirements_of(org, issuers.get(org.issuer), handlers)) for org in orgs]

    async def _check(self, org: OrgDefinitions, needs: Sequence[Need]) -> Report:
        report = await self._check_token(org, needs)
        lacking = await self.database.call_autocommit(_lacks_secrets, org)
        return replace(report, general=(*report.general, *lacking)) if lacking else report

    async def _check_token(self, org: OrgDefinitions, needs: Sequence[Need]) -> Report:
        code = org.org.code
        try:
            credentials = await self.source.active(org.org.id)
        except ConfigurationError as error:
            failed = Diagnostic("credential", False, error.message, error.fix)
        else:
            if credentials:
                return await self.probe(org, needs, credentials[0])
            failed = await self.database.call_autocommit(_lacks_credential, org)
        return Report(code, org.issuer, None, general=(failed,))


def _requirements_of(org: OrgDefinitions, issuer: Issuer | None, handlers: Handlers) -> tuple[Need, ...]:
    """What an org's definitions require, one need for each audience; without definitions, a bare one."""
    default = (issuer.audience if issuer else None) or ""
    needs: dict[str, Need] = {}
    for definition in org.definitions:
        audience = (definition.audience or default).replace("{org}", org.org.code)
        own, variants = scopes_of(definition, handlers, org.pool)
        before = needs.get(audience, Need(audience))
        needs[audience] = Need(
            audience,
            before.scopes | own,
            before.may | variants,
            before.properties | frozenset(definition.requires_properties),
            (*before.definitions, definition.name),
        )
    if not org.definitions and default:
        bare = default.replace("{org}", org.org.code)
        needs[bare] = Need(bare)
    return tuple(need for audience, need in sorted(needs.items()) if audience)


def _denied_pools(
    org: OrgDefinitions, report: Report, handlers: Handlers, rules: Rules
) -> Iterator[Diagnostic]:
    """Pools of the org's definitions that its tokens do not allow: the runs there are refused."""
    claims = {
        name: probe.claims
        for need, probe in zip(report.needs, report.probes, strict=True)
        for name in need.definitions
        if probe.claims is not None
    }
    found: dict[tuple[str, str], str] = {}
    for definition in org.definitions:
        pool = handlers.pool_of(definition, org.pool)
        if pool in rules and definition.name in claims:
            name = pool_mismatch(pool, claims[definition.name], rules)
            if name is not None:
                found.setdefault((pool, name), definition.name)
    for (pool, name), definition_name in found.items():
        yield Diagnostic(
            "pool",
            False,
            f"runs of {definition_name} are refused in pool {pool}: it requires {name} = {rules[pool][name]}",
            f"set the property {name} at the provider, or name another pool",
        )


def _lacks_secrets(connection: Connection, org: OrgDefinitions) -> list[Diagnostic]:
    return list(lacking(connection, org, Handlers(connection)))


def _lacks_credential(connection: Connection, org: OrgDefinitions) -> Diagnostic:
    code = org.org.code
    begun = applications.of_orgs(connection, [org.org.id], applications.UNFINISHED)
    if not begun:
        return Diagnostic("credential", False, f"org {code} has no active credential", _add_credential(code))
    why = f": {begun[-1]['last_error']}" if begun[-1]["last_error"] else ""
    return Diagnostic(
        "credential",
        False,
        f"org {code} has no active credential; its application is not ready{why}",
        f"`{COMMAND} orgs sync --provision --org {code}` continues, and says what to do",
    )


def _add_credential(code: str) -> str:
    return f"`{COMMAND} credentials add {code} --client-id ID --secret-file FILE`"


@asynccontextmanager
async def open_checks(settings: Settings, database: Database, clock: Clock) -> AsyncIterator[Checks]:
    """Token checks at the configured issuers, with the stored credentials.

    Raises ConfigurationError if an issuer or the key ring is not usable.
    """
    ring = find_keyring(settings)
    source = OpenedCredentials(database, ring, settings.secrets_dir, clock)

    def digests(key_id: str) -> Digests | None:
        return ring.digests(key_id) if ring is not None and key_id else None

    async with open_client() as client:
        watch(client)
        probes = {
            name: TokenProbe(issuer, client, clock=clock) for name, issuer in issuers_of(settings).items()
        }
        try:
            yield Checks(database, source, probes, digests)
        finally:
            for probe in probes.values():
                await probe.close()
