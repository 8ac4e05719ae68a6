"""`runs logs` and `runs show` for people: errors with their traces, requests, a log with nothing in it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import insert

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.site import definition
from worker.clock import SystemClock
from worker.ids import new_id
from worker.store import orgs, tables
from worker.store.database import Database

SITE = "/opt/lib/python3.13/site-packages"
TRACE = f"""Traceback (most recent call last):
  File "/home/kim/acme/jobs.py", line 10, in note
    await ctx.http.get(url)
  File "{SITE}/httpx/_client.py", line 1500, in get
    raise error
httpx.ConnectError: refused \x1b[2J
"""
ERROR = {"type": "httpx.ConnectError", "message": "refused \x1b[2J", "trace": TRACE}


@pytest.fixture
def failed(own_cli: CommandLine, migrated_url: str) -> str:
    """A run with two attempts: one that logged and failed, and one that failed without a word."""
    own_cli("orgs", "add", "org_a")
    own_cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "@yearly"))
    run: str = own_cli("definitions", "run", "org_a", "tick", "-o", "id").out.strip()
    database = Database.open(migrated_url, clock=SystemClock())
    with database.transaction() as connection:
        org_id, now = orgs.require(connection, "org_a")["id"], database.now(connection)
        ids = {"run_id": run, "org_id": org_id}
        for attempt in (1, 2):
            values = {
                "attempt": attempt,
                "worker_id": new_id(),
                "fencing_token": attempt,
                "handler": "acme.note",
                "started_at": now,
                "ended_at": now + timedelta(seconds=attempt),
                "outcome": "failed",
                "error": ERROR,
            }
            connection.execute(insert(tables.attempts).values(**ids, **values))
        for seq, text in enumerate(("hello\nworld", f"it failed\n{TRACE}"), start=1):
            line = {"attempt": 1, "seq": seq, "at": now, "level": "error", "source": "log", "text": text}
            connection.execute(insert(tables.run_logs).values(**ids, **line))
    database.close()
    return run


def test_each_attempt_ends_with_its_error_and_libraries_are_counted(failed: str, own_cli: CommandLine):
    printed = own_cli("runs", "logs", failed).out

    assert [line.partition("Z ")[2] or line for line in printed.splitlines()] == [
        "error   hello\\nworld",
        "error   it failed",
        "    Traceback (most recent call last):",
        '      File "/home/kim/acme/jobs.py", line 10, in note',
        "        await ctx.http.get(url)",
        "      … 1 frame of httpx",
        "    httpx.ConnectError: refused \\x1b[2J",
        *(
            line
            for attempt in (1, 2)
            for line in (
                f"attempt {attempt} failed:",
                "    Traceback (most recent call last):",
                '      File "/home/kim/acme/jobs.py", line 10, in note',
                "        await ctx.http.get(url)",
                "      … 1 frame of httpx",
                "    httpx.ConnectError: refused \\x1b[2J",
            )
        ),
    ]


def test_programs_get_the_lines_alone(failed: str, own_cli: CommandLine):
    rows = own_cli("runs", "logs", failed, "-o", "json").json()

    assert [row["seq"] for row in rows] == [1, 2]
    assert "site-packages" in rows[1]["text"]


@on_either
def test_a_run_is_shown_with_one_line_for_the_error_of_each_attempt(failed: str, own_cli: CommandLine):
    shown = own_cli("runs", "show", failed).out

    attempts = [line for line in shown.splitlines() if "failed" in line]
    assert len(attempts) == 2
    assert all(line.endswith("httpx.ConnectError: refused \\x1b[2J") for line in attempts)
    assert own_cli("runs", "show", failed, "-o", "json").json()["attempts"][0]["error"] == ERROR


def test_a_run_that_logged_nothing_is_said_to(cli: CommandLine):
    cli("orgs", "add", "org_a")
    cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "@yearly"))
    run = cli("definitions", "run", "org_a", "tick", "-o", "id").out.strip()

    done = cli("runs", "logs", run)

    assert (done.out, done.err) == ("", f"run {run} has logged nothing (waiting due)\n")
    assert cli("runs", "logs", run, "-o", "json").json() == []


@on_either
def test_a_run_is_shown_with_what_it_sent_and_how_long_it_waited(
    failed: str, own_cli: CommandLine, migrated_url: str
):
    assert own_cli("runs", "show", failed, "-o", "json").json()["egress"] == []
    assert "waited" not in own_cli("runs", "show", failed).out
    database = Database.open(migrated_url, clock=SystemClock())
    row = {
        "origin": "https://api.example.com", "requests": 3, "bytes_out": 1200, "bytes_in": 56000,
        "statuses": {"200": 2, "429": 1}, "denied": 0, "waited_seconds": 12.0,
    }  # fmt: skip
    with database.transaction() as connection:
        ids = {"run_id": failed, "org_id": orgs.require(connection, "org_a")["id"], "attempt": 1}
        connection.execute(insert(tables.run_egress).values(**ids, **row))
    database.close()

    shown = own_cli("runs", "show", failed).out

    (line,) = [line for line in shown.splitlines() if "https://api.example.com  " in line]
    assert "200: 2, 429: 1" in line
    assert "waited 12 s for https://api.example.com" in shown
    assert own_cli("runs", "show", failed, "-o", "json").json()["egress"] == [row]
