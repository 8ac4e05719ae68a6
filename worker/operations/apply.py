"""Apply a file of orgs, templates, definitions, calendars, budgets, limits, rollouts: all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

from sqlalchemy import Connection

from worker.errors import DefinitionError, UsageError
from worker.ids import ALL_ORGS, OrgId, TemplateId, new_id
from worker.model.definitions.definition import Definition
from worker.model.definitions.fields import Faults, refusal
from worker.model.definitions.file import DefinitionsFile, TemplateEntry
from worker.model.definitions.origins import NO_ISSUERS, IssuerOrigins, check_origins
from worker.model.orgs import OrgEntry, Selector
from worker.operations import settle
from worker.operations.budgets import BudgetChange, budget_changes, wake_changed, write_budgets
from worker.operations.changes import (
    CALENDARS,
    LIMITS,
    ROLLOUTS,
    Action,
    CalendarChange,
    Change,
    Dates,
    DefinitionChange,
    LimitChange,
    OrgChange,
    RolloutChange,
    TemplateChange,
    check_selected,
    differing,
    write_definitions,
    write_templates,
)
from worker.operations.handlers import Handlers
from worker.operations.orgs import changed_columns, check_entry, columns_of
from worker.operations.templates import materialise_first
from worker.store import audit, calendars, definitions, orgs, places, templates
from worker.store.database import Database
from worker.store.dialect import Row, chunks

AnyChange = (
    OrgChange
    | TemplateChange
    | DefinitionChange
    | BudgetChange
    | CalendarChange
    | LimitChange
    | RolloutChange
)
Report = Callable[[int, int, str], None]
# The pools of the orgs that have a definition; None for an org without one.
OrgPools = Callable[[], Collection[str | None]]


def apply(
    database: Database,
    file: DefinitionsFile,
    *,
    actor: str,
    dry_run: bool = False,
    prune: bool = False,
    allow_unknown_handlers: bool = False,
    inline: Collection[str] = (),
    insecure_origins: Collection[str] = (),
    issuers: Collection[str] | None = None,
    api_origins: IssuerOrigins = NO_ISSUERS,
    currency: str | None = None,
    report: Report = lambda done, total, what: None,
) -> list[Change]:
    """Make the database match the file in one transaction; returns the changes, which `dry_run` only checks.

    The same file again changes nothing. If a calendar changes, so do all definitions and templates that name
    it, of every org.

    `prune` closes definitions of the file's orgs that it does not have, except those of
    templates, and removes such budgets. Pauses and org states stay. The first orgs get their
    templates' definitions in this transaction, the others from the workers. `inline` are the
    distributions whose handlers can run inline, `insecure_origins` the http origins that can be
    `api_origins`, `issuers` those of `worker.toml` (None if unknown), `api_origins` the origins of
    each, `currency` that of money. `report` gets the number of definitions that are checked, then written,
    and of all.

    Raises:
        DefinitionError: names the entry and field that is refused, with the `others`; nothing was changed.
    """
    with database.transaction() as connection:
        handlers, faults = Handlers(connection), Faults()

        def check(definition: Definition, entry: str, of: Collection[str], org_pools: OrgPools) -> None:
            with faults.collecting():
                handlers.check(
                    definition,
                    entry,
                    org_pools=org_pools,
                    inline=inline,
                    allow_unknown=allow_unknown_handlers,
                )
                own, base_url = definition.api_origins, definition.api_base_url
                check_origins(own, base_url, of, api_origins, insecure_origins, entry=entry)

        with faults.collecting():
            plan = _make_plan(
                connection,
                file,
                prune=prune,
                issuers=issuers,
                check=check,
                faults=faults,
                report=report,
                currency=currency,
            )
        faults.check()
        if not dry_run:
            _carry_out(connection, plan, actor=actor, at=database.now(connection), report=report)
    if not dry_run:
        wake_changed(database, plan.budgets)
    return [change.shown() for change in plan.all]


@dataclass(slots=True)
class _Plan:
    orgs: list[OrgChange] = field(default_factory=list)
    templates: list[TemplateChange] = field(default_factory=list)
    definitions: list[DefinitionChange] = field(default_factory=list)
    budgets: list[BudgetChange] = field(default_factory=list)
    calendars: list[CalendarChange] = field(default_factory=list)
    limits: list[LimitChange] = field(default_factory=list)
    rollouts: list[RolloutChange] = field(default_factory=list)

    @property
    def all(self) -> list[AnyChange]:
        first: list[AnyChange] = [*self.calendars, *self.orgs, *self.templates, *self.definitions]
        return [*first, *self.budgets, *self.limits, *self.rollouts]


def _carry_out(connection: Connection, plan: _Plan, *, actor: str, at: datetime, report: Report) -> None:
    if plan.calendars:
        CALENDARS.require().write_calendars(connection, plan.calendars, actor=actor, at=at)
    settled = [change.before for change in plan.definitions if change.before]
    for org in plan.orgs:
        if org.before and "timezone" in org.new:
            settled += definitions.lock_org(connection, org.id)
    with settle.rescheduling(connection, settled, at=at, scope=ALL_ORGS) as counts:
        fresh = {"created_at": at, "updated_at": at}
        added = [org for org in plan.orgs if org.before is None]
        orgs.add(connection, [{"id": org.id, "code": org.code, **fresh, **org.new} for org in added])
        for org in plan.orgs:
            if org.before is not None:
                orgs.change(connection, org.id, org.new, at=at)
        done = 0
        for part in chunks(plan.definitions):
            write_definitions(connection, part, actor=actor, at=at, counts=counts)
            done += len(part)
            report(done, len(plan.definitions), "definitions written")
    write_templates(connection, plan.templates, actor=actor, at=at)
    write_budgets(connection, plan.budgets, actor=actor, at=at)
    if plan.limits:
        LIMITS.require().write_limits(connection, plan.limits, actor=actor, at=at)
    if plan.rollouts:
        ROLLOUTS.require().write_rollouts(connection, plan.rollouts, actor=actor, at=at)
    audit.record(connection, [change.audit_entry() for change in plan.all], at=at, actor=actor)
    materialise_first(connection, actor=actor, at=at)


def _make_plan(
    connection: Connection,
    file: DefinitionsFile,
    *,
    prune: bool,
    issuers: Collection[str] | None,
    check: Callable[[Definition, str, Collection[str], OrgPools], None],
    faults: Faults,
    report: Report,
    currency: str | None,
) -> _Plan:
    """Check the whole file and compare it with the stored rows, which stay locked.

    `check` is called with each definition, its entry, the issuers whose orgs may run it, and their pools.
    `faults` gets errors after which the check can go on.

    Raises:
        DefinitionError: names the entry and field that is refused.
    """
    plan = _Plan()
    named = {entry.code for entry in file.orgs} | {each.org for each in file.definitions}
    named |= {budget.org for budget in file.budgets if budget.org is not None}
    users = (*file.definitions, *(entry.definition for entry in file.templates))
    used = {definition.calendar for definition in users if definition.calendar is not None}
    named_calendars = CALENDARS.require() if file.calendars or used else None
    dates: Dates = {}
    if named_calendars is not None:
        plan.calendars, dates = named_calendars.calendar_changes(connection, file.calendars, used)
    changed = {
        change.name: [day.isoformat() for day in dates[change.name]]
        for change in plan.calendars
        if change.before is not None
    }
    # Locked together with those of the file: two files then take all locks in one order.
    following_orgs = calendars.orgs_with(connection, ALL_ORGS, changed)
    found_orgs = orgs.by_code(connection, named | following_orgs, lock=True)
    stored_orgs = {code: row for code, row in found_orgs.items() if code in named}
    ids: dict[str, OrgId] = {code: row["id"] for code, row in stored_orgs.items()}
    removed = {code for code, row in stored_orgs.items() if row["state"] == "removed"}
    for entry in file.orgs:
        org = _org_change(entry, stored_orgs.get(entry.code), issuers)
        if org is not None:
            plan.orgs.append(org)
            ids[entry.code] = org.id
    stored = {
        (row["org"], row["name"]): row
        for row in definitions.lock(connection, (row["id"] for row in found_orgs.values()))
    }
    issuer_of = {code: row["issuer"] for code, row in stored_orgs.items()}
    issuer_of |= {entry.code: entry.issuer for entry in file.orgs}
    pool_of_org = {code: row["pool"] for code, row in stored_orgs.items()}
    pool_of_org |= {entry.code: entry.pool for entry in file.orgs}
    for done, each in enumerate(file.definitions):
        report(done, len(file.definitions), "definitions checked")
        name = f"definition {each.org}/{each.name}"
        if each.org not in ids:
            fix = f'add [[org]] code = "{each.org}" to the file, or `orgs add {each.org}`'
            faults.add(refusal(f"there is no org {each.org}", name, "org", fix=fix))
            continue
        if each.org in removed:
            faults.add(_removed(each.org, name, "org"))
            continue
        if named_calendars is not None:
            each = named_calendars.dated(each, dates, name)
        check(each, name, (issuer_of[each.org],), partial(_pool_in, pool_of_org, each.org))
        before = stored.get((each.org, each.name))
        if before is not None and before["closed_at"] is None and before["template_id"] is not None:
            fix = "choose another name, or take the org out of the template's selector"
            raise refusal("a template makes a definition of this name", name, "name", fix=fix)
        definition = DefinitionChange.to(ids[each.org], each, before)
        if definition is not None:
            plan.definitions.append(definition)
    for template_entry in sorted(file.templates, key=lambda template: template.name):
        selected = template_entry.selector.issuer
        of = issuers or () if selected is None else (selected,)
        if named_calendars is not None:
            dated = named_calendars.dated(template_entry.definition, dates, f"template {template_entry.name}")
            template_entry = replace(template_entry, definition=dated)
        selected_pools = partial(_pools_of, connection, template_entry.selector, file.orgs)
        check(template_entry.definition, f"template {template_entry.name}", of, selected_pools)
        template = _template_change(template_entry, templates.find(connection, template_entry.name), issuers)
        if template is not None:
            plan.templates.append(template)
    kept = {(each.org, each.name) for each in file.definitions}
    others = [
        row
        for key, row in stored.items()
        if key not in kept and row["closed_at"] is None and row["template_id"] is None
    ]
    for row in others:
        if prune and row["org"] in named:
            plan.definitions.append(DefinitionChange.close(row))
        elif named_calendars is not None and row["spec"].get("calendar") in changed:
            plan.definitions.append(named_calendars.following(row, changed))
    if named_calendars is not None:
        in_file = {entry.name for entry in file.templates}
        plan.templates += named_calendars.following_templates(connection, changed, in_file)
    pruned = frozenset(ids.values()) if prune else frozenset[OrgId]()
    plan.budgets += budget_changes(connection, file.budgets, ids, issuers, prune=pruned, currency=currency)
    if file.limits:
        plan.limits += LIMITS.require().limit_changes(connection, file.limits)
    if file.rollouts:
        plan.rollouts += ROLLOUTS.require().rollout_changes(connection, file.rollouts)
    return plan


def _pool_in(pools: Mapping[str, str | None], org: str) -> tuple[str | None]:
    return (pools[org],)


def _pools_of(connection: Connection, selector: Selector, entries: Collection[OrgEntry]) -> set[str | None]:
    """The pools of all orgs that a template selects once the file is applied."""
    found = {
        row["code"]: (row["tags"], row["issuer"], row["pool"]) for row in places.orgs(connection, ALL_ORGS)
    }
    found |= {entry.code: (entry.tags, entry.issuer, entry.pool) for entry in entries}
    return {pool for tags, issuer, pool in found.values() if selector.matches(tags=tags, issuer=issuer)}


def _org_change(entry: OrgEntry, before: Row | None, issuers: Collection[str] | None) -> OrgChange | None:
    name = f"org {entry.code}"
    try:
        check_entry(entry, issuers)
    except UsageError as error:
        raise DefinitionError(error.message, entry=name, fix=error.fix) from None
    if before is None:
        return OrgChange(OrgId(new_id()), entry.code, None, columns_of(entry))
    if before["state"] == "removed":
        raise _removed(entry.code, name, "code")
    new = changed_columns(before, entry)
    return OrgChange(before["id"], entry.code, before, new) if new else None


def _removed(org: str, entry: str, key: str) -> DefinitionError:
    fix = f"take it out of the file, or bring it back with `orgs add {org}`"
    return DefinitionError(f"org {org} was removed", entry=entry, field=key, fix=fix)


def _template_change(
    entry: TemplateEntry, before: Row | None, issuers: Collection[str] | None
) -> TemplateChange | None:
    check_selected(entry.selector, issuers, f"template {entry.name}")
    selector, spec = entry.selector.as_json(), entry.spec
    if before is None:
        return TemplateChange("add", TemplateId(new_id()), entry.name, None, selector, spec)
    changed = differing({**before["spec"], "orgs": before["selector"]}, {**spec, "orgs": selector})
    if before["closed_at"] is None and not changed:
        return None
    action: Action = "change" if before["closed_at"] is None else "reopen"
    return TemplateChange(action, before["id"], entry.name, before, selector, spec)
