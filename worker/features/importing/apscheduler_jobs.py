"""APScheduler 3: the jobs in a Python source, as `add_job` and `scheduled_job` add them."""

from __future__ import annotations

import ast
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import partial
from typing import Any, TypeGuard
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.cron.expressions import (
    LastDayOfMonthExpression,
    RangeExpression,
    WeekdayPositionExpression,
)
from apscheduler.triggers.cron.fields import BaseField
from apscheduler.util import convert_to_datetime

from worker.clock import EPOCH, to_text
from worker.features.importing import cron_fields
from worker.features.importing.cron_fields import DAYS, HOURS, MINUTES, MONTHS, SECONDS, WEEKDAYS
from worker.features.importing.entries import Import, NotTaken, params_of, refuse_unknown, zone_of
from worker.features.importing.python_source import (
    FoundNode,
    PythonSource,
    assigned,
    literal_argument,
    literal_pairs,
)
from worker.model.definitions.units import format_duration

_OF_JOB = (
    *("func", "trigger", "args", "kwargs", "id", "name", "misfire_grace_time", "coalesce", "max_instances"),
    *("next_run_time", "jobstore", "executor", "replace_existing"),
)
_CRON = ("year", "month", "day", "week", "day_of_week", "hour", "minute", "second")
_BOUNDS = ("start_date", "end_date", "timezone", "jitter")
_UNITS = ("weeks", "days", "hours", "minutes", "seconds")
# The arguments of each trigger, in the order of its constructor.
_TRIGGERS = {
    "cron": (*_CRON, *_BOUNDS),
    "interval": (*_UNITS, *_BOUNDS),
    "date": ("run_date", "timezone"),
}
_CLASSES = {"CronTrigger": "cron", "IntervalTrigger": "interval", "DateTrigger": "date"}
_OTHERS = ("AndTrigger", "OrTrigger", "CalendarIntervalTrigger", "and", "or", "calendarinterval")
_FULL = {
    "month": MONTHS,
    "day": DAYS,
    "day_of_week": WEEKDAYS,
    "hour": HOURS,
    "minute": MINUTES,
    "second": SECONDS,
}
_VERSION_2 = "is of APScheduler 2; add_job of APScheduler 3 is read"
_NOT_READ = {
    "add_schedule": "is of APScheduler 4; add_job of APScheduler 3 is read",
    **dict.fromkeys(("add_cron_job", "add_interval_job", "add_date_job"), _VERSION_2),
    **dict.fromkeys(("cron_schedule", "interval_schedule"), _VERSION_2),
    **dict.fromkeys(("reschedule_job", "modify_job"), "changes a job while the program runs"),
}
_DEFAULTS = ("misfire_grace_time", "coalesce", "max_instances")


def read_apscheduler(text: str, imported: Import, *, now: datetime) -> None:
    """Add a definition for each job, and remarks for the rest; dates before `now` are over.

    Raises DefinitionError if the text is not Python.
    """
    _Reader(PythonSource(text), imported, now).read()


