"""Calendars from the command line: iCalendar files beside the applied one, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.site import definition

pytestmark = pytest.mark.feature("calendars")

EVENT = (
    "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nBEGIN:VEVENT\r\nUID:1@acme\r\nSUMMARY:Christmas\r\n"
    "DTSTART;VALUE=DATE:20301225\r\nDTEND;VALUE=DATE:20301227\r\n{}END:VEVENT\r\nEND:VCALENDAR\r\n"
)


@pytest.fixture(scope="module")
def site(cli: CommandLine) -> CommandLine:
    cli("orgs", "add", "org_acme", "--timezone", "Europe/Berlin")
    return cli


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file for apply in a folder of its own, with an iCalendar file below it."""
    (tmp_path / "ics").mkdir()
    (tmp_path / "ics" / "holidays.ics").write_text(EVENT.format(""), newline="")
    made = tmp_path / "acme.toml"
    made.write_text(
        '[[calendar]]\nname = "holidays"\nics = "ics/holidays.ics"\n'
        + definition("org_acme", "tick", "acme.note", "0 3 * * *", calendar="holidays")
    )
    return made


def test_the_dates_are_stored_and_the_file_is_not_needed_any_more(site: CommandLine, file: Path):
    """Its path is relative to the applied file, wherever the command is given."""
    changes = site("apply", str(file), "-o", "json").json()
    assert changes[0]["fields"] == {"dates": {"before": None, "after": ["2030-12-25", "2030-12-26"]}}
    assert changes[1]["fields"]["calendar"] == {"before": None, "after": "holidays"}
    assert site("apply", str(file), "-o", "json").json() == []

    (file.parent / "ics" / "holidays.ics").unlink()

    times = site("definitions", "next", "org_acme", "tick", "--from", "2030-12-24", "-n", "4", "-o", "json")
    assert [(row["local"][:10], row["note"]) for row in times.json()] == [
        ("2030-12-24", None),
        ("2030-12-25", "would be skipped: calendar holidays"),
        ("2030-12-26", "would be skipped: calendar holidays"),
        ("2030-12-27", None),
    ]
    shown = site("definitions", "show", "org_acme", "tick", "-o", "json").json()
    assert (shown["calendar"], shown["spec"]["calendar"]) == ("holidays", "holidays")
    assert shown["next_run_for"] == shown["next_scheduled_for"]
    listed = site("calendars", "list", "-o", "json").json()
    assert [(row["name"], row["days"], row["first_date"], row["last_date"]) for row in listed] == [
        ("holidays", 2, "2030-12-25", "2030-12-26")
    ]
    one = site("calendars", "show", "holidays", "-o", "json").json()
    assert (one["dates"], one["definitions"]) == (["2030-12-25", "2030-12-26"], 1)
    assert "2030-12-25, 2030-12-26" in site("calendars", "show", "holidays").out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("RRULE:FREQ=YEARLY\r\n", "line 8: event 'Christmas' recurs (RRULE); write each of its dates"),
        ("RDATE;VALUE=DATE:20311225\r\n", "line 8: event 'Christmas' recurs (RDATE)"),
        ("DTSTART:20301225T080000Z\r\n", "line 8: event 'Christmas' has DTSTART twice"),
    ],
)
def test_a_refused_event_is_named_and_nothing_is_applied(
    site: CommandLine, file: Path, line: str, problem: str
):
    (file.parent / "ics" / "holidays.ics").write_text(EVENT.format(line), newline="")
    before = site("audit", "list", "-o", "json").json()

    done = site("apply", str(file), "-o", "json", check=False)

    assert done.code == 78
    error = json.loads(done.err)["error"]
    assert error["message"].startswith("calendar holidays, ics: ics/holidays.ics, ")
    assert problem in error["message"]
    assert error["fix"]
    assert site("audit", "list", "-o", "json").json() == before


def test_a_file_that_is_absent_or_too_large_is_named(site: CommandLine, file: Path):
    path = file.parent / "ics" / "holidays.ics"
    path.write_bytes(b" " * (4 * 2**20 + 1))
    assert "is larger than 4 MiB" in site("apply", str(file), check=False).err

    path.unlink()
    done = site("apply", str(file), check=False)
    assert f"calendar holidays, ics: {path} cannot be read: No such file" in done.err
