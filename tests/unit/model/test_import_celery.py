"""Importing a Celery beat schedule from its source, which is read and never executed."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

from worker.errors import DefinitionError
from worker.features.importing.celery_beat import read_celery_beat
from worker.features.importing.entries import Import, to_toml
from worker.model.definitions.file import parse_file


def imported(
    source: str, *, handler: str | None = None, zone: str | None = None, module: str = "proj"
) -> Import:
    found = Import("org_acme", handler, zone)
    read_celery_beat(dedent(source), found, module=module)
    if found.definitions:
        assert len(parse_file(to_toml(found, "x")).definitions) == len(found.definitions)
    return found


def scheduled(schedule: str) -> dict[str, Any]:
    """The definition of an entry with this schedule."""
    found = imported(f"beat_schedule = {{'x': {{'task': 't', 'schedule': {schedule}}}}}")
    assert found.definitions, found.remarks
    return found.definitions[0]


def refused(schedule: str) -> str:
    found = imported(f"\nbeat_schedule = {{'x': {{'task': 't', 'schedule': {schedule}}}}}")
    assert found.definitions == []
    (remark,) = found.remarks
    assert (remark.line, remark.entry, remark.taken) == (2, "x", False)
    return remark.reason


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        ("crontab()", "* * * * *"),
        ("crontab(minute=0, hour=0)", "0 0 * * *"),
        ("crontab(minute='*/15')", "*/15 * * * *"),
        ("crontab(minute=0, hour='*/3,8-17')", "0 0,3,6,8-18,21 * * *"),
        ("crontab(minute=0, hour=[8, 12, 20])", "0 8,12,20 * * *"),
        ("crontab(minute={0, 30})", "0,30 * * * *"),
        ("crontab(minute=0, hour=range(8, 18))", "0 8-17 * * *"),
        ("crontab(hour=7, minute=30, day_of_week=1)", "30 7 * * 1"),
        ("crontab(0, 0, 'sunday')", "0 0 * * sun"),
        ("crontab(0, 0, '*', 2)", "0 0 2 * *"),
        ("crontab(0, 0, day_of_month='1-31', day_of_week='mon')", "0 0 * * mon"),
        ("crontab(0, 0, day_of_month='*/10', day_of_week='0-6')", "0 0 */10 * *"),
        ("crontab(0, 0, day_of_week='sat-mon')", "0 0 * * sun,mon,sat"),
        ("crontab(0, '22-2')", "0 0-2,22,23 * * *"),
        ("crontab(0, 0, day_of_month='1', month_of_year='*/3')", "0 0 1 */3 *"),
        ("crontab(0, 0, day_of_month='1', month_of_year='jan,july')", "0 0 1 1,7 *"),
        ("crontab.from_string('30 7 1 * *')", "30 7 1 * *"),
        ("crontab.from_string('30 7 * * 1')", "30 7 * * 1"),
    ],
)
def test_a_crontab_keeps_its_times(schedule: str, line: str):
    definition = scheduled(schedule)
    # Celery's default zone.
    assert (definition["schedule"], definition["timezone"]) == (line, "UTC")


@pytest.mark.parametrize(
    ("schedule", "interval"),
    [
        ("30.0", "every 30s"),
        ("60 * 5", "every 5m"),
        ("timedelta(hours=1, minutes=30)", "every 1h30m"),
        ("datetime.timedelta(days=1)", "every 1d"),
        ("timedelta(minutes=1) * 7", "every 7m"),
        ("schedule(run_every=10)", "every 10s"),
        ("schedule(timedelta(seconds=90), relative=True)", "every 1m30s"),
    ],
)
def test_an_interval_becomes_every(schedule: str, interval: str):
    definition = scheduled(schedule)
    assert definition["schedule"] == interval
    assert "timezone" not in definition


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ("crontab(0, 0, day_of_week=1, day_of_month='1-7')", "both must match there"),
        ("crontab(0, 0, '*/2', '*/2')", "both must match there"),
        ("crontab(0, 24)", "hour must be 0-23"),
        ("crontab(0, 0, 7)", "day_of_week must be 0-6"),
        ("crontab('5/15')", "not an expression of Celery's crontab"),
        ("crontab(0, 0, day_of_month=30, month_of_year=2)", "can never fire"),
        ("crontab(nowfun=now)", "nowfun is not supported"),
        ("crontab(minute=MINUTE)", "MINUTE is not a literal"),
        ("crontab(**options)", "** unpacks"),
        ("solar('sunset', -37.81753, 144.96715)", "solar schedules"),
        ("0.5", "whole seconds"),
        ("0", "not a positive number of seconds"),
        ("float(os.environ['EVERY'])", "not a literal"),
        ("MySchedule(5)", "a call of MySchedule"),
        ("True", "not a positive number of seconds"),
        ("1 / 0", "arithmetic fails"),
        ("10 ** 9", "not a literal"),
        ("1e999", "not a positive number of seconds"),
        ("timedelta(days=10 * 1000 * 1000 * 1000)", "timedelta"),
        ("crontab([[1]])", "minute must be 0-59"),
        ("crontab(minute='\u00b2')", "minute must be 0-59"),
        ("crontab(1, 2, 3, 4, 5, 6)", "more positional arguments"),
    ],
)
def test_what_a_definition_cannot_say_is_not_taken(schedule: str, reason: str):
    assert reason in refused(schedule)


@pytest.mark.parametrize(
    "source",
    [
        "app.conf.beat_schedule = {ENTRY}",
        "beat_schedule = {ENTRY}",
        "CELERY_BEAT_SCHEDULE = {ENTRY}",
        "CELERYBEAT_SCHEDULE: dict = {ENTRY}",
        "app.conf.update(beat_schedule={ENTRY}, result_backend='x')",
        "app.conf.update({'beat_schedule': {ENTRY}})",
        "app.conf['beat_schedule'] = {ENTRY}",
        "app.conf.beat_schedule.update({ENTRY})",
        "app.conf.beat_schedule['x'] = VALUE",
        "app.conf['beat_schedule']['x'] = VALUE",
        "app.conf.beat_schedule |= {ENTRY}",
        "app = Celery('proj', beat_schedule={ENTRY})",
        "app.config.from_mapping(CELERY=dict(broker_url='x', beat_schedule={ENTRY}))",
        "CELERY = {'beat_schedule': {ENTRY}}",
        "jobs = {ENTRY}\napp.conf.beat_schedule = jobs",
        "beat_schedule = {ENTRY}\napp.conf.beat_schedule = beat_schedule",
        "CELERY_BEAT_SCHEDULE = {ENTRY}\napp.conf.update(beat_schedule=CELERY_BEAT_SCHEDULE)",
        "jobs = {}\njobs['x'] = VALUE\napp.conf.beat_schedule = jobs",
        "every = VALUE\napp.conf.beat_schedule = {'x': every}",
        "app.conf.beat_schedule = dict(x=VALUE)",
        "app.conf.beat_schedule = {'x': dict(task='proj.tasks.sync', schedule=60)}",
        "def configure(app):\n    app.conf.beat_schedule = {ENTRY}",
    ],
)
def test_the_schedule_is_found_however_it_is_assigned(source: str):
    value = "{'task': 'proj.tasks.sync', 'schedule': 60}"
    found = imported(source.replace("{ENTRY}", f"{{'x': {value}}}").replace("VALUE", value))
    expected = {"org": "org_acme", "name": "x", "handler": "proj.tasks.sync", "schedule": "every 1m"}
    assert found.definitions == [expected]
    assert found.remarks == []


TASKS = """
from celery import shared_task
from proj.other import report
import proj.sums

