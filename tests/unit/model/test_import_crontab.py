"""Importing a crontab: schedules stay as they are; what has no place in a definition is reported."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from worker.features.importing.crontab import has_user_column, read_crontab
from worker.features.importing.entries import Import, to_toml
from worker.model.definitions.file import parse_file


def imported(text: str, *, zone: str | None = "Europe/Berlin", with_user: bool = False) -> Import:
    found = Import("org_acme", "acme.command", zone)
    read_crontab(text, found, with_user=with_user)
    return found


def one(line: str, **options: Any) -> dict[str, Any]:
    (definition,) = imported(line, **options).definitions
    return definition


def remarks(text: str, **options: Any) -> list[str]:
    return [str(remark) for remark in imported(text, **options).remarks]


@pytest.mark.parametrize(
    "schedule",
    [
        "0 3 * * *",
        "*/15 9-17 * * mon-fri",
        "0 0 1 * 1",
        "5,35 0 1-7 1,7 SUN",
        "0 0 * * 7",
        "@hourly",
        "@annually",
    ],
)
def test_a_schedule_is_taken_unchanged(schedule: str):
    assert one(f"{schedule} /opt/backup.sh")["schedule"] == schedule


def test_blanks_and_tabs_between_fields_become_one_blank():
    assert one("\t0  3\t* * *\t/opt/backup.sh  -v ")["schedule"] == "0 3 * * *"


def test_the_command_goes_to_params_as_the_shell_would_get_it():
    command = one(r'0 3 * * * cd /srv && pg_dump "acme" > "/tmp/$(date +\%F)" # nightly')["params"]["command"]
    assert command == 'cd /srv && pg_dump "acme" > "/tmp/$(date +%F)" # nightly'


def test_a_backslash_that_is_escaped_escapes_no_percent_sign():
    assert one(r"0 3 * * * echo \\\% \n \\")["params"]["command"] == r"echo \\% \n \\"


def test_the_file_is_valid_whatever_the_command_has_in_it():
    command = 'printf "\\t\'é\x7f😀" | tee C:\\\\x; echo """ \'\'\''
    found = imported(f"0 3 * * * {command}")
    assert tomllib.loads(to_toml(found, "x"))["definition"][0]["params"] == {"command": command}
    (definition,) = parse_file(to_toml(found, "x")).definitions
    assert (definition.org, definition.handler, definition.timezone) == (
        "org_acme",
        "acme.command",
        "Europe/Berlin",
    )


def test_a_nickname_starts_on_time_as_cron_does():
    assert one("@daily /opt/backup.sh")["spread"] == "off"
    assert "spread" not in one("0 0 * * * /opt/backup.sh")


def test_cron_tz_applies_to_the_lines_below_it_and_tz_to_none():
    text = """0 1 * * * first
CRON_TZ = "America/New_York"
0 2 * * * second
TZ=Asia/Tokyo
0 3 * * * third
CRON_TZ=
0 4 * * * fourth
"""
    zones = [entry["timezone"] for entry in imported(text).definitions]
    assert zones == ["Europe/Berlin", "America/New_York", "America/New_York", "Europe/Berlin"]
    assert [remark.line for remark in imported(text).remarks] == [4]


def test_lines_below_a_zone_that_does_not_exist_are_not_taken():
    found = imported("CRON_TZ=Mars/Olympus\n0 1 * * * first\nCRON_TZ=UTC\n0 2 * * * second\n")
    assert [entry["name"] for entry in found.definitions] == ["second"]
    assert [(remark.line, remark.taken) for remark in found.remarks] == [(1, True), (2, False)]
    assert "Mars/Olympus" in found.remarks[1].reason


def test_a_crontab_that_names_no_zone_says_so():
    assert "timezone" not in one("0 1 * * * first", zone=None)
    assert "--zone" in remarks("0 1 * * * first", zone=None)[-1]
    assert remarks("0 1 * * * first") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("@reboot /opt/start", "@reboot has no time"),
        ("@every_minute /opt/start", "@every_minute is not one of"),
        ("61 * * * * false", "minute must be 0-59"),
        ("0 0 31 2 * never", "can never fire"),
        ("0 0 * * *", "it has no command"),
        ("nonsense", "it has no command"),
        ("0 5 * * * mail me%hello", "standard input"),
        ("0 5 * * * mail me %", "standard input"),
        (r"0 5 * * * mail me \\%hello", "standard input"),
        ("-*/5 * * * * quiet", "minute must be 0-59"),
    ],
)
def test_what_has_no_place_in_a_definition_is_not_taken(line: str, reason: str):
    found = imported(f"# a comment\n\n{line}\n")
    assert found.definitions == []
    (remark,) = found.remarks
    assert (remark.line, remark.taken) == (3, False)
    assert reason in remark.reason


@pytest.mark.parametrize(
    "variable", ["MAILTO=ops@example.com", "PATH = /usr/bin", "'SHELL'=/bin/bash", "A_1="]
)
def test_variables_are_reported(variable: str):
    (remark,) = remarks(variable)
    assert remark.startswith("line 1, ")
    assert "not taken over" in remark


def test_the_user_column_is_found_by_place_or_header():
    header = "# m h dom mon dow user\tcommand\n"
    assert has_user_column("", "/etc/crontab")
    assert has_user_column("", "/etc/cron.d/backup")
    assert has_user_column(header, "saved.txt")
    assert has_user_column("# *  *  *  *  * user-name  command to be executed\n", "-")
    assert not has_user_column("# m h  dom mon dow   command\n0 1 * * * user command\n", "crontab")


def test_a_user_is_reported_once_and_left_out_of_the_command():
    found = imported("0 1 * * * root first\n0 2 * * * root second\n@daily www-data third\n", with_user=True)
    assert [entry["params"]["command"] for entry in found.definitions] == ["first", "second", "third"]
    assert [remark.line for remark in found.remarks] == [1, 3]
    assert imported("0 1 * * * /opt/first now", with_user=True).definitions == []


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/usr/local/bin/backup.sh -v", "backup"),
        ("cd /srv/app && FOO=1 nice -n 10 python3 manage.py clearsessions", "manage-clearsessions"),
        ("/usr/bin/php /var/www/artisan schedule:run", "artisan-schedule-run"),
        ("[ -x /usr/sbin/x ] && exec /usr/sbin/certbot renew", "certbot-renew"),
        ("flock -n /tmp/lock timeout 30s run-parts --report /etc/cron.hourly", "run-parts"),
        ("'unbalanced", "unbalanced"),
        ("$$$", "command"),
    ],
)
def test_names_come_from_the_first_program(command: str, name: str):
    assert one(f"0 1 * * * {command}")["name"] == name


def test_names_are_unique():
    names = [
        entry["name"] for entry in imported("0 1 * * * sync\n0 2 * * * sync\n0 3 * * * sync\n").definitions
    ]
    assert names == ["sync", "sync-2", "sync-3"]


def test_no_remark_repeats_a_command_which_may_hold_a_secret():
    text = "@reboot login canary-7\n0 5 * * * login canary-7%x\nTOKEN=canary-7\n61 * * * * login canary-7\n"
    found = remarks(text)
    assert len(found) == 4
    assert not [remark for remark in found if "canary-7" in remark]
