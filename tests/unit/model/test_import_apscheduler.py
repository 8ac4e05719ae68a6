"""Importing APScheduler's jobs from their source, and what its own triggers say about the times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from textwrap import dedent
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import DefinitionError
from worker.features.importing.apscheduler_jobs import read_apscheduler
from worker.features.importing.entries import Import, to_toml
from worker.model.definitions.file import parse_file
from worker.model.definitions.triggers import parse_schedule

NOW = datetime(2027, 1, 1, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


def imported(source: str, *, handler: str | None = None, zone: str | None = "Europe/Berlin") -> Import:
    found = Import("org_acme", handler, zone)
    read_apscheduler(dedent(source), found, now=NOW)
    if found.definitions:
        assert len(parse_file(to_toml(found, "x")).definitions) == len(found.definitions)
    return found


def job(arguments: str, **options: Any) -> dict[str, Any]:
    found = imported(f"scheduler.add_job({arguments})", **options)
    assert found.definitions, found.remarks
    return found.definitions[0]


CRON: list[tuple[dict[str, Any], str]] = [
    ({"hour": 3}, "0 3 * * *"),
    ({"day": 1, "minute": 20}, "20 * 1 * *"),
    ({"month": 3}, "0 0 1 3 *"),
    ({"minute": "*/15"}, "*/15 * * * *"),
    ({"minute": "5/20"}, "5,25,45 * * * *"),
    ({"hour": "8-18/2"}, "0 8,10,12,14,16,18 * * *"),
    ({"day_of_week": "mon-fri", "hour": 5, "minute": 30}, "30 5 * * mon-fri"),
    ({"day_of_week": 0}, "0 0 * * 1"),
    ({"day_of_week": 6, "hour": 1}, "0 1 * * 0"),
    ({"day_of_week": "*/2"}, "0 0 * * 0,1,3,5"),
    ({"day_of_week": "sat,sun", "hour": 9}, "0 9 * * sun,sat"),
    ({"day": "1-31", "day_of_week": "mon"}, "0 0 * * mon"),
    ({"day": "last", "hour": 23}, "0 23 L * *"),
    ({"day": "last fri"}, "0 0 * * 5L"),
    ({"month": "6-8,11-12", "day": "3rd fri", "hour": "0-3"}, "0 0-3 * 6-8,11,12 5#3"),
    ({"month": "jan-mar", "day": 2}, "0 0 2 1-3 *"),
    ({"second": "*/10"}, "*/10 * * * * *"),
    ({"hour": "*", "second": 30}, "30 * * * * *"),
    ({"year": "*", "week": "*", "hour": 4}, "0 4 * * *"),
]


@pytest.mark.parametrize(("fields", "line"), CRON)
def test_a_cron_trigger_keeps_its_times(fields: dict[str, Any], line: str):
    arguments = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    definition = job(f"tick, 'cron', {arguments}")
    assert (definition["schedule"], definition["timezone"]) == (line, "Europe/Berlin")
    # No clock changes in the first months of a year: both say the same.
    theirs = CronTrigger(**fields, timezone=BERLIN)
    ours = parse_schedule(line, BERLIN)
    expected, previous, now = [], None, NOW
    for _ in range(12):
        previous = theirs.get_next_fire_time(previous, now)
        assert previous is not None
        now = previous
        if previous >= datetime(2027, 3, 27, tzinfo=UTC):
            break
        expected.append(previous.astimezone(UTC))
    assert list(islice(ours.occurrences(NOW), len(expected))) == expected


@pytest.mark.parametrize(
    ("trigger", "line"),
    [
        ("CronTrigger(hour=3)", "0 3 * * *"),
        ("CronTrigger.from_crontab('0 0 * * 0')", "0 0 * * 1"),
        ("CronTrigger.from_crontab('30 5 * * mon-fri')", "30 5 * * mon-fri"),
        ("CronTrigger.from_crontab('0 0 1-15 may-aug *')", "0 0 1-15 5-8 *"),
        ("'cron'", "* * * * * *"),
    ],
)
def test_triggers_as_objects(trigger: str, line: str):
    assert job(f"tick, {trigger}")["schedule"] == line
    assert job(f"tick, trigger={trigger}")["schedule"] == line


def test_a_trigger_may_have_a_name():
    found = imported("nightly = CronTrigger(hour=3)\nscheduler.add_job(tick, nightly)")
    assert found.definitions[0]["schedule"] == "0 3 * * *"


@pytest.mark.parametrize(
    ("arguments", "interval"),
    [
        ("tick, 'interval', hours=2", "every 2h"),
        ("tick, 'interval', weeks=1, minutes=30", "every 7d30m"),
        ("tick, IntervalTrigger(minutes=10)", "every 10m"),
        ("tick, IntervalTrigger(0, 0, 6)", "every 6h"),
        ("tick, 'interval'", "every 1s"),
    ],
)
def test_an_interval_becomes_every(arguments: str, interval: str):
    definition = job(arguments)
    assert definition["schedule"] == interval
    assert "timezone" not in definition


@pytest.mark.parametrize(
    ("run_date", "at"),
    [
        ("'2027-11-06 16:30:05'", "at 2027-11-06T15:30:05"),
        ("date(2027, 7, 1)", "at 2027-06-30T22:00:00"),
        ("datetime(2027, 7, 1, 12)", "at 2027-07-01T10:00:00"),
        ("datetime(2027, 7, 1, 12, tzinfo=timezone.utc)", "at 2027-07-01T12:00:00"),
        ("'2027-07-01 12:00:00', timezone='Asia/Tokyo'", "at 2027-07-01T03:00:00"),
    ],
)
def test_a_date_becomes_at(run_date: str, at: str):
    assert job(f"tick, 'date', run_date={run_date}")["schedule"].startswith(at)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("tick, 'cron', day=1, day_of_week='mon'", "both must match there"),
        ("tick, 'cron', day='last', day_of_week='fri'", "both must match there"),
        ("tick, CronTrigger.from_crontab('0 0 1 * 1')", "both must match there"),
        ("tick, 'cron', year=2027", "restricts the year"),
        ("tick, 'cron', week='*/2'", "restricts the week"),
        ("tick, 'cron', day='1st mon,3rd mon'", "several special days"),
        ("tick, 'cron', hour=24", "APScheduler refuses it"),
        ("tick, 'cron', day_of_week='fri-mon'", "APScheduler refuses it"),
        ("tick, 'cron', hours=3", "hours is not supported"),
        ("tick, 'cron', hour=HOUR", "HOUR is not a literal"),
        ("tick, 'cron', **when", "** unpacks"),
        ("tick, OrTrigger([a, b])", "OrTrigger is a trigger that definitions do not have"),
        ("tick, MyTrigger()", "its trigger is not cron"),
        ("tick, 'interval', seconds=0.5", "whole seconds"),
        ("tick, 'date', run_date='2009-11-06'", "is over"),
        ("tick, 'date'", "runs once, at once"),
        ("tick", "has no trigger"),
        ("lambda: 1, 'cron', hour=1", "a lambda, which has no name"),
        ("tick, 'cron', hour=1, end_date='soon'", "end_date cannot be read"),
        ("tick, 'cron', hour=1, timezone='Mars/Olympus'", "unknown time zone"),
        ("tick, 'cron', hour=1, timezone=timezone(timedelta(hours=2))", "fixed offset"),
        ("tick, 'cron', hour=1, misfire_grace_time=-1", "not a positive number"),
    ],
)
def test_what_a_definition_cannot_say_is_not_taken(arguments: str, reason: str):
    found = imported(f"\nscheduler.add_job({arguments})")
    assert found.definitions == []
    (remark,) = found.remarks
    assert (remark.line, remark.taken) == (2, False)
    assert reason in remark.reason


def test_weekday_numbers_are_reported_since_they_change():
    (remark,) = imported("scheduler.add_job(tick, CronTrigger.from_crontab('0 0 * * 1-5'))").remarks
    assert "1-5 there is 2-6 in a crontab line" in remark.reason
    assert imported("scheduler.add_job(tick, CronTrigger.from_crontab('0 0 * * mon-fri'))").remarks == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("tick, 'cron', hour=1", {"name": "tick", "handler": "tick"}),
        ("jobs.export, 'cron', hour=1", {"name": "export", "handler": "jobs.export"}),
        ("self.export, 'cron', hour=1", {"handler": "export"}),
        ("'pkg.mod:func', 'cron', hour=1", {"name": "func", "handler": "pkg.mod.func"}),
        ("func=tick, trigger='cron', hour=1, id='nightly', name='x'", {"name": "nightly", "handler": "tick"}),
        ("tick, 'cron', hour=1, name='At night'", {"name": "At night"}),
        ("tick, 'cron', [1, 'a'], {'b': 2}, hour=1", {"params": {"b": 2, "args": [1, "a"]}}),
        ("tick, 'cron', hour=1, max_instances=3", {"overlap": "allow", "max_concurrent": 3}),
        ("tick, 'cron', hour=1, misfire_grace_time=3600", {"misfire_within": "1h"}),
        ("tick, 'cron', hour=1, coalesce=False", {"misfire": "all"}),
        ("tick, 'cron', hour=1, next_run_time=None", {"enabled": False}),
        ("tick, 'cron', hour=1, jitter=120", {"spread": "2m"}),
        (
            "tick, 'cron', hour=1, start_date='2027-02-01', end_date='2027-03-01 12:00:00'",
            {"starts_at": "2027-01-31T23:00:00.000000Z", "ends_at": "2027-03-01T11:00:01.000000Z"},
        ),
    ],
)
def test_options_of_a_job(arguments: str, expected: dict[str, Any]):
    definition = job(arguments)
    assert {key: definition[key] for key in expected} == expected


def test_a_job_without_options_leaves_the_policies_to_their_defaults():
    assert job("tick, 'interval', hours=1, max_instances=1, coalesce=True") == {
        "org": "org_acme",
        "name": "tick",
        "handler": "tick",
        "schedule": "every 1h",
    }


def test_an_interval_with_a_start_is_reported_if_its_times_shift():
    starts = "scheduler.add_job(tick, 'interval', hours=2, start_date='2027-02-01 {}', timezone='UTC')"
    assert imported(starts.format("04:00:00")).remarks == []
    (remark,) = imported(starts.format("05:00:00")).remarks
    assert "shifted" in remark.reason


def test_decorators():
    found = imported(
        """
        @scheduler.scheduled_job("interval", id="often", minutes=3)
        def timed(): ...

        @scheduler.scheduled_job(CronTrigger(hour=4), kwargs={"a": 1})
        async def nightly(): ...

        @scheduler.task("interval", id="flask", hours=1)
        def of_flask(): ...

        @app.task(bind=True)
        def of_celery(): ...
        """
    )
    assert found.definitions == [
        {"org": "org_acme", "name": "often", "handler": "timed", "schedule": "every 3m"},
        {
            "org": "org_acme",
            "name": "nightly",
            "handler": "nightly",
            "schedule": "0 4 * * *",
            "timezone": "Europe/Berlin",
            "params": {"a": 1},
        },
        {"org": "org_acme", "name": "flask", "handler": "of_flask", "schedule": "every 1h"},
    ]


@pytest.mark.parametrize(
    ("source", "zone"),
    [
        ("s = BackgroundScheduler(timezone='Asia/Tokyo')\ns.add_job(tick, 'cron', hour=1)", "Asia/Tokyo"),
        ("s = BackgroundScheduler(timezone=utc)\ns.add_job(tick, 'cron', hour=1)", "UTC"),
        (
            "s = S()\ns.configure(timezone=pytz.timezone('Asia/Tokyo'))\ns.add_job(tick, 'cron', hour=1)",
            "Asia/Tokyo",
        ),
        ("s = BlockingScheduler({'apscheduler.timezone': 'UTC'})\ns.add_job(tick, 'cron', hour=1)", "UTC"),
        (
            "s = BackgroundScheduler(timezone='Asia/Tokyo')\ns.add_job(tick, 'cron', hour=1, timezone='UTC')",
            "UTC",
        ),
        (
            "a = AScheduler(timezone='UTC')\nb = AScheduler()\nb.add_job(tick, 'cron', hour=1)",
            "Europe/Berlin",
        ),
        ("a = AScheduler(timezone='UTC')\nb.add_job(tick, 'cron', hour=1)", "UTC"),
        ("s = BackgroundScheduler()\ns.add_job(tick, 'cron', hour=1)", "Europe/Berlin"),
        ("s = BackgroundScheduler(timezone=zone())\ns.add_job(tick, 'cron', hour=1)", "Europe/Berlin"),
    ],
)
def test_the_zone_is_the_jobs_else_the_schedulers_else_the_options(source: str, zone: str):
    assert imported(source).definitions[0]["timezone"] == zone


def test_without_a_zone_dates_are_not_taken_and_cron_follows_the_org():
    found = imported(
        """
        scheduler.add_job(tick, "cron", hour=1)
        scheduler.add_job(tick, "cron", hour=1, end_date="2030-01-01")
        scheduler.add_job(tick, "date", run_date="2030-01-01")
        """,
        zone=None,
    )
    assert ["timezone" in entry for entry in found.definitions] == [False]
    assert [remark.line for remark in found.remarks] == [3, 4, 0]
    assert all("--zone" in remark.reason for remark in found.remarks)


def test_defaults_of_the_scheduler_apply_to_its_jobs():
    found = imported(
        """
        scheduler = BackgroundScheduler(job_defaults={"coalesce": False, "max_instances": 3}, timezone="UTC")
        scheduler.add_job(tick, "cron", hour=1)
        scheduler.add_job(tick, "cron", hour=2, coalesce=True, max_instances=1)
        """
    )
    assert [(entry.get("misfire"), entry.get("max_concurrent")) for entry in found.definitions] == [
        ("all", 3),
        (None, None),
    ]


def test_loops_conditions_and_other_versions():
    found = imported(
        """
        for org in orgs:
            scheduler.add_job(tick, "cron", hour=1)
        if DEBUG:
            scheduler.add_job(tick, "cron", hour=1)
        scheduler.add_schedule(tick, CronTrigger(hour=1))
        scheduler.add_cron_job(tick, hour=1)
        scheduler.reschedule_job("tick", trigger="cron", hour=2)
        """
    )
    assert len(found.definitions) == 1
    assert [(remark.line, remark.taken) for remark in found.remarks] == [
        (3, False),
        (5, True),
        (6, False),
        (7, False),
        (8, False),
    ]


def test_handler_replaces_all_functions():
    assert job("lambda: 1, 'cron', hour=1", handler="acme.task")["handler"] == "acme.task"


def test_a_source_that_is_not_python_is_refused():
    with pytest.raises(DefinitionError, match="line 1: not valid Python"):
        imported("scheduler.add_job(")


def numbers(low: int, high: int) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(str)


def expressions(low: int, high: int, *words: str) -> st.SearchStrategy[str]:
    """What APScheduler may take for a field, or refuse."""
    number = st.sampled_from(words) | numbers(low, high) if words else numbers(low, high)
    part = st.one_of(
        number,
        st.just("*"),
        st.integers(2, 7).map(lambda step: f"*/{step}"),
        st.tuples(number, number).map("-".join),
        st.tuples(numbers(low, high), numbers(low, high), st.integers(1, 5)).map(
            lambda p: f"{p[0]}-{p[1]}/{p[2]}"
        ),
    )
    return st.lists(part, min_size=1, max_size=3).map(",".join)


FIELDS = {
    "month": expressions(1, 12, "jan", "may", "Dec"),
    "day": expressions(1, 31) | st.sampled_from(["last", "1st mon", "last sun", "5th fri"]),
    "day_of_week": expressions(0, 6, "mon", "tue", "sat", "SUN"),
    "hour": expressions(0, 23),
    "minute": expressions(0, 59),
    "second": expressions(0, 59),
}


@given(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=4), st.data())
def test_any_cron_trigger_has_the_same_times_or_is_not_taken(names: list[str], data: st.DataObject):
    fields = {name: data.draw(FIELDS[name]) for name in names}
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    found = imported(f"scheduler.add_job(tick, 'cron', {arguments})", zone="UTC")
    if not found.definitions:
        assert [remark.taken for remark in found.remarks] == [False]
        return
    theirs, at = CronTrigger(**fields, timezone=UTC), NOW
    for ours in islice(parse_schedule(found.definitions[0]["schedule"], ZoneInfo("UTC")).occurrences(NOW), 6):
        expected = theirs.get_next_fire_time(None, at)
        assert ours == expected
        at = ours + timedelta(seconds=1)
