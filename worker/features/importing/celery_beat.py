"""Celery beat: the schedule in a Python source, as `beat_schedule` and `add_periodic_task` define it."""

from __future__ import annotations

import ast
import re
from datetime import timedelta
from typing import Any, NamedTuple

from worker.features.importing import cron_fields
from worker.features.importing.cron_fields import DAYS, HOURS, MINUTES, MONTHS, WEEKDAY_NAMES, WEEKDAYS
from worker.features.importing.entries import (
    Import,
    NotTaken,
    mapping,
    params_of,
    refuse_unknown,
    sequence,
    zone_of,
)
from worker.features.importing.python_source import (
    FoundNode,
    PythonSource,
    assigned,
    literal_argument,
    literal_pairs,
)
from worker.model.definitions.units import format_duration

_SCHEDULES = ("beat_schedule", "CELERY_BEAT_SCHEDULE", "CELERYBEAT_SCHEDULE")
_ZONES = ("timezone", "CELERY_TIMEZONE")
_UTC_SWITCHES = ("enable_utc", "CELERY_ENABLE_UTC")
# The order of positional arguments, which is not that of a crontab line.
_CRONTAB = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
_FULL = dict(zip(_CRONTAB, (MINUTES, HOURS, WEEKDAYS, DAYS, MONTHS), strict=True))
_WORDS = {
    "day_of_week": WEEKDAY_NAMES,
    "month_of_year": (
        *("", "jan", "feb", "mar", "apr", "may", "jun"),
        *("jul", "aug", "sep", "oct", "nov", "dec"),
    ),
}
_ENTRY = ("task", "schedule", "args", "kwargs", "options", "relative")
_PART = re.compile(r"(?:(?P<star>\*)|(?P<first>\w+?)(?:-(?P<last>\w+))?)(?:/(?P<step>\d+))?")
_SIGNATURES = ("s", "si", "signature", "subtask")


class _Call(NamedTuple):
    """The call of a task: what it runs, with which arguments and options."""

    task: Any
    args: Any
    kwargs: Any
    options: dict[str, ast.expr]


def read_celery_beat(text: str, imported: Import, *, module: str = "") -> None:
    """Add a definition for each entry of the schedule, and remarks for the rest.

    `module` is the name of the source's module, which Celery puts before the names of its tasks.
    Raises DefinitionError if the text is not Python.
    """
    _Reader(PythonSource(text), imported, module).read()


