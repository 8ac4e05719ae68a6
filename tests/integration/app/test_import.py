"""`import`: what it prints is a file that `apply` takes as it is."""

from __future__ import annotations

import json
import pickle
import shelve
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.cli import CommandLine

pytestmark = pytest.mark.feature("importing")

CRONTAB = """\
MAILTO=ops@example.com
CRON_TZ=Europe/Berlin
0 3 * * * /opt/backup.sh "daily" > /dev/null
0 0 1 * 1 date +\\%F
@reboot /opt/start
@daily /opt/backup.sh
"""
BEAT = """\
from celery import Celery
from celery.schedules import crontab, solar

app = Celery("proj")
app.conf.timezone = "Europe/London"
app.conf.beat_schedule = {
    "sums": {"task": "proj.tasks.add", "schedule": 30.0, "args": (16, 16)},
    "monday": {"task": "proj.tasks.report", "schedule": crontab(hour=7, minute=30, day_of_week=1)},
    "dusk": {"task": "proj.tasks.report", "schedule": solar("dusk_civil", 52.5, 13.4)},
    "first monday": {
        "task": "proj.tasks.report", "schedule": crontab(0, 8, day_of_week="mon", day_of_month="1-7"),
    },
}
"""
JOBS = """\
from apscheduler.schedulers.blocking import BlockingScheduler

scheduler = BlockingScheduler(timezone="Europe/Berlin")
scheduler.add_job(export, "cron", day_of_week=0, hour=5, kwargs={"full": True})
scheduler.add_job(export, "interval", minutes=10, id="often")
scheduler.add_job(export, "cron", day=1, day_of_week="mon")
"""


@pytest.mark.parametrize(
    ("kind", "source", "options", "schedules", "left"),
    [
        (
            "crontab",
            CRONTAB,
            ("--handler", "acme.command"),
            {"backup-daily": "0 3 * * *", "date": "0 0 1 * 1", "backup": "@daily"},
            ["line 5: not taken over: @reboot"],
        ),
        (
            "celery-beat",
            BEAT,
            (),
            {"sums": "every 30s", "monday": "30 7 * * 1"},
            ["line 9, dusk: not taken over: solar", "line 10, first monday: not taken over: it restricts"],
        ),
        (
            "apscheduler",
            JOBS,
            (),
            {"export": "0 5 * * 1", "often": "every 10m"},
            ["line 6: not taken over: it restricts"],
        ),
    ],
)
def test_apply_takes_the_output_as_it_is(
    cli: CommandLine,
    tmp_path: Path,
    kind: str,
    source: str,
    options: tuple[str, ...],
    schedules: dict[str, str],
    left: list[str],
):
    org = f"org_{kind.replace('-', '_')}"
    cli("orgs", "add", org)
    file = tmp_path / "source.py"
    file.write_text(source)

    printed = cli("import", kind, str(file), "--org", org, *options)
    for remark in left:
        assert remark in printed.err
    assert f"{len(schedules)} taken over, {len(left)} not" in printed.err

    checked = cli("apply", "-", "--dry-run", "--allow-unknown-handlers", "-o", "json", stdin=printed.out)
    assert [row["action"] for row in checked.json()] == ["add"] * len(schedules)
    assert cli("definitions", "list", "--org", org, "-o", "json").json() == []
    cli("apply", "-", "--allow-unknown-handlers", stdin=printed.out)
    listed = cli("definitions", "list", "--org", org, "-o", "json").json()
    assert {row["name"]: row["schedule"] for row in listed} == schedules

    # As JSON the same, which changes nothing; and by line, and by name.
    as_json = cli("import", kind, "-", "--org", org, *options, "-o", "json", stdin=source)
    if kind == "crontab":
        again = cli("apply", "-", "--allow-unknown-handlers", stdin=as_json.out)
        assert "nothing changes" in again.err
    lines = cli("import", kind, str(file), "--org", org, *options, "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["name"] for line in lines] == list(schedules)
    assert cli("import", kind, str(file), "--org", org, *options, "-o", "id").out.split("\n") == [
        *schedules,
        "",
    ]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("crontab", "# nothing here\n"),
        ("crontab", "@reboot /opt/start\n61 * * * * /opt/never\n"),
        ("celery-beat", "app = Celery('proj')\n"),
        ("celery-beat", "beat_schedule = load()\n"),
        ("apscheduler", ""),
        ("apscheduler", "scheduler.add_job(tick)\n"),
    ],
)
def test_nothing_taken_over_exits_1_and_prints_nothing(cli: CommandLine, kind: str, source: str):
    command = ("import", kind, "-", "--org", "org_acme", "--handler", "acme.note")
    people = cli(*command, stdin=source, check=False)
    assert (people.code, people.out) == (1, "")
    assert people.err.splitlines()[-1].startswith("fix: ")
    programs = cli(*command, "-o", "json", stdin=source, check=False)
    assert (programs.code, programs.out) == (1, "")
    assert json.loads(programs.err)["error"]["code"] == "nothing_imported"


def test_a_source_that_is_not_python_exits_78(cli: CommandLine):
    failed = cli("import", "celery-beat", "-", "--org", "org_acme", stdin="beat_schedule = {", check=False)
    assert (failed.code, failed.out) == (78, "")
    assert "line 1" in failed.err


class Witness:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["celery-beat", "apscheduler"])
def test_a_pickle_is_refused_and_not_loaded(cli: CommandLine, tmp_path: Path, kind: str, protocol: int):
    witness = tmp_path / "loaded"
    file = tmp_path / "jobs"
    file.write_bytes(pickle.dumps({"entries": [Witness(witness)]}, protocol))
    failed = cli("import", kind, str(file), "--org", "org_acme", check=False)
    assert (failed.code, failed.out) == (2, "")
    assert "pickles" in failed.err
    assert not witness.exists()
    # The control: loading it does what it says.
    pickle.loads(file.read_bytes())
    assert witness.exists()


def test_the_file_of_a_running_beat_is_refused(cli: CommandLine, tmp_path: Path):
    with shelve.open(str(tmp_path / "celerybeat-schedule")) as stored:
        stored["entries"] = {"x": 1}
    for file in tmp_path.glob("celerybeat-schedule*"):
        failed = cli("import", "celery-beat", str(file), "--org", "org_acme", check=False)
        assert failed.code in (2, 78), file
        assert failed.out == ""
