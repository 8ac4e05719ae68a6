"""A new release of the time zone database: what is to come moves, what has come stays."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.site import definition, org_entry
from worker.model.runs.fire import decide
from worker.model.runs.run import Declared
from worker.operations import settle as module
from worker.operations.settle import outdated, recompute, recomputed
from worker.store import firing, schema, tables

HOUR = timedelta(hours=1)
FILE = org_entry("org_acme", timezone="Europe/Berlin") + definition(
    "org_acme", "nightly", "acme.plain", "0 3 * * *"
)
OTHERS = definition("org_acme", "interval", "acme.plain", "every 7h") + definition(
    "org_acme", "greenwich", "acme.plain", "0 3 * * *", timezone="UTC"
)


def move(database, name: str, by: timedelta) -> None:
    """As if the instant had been computed with other zone data."""
    schedule, definitions = tables.schedule, tables.definitions
    with database.transaction() as connection:
        rows = connection.execute(
            schedule.select()
            .join(definitions, definitions.c.id == schedule.c.definition_id)
            .where(definitions.c.name == name)
        ).mappings()
        (row,) = rows
        moved = row["next_scheduled_for"] + by
        connection.execute(
            update(schedule)
            .where(schedule.c.definition_id == row["definition_id"])
            .values(next_scheduled_for=moved, next_fire_at=moved)
        )


def schedules(rows):
    return {row["definition_id"]: (row["next_scheduled_for"], row["next_fire_at"]) for row in rows.schedule}


def test_what_was_computed_otherwise_moves_to_where_it_is_now(apply, database, rows):
    apply(FILE + OTHERS)
    right = schedules(rows)
    for name in ("nightly", "interval", "greenwich"):
        move(database, name, HOUR)
    wrong = schedules(rows)

    page = recompute(database)

    assert (page.after, page.moved) == (None, 1)
    (moved,) = [id_ for id_, instants in schedules(rows).items() if instants != wrong[id_]]
    assert schedules(rows)[moved] == right[moved]
    assert recompute(database).moved == 0


def test_an_instant_that_has_fired_does_not_fire_again(apply, database, rows):
    """Fired by the old data an hour before the new data would have it."""
    apply(FILE)
    (schedule,) = rows.schedule
    past = rows.now() - timedelta(minutes=5)
    rows.make_due_since(past.replace(microsecond=0))
    with database.transaction() as connection:
        firing.fire(connection, lambda due, now: decide(due, now, lambda _: Declared()), limit=100, specs={})
    fired = rows.runs
    move(database, "nightly", -HOUR)

    recompute(database)

    assert rows.runs == fired
    assert rows.schedule[0]["next_scheduled_for"] == schedule["next_scheduled_for"]


def test_what_is_due_already_is_left_to_fire(apply, database, rows):
    apply(FILE)
    rows.make_due_since(rows.now() - HOUR)
    before = schedules(rows)

    assert recompute(database).moved == 0
    assert schedules(rows) == before


@on_either
def test_many_definitions_go_page_by_page(apply, database, rows, monkeypatch):
    monkeypatch.setattr(module, "PAGE", 2)
    apply(FILE + "".join(FILE[FILE.index("[[def") :].replace("nightly", f"n{n}") for n in range(4)))
    for name in ("nightly", *(f"n{n}" for n in range(4))):
        move(database, name, HOUR)

    moved, pages, page = 0, 0, recompute(database)
    while True:
        moved, pages = moved + page.moved, pages + 1
        if page.after is None:
            break
        page = recompute(database, after=page.after)

    assert (moved, pages) == (5, 3)


def test_the_release_is_remembered_and_told(database, rows, emitted):
    assert outdated(database, "2030a") is False
    assert outdated(database, "2030a") is False
    assert outdated(database, "2030b") is True

    recomputed(database, "2030b", moved=7)

    assert outdated(database, "2030b") is False
    with database.autocommit() as connection:
        assert schema.read(connection, schema.ZONE_DATA) == "2030b"
    (event,) = emitted
    assert (event.event.name, event.fields) == ("tzdata.changed", {"version": "2030b", "definitions": 7})
    (entry,) = [entry for entry in rows.audit if entry["action"] == "tzdata.change"]
    assert entry["detail"] == {"before": "2030a", "definitions": 7}


@pytest.mark.parametrize(
    ("name", "content", "version"),
    [("tzdata.zi", "# version 2031c\n# more", "2031c"), ("+VERSION", "2031d\n", "2031d")],
)
def test_the_release_is_the_one_of_the_files_in_use(tmp_path, monkeypatch, name, content, version):
    from worker.model.definitions import zones

    (tmp_path / "Europe").mkdir()
    (tmp_path / "Europe" / "Berlin").write_bytes(b"TZif2")
    monkeypatch.setattr(zones.zoneinfo, "TZPATH", (str(tmp_path / "none"), str(tmp_path)))
    unnamed = zones.zone_data_version()
    (tmp_path / name).write_text(content)

    assert zones.zone_data_version() == version
    assert unnamed.startswith("sha256:")