class _Reader:
    def __init__(self, source: PythonSource, imported: Import, module: str) -> None:
        self._source = source
        self._imported = imported
        self._module = module
        self._zone: str | None = imported.zone
        # Names of the schedule: those that Celery reads, and those of a dict that is assigned to one.
        self._names = set(_SCHEDULES)
        self._dicts: set[ast.expr] = set()
        # Whether the zone is set to what only running the code would tell.
        self._uncertain = False

    def read(self) -> None:
        self._read_settings()
        for found in self._source.found:
            for name, value in _settings(self._source, found):
                if name in _SCHEDULES and isinstance(value, ast.Name):
                    self._names.add(value.id)
        for found in self._source.found:
            self._read_node(found)

    def _read_settings(self) -> None:
        zones: set[str] = set()
        has_utc, django_zone = True, 0
        # Only in a module of settings, `timezone` without an owner is one of them.
        is_module = any("beat_schedule" in _variables(found) for found in self._source.found)
        for found in self._source.found:
            for name, value in _settings(self._source, found):
                if not is_module and name in ("timezone", "enable_utc") and name in _variables(found):
                    continue
                if name in _ZONES:
                    zones |= self._read_zone(name, value)
                elif name in _UTC_SWITCHES and isinstance(value, ast.Constant):
                    has_utc = bool(value.value)
                elif name == "TIME_ZONE":
                    django_zone = value.lineno
        if len(zones) == 1:
            [self._zone] = zones
        elif zones or not has_utc:
            self._uncertain = True
        elif self._zone is None and not self._uncertain:
            self._zone = "UTC"
        if django_zone and not zones and self._imported.zone is None:
            why = "Celery follows CELERY_TIMEZONE, else UTC, which is taken; --zone if it is wrong"
            self._imported.note(django_zone, "TIME_ZONE", why)
        if self._uncertain and self._zone is None:
            self._imported.note_zone("the source does not tell Celery's time zone", "crontab entries")

    def _read_zone(self, name: str, value: ast.expr) -> set[str]:
        try:
            zone = str(self._source.value(value))
            zone_of(zone)
        except NotTaken as error:
            self._uncertain = True
            self._imported.note(value.lineno, name, f"not taken over: {error}")
            return set()
        return {zone}

    def _read_node(self, found: FoundNode) -> None:
        node = found.node
        targets, given = assigned(node)
        for target in targets:
            if given is not None and isinstance(target, ast.Subscript) and self._is_schedule(target.value):
                with self._imported.entry(target.lineno, ""):
                    found.refuse_loop()
                    self._entry(self._source.value(target.slice), given, found, target.lineno)
        for name, value in _settings(self._source, found):
            if name in _SCHEDULES:
                self._entries(value, found)
        if not isinstance(node, ast.Call):
            return
        called = self._source.called(node)
        if called == "update":
            if isinstance(node.func, ast.Attribute) and self._is_schedule(node.func.value):
                for argument in node.args:
                    self._entries(argument, found)
        elif called == "add_periodic_task":
            self._periodic(node, found)
        elif called == "periodic_task":
            self._imported.leave(
                node.lineno, "", "periodic_task is of Celery 4: use beat_schedule or add_periodic_task"
            )

    def _is_schedule(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return node.slice.value in _SCHEDULES
        return getattr(node, "attr", getattr(node, "id", "")) in self._names

    def _entries(self, node: ast.expr, found: FoundNode) -> None:
        with self._imported.entry(node.lineno, ""):
            pairs = self._source.resolve(node, changed=True)
            if pairs in self._dicts:
                # Assigned to a name of the schedule, and that to another one.
                return
            self._dicts.add(pairs)
            if isinstance(pairs, ast.Dict):
                for key, value in zip(pairs.keys, pairs.values, strict=True):
                    line = (key or value).lineno
                    with self._imported.entry(line, ""):
                        self._entry(self._source.key(key), value, found, line)
            else:
                for name, value in self._source.pairs(pairs):
                    self._entry(name, value, found, value.lineno)

    def _entry(self, key: Any, node: ast.expr, found: FoundNode, line: int) -> None:
        name = str(key)
        with self._imported.entry(line, name):
            found.refuse_loop()
            given = dict(self._source.pairs(node))
            refuse_unknown(given, _ENTRY)
            task = self._imported.handler
            if task is None:
                if "task" not in given:
                    raise NotTaken("it has no task")
                task = self._source.value(given["task"])
            args, kwargs = self._source.literal(given, "args", ()), self._source.literal(given, "kwargs", {})
            options = dict(self._source.pairs(given["options"])) if "options" in given else {}
            self._add(name, line, found, _Call(task, args, kwargs, options), given.get("schedule"))

    def _periodic(self, call: ast.Call, found: FoundNode) -> None:
        names = ("schedule", "sig", "args", "kwargs", "name")
        line = call.lineno
        label = literal_argument(call, "name")
        with self._imported.entry(line, label):
            found.refuse_loop()
            given = self._source.arguments(call, names)
            if "sig" not in given:
                raise NotTaken("it names no task")
            task, args, kwargs, options = self._signature(given["sig"])
            options |= {key: value for key, value in given.items() if key not in names}
            args += sequence(self._source.literal(given, "args") or ())
            kwargs |= mapping(self._source.literal(given, "kwargs") or {})
            name = label or task.rpartition(".")[2]
            self._add(name, line, found, _Call(task, args, kwargs, options), given.get("schedule"))

    def _signature(self, node: ast.expr) -> _Call:
        """Task, arguments, keyword arguments and options of a signature.

        It is `task`, `task.s(…)`, `task.signature(…)` or `signature("task", …)`.
        """
        node = self._source.resolve(node)
        if not isinstance(node, ast.Call):
            return _Call(self._task(node), (), {}, {})
        called = self._source.called(node)
        if called not in _SIGNATURES:
            raise NotTaken(f"its task is {self._source.shown(node)}, not a signature such as task.s(1)")
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if owner is not None and called in ("s", "si"):
            positional = tuple(self._source.value(argument) for argument in node.args)
            named = {key: self._source.value(value) for key, value in self._source.keywords(node).items()}
            return _Call(self._task(owner), positional, named, {})
        names: tuple[str, ...] = ("args", "kwargs", "options")
        if owner is None or self._source.path(owner) in ("celery", "app"):
            names = ("task", *names)
        given = self._source.arguments(node, names)
        if "task" in names and "task" not in given:
            raise NotTaken("it names no task")
        task = str(self._source.value(given["task"])) if "task" in names else self._task(owner)
        options = {key: value for key, value in given.items() if key not in (*names, "immutable")}
        if "options" in given:
            options |= dict(self._source.pairs(given["options"]))
        args, kwargs = self._source.literal(given, "args", ()), self._source.literal(given, "kwargs", {})
        return _Call(task, sequence(args), mapping(kwargs), options)

    def _task(self, node: ast.expr | None) -> str:
        """The name that Celery gives a task: the module's and the function's, unless it has a `name=`."""
        path = "" if node is None else self._source.path(node)
        if not path:
            if self._imported.handler is not None:
                return self._imported.handler
            shown = "an expression" if node is None else self._source.shown(node)
            raise NotTaken(f"its task is {shown}, which has no name; --handler sets one")
        if not isinstance(node, ast.Name) or self._source.is_imported(node.id):
            return path
        return self._local(node.id)

    def _local(self, function: str) -> str:
        for each in self._source.found:
            if isinstance(each.node, ast.FunctionDef | ast.AsyncFunctionDef) and each.node.name == function:
                for decorator in each.node.decorator_list:
                    given = self._source.keywords(decorator) if isinstance(decorator, ast.Call) else {}
                    if "name" in given:
                        return str(self._source.value(given["name"]))
        return f"{self._module}.{function}" if self._module else function

    def _add(self, name: str, line: int, found: FoundNode, call: _Call, schedule: ast.expr | None) -> None:
        if schedule is None:
            raise NotTaken("it has no schedule")
        values: dict[str, Any] = {"handler": call.task, **self._schedule(schedule)}
        params, notes = params_of(call.args, call.kwargs)
        for option, value in call.options.items():
            if option == "expires":
                values["start_deadline"] = self._expires(value)
            else:
                notes.append(f"its option {option} is not taken over")
        if found.context == "condition":
            notes.append("it is scheduled under a condition, and taken as if that were always true")
        self._imported.add(line, name, {**values, "params": params}, notes)

    def _expires(self, node: ast.expr) -> str:
        value = self._source.value(node)
        if not isinstance(value, timedelta) or value <= timedelta(0):
            value = cron_fields.seconds(value, "option expires")
        return format_duration(value)

    def _schedule(self, node: ast.expr) -> dict[str, Any]:
        """The keys `schedule` and `timezone` of an interval or a crontab."""
        node = self._source.resolve(node)
        called = self._source.called(node)
        if isinstance(node, ast.Call):
            if called == "crontab":
                line = self._crontab(self._source.arguments(node, _CRONTAB))
                return {"schedule": line, "timezone": self._zone}
            if called == "from_string" and self._source.path(node.func).endswith("crontab.from_string"):
                return {"schedule": self._from_string(node), "timezone": self._zone}
            if called == "schedule":
                given = self._source.arguments(node, ("run_every", "relative", "nowfun", "app"))
                refuse_unknown(given, ("run_every", "relative", "app"))
                if "run_every" not in given:
                    raise NotTaken("its schedule has no run_every")
                return self._schedule(given["run_every"])
            if called == "solar":
                raise NotTaken("solar schedules follow the sun, which definitions cannot")
            if called not in ("timedelta", "float", "int"):
                raise NotTaken(f"its schedule is {self._source.shown(node)}, not an interval or a crontab")
        value = self._source.value(node)
        interval = value if isinstance(value, timedelta) else cron_fields.seconds(value, "schedule")
        return cron_fields.every(interval)

    def _from_string(self, call: ast.Call) -> str:
        text = str(self._source.value(call.args[0])) if call.args else ""
        minute, hour, day, month, weekday = cron_fields.split_line(text, "crontab.from_string")
        return _line(dict(zip(_CRONTAB, (minute, hour, weekday, day, month), strict=True)))

    def _crontab(self, given: dict[str, ast.expr]) -> str:
        refuse_unknown(given, (*_CRONTAB, "app"))
        return _line({key: self._source.value(value) for key, value in given.items() if key in _FULL})


def _settings(source: PythonSource, found: FoundNode) -> list[tuple[str, ast.expr]]:
    """Names and values that a node assigns as settings of Celery, in whichever way."""
    node = found.node
    targets, value = assigned(node)
    if value is not None and (not isinstance(node, ast.AugAssign) or isinstance(node.op, ast.BitOr)):
        return [(_setting(target, found), value) for target in targets]
    if isinstance(node, ast.Dict):
        pairs = literal_pairs(node)
        return pairs if any(name in _SCHEDULES for name, _ in pairs) else []
    if isinstance(node, ast.Call):
        is_update = source.path(node.func).endswith("conf.update")
        if is_update or source.called(node) in ("Celery", "dict"):
            named = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
            if not is_update and not any(name in _SCHEDULES for name, _ in named):
                return []
            for argument in node.args if is_update else ():
                pairs = literal_pairs(argument)
                if not any(name in _SCHEDULES for name, _ in pairs):
                    named += pairs
            return named
    return []


def _variables(found: FoundNode) -> list[str]:
    """The variables that an assignment outside of functions binds."""
    targets = found.node.targets if isinstance(found.node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name) and not found.function]


