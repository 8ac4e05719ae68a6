"""`doctor` as an operator and a program see it."""

from __future__ import annotations

import sqlite3

from tests.fakes.cli import CommandLine
from tests.fakes.site import definition


def test_doctor_exits_0_where_all_is_well(cli_on_either: CommandLine):
    done = cli_on_either("doctor", "-o", "json")

    assert done.code == 0
    assert [row["check"] for row in done.json()] == ["held_snapshots", "live_rows"]
    assert all(row["ok"] for row in done.json())


def test_doctor_exits_1_and_says_what_to_do_where_a_check_fails(cli: CommandLine):
    cli("orgs", "add", "org_a")
    cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 0 1 1 *"))
    run = cli("definitions", "run", "org_a", "tick", "-o", "json").json()
    with sqlite3.connect(cli.settings.parent / "worker.db") as connection:
        connection.execute("DELETE FROM live_runs")
    connection.close()

    done = cli("doctor", check=False)

    assert done.code == 1
    assert run["id"] in cli("doctor", "-o", "json", check=False).out
    assert "live_rows" in done.out
    assert "fix: live_rows: " in done.err
