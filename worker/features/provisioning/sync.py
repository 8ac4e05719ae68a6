"""Orgs from the provider: add, rename, tag and, if asked, suspend them, in small transactions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, TypedDict

from sqlalchemy import Connection

from worker.errors import Conflict, ProviderRefused, ProviderUnavailable
from worker.features.provisioning.management.contract import Management, PropertyValue, ProviderOrg
from worker.features.provisioning.provisioning import Provisioned
from worker.ids import ALL_ORGS, OrgId
from worker.kit.walks import for_each
from worker.model.orgs import OrgEntry, OrgState
from worker.model.provider import TagRule, mapped_tags, need_properties
from worker.operations.orgs import SYNC, check_entry, columns_of, new_row, set_org_state
from worker.operations.templates import materialise, materialise_first
from worker.store import audit, orgs
from worker.store.database import Database
from worker.store.dialect import Row, chunks
from worker.telemetry.events import emit

Absent = Literal["keep", "suspend"]
# Orgs that one transaction changes.
BATCH = 200
MAX_NAME = 200
# Notes of orgs that are suspended; the second one says how to resume it.
GONE = "gone at the provider"
PAUSED_AND_GONE = "gone at the provider; it was paused before"
# What a change of a column is called.
_CHANGED = {"name": "renamed", "tags": "tagged"}


class SyncRow(TypedDict):
    """What `orgs sync` did with one org; `changes` is empty if it failed before anything was changed."""

    org: str
    name: str
    changes: list[str]
    client_id: str | None
    error: str | None
    warning: str | None
    fix: str | None


@dataclass(frozen=True, slots=True)
class SyncRules:
    """How orgs follow the provider.

    `most_suspended` is the share of the issuer's orgs that may be suspended at once, or None for any number.
    """

    issuer: str
    tags: Sequence[TagRule] = ()
    absent: Absent = "keep"
    most_suspended: float | None = 0.05

    @property
    def actor(self) -> str:
        """Who suspends an org that is gone; only such an org is resumed when it returns."""
        return f"{SYNC}{self.issuer}"


@dataclass(slots=True)
class Listed:
    """An org of the provider, with its properties if the mapping of tags needs them."""

    org: ProviderOrg
    properties: Mapping[str, PropertyValue] = field(default_factory=dict)
    error: ProviderRefused | None = None
    """Why its properties cannot be read; it stays as it is."""


@dataclass(slots=True)
class Plan:
    """What a sync is to do."""

    add: list[Listed] = field(default_factory=list)
    change: list[tuple[Row, Listed]] = field(default_factory=list)
    suspend: list[Row] = field(default_factory=list)
    resume: list[Row] = field(default_factory=list)
    failed: list[SyncRow] = field(default_factory=list)
    known: int = 0
    """The issuer's orgs that were active or paused before."""
    stored: Mapping[str, Row] = field(default_factory=dict)
    """The stored orgs that it was compared with, by code."""
    is_unknown: bool = False
    """Whether neither the provider nor this installation has the one org that was asked for."""

    def leave(self, codes: Collection[str]) -> None:
        """Leave these orgs as they are: they were read again after the list was."""
        self.add = [each for each in self.add if each.org.code not in codes]
        self.change = [(row, each) for row, each in self.change if row["code"] not in codes]
        self.suspend = [row for row in self.suspend if row["code"] not in codes]
        self.resume = [row for row in self.resume if row["code"] not in codes]

    def leave_newer(self, at: datetime) -> None:
        """Suspend no org that was added or moved after this time, when the list began to be read."""
        self.suspend = [row for row in self.suspend if (row["state_at"] or row["created_at"]) <= at]

    def check_suspended(self, rules: SyncRules) -> None:
        """Check that no more orgs are gone than may be suspended at once: a share of all, but at least one.

        Raises:
            Conflict: there are more; `apply` suspends none of them.
        """
        if not self._suspends_too_many(rules):
            return
        raise Conflict(
            f"{len(self.suspend)} of {self.known} orgs of issuer {rules.issuer} are gone at the provider, "
            "more than max_suspended; none was suspended",
            fix="if that is right, call `orgs sync --absent suspend --yes`",
        )

    def suspended(self, rules: SyncRules) -> list[Row]:
        """The orgs to suspend: none if they are too many."""
        return [] if self._suspends_too_many(rules) else self.suspend

    def _suspends_too_many(self, rules: SyncRules) -> bool:
        if rules.most_suspended is None:
            return False
        # Rounded: 29 % of 100 orgs are 28.999999999999996.
        return len(self.suspend) > max(1, int(round(self.known * rules.most_suspended, 6)))