def _setting(target: ast.expr, found: FoundNode) -> str:
    """The setting that an assignment sets: `app.conf.NAME`, `app.conf["NAME"]`, or a module's NAME."""
    if isinstance(target, ast.Attribute):
        owner, name = target.value, target.attr
    elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        owner, name = target.value, str(target.slice.value)
    else:
        return getattr(target, "id", "") if not found.function else ""
    is_configuration = getattr(owner, "attr", getattr(owner, "id", "")) in ("conf", "config")
    return name if is_configuration or (name in _SCHEDULES and isinstance(target, ast.Attribute)) else ""


def _line(given: dict[str, Any]) -> str:
    """The crontab line of Celery's fields."""
    sets = {key: _numbers(key, given.get(key, "*")) for key in _CRONTAB}
    days, weekdays = sets["day_of_month"], sets["day_of_week"]
    if days != set(DAYS) and weekdays != set(WEEKDAYS):
        raise NotTaken(cron_fields.BOTH_DAYS)
    fields = []
    for key in ("minute", "hour", "day_of_month", "month_of_year", "day_of_week"):
        text = given.get(key, "*")
        written = text if isinstance(text, str) else ""
        names = key == "day_of_week" and any(map(str.isalpha, written))
        starred = written.startswith("*")
        fields.append(cron_fields.field(sets[key], _FULL[key], starred=starred, names=names))
    return " ".join(fields)


