"""Changes of orgs, templates, definitions, calendars, limits: what each changes, its rows, its audit entry.

Those of budgets are in `operations/budgets.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal, Protocol

from sqlalchemy import Connection

from worker.ids import ALL_ORGS, DefinitionId, OrgId, TemplateId, new_id
from worker.kit.feature import Point
from worker.model.definitions import CALENDAR_DATES
from worker.model.definitions.calendars import CalendarEntry
from worker.model.definitions.definition import Definition, to_spec
from worker.model.definitions.fields import refusal
from worker.model.definitions.limits import COLUMNS as LIMIT_COLUMNS
from worker.model.definitions.limits import LimitEntry, shown
from worker.model.definitions.rollouts import COLUMNS as ROLLOUT_COLUMNS
from worker.model.definitions.rollouts import RolloutEntry
from worker.model.orgs import Selector
from worker.operations import settle
from worker.store import audit, backfills, definitions, edit_runs, orgs, templates
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists.rows import PlannedStepRow, RolloutDetail
from worker.store.sweeps import EndCounts

Kind = Literal["org", "definition", "template", "budget", "calendar", "limit", "rollout"]
Action = Literal["add", "change", "reopen", "close", "remove"]
# The dates of calendars by name.
Dates = Mapping[str, tuple[date, ...]]


@dataclass(frozen=True, slots=True)
class Change:
    """One change as `apply` prints it: `fields` has each key's value before and after."""

    kind: Kind
    action: Action
    org: str | None
    name: str
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def detail(self) -> dict[str, Any]:
        """The fields as JSON and the audit have them."""
        return {key: {"before": before, "after": after} for key, (before, after) in self.fields.items()}

    def as_row(self) -> dict[str, Any]:
        """The columns that `apply` prints."""
        named = {"kind": self.kind, "action": self.action, "org": self.org, "name": self.name}
        return named | {"fields": self.detail}


def because(reason: str | None) -> dict[str, str]:
    """What an audit row adds if somebody gave a reason for the change."""
    return {"reason": reason} if reason else {}


