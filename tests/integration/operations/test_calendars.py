"""Calendars: what apply changes in every org that uses one, and what keeps one from being removed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from worker.errors import Conflict, DefinitionError, NotFound
from worker.features.calendars.operations import remove_calendar
from worker.ids import ALL_ORGS
from worker.model.definitions.file import parse_file
from worker.operations import definitions as definition_module
from worker.operations.apply import apply as apply_file
from worker.operations.definitions import edit_definition
from worker.operations.templates import close_template, materialise
from worker.store import calendars as calendar_rows
from worker.store.database import Database
from worker.store.lists import CALENDARS
from worker.store.lists import read as lists


def calendar(*dates: str, name: str = "holidays") -> str:
    return f'[[calendar]]\nname = "{name}"\ndates = {list(dates)}\n'


def org(code: str, *tags: str) -> str:
    return f'[[org]]\ncode = "{code}"\nissuer = "main"\ntags = {list(tags)}\n'


def definition(code: str, name: str = "digest", *, calendar: str | None = "holidays", **keys: str) -> str:
    keys |= {"calendar": calendar} if calendar else {}
    keys |= {"org": code, "name": name, "handler": "acme.plain", "schedule": "@daily"}
    return "[[definition]]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items())


TEMPLATE = (
    '[[template]]\nname = "export"\norgs = { tags = ["pro"] }\nhandler = "acme.plain"\n'
    'schedule = "@hourly"\ncalendar = "holidays"\n'
)


def specs(rows: Any) -> dict[tuple[str, str], tuple[int, list[str] | None]]:
    """By org and name of a definition: its revision, and the dates that it has."""
    codes = {row["id"]: row["code"] for row in rows.orgs}
    current = {(row["definition_id"], row["revision"]): row["spec"] for row in rows.definition_revisions}
    return {
        (codes[row["org_id"]], row["name"]): (
            row["revision"],
            current[row["id"], row["revision"]].get("calendar_dates"),
        )
        for row in rows.definitions
    }


def shown(changes: list[Any]) -> list[tuple[str, str, str | None, str]]:
    return [(change.kind, change.action, change.org, change.name) for change in changes]


def test_apply_stores_the_dates_and_the_same_file_changes_nothing(apply, rows, database):
    file = calendar("2026-12-26", "2026-12-25") + org("org_a") + definition("org_a")

    [first, *_] = apply(file)

    assert (first.kind, first.action, first.name) == ("calendar", "add", "holidays")
    assert first.detail == {"dates": {"before": None, "after": ["2026-12-25", "2026-12-26"]}}
    assert specs(rows) == {("org_a", "digest"): (1, ["2026-12-25", "2026-12-26"])}
    assert [row["calendar"] for row in rows.definitions] == ["holidays"]
    before = rows.everything()
    assert apply(file) == []
    # What is stored need not be in the file.
    assert apply(definition("org_a")) == []
    assert rows.everything() == before


def test_a_change_reaches_every_definition_that_names_it_and_no_other(apply, rows):
    apply(
        calendar("2026-12-25")
        + calendar("2026-07-04", name="us")
        + org("org_a")
        + org("org_b")
        + definition("org_a")
        + definition("org_b")
        + definition("org_b", "other", calendar="us")
        + definition("org_b", "plain", calendar=None)
    )

    changes = apply(calendar("2027-12-25"))

    assert shown(changes) == [
        ("calendar", "change", None, "holidays"),
        ("definition", "change", "org_a", "digest"),
        ("definition", "change", "org_b", "digest"),
    ]
    assert specs(rows) == {
        ("org_a", "digest"): (2, ["2027-12-25"]),
        ("org_b", "digest"): (2, ["2027-12-25"]),
        ("org_b", "other"): (1, ["2026-07-04"]),
        ("org_b", "plain"): (1, None),
    }
    audit = [(row["action"], row["subject"]) for row in rows.audit if row["action"].endswith(".change")]
    assert sorted(audit) == [
        ("calendar.change", "holidays"),
        ("definition.change", "org_a digest"),
        ("definition.change", "org_b digest"),
    ]


def test_prune_closes_nothing_of_an_org_that_only_shares_the_calendar(apply, rows):
    apply(calendar("2026-12-25") + org("org_a") + org("org_b") + definition("org_a") + definition("org_b"))

    apply(calendar("2027-12-25") + org("org_a"), prune=True)

    assert {row["name"]: row["closed_at"] is None for row in rows.definitions if row["revision"] == 2} == {
        "digest": True
    }
    revisions = {org: revision for (org, _), (revision, _) in specs(rows).items()}
    assert revisions == {"org_a": 1, "org_b": 2}


def test_a_paused_definition_gets_the_dates_and_stays_paused(apply, rows, database):
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a"))
    definition_module.pause_definition(database, "org_a", "digest", actor="tester")

    apply(calendar("2027-12-25"))

    assert specs(rows) == {("org_a", "digest"): (2, ["2027-12-25"])}
    [row] = rows.definitions
    assert row["paused_at"] is not None


def test_a_template_gives_its_definitions_the_dates_and_follows_a_change(apply, rows, database):
    apply(calendar("2026-12-25") + org("org_a", "pro") + org("org_b", "pro") + TEMPLATE)
    assert specs(rows) == {(code, "export"): (1, ["2026-12-25"]) for code in ("org_a", "org_b")}

    changes = apply(calendar("2026-12-25", "2026-12-26"))

    assert shown(changes) == [
        ("calendar", "change", None, "holidays"),
        ("template", "change", None, "export"),
    ]
    assert changes[1].detail == {"calendar_dates": {"before": [], "after": ["2026-12-26"]}}
    while materialise(database).orgs:
        pass
    dates = ["2026-12-25", "2026-12-26"]
    assert specs(rows) == {(code, "export"): (2, dates) for code in ("org_a", "org_b")}
    assert apply(calendar(*dates) + TEMPLATE) == []


def test_an_org_that_comes_later_has_the_dates_of_the_template(apply, rows, database):
    apply(calendar("2026-12-25") + TEMPLATE)
    apply(calendar("2027-12-25"))
    apply(org("org_late", "pro"))

    assert specs(rows) == {("org_late", "export"): (1, ["2027-12-25"])}


def test_a_calendar_without_dates_keeps_nothing_from_running(apply, rows):
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a"))

    apply(calendar())

    assert specs(rows) == {("org_a", "digest"): (2, None)}


@pytest.mark.parametrize("entry", ["definition", "template"])
def test_a_calendar_that_does_not_exist_is_refused_with_entry_field_and_fix(apply, rows, entry):
    text = org("org_a") + definition("org_a") if entry == "definition" else TEMPLATE

    with pytest.raises(DefinitionError, match="there is no calendar holidays") as caught:
        apply(text)

    assert caught.value.field == "calendar"
    assert (
        caught.value.entry == {"definition": "definition org_a/digest", "template": "template export"}[entry]
    )
    assert '[[calendar]] name = "holidays"' in caught.value.fix
    assert rows.definitions == rows.templates == []


def test_an_edit_of_another_key_keeps_the_dates_and_the_column(apply, rows, database):
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a"))

    edit_definition(database, "org_a", "digest", {"priority": 3}, actor="tester")

    assert specs(rows) == {("org_a", "digest"): (2, ["2026-12-25"])}
    assert [row["calendar"] for row in rows.definitions] == ["holidays"]


def test_nobody_writes_dates_into_a_definition(apply, database):
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a"))

    with pytest.raises(DefinitionError, match="unknown key 'calendar_dates'"):
        edit_definition(database, "org_a", "digest", {"calendar_dates": ["2030-01-01"]}, actor="tester")


@on_either
def test_a_calendar_in_use_stays_and_one_that_is_not_goes(apply, rows, database):
    apply(calendar("2026-12-25") + org("org_a", "pro") + definition("org_a") + TEMPLATE)

    with pytest.raises(Conflict, match="in use by template export and 2 definitions") as caught:
        remove_calendar(database, "holidays", actor="tester")
    assert caught.value.exit_code == 5

    close_template(database, "export", actor="tester")
    close_definition(database, "org_a", "digest", actor="tester")
    row = remove_calendar(database, "holidays", actor="tester")

    assert row["dates"] == ["2026-12-25"]
    assert rows.calendars == []
    assert rows.audit[-1]["action"] == "calendar.remove"
    with pytest.raises(NotFound, match="no calendar holidays"):
        remove_calendar(database, "holidays", actor="tester")


def test_a_definition_that_drops_its_calendar_no_longer_counts_as_its_user(apply, rows, database):
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a"))

    apply(definition("org_a", calendar=None))

    assert [row["calendar"] for row in rows.definitions] == [None]
    remove_calendar(database, "holidays", actor="tester")


@on_either
def test_the_list_and_one_calendar(apply, database):
    apply(calendar("2026-12-25", "2027-12-25") + calendar(name="empty") + org("org_a") + definition("org_a"))

    with database.autocommit() as connection:
        listed = lists.read(connection, CALENDARS, ALL_ORGS)
        one = lists.calendar(connection, "holidays")

    assert {row["name"]: (row["days"], str(row["first_date"]), str(row["last_date"])) for row in listed} == {
        "holidays": (2, "2026-12-25", "2027-12-25"),
        "empty": (0, "None", "None"),
    }
    assert (one["dates"], one["definitions"], one["templates"]) == (["2026-12-25", "2027-12-25"], 1, [])


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
def test_a_definition_never_keeps_dates_that_another_transaction_replaces(
    apply, rows, database: Database, monkeypatch: pytest.MonkeyPatch
):
    """The edit has read the dates when the calendar changes: the change waits for it, then follows."""
    apply(calendar("2026-12-25") + org("org_a") + definition("org_a", calendar=None))
    has_read, may_go_on = threading.Event(), threading.Event()
    find = calendar_rows.find

    def slow_find(connection, names):
        found = find(connection, names)
        if threading.current_thread().name.startswith("edit"):
            has_read.set()
            assert may_go_on.wait(20)
        return found

    monkeypatch.setattr(calendar_rows, "find", slow_find)
    with ThreadPoolExecutor(1, "edit") as editor, ThreadPoolExecutor(1, "apply") as applier:
        edit = editor.submit(
            edit_definition, database, "org_a", "digest", {"calendar": "holidays"}, actor="tester"
        )
        assert has_read.wait(20)
        change = applier.submit(apply_file, database, parse_file(calendar("2027-12-25")), actor="tester")
        with pytest.raises(TimeoutError):
            change.result(0.3)
        may_go_on.set()
        edit.result(20)
        changes = change.result(20)

    assert [each.kind for each in changes] == ["calendar", "definition"]
    assert specs(rows) == {("org_a", "digest"): (3, ["2027-12-25"])}