async def read_orgs(
    management: Management,
    rules: SyncRules,
    only: str | None,
    *,
    concurrency: int = 8,
    report: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[Listed]:
    """The provider's orgs, or one of them, with their properties if the mapping of tags needs them.

    `report` gets the number of orgs read, and of all orgs once that is known.

    Raises:
        ProviderUnavailable: the list is empty, or it cannot be read to its end.
        Throttled, ConfigurationError: the provider asks for a long pause, or denies it.
    """
    found: dict[str, Listed] = {}
    one = None if only is None else await management.org(only)
    if one is not None:
        found[one.code] = Listed(one)
    elif only is None or rules.absent == "suspend":
        # Before one org is suspended, too: the response about an org alone can have another reason.
        found = await _read_all(management, rules, report)
        found = found if only is None else {code: each for code, each in found.items() if code == only}
    if need_properties(rules.tags):
        await _read_properties(management, list(found.values()), concurrency, report)
    return list(found.values())


async def _read_all(
    management: Management, rules: SyncRules, report: Callable[[int, int | None], None]
) -> dict[str, Listed]:
    """All orgs of the provider, by code; raises as `read_orgs`."""
    found: dict[str, Listed] = {}
    try:
        async for page in management.orgs():
            for each in page:
                found.setdefault(each.code, Listed(each))
            report(len(found), None)
    except ProviderRefused as refused:
        raise ProviderUnavailable(f"{refused.message}; nothing was changed", fix=refused.fix) from None
    if not found:
        raise ProviderUnavailable(
            f"the provider of issuer {rules.issuer} lists no orgs; nothing was changed",
            fix=f"check url and client_id in [issuers.{rules.issuer}.management]: the right environment?",
        )
    return found


async def _read_properties(
    management: Management,
    listed: Sequence[Listed],
    concurrency: int,
    report: Callable[[int, int | None], None],
) -> None:
    """Read the properties of each org, `concurrency` at a time; raises as `read_orgs`."""
    done = 0

    async def read(each: Listed) -> None:
        nonlocal done
        try:
            each.properties = await management.org_properties(each.org.code)
        except ProviderRefused as refused:
            each.error = refused
        done += 1
        report(done, len(listed))

    try:
        await for_each(listed, read, concurrency=concurrency)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def plan(stored: Iterable[Row], listed: Sequence[Listed], rules: SyncRules, *, only: str | None) -> Plan:
    """Compare the stored orgs (of all issuers) with the provider's; pure."""
    made = Plan()
    by_code = {row["code"]: row for row in stored}
    made.stored = by_code
    made.is_unknown = only is not None and not listed and only not in by_code
    codes = {each.org.code for each in listed}
    for each in listed:
        row = by_code.get(each.org.code)
        if fault := _fault(each, row, rules):
            made.failed.append(fault)
        elif row is None:
            made.add.append(each)
        elif row["state"] != "removed":
            if _entry(row, each, rules) != _entry_of(row):
                made.change.append((row, each))
            if row["state"] == "suspended" and row["state_by"] == rules.actor:
                made.resume.append(row)
    for row in by_code.values():
        if row["issuer"] != rules.issuer or row["state"] not in ("active", "paused"):
            continue
        made.known += 1
        is_asked = only is None or row["code"] == only
        if rules.absent == "suspend" and is_asked and row["code"] not in codes:
            made.suspend.append(row)
    return made


def apply(
    database: Database, made: Plan, rules: SyncRules, *, actor: str, issuers: Iterable[str]
) -> list[SyncRow]:
    """Carry out a plan in small transactions; returns a row for each org that changed or failed.

    No org is suspended if more are gone than may be suspended at once; see `Plan.check_suspended`.
    """
    rows = {row["org"]: row for row in made.failed}
    names = set(issuers)

    def note(org: str, name: str, change: str) -> None:
        rows.setdefault(org, _row(org, name))["changes"].append(change)

    for part in chunks([*((None, each) for each in made.add), *made.change], BATCH):
        with database.transaction() as connection:
            at = database.now(connection)
            for org, name, change in _write(connection, part, rules, names, actor=actor, at=at):
                note(org, name, change)
            materialise_first(connection, actor=actor, at=at)

    def move(row: Row, state: OrgState, why: str, change: str) -> None:
        # Unless somebody has moved it since the orgs were compared.
        moved = set_org_state(database, row["code"], state, actor=rules.actor, note=why, seen=row)
        if (moved["state"], moved["state_note"]) == (state, why):
            note(row["code"], row["name"], change)

    for row in made.resume:
        # One that a person had paused is paused again.
        state: OrgState = "paused" if row["state_note"] == PAUSED_AND_GONE else "active"
        move(row, state, "listed by the provider again", "resumed")
    for row in made.suspended(rules):
        move(row, "suspended", PAUSED_AND_GONE if row["state"] == "paused" else GONE, "suspended")
    while materialise(database).orgs:
        pass
    changed = [row for row in rows.values() if row["changes"]]
    if changed:
        emit("orgs.synced", issuer=rules.issuer, changed=len(changed), failed=len(made.failed))
    return list(rows.values())


def planned(database: Database, listed: Sequence[Listed], rules: SyncRules, only: str | None) -> Plan:
    """What a sync is to do, by the orgs that are stored."""
    with database.autocommit() as connection:
        if only is not None:
            codes = {only, *(each.org.code for each in listed)}
            return plan(orgs.by_code(connection, codes).values(), listed, rules, only=only)
        found = {row["code"]: row for row in orgs.of_issuer(connection, ALL_ORGS, rules.issuer)}
        others = [each.org.code for each in listed if each.org.code not in found]
        stored = [*found.values(), *orgs.by_code(connection, others).values()]
    return plan(stored, listed, rules, only=only)


def describe(made: Plan, rules: SyncRules) -> list[SyncRow]:
    """The rows that `apply` would return, for a dry run."""
    rows = {row["org"]: row for row in made.failed}
    named = [
        *((each.org.code, _entry(None, each, rules).name, "added") for each in made.add),
        *((row["code"], *change) for row, each in made.change for change in _changed(row, each, rules)),
        *((row["code"], row["name"], "resumed") for row in made.resume),
        *((row["code"], row["name"], "suspended") for row in made.suspended(rules)),
    ]
    for org, name, change in named:
        rows.setdefault(org, _row(org, name))["changes"].append(change)
    return list(rows.values())


def with_results(rows: Sequence[SyncRow], results: Sequence[Provisioned], made: Plan) -> list[SyncRow]:
    """The rows of a sync, with what became of the applications, those without another change by code."""
    by_org = {row["org"]: row for row in rows}
    for result in sorted(results, key=lambda each: each.org):
        stored = made.stored.get(result.org)
        row = by_org.setdefault(result.org, _row(result.org, stored["name"] if stored else result.org))
        row["client_id"] = result.client_id
        if result.error is not None:
            row["error"], row["fix"] = result.error.message, result.error.fix or None
        else:
            row["changes"].append("provisioned")
            row["warning"] = result.warning or None
    return list(by_org.values())


def with_planned(rows: Sequence[SyncRow], made: Plan, lacking: Sequence[str]) -> list[SyncRow]:
    """The rows of a dry run, with the applications that would be made for new orgs and for `lacking` ones."""
    gone = {row["code"] for row in made.suspend}
    codes = [*(each.org.code for each in made.add), *(code for code in lacking if code not in gone)]
    return with_results(rows, [Provisioned(code) for code in codes], made)


def _row(org: str, name: str, *, error: str | None = None, fix: str | None = None) -> SyncRow:
    return SyncRow(org=org, name=name, changes=[], client_id=None, error=error, warning=None, fix=fix)


def _fault(each: Listed, row: Row | None, rules: SyncRules) -> SyncRow | None:
    """The row of an org that cannot be taken over, or None."""
    code = each.org.code
    if row is not None and row["issuer"] != rules.issuer:
        return _row(
            code,
            each.org.name,
            error=f"org {code} exists already, with issuer {row['issuer']}",
            fix="two issuers cannot share an org: change its code at one of the providers",
        )
    if not code or not code.isprintable() or "/" in code or len(code) > MAX_NAME:
        return _row(
            code[:MAX_NAME],
            each.org.name,
            error="the provider names an org by a code that cannot be used",
            fix="a code has 1 to 200 printable characters without a slash",
        )
    if each.error is not None:
        return _row(code, each.org.name, error=each.error.message, fix=each.error.fix)
    return None


def _entry_of(row: Row) -> OrgEntry:
    return OrgEntry(
        row["code"],
        row["name"],
        row["issuer"],
        row["max_concurrent_runs"],
        row["weight"],
        frozenset(row["tags"]),
        row["timezone"],
        row["pool"],
    )


def _entry(row: Row | None, each: Listed, rules: SyncRules) -> OrgEntry:
    """The org as it should be: the name of the provider, and the tags of the mapping; all else stays."""
    name = "".join(letter for letter in each.org.name if letter.isprintable()).strip()[:MAX_NAME]
    before = OrgEntry(each.org.code, "", rules.issuer) if row is None else _entry_of(row)
    tags = mapped_tags(each.org, each.properties, rules.tags, before.tags)
    return replace(before, name=name or before.code, tags=tags)


def _differences(before: OrgEntry, entry: OrgEntry) -> Row:
    """The columns that change."""
    values: Row = {"name": entry.name} if entry.name != before.name else {}
    return values if entry.tags == before.tags else values | {"tags": sorted(entry.tags)}


def _changed(row: Row, each: Listed, rules: SyncRules) -> list[tuple[str, str]]:
    """The new name of an org, with each change."""
    entry = _entry(row, each, rules)
    return [(entry.name, _CHANGED[column]) for column in _differences(_entry_of(row), entry)]


def _write(
    connection: Connection,
    part: Sequence[tuple[Row | None, Listed]],
    rules: SyncRules,
    issuers: set[str],
    *,
    actor: str,
    at: datetime,
) -> list[tuple[str, str, str]]:
    """Add or change these orgs; returns org, name and change of each that changed."""
    stored = orgs.by_code(connection, (each.org.code for _, each in part), lock=True)
    done: list[tuple[str, str, str]] = []
    new: list[Row] = []
    trail: list[audit.Entry] = []
    for _, each in part:
        row = stored.get(each.org.code)
        if row is not None and (row["issuer"] != rules.issuer or row["state"] == "removed"):
            continue
        entry = _entry(row, each, rules)
        check_entry(entry, issuers)
        if row is None:
            new.append(new_row(entry, at=at))
            trail.append(audit.Entry(new[-1]["id"], "org.add", entry.code, columns_of(entry)))
            done.append((entry.code, entry.name, "added"))
            continue
        if values := _differences(_entry_of(row), entry):
            orgs.change(connection, OrgId(row["id"]), values, at=at)
            trail.append(audit.Entry(row["id"], "org.change", entry.code, values))
            done += [(entry.code, entry.name, _CHANGED[column]) for column in values]
    orgs.add(connection, new)
    audit.record(connection, trail, at=at, actor=actor)
    return done