@app.task
def sync(org): ...

@shared_task(name="billing.close")
def close(): ...

@app.on_after_configure.connect
def setup(sender, **kwargs):
    sender.add_periodic_task(CALL)
"""


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "10, sync.s('acme'), name='often'",
            {"name": "often", "handler": "proj.sync", "params": {"args": ["acme"]}},
        ),
        ("10, sync.s(org='acme')", {"name": "sync", "handler": "proj.sync", "params": {"org": "acme"}}),
        ("10, sync, args=(1,), kwargs={'a': 2}", {"handler": "proj.sync", "params": {"a": 2, "args": [1]}}),
        ("10, close.si()", {"handler": "billing.close"}),
        ("10, report.s()", {"handler": "proj.other.report"}),
        ("10, proj.sums.total.s()", {"handler": "proj.sums.total"}),
        ("10, signature('x.y', args=(2,))", {"handler": "x.y", "params": {"args": [2]}}),
        ("10, sync.signature((2,), {'a': 1})", {"handler": "proj.sync", "params": {"a": 1, "args": [2]}}),
        ("10.0, sync.s(), expires=30", {"start_deadline": "30s"}),
    ],
)
def test_add_periodic_task_names_its_task_as_celery_does(call: str, expected: dict[str, Any]):
    found = imported(TASKS.replace("CALL", call))
    (definition,) = found.definitions
    assert definition["schedule"] == "every 10s"
    assert {key: definition[key] for key in expected} == expected


def test_in_a_loop_or_under_a_condition():
    found = imported(
        """
        for org in orgs:
            sender.add_periodic_task(10, sync.s(org))
        beat_schedule = {name: {"task": name, "schedule": 5} for name in names}
        for org in orgs:
            app.conf.beat_schedule[org] = {"task": "t", "schedule": 5}
        if settings.DEBUG:
            app.conf.beat_schedule["debug"] = {"task": "t", "schedule": 5}
        if __name__ == "__main__":
            app.conf.beat_schedule["main"] = {"task": "t", "schedule": 5}
        """
    )
    assert [entry["name"] for entry in found.definitions] == ["debug", "main"]
    assert [(remark.line, remark.taken) for remark in found.remarks] == [
        (3, False),
        (4, False),
        (6, False),
        (8, True),
    ]


def test_arguments_become_params():
    found = imported(
        """
        beat_schedule = {
            "a": {"task": "t", "schedule": 5, "args": (16, [1, {"x": True}]), "kwargs": {"d": {"a b": 1.5}}},
            "b": {"task": "t", "schedule": 5, "kwargs": {"none": None, "kept": 0}},
            "c": {"task": "t", "schedule": 5, "args": (None,)},
            "d": {"task": "t", "schedule": 5, "args": (1,), "kwargs": {"args": 2}},
            "e": {"task": "t", "schedule": 5, "kwargs": {"when": timedelta(days=1)}},
            "f": {"task": "t", "schedule": 5, "kwargs": {"org": ORG}},
        }
        """
    )
    assert [entry["params"] for entry in found.definitions] == [
        {"d": {"a b": 1.5}, "args": [16, [1, {"x": True}]]},
        {"kept": 0},
    ]
    assert [(remark.entry, remark.taken) for remark in found.remarks] == [
        ("b", True),
        ("c", False),
        ("d", False),
        ("e", False),
        ("f", False),
    ]


def test_expires_becomes_the_start_deadline_and_other_options_are_reported():
    found = imported(
        "beat_schedule = {'x': {'task': 't', 'schedule': 5, 'options': {'expires': 90.0, 'queue': 'slow'}}}"
    )
    assert found.definitions[0]["start_deadline"] == "1m30s"
    assert [str(remark) for remark in found.remarks] == ["line 1, x: its option queue is not taken over"]


CRONTAB = "beat_schedule = {'x': {'task': 't', 'schedule': crontab(0, 3)}}\n"


@pytest.mark.parametrize(
    ("settings", "zone", "taken"),
    [
        ("", None, "UTC"),
        ("", "Europe/Paris", "Europe/Paris"),
        ("timezone = 'Europe/London'", None, "Europe/London"),
        ("timezone = 'Europe/London'", "Europe/Paris", "Europe/London"),
        ("app.conf.timezone = 'Europe/London'", None, "Europe/London"),
        ("app.conf.update(timezone='Europe/London')", None, "Europe/London"),
        ("CELERY_TIMEZONE = TIME_ZONE\nTIME_ZONE = 'Asia/Tokyo'", None, "Asia/Tokyo"),
        ("user.timezone = 'Europe/London'", None, "UTC"),
    ],
)
def test_the_zone_is_the_settings_else_the_options_else_utc(settings: str, zone: str | None, taken: str):
    found = imported(f"{CRONTAB}{settings}\n", zone=zone)
    assert found.definitions[0]["timezone"] == taken
    assert found.remarks == []


@pytest.mark.parametrize(
    "settings",
    [
        "timezone = settings.TIME_ZONE",
        "timezone = 'UTC'\napp.conf.timezone = 'Asia/Tokyo'",
        "CELERY_TIMEZONE = 'Mars/Olympus'",
        "enable_utc = False",
        "TIME_ZONE = 'UTC'",
    ],
)
def test_a_zone_that_the_source_does_not_tell_is_reported(settings: str):
    found = imported(f"{CRONTAB}{settings}\n")
    assert ("timezone" in found.definitions[0]) == (settings == "TIME_ZONE = 'UTC'")
    assert any("--zone" in remark.reason for remark in found.remarks)
    assert imported(f"{CRONTAB}{settings}\n", zone="UTC").definitions[0]["timezone"] == "UTC"


def test_handler_replaces_all_tasks():
    found = imported("beat_schedule = {'x': {'task': task_of(), 'schedule': 5}}", handler="acme.task")
    assert found.definitions[0]["handler"] == "acme.task"


def test_the_source_is_not_executed(tmp_path: Any):
    witness = tmp_path / "executed"
    found = imported(
        f"""
        open({str(witness)!r}, "w").close()
        raise SystemExit
        beat_schedule = {{"x": {{"task": "t", "schedule": exec("open({str(witness)!r}, 'w')")}}}}
        """
    )
    assert found.definitions == []
    assert not witness.exists()


@pytest.mark.parametrize(
    "source", ["beat_schedule = {", "x = '\0'", "x = " + "(" * 5000 + ")" * 5000, "print 'python 2'"]
)
def test_a_source_that_is_not_python_is_refused(source: str):
    with pytest.raises(DefinitionError, match="Python"):
        imported(source)


def test_an_expression_nested_too_deeply_is_one_remark():
    found = imported("beat_schedule = {'x': {'task': 't', 'schedule': " + "+".join(["1"] * 2500) + "}}")
    assert [remark.reason for remark in found.remarks] == ["it nests too deeply"]


def test_no_remark_has_a_value_which_may_be_a_secret():
    found = imported(
        """
        beat_schedule = {
            "a": {"task": "t", "schedule": 5, "kwargs": {"key": f"canary-7{x}"}},
            "b": {"task": "t", "schedule": "canary-7"},
            "c": {"task": "t", "schedule": 5, "args": [None, "canary-7"]},
            "d": {"task": "t", "schedule": connect("canary-7")},
        }
        """
    )
    assert len(found.remarks) == 4
    assert not [remark for remark in found.remarks if "canary-7" in str(remark)]


def test_a_schedule_that_is_assigned_twice_keeps_both_and_the_decorator_of_celery_4_is_reported():
    found = imported(
        """
        app.conf.beat_schedule = {"a": {"task": "t", "schedule": 5}}
        app.conf.beat_schedule = {"a": {"task": "t", "schedule": 6}}

        @periodic_task(run_every=5)
        def tick(): ...
        """
    )
    assert [entry["name"] for entry in found.definitions] == ["a", "a-2"]
    assert [(remark.line, remark.taken) for remark in found.remarks] == [(5, False)]


def test_a_variable_of_an_application_called_timezone_is_not_celerys():
    found = imported(
        """
        timezone = "Europe/London"
        app.conf.beat_schedule = {"a": {"task": "t", "schedule": crontab(0, 3)}}
        """
    )
    assert found.definitions[0]["timezone"] == "UTC"