class _Reader:
    def __init__(self, source: PythonSource, imported: Import, now: datetime) -> None:
        self._source = source
        self._imported = imported
        self._now = now
        # The zone of each scheduler by the name it is assigned to; None if the source does not tell it.
        self._zones: dict[str, tzinfo | None] = {}
        self._defaults: dict[str, Any] = {}
        self._lacks_zone = False

    def read(self) -> None:
        for found in self._source.found:
            self._read_scheduler(found.node)
        for found in self._source.found:
            if isinstance(found.node, ast.Call):
                called = self._source.called(found.node)
                if called == "add_job":
                    self._job(found.node, found, None)
                elif called in _NOT_READ:
                    self._imported.leave(found.node.lineno, "", f"{called} {_NOT_READ[called]}")
            elif isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in found.node.decorator_list:
                    if self._is_job(decorator):
                        self._job(decorator, found, found.node.name)
        if self._lacks_zone:
            why = "APScheduler follows the zone of its machine, which the source does not name"
            self._imported.note_zone(why, "cron triggers")

    def _is_job(self, decorator: ast.expr) -> TypeGuard[ast.Call]:
        """Whether it is `@scheduled_job(…)`, or `@task("cron", …)` of Flask-APScheduler."""
        called = self._source.called(decorator)
        if called == "task" and isinstance(decorator, ast.Call) and decorator.args:
            return isinstance(decorator.args[0], ast.Constant) and decorator.args[0].value in _TRIGGERS
        return called == "scheduled_job"

    def _read_scheduler(self, node: ast.AST) -> None:
        """The zone and the defaults of jobs of a scheduler that is made or configured here."""
        targets, value = assigned(node)
        name, call = self._source.path(targets[0]) if targets else "", value or node
        if not isinstance(call, ast.Call):
            return
        if self._source.called(call) == "configure" and isinstance(call.func, ast.Attribute):
            name = self._source.path(call.func.value)
        elif not (name and self._source.called(call).endswith("Scheduler")):
            return
        settings = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        for argument in call.args:
            for key, setting in literal_pairs(argument):
                settings[key.removeprefix("apscheduler.")] = setting
        self._zones.setdefault(name, None)
        if "timezone" in settings:
            with self._imported.entry(call.lineno, "timezone"):
                self._zones[name] = _zone(self._source.value(settings["timezone"]))
        with self._imported.entry(call.lineno, "job_defaults"):
            given = self._source.pairs(settings["job_defaults"]) if "job_defaults" in settings else []
            dotted = [(key.removeprefix("job_defaults."), value) for key, value in settings.items()]
            for key, value in [*given, *dotted]:
                if key in _DEFAULTS:
                    self._defaults[key] = self._source.value(value)

    def _job(self, call: ast.Call, found: FoundNode, function: str | None) -> None:
        line = call.lineno
        with self._imported.entry(line, literal_argument(call, "id", "name") or function or ""):
            found.refuse_loop()
            given = self._source.arguments(call, _OF_JOB if function is None else _OF_JOB[1:-1])
            handler = function or self._handler(given.get("func"))
            zone = self._zone_of(call)
            values, notes = self._trigger(given, zone)
            values |= self._options(given, notes)
            literal = partial(self._source.literal, given)
            params, missing = params_of(literal("args") or (), literal("kwargs") or {})
            name = literal("id") or literal("name") or handler.rpartition(".")[2]
            if found.context == "condition":
                notes.append("it is added under a condition, and taken as if that were always true")
            values = {"handler": handler, **values, "params": params}
            self._imported.add(line, str(name), values, [*notes, *missing])

    def _handler(self, node: ast.expr | None) -> str:
        """The function as the source names it; `package.module:function` with a dot."""
        if node is None:
            raise NotTaken("it has no function")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value.replace(":", ".")
        path = self._source.path(node) if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        if path:
            return str(path).removeprefix("self.").removeprefix("cls.")
        if self._imported.handler is not None:
            return self._imported.handler
        raise NotTaken(f"its function is {self._source.shown(node)}, which has no name; --handler sets one")

    def _zone_of(self, call: ast.Call) -> tzinfo | None:
        """The zone of the scheduler that gets the job, else that of --zone."""
        name = self._source.path(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        zones = set(self._zones.values())
        found = self._zones[name] if name in self._zones else zones.pop() if len(zones) == 1 else None
        if found is None and self._imported.zone is not None:
            return zone_of(self._imported.zone)
        return found

    def _trigger(self, given: dict[str, ast.expr], zone: tzinfo | None) -> tuple[dict[str, Any], list[str]]:
        """The keys of a definition for a job's trigger, and notes."""
        more = {key: value for key, value in given.items() if key not in _OF_JOB}
        if "trigger" not in given:
            raise NotTaken("it has no trigger, so it runs once at once: `definitions run` does")
        node = self._source.resolve(given["trigger"])
        kind = node.value if isinstance(node, ast.Constant) else None
        if isinstance(node, ast.Call):
            called = self._source.called(node)
            if called == "from_crontab":
                more = self._from_crontab(node)
                kind = "cron"
            elif called in _CLASSES:
                kind = _CLASSES[called]
                more = self._source.arguments(node, _TRIGGERS[kind])
            elif called in _OTHERS:
                kind = called
        if kind in _OTHERS:
            raise NotTaken(f"{kind} is a trigger that definitions do not have")
        if not isinstance(kind, str) or kind not in _TRIGGERS:
            raise NotTaken("its trigger is not cron, interval or date")
        refuse_unknown(more, _TRIGGERS[kind])
        arguments = {key: self._source.value(value) for key, value in more.items()}
        if arguments.get("timezone") is not None:
            zone = _zone(arguments["timezone"])
        arguments.pop("timezone", None)
        notes: list[str] = []
        if kind == "cron":
            values = self._cron(arguments, zone, notes)
        elif kind == "interval":
            values = cron_fields.every(_length(arguments))
        else:
            return {"schedule": self._at(arguments.get("run_date"), zone)}, notes
        for key, bound in (("starts_at", "start_date"), ("ends_at", "end_date")):
            if arguments.get(bound) is not None:
                at = _time(arguments[bound], zone, bound)
                # `end_date` is included, `ends_at` is not.
                values[key] = to_text(at + timedelta(seconds=1) if key == "ends_at" else at)
        if kind == "interval" and "starts_at" in values:
            length = _length(arguments)
            if (_time(arguments["start_date"], zone, "start_date") - EPOCH) % length:
                notes.append("every counts from 1970-01-01T00:00:00Z, so its times are shifted")
        if arguments.get("jitter"):
            values["spread"] = format_duration(cron_fields.seconds(arguments["jitter"], "jitter"))
        return values, notes

    def _from_crontab(self, call: ast.Call) -> dict[str, ast.expr]:
        given = self._source.arguments(call, ("expr", "timezone"))
        parts = cron_fields.split_line(str(self._source.literal(given, "expr") or ""), "from_crontab")
        names = ("minute", "hour", "day", "month", "day_of_week")
        found: dict[str, ast.expr] = dict(zip(names, map(ast.Constant, parts), strict=True))
        return found | ({"timezone": given["timezone"]} if "timezone" in given else {})

    def _cron(self, arguments: dict[str, Any], zone: tzinfo | None, notes: list[str]) -> dict[str, Any]:
        try:
            trigger = CronTrigger(
                **{key: value for key, value in arguments.items() if key in _CRON}, timezone=UTC
            )
        except (ValueError, TypeError) as error:
            raise NotTaken(f"APScheduler refuses it: {error}") from None
        fields = {each.name: each for each in trigger.fields}
        for name in ("year", "week"):
            if str(fields[name]) != "*":
                raise NotTaken(f"it restricts the {name}, which a crontab line cannot")
        if all(each.is_default for each in trigger.fields):
            notes.append("its trigger has no fields, so it runs every second, as there")
        given_weekday = str(arguments.get("day_of_week", ""))
        named = any(map(str.isalpha, given_weekday))
        day, weekday = _days(fields["day"], fields["day_of_week"], named=named)
        if given_weekday and not named and weekday != "*":
            notes.append(
                f"APScheduler counts weekdays from Monday: {fields['day_of_week']} there is {weekday} in a "
                "crontab line"
            )
        second, minute, hour, month = (_field(fields[name]) for name in ("second", "minute", "hour", "month"))
        line = " ".join([*([] if second == "0" else [second]), minute, hour, day, month, weekday])
        if zone is None:
            self._lacks_zone = True
            return {"schedule": line}
        if not isinstance(zone, ZoneInfo):
            raise NotTaken("its time zone is a fixed offset; use the name of a zone, such as Europe/Berlin")
        return {"schedule": line, "timezone": zone.key}

    def _at(self, value: Any, zone: tzinfo | None) -> str:
        if value is None:
            raise NotTaken("it runs once, at once: `definitions run` does")
        at = _time(value, zone, "run_date")
        if at <= self._now:
            raise NotTaken("its run_date is over")
        return f"at {to_text(at)}"

    def _options(self, given: dict[str, ast.expr], notes: list[str]) -> dict[str, Any]:
        """The policies of a job: concurrency, missed times, paused."""
        found = self._defaults | {key: self._source.value(given[key]) for key in _DEFAULTS if key in given}
        values: dict[str, Any] = {}
        most = found.get("max_instances", 1)
        if isinstance(most, int) and most > 1:
            values |= {"overlap": "allow", "max_concurrent": most}
        if found.get("misfire_grace_time") is not None:
            grace = cron_fields.seconds(found["misfire_grace_time"], "misfire_grace_time")
            values["misfire_within"] = format_duration(grace)
        if found.get("coalesce") is False:
            values["misfire"] = "all"
        if "next_run_time" in given:
            node = self._source.resolve(given["next_run_time"])
            if isinstance(node, ast.Constant) and node.value is None:
                values["enabled"] = False
            else:
                notes.append("its next_run_time is not taken over")
        return values


def _zone(value: Any) -> tzinfo:
    return value if isinstance(value, tzinfo) else zone_of(str(value))


def _time(value: Any, zone: tzinfo | None, name: str) -> datetime:
    """A date or time as APScheduler reads it, in UTC."""
    try:
        found = convert_to_datetime(value, zone, name)
    except (TypeError, ValueError) as error:
        missing = zone is None and isinstance(value, str | date)
        why = "has no time zone; --zone names one" if missing else f"cannot be read: {error}"
        raise NotTaken(f"its {name} {why}") from None
    if not isinstance(found, datetime):
        raise NotTaken(f"its {name} is not a date or a time")
    return found.astimezone(UTC)


def _length(arguments: dict[str, Any]) -> timedelta:
    try:
        found = timedelta(**{unit: arguments[unit] for unit in _UNITS if unit in arguments})
    except (TypeError, OverflowError) as error:
        raise NotTaken(f"its interval cannot be read: {error}") from None
    # APScheduler takes an interval of nothing as a second.
    return found or timedelta(seconds=1)


def _field(source: BaseField) -> str:
    return cron_fields.field(_numbers(source), _FULL[source.name], starred=str(source).startswith("*"))


def _numbers(source: BaseField) -> set[int]:
    full = _FULL[source.name]
    found: set[int] = set()
    for each in source.expressions:
        if isinstance(each, RangeExpression):
            last = full[-1] if each.last is None else each.last
            found.update(range(each.first, last + 1, each.step or 1))
        else:
            found.update(full[:: each.step or 1])
    return found


def _days(day: BaseField, day_of_week: BaseField, *, named: bool) -> tuple[str, str]:
    """The fields for the day of the month and of the week; APScheduler's Monday is 0, cron's Sunday."""
    weekdays = {(number + 1) % 7 for number in _numbers(day_of_week)}
    is_special = any(
        isinstance(each, LastDayOfMonthExpression | WeekdayPositionExpression) for each in day.expressions
    )
    if weekdays != set(WEEKDAYS):
        if is_special or _numbers(day) != set(DAYS):
            raise NotTaken(cron_fields.BOTH_DAYS)
        return "*", cron_fields.field(weekdays, WEEKDAYS, names=named)
    if not is_special:
        return _field(day), "*"
    if len(day.expressions) > 1:
        raise NotTaken("its day combines several special days; write a definition for each")
    special = day.expressions[0]
    if isinstance(special, LastDayOfMonthExpression):
        return "L", "*"
    weekday = (special.weekday + 1) % 7
    return "*", f"{weekday}L" if special.option_num == 5 else f"{weekday}#{special.option_num + 1}"
