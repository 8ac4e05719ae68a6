"""Check orgs: a token of each, held against what its definitions need; verify one generation of one org."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from worker.errors import ConfigurationError, NotFound, Unavailable
from worker.operations.handlers import Handlers
from worker.operations.requirements import OrgNeeds, of_all_orgs, of_org, scopes_of
from worker.store.database import Database
from worker.tokens.credentials import Credential, CredentialSource
from worker.tokens.issuer import Issuer
from worker.tokens.token_probe import COMMAND, Diagnostic, Found, Need, TokenProbe, kind_of

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of one org, audience by audience."""

    org: str
    issuer: str
    credential: Credential | None
    needs: tuple[Need, ...]
    looks: tuple[Found, ...]
    general: tuple[Diagnostic, ...] = ()

    @property
    def findings(self) -> list[Diagnostic]:
        return [*self.general, *(finding for look in self.looks for finding in look.findings)]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def transient(self) -> bool:
        """Whether the issuer gave no answer that says anything of the org."""
        return any(look.transient for look in self.looks)

    def problems(self) -> list[Diagnostic]:
        return [finding for finding in self.findings if not finding.ok]

    def as_row(self) -> Row:
        """The report as it is printed; of properties and flags names and types only."""
        claims = [look.claims for look in self.looks if look.claims is not None]
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
            "lifetime": (first.expires_at - first.issued_at).total_seconds() if first else None,
            "problems": "; ".join(finding.detail for finding in self.problems()) or None,
            "findings": [
                {"check": each.check, "ok": each.ok, "detail": each.detail, "fix": each.fix or None}
                for each in self.findings
            ],
        }


class Checks:
    """Checks orgs at their issuers; each request is counted as a use of its credential."""

    def __init__(
        self, database: Database, source: CredentialSource, examiners: Mapping[str, TokenProbe]
    ) -> None:
        self._database = database
        self._source = source
        self._examiners = examiners
        self._discovered: dict[str, asyncio.Task[Diagnostic]] = {}

    async def check_all(
        self,
        codes: Sequence[str] | None,
        *,
        concurrency: int = 8,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Report]:
        """The reports of these orgs, or of all that may run something, in the order of their codes.

        `tell` is called with how many are done, of how many.

        Raises:
            NotFound: there is no org of a code.
        """
        work = self._read(codes)
        reports: list[Report | None] = [None] * len(work)
        left = iter(range(len(work)))
        done = 0

        async def carry() -> None:
            nonlocal done
            for place in left:
                reports[place] = await self._check(*work[place])
                done += 1
                tell(done, len(work))

        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, min(concurrency, len(work)))):
                group.create_task(carry())
        return [report for report in reports if report is not None]

    async def verify(self, code: str, generation: int | None = None) -> Report:
        """The report of one org with one generation of its credentials, the newest by default.

        Raises:
            NotFound: there is no such org, or no such generation that is active.
            ConfigurationError: its secret does not open.
        """
        [(org, needs)] = self._read([code])
        for credential in await self._source.active(org.org.id):
            if generation in (None, credential.generation):
                return await self.look(org, needs, credential)
        raise _not_active(code, generation)

    async def look(
        self, org: OrgNeeds, needs: Sequence[Need], credential: Credential, *, counts: bool = True
    ) -> Report:
        """The report of one org with this credential, which may be one that is not stored."""
        examiner = self._examiners.get(org.issuer)
        if examiner is None:
            fix = f"add a table [issuers.{org.issuer}] to worker.toml"
            missing = Diagnostic("issuer", False, f"worker.toml has no issuer {org.issuer}", fix)
            return Report(org.org.code, org.issuer, credential, (), (), (missing,))
        if not needs:
            fix = f"set audience in [issuers.{org.issuer}] of worker.toml"
            missing = Diagnostic("audience", False, f"issuer {org.issuer} has no audience", fix)
            return Report(org.org.code, org.issuer, credential, (), (), (missing,))
        discovery = await self._discovery(org.issuer, examiner)
        looks = []
        for need in needs:
            found = await examiner.examine(credential, need)
            looks.append(found)
            if counts:
                # The count is for people; no answer is lost for it.
                with suppress(Unavailable):
                    await self._source.used(credential.id, found.rejected)
        return Report(org.org.code, org.issuer, credential, tuple(needs), tuple(looks), (discovery,))

    def read(self, code: str) -> tuple[OrgNeeds, tuple[Need, ...]]:
        """One org and what its definitions need.

        Raises:
            NotFound: there is no such org.
        """
        [work] = self._read([code])
        return work

    def _read(self, codes: Iterable[str] | None) -> list[tuple[OrgNeeds, tuple[Need, ...]]]:
        with self._database.autocommit() as connection:
            handlers = Handlers(connection)
            found = of_all_orgs(connection) if codes is None else (of_org(connection, code) for code in codes)
            issuers = {name: examiner.issuer for name, examiner in self._examiners.items()}
            return [(org, needs_of(org, issuers.get(org.issuer), handlers)) for org in found]

    async def _check(self, org: OrgNeeds, needs: Sequence[Need]) -> Report:
        try:
            credentials = await self._source.active(org.org.id)
        except ConfigurationError as error:
            finding = Diagnostic("credential", False, error.message, error.fix)
            return Report(org.org.code, org.issuer, None, (), (), (finding,))
        if credentials:
            return await self.look(org, needs, credentials[0])
        code = org.org.code
        fix = f"`{COMMAND} credentials add {code} --client-id ID --secret-file FILE`"
        finding = Diagnostic("credential", False, f"org {code} has no active credential", fix)
        return Report(code, org.issuer, None, (), (), (finding,))

    async def _discovery(self, issuer: str, examiner: TokenProbe) -> Diagnostic:
        # Once for all orgs; whoever is first does not keep it from the others by being cancelled.
        if issuer not in self._discovered:
            self._discovered[issuer] = asyncio.create_task(examiner.discovery())
        return await asyncio.shield(self._discovered[issuer])


def needs_of(org: OrgNeeds, issuer: Issuer | None, handlers: Handlers) -> tuple[Need, ...]:
    """What the org's definitions need, a need for each audience; of an org without any, a bare one."""
    default = (issuer.audience if issuer else None) or ""
    needs: dict[str, Need] = {}
    for definition in org.definitions:
        audience = (definition.audience or default).replace("{org}", org.org.code)
        own, variants = scopes_of(definition, handlers)
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


def _not_active(code: str, generation: int | None) -> NotFound:
    if generation is None:
        fix = f"`{COMMAND} credentials add {code} --client-id ID --secret-file FILE`"
        return NotFound(f"org {code} has no active credential", fix=fix)
    return NotFound(
        f"org {code} has no active credential of generation {generation}",
        fix=f"`{COMMAND} credentials list {code}` names them",
    )