def check_selected(selector: Selector | None, issuers: Iterable[str] | None, entry: str) -> None:
    """Refuse an entry that selects orgs by an unknown issuer; `issuers` are those of worker.toml, if known.

    Raises:
        DefinitionError: worker.toml has no such issuer.
    """
    issuer = None if selector is None else selector.issuer
    if issuers is not None and issuer is not None and issuer not in issuers:
        problem = f"there is no issuer {issuer!r}; worker.toml has {', '.join(sorted(issuers)) or 'none'}"
        fix = f"add a table [issuers.{issuer}] to worker.toml, or correct the name"
        raise refusal(problem, entry, "orgs.issuer", fix=fix)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values."""
    pairs = ((key, before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys()))
    return {key: (old, new) for key, old, new in pairs if not same(old, new)}


def shown_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """As `differing`, for two specs: of the dates of one calendar only those that come or go."""
    found = differing(before, after)
    if "calendar" in found:
        found.pop(CALENDAR_DATES, None)
    elif CALENDAR_DATES in found:
        found[CALENDAR_DATES] = one_sided(*found[CALENDAR_DATES])
    return found


def one_sided(before: list[str] | None, after: list[str] | None) -> tuple[list[str], list[str]]:
    """Of two lists, what only the one has, and what only the other has."""
    old, new = before or [], after or []
    olds, news = set(old), set(new)
    return [each for each in old if each not in news], [each for each in new if each not in olds]


def same(one: Any, other: Any) -> bool:
    """Equality as in `jsonb`: true is not 1, but 1 and 1.0 are one number."""
    if one is other:
        return True
    if type(one) is str:
        # Most values are texts.
        return bool(one == other)
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@dataclass(frozen=True, slots=True)
class OrgChange:
    """An org to add (`before` None), or whose columns in `new` change."""

    id: OrgId
    code: str
    before: Row | None
    new: Mapping[str, Any]

    def shown(self) -> Change:
        before = {} if self.before is None else {name: self.before[name] for name in self.new}
        action: Action = "add" if self.before is None else "change"
        return Change("org", action, self.code, self.code, differing(before, self.new))

    def audit_entry(self) -> audit.Entry:
        return audit.Entry(self.id, f"org.{self.shown().action}", self.code, dict(self.new))


@dataclass(frozen=True, slots=True)
class TemplateChange:
    """A template to add (`before` None), change, reopen or close, and its new selector and spec."""

    action: Action
    id: TemplateId
    name: str
    before: Row | None
    selector: Any
    spec: Mapping[str, Any]

    def shown(self) -> Change:
        if self.action == "close":
            return Change("template", "close", None, self.name)
        before = {} if self.before is None else {**self.before["spec"], "orgs": self.before["selector"]}
        after = {**self.spec, "orgs": self.selector}
        return Change("template", self.action, None, self.name, shown_keys(before, after))

    def audit_entry(self) -> audit.Entry:
        return audit.Entry(None, f"template.{self.action}", self.name, self.shown().detail)


@dataclass(frozen=True, slots=True)
class CalendarChange:
    """A calendar to add (`before` None), to give other dates, or to remove (`dates` None)."""

    name: str
    before: Row | None
    dates: tuple[date, ...] | None

    @property
    def action(self) -> Action:
        if self.dates is None:
            return "remove"
        return "add" if self.before is None else "change"

    def shown(self) -> Change:
        if self.dates is None:
            return Change("calendar", "remove", None, self.name)
        after = [day.isoformat() for day in self.dates]
        dates = (None, after) if self.before is None else one_sided(self.before["dates"], after)
        return Change("calendar", self.action, None, self.name, {"dates": dates})

    def audit_entry(self) -> audit.Entry:
        return audit.Entry(None, f"calendar.{self.action}", self.name, self.shown().detail)


@dataclass(frozen=True, slots=True)
class TemplateRef:
    """The revision of a template that makes a definition."""

    id: TemplateId
    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class DefinitionChange:
    """A definition to add (`before` None), change, reopen or close, its new spec, and its template."""

    action: Action
    org_id: OrgId
    org: str
    name: str
    before: Row | None
    spec: Mapping[str, Any]
    enabled: bool
    template: TemplateRef | None = None

    @classmethod
    def to(
        cls, org_id: OrgId, wanted: Definition, before: Row | None, template: TemplateRef | None = None
    ) -> DefinitionChange | None:
        """The change that adds, reopens or changes a definition; None if it is the same already."""
        spec = to_spec(wanted)
        return cls.to_spec(org_id, wanted.org, wanted.name, spec, wanted.enabled, before, template)

    @classmethod
    def to_spec(
        cls,
        org_id: OrgId,
        org: str,
        name: str,
        spec: Mapping[str, Any],
        enabled: bool,
        before: Row | None,
        template: TemplateRef | None = None,
    ) -> DefinitionChange | None:
        """As `to`, with the canonical spec, which many definitions may share."""
        action: Action = "change"
        if before is None:
            action = "add"
        elif before["closed_at"] is not None:
            action = "reopen"
        elif not differing(before["spec"], spec) and before["enabled"] == enabled:
            return None
        return cls(action, org_id, org, name, before, spec, enabled, template)

    @classmethod
    def close(cls, row: Row, template: TemplateRef | None = None) -> DefinitionChange:
        """The change that closes a stored definition."""
        return cls(
            "close", row["org_id"], row["org"], row["name"], row, row["spec"], row["enabled"], template
        )

    def shown(self) -> Change:
        if self.action == "close":
            return Change("definition", "close", self.org, self.name)
        after = {**self.spec, "enabled": self.enabled}
        if self.before is None:
            new = {
                key: (None, after[key])
                for key in sorted(after)
                if after[key] is not None and key != CALENDAR_DATES
            }
            return Change("definition", self.action, self.org, self.name, new)
        before = {**self.before["spec"], "enabled": self.before["enabled"]}
        return Change("definition", self.action, self.org, self.name, shown_keys(before, after))

    def audit_entry(self, reason: str | None = None) -> audit.Entry:
        detail = self.shown().detail | because(reason)
        if self.template is not None:
            detail["template"] = self.template.name
        return audit.Entry(self.org_id, f"definition.{self.action}", f"{self.org} {self.name}", detail)


def change_definitions(
    connection: Connection,
    changes: Sequence[DefinitionChange],
    *,
    actor: str,
    at: datetime,
    reason: str | None = None,
) -> None:
    """Settle and change locked definitions, schedule them from now, and write the audit."""
    stored = [change.before for change in changes if change.before]
    with settle.rescheduling(connection, stored, at=at, scope=ALL_ORGS) as counts:
        write_definitions(connection, changes, actor=actor, at=at, counts=counts)
    audit.record(connection, [change.audit_entry(reason) for change in changes], at=at, actor=actor)


def write_definitions(
    connection: Connection,
    changes: Sequence[DefinitionChange],
    *,
    actor: str,
    at: datetime,
    counts: EndCounts,
) -> None:
    """Write changes of settled definitions, schedule new ones, and cancel the runs of closed ones.

    The caller writes the `counts` of these runs.
    """
    new = _write_rows(connection, changes, actor, at)
    settle.schedule_next(connection, new, at=at, inclusive=True, scope=ALL_ORGS)
    closed = {change.before["id"]: change for change in changes if change.action == "close" and change.before}
    for definition_id in sorted(backfills.unfinished_of(connection, ALL_ORGS, list(closed))):
        ours = backfills.is_of(definition_id)
        backfills.cancel(connection, closed[definition_id].org_id, ours, at=at)
    edit_runs.end_waiting_of(connection, ALL_ORGS, list(closed), reason="closed", counts=counts)
    own = {(change.org_id, change.name) for change in closed.values() if change.template is None}
    templates.look_again(connection, own)


def _write_rows(
    connection: Connection, changes: Sequence[DefinitionChange], actor: str, at: datetime
) -> list[Row]:
    """Write rows and revisions; returns the new definitions, as `definitions.read` would."""
    added = {change.org_id for change in changes if change.before is None}
    org_of = orgs.scheduling_of(connection, added)
    new: list[Row] = []
    rows: list[dict[str, Any]] = []
    revisions: list[dict[str, Any]] = []
    changed: list[definitions.DefinitionUpdate] = []
    for change in changes:
        before, template = change.before, change.template
        values: dict[str, Any] = {
            "template_id": template.id if template else None,
            "template_revision": template.revision if template else None,
        }
        if change.action != "close":
            values["enabled"] = change.enabled
            values["calendar"] = change.spec.get("calendar")
        if before is None:
            definition_id, revision = DefinitionId(new_id()), 1
            named = {"id": definition_id, "org_id": change.org_id, "name": change.name}
            rows.append(named | {"revision": revision, "created_at": at, "updated_at": at} | values)
            org = org_of[change.org_id]
            of_org = {"org": change.org, "org_state": org.state}
            rest: Row = {"org_timezone": org.timezone, "org_pool": org.pool}
            rest |= {"spec": change.spec, "paused_at": None, "closed_at": None}
            new.append(rows[-1] | of_org | rest)
        else:
            definition_id, revision = before["id"], before["revision"]
            values["closed_at"] = at if change.action == "close" else None
            if change.action == "reopen":
                values["consecutive_failures"] = 0
            if differing(before["spec"], change.spec):
                values["revision"] = revision = revision + 1
            changed.append(
                definitions.DefinitionUpdate(change.org_id, definition_id, before["revision"], values)
            )
            if revision == before["revision"]:
                continue
        revisions.append(
            {
                "definition_id": definition_id,
                "revision": revision,
                "spec": change.spec,
                "at": at,
                "by": actor,
            }
        )
    definitions.change(connection, changed, at=at)
    definitions.add(connection, rows, revisions)
    return new


def write_templates(
    connection: Connection, changes: Sequence[TemplateChange], *, actor: str, at: datetime
) -> None:
    """Write templates. Their definitions follow later, org by org."""
    for change in changes:
        revision = 1 if change.before is None else change.before["revision"] + (change.action != "close")
        values = {
            "name": change.name,
            "revision": revision,
            "selector": change.selector,
            "spec": dict(change.spec),
            "updated_at": at,
            "updated_by": actor,
            "closed_at": at if change.action == "close" else None,
        }
        if change.before is None:
            values["created_at"] = at
        templates.write(connection, change.id, values, new=change.before is None)


class NamedCalendars(Protocol):
    """What the feature calendars does for a file, and for a definition that names one."""

    def calendar_changes(
        self, connection: Connection, entries: Sequence[CalendarEntry], named: Collection[str]
    ) -> tuple[list[CalendarChange], Dates]: ...

    def dated(self, definition: Definition, dates: Dates, entry: str) -> Definition: ...

    def with_calendar(self, connection: Connection, definition: Definition, entry: str) -> Definition: ...

    def following(self, row: Row, dates: Mapping[str, list[str]]) -> DefinitionChange: ...

    def following_templates(
        self, connection: Connection, changed: Mapping[str, list[str]], in_file: Collection[str]
    ) -> list[TemplateChange]: ...

    def write_calendars(
        self, connection: Connection, changes: Sequence[CalendarChange], *, actor: str, at: datetime
    ) -> None: ...


CALENDARS: Point[NamedCalendars] = Point("calendars.named", "`calendar` of a definition")


@dataclass(frozen=True, slots=True)
class LimitChange:
    """A limit at another service to add (`before` None), change or remove (`new` None)."""

    before: Row | None
    new: Mapping[str, Any] | None

    def shown(self) -> Change:
        name = shown(self.new or self.before or {})
        if self.new is None:
            return Change("limit", "remove", None, name)
        old = {} if self.before is None else {key: self.before[key] for key in LIMIT_COLUMNS}
        new = {key: self.new[key] for key in LIMIT_COLUMNS}
        return Change("limit", "add" if self.before is None else "change", None, name, differing(old, new))

    def audit_entry(self) -> audit.Entry:
        change = self.shown()
        return audit.Entry(None, f"limit.{change.action}", change.name, change.detail)


class AppliedLimits(Protocol):
    """What the feature egress does for a file with limits."""

    def limit_changes(self, connection: Connection, entries: Sequence[LimitEntry]) -> list[LimitChange]: ...

    def write_limits(
        self, connection: Connection, changes: Sequence[LimitChange], *, actor: str, at: datetime
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class RolloutChange:
    """A rollout to add (`before` None) or change, with its columns of `COLUMNS`."""

    name: str
    before: Row | None
    new: Mapping[str, Any]

    def shown(self) -> Change:
        old = {} if self.before is None else {key: self.before[key] for key in ROLLOUT_COLUMNS}
        action: Action = "add" if self.before is None else "change"
        return Change("rollout", action, None, self.name, differing(old, self.new))

    def audit_entry(self) -> audit.Entry:
        change = self.shown()
        return audit.Entry(None, f"rollout.{change.action}", self.name, change.detail)


class AppliedRollouts(Protocol):
    """What the feature rollouts does for a file with rollouts."""

    def rollout_changes(
        self, connection: Connection, entries: Sequence[RolloutEntry]
    ) -> list[RolloutChange]: ...

    def write_rollouts(
        self, connection: Connection, changes: Sequence[RolloutChange], *, actor: str, at: datetime
    ) -> None: ...


class RolloutMoves(Protocol):
    """What the feature rollouts does for pages and the API."""

    def advance(
        self, database: Database, name: str, *, reason: str | None, anyway: bool, actor: str
    ) -> RolloutDetail: ...

    def move(self, database: Database, name: str, verb: str, *, reason: str, actor: str) -> RolloutDetail: ...

    def plan_steps(self, connection: Connection, name: str) -> list[PlannedStepRow]: ...


ROLLOUT_MOVES: Point[RolloutMoves] = Point("rollouts.moves", "a change of a rollout")
ROLLOUTS: Point[AppliedRollouts] = Point("rollouts.applied", "[[rollout]] of a file")
LIMITS: Point[AppliedLimits] = Point("egress.limits", "[[limit]] of a file")