def _numbers(key: str, value: Any) -> set[int]:
    """The numbers of a field, as Celery expands it: ranges may wrap, Sunday is 0."""
    full = _FULL[key]
    if isinstance(value, str):
        found = {number for part in value.split(",") for number in _part(key, part.strip())}
    elif isinstance(value, int) and not isinstance(value, bool):
        found = {value}
    elif isinstance(value, list | tuple | set):
        found = {number if isinstance(number, int) else -1 for number in value}
    else:
        raise NotTaken(f"{key} is not a number, a text or a list")
    if not found or not found <= set(full):
        raise NotTaken(f"{key} must be {full[0]}-{full[-1]}")
    return found


def _part(key: str, text: str) -> list[int]:
    match = _PART.fullmatch(text)
    full = _FULL[key]
    step = int(match["step"] or 1) if match else 0
    if match is None or not step or (match["step"] and not (match["star"] or match["last"])):
        raise NotTaken(f"{key} {text!r} is not an expression of Celery's crontab")
    if match["star"]:
        return list(full)[::step]
    first = _number(key, match["first"])
    last = _number(key, match["last"]) if match["last"] else first
    if last < first:
        return [*range(first, full[-1] + 1), *range(full[0], last + 1)][::step]
    return list(range(first, last + 1))[::step]


def _number(key: str, text: str) -> int:
    full = _FULL[key]
    if text.isdecimal() and len(text) < 5:
        if int(text) in full:
            return int(text)
    elif (word := text[:3].lower()) in _WORDS.get(key, ()) and word:
        return _WORDS[key].index(word)
    raise NotTaken(f"{key} must be {full[0]}-{full[-1]}")
