"""`pools approvals`, `pools approve` (docs/operating/hosts.md) and `handlers forget`: exit codes, output."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.stock import Stock
from tests.integration.operations.test_host_handlers import KEYED, RENDER, host_of
from worker.clock import SystemClock
from worker.store import catalogue
from worker.store.database import Database


@pytest.fixture
def stock(own_cli: CommandLine, migrated_url: str):
    """The database of the command line, with a host of pool eu."""
    database = Database.open(migrated_url, clock=SystemClock())
    made = Stock(database)
    host_of(made, "eu", RENDER, KEYED)
    yield made
    database.close()


@on_either
def test_approvals_are_listed_with_their_command_and_approved_once(
    own_cli: CommandLine, stock: Stock
) -> None:
    cli = own_cli
    [row] = cli("pools", "approvals", "-o", "json").json()
    table = cli("pools", "approvals", "eu")
    digest = cli("pools", "approvals", "-o", "id").out.strip()

    assert list(row)[:2] == ["pool", "handler"]
    columns = ("pool", "handler", "distribution", "digest", "secrets", "scopes", "egress", "audiences")
    columns += (
        "children",
        "timeout",
        "max_attempts",
        "max_concurrent",
        "approved",
        "approved_at",
        "approved_by",
        "hosts",
    )
    assert row.keys() >= set(columns)
    assert (row["secrets"], row["approved"], row["approved_at"]) == (["openai"], False, None)
    assert digest == row["digest"]
    assert table.out.split("\n")[0].split() == list(columns)
    assert f"approve: pools approve eu gpu.keyed {digest}" in table.err
    assert cli("pools", "approvals", "-o", "jsonl").out.count("\n") == 1

    for arguments, code in (
        (("us", "gpu.keyed", digest), 3),
        (("eu", "gpu.none", digest), 3),
        (("eu", "gpu.keyed", "1-0"), 5),
    ):
        failed = cli("pools", "approve", *arguments, check=False)
        assert failed.code == code, failed.err
    assert f"pools approve eu gpu.keyed {digest}" in failed.err
    assert cli("pools", "approvals", "us", check=False).code == 3
    given = cli("pools", "approve", "eu", "gpu.keyed", digest, "-o", "json").json()
    assert (given["digest"], given["secrets"], given["timeout"]) == (digest, ["openai"], "1h")
    [row] = cli("pools", "approvals", "-o", "json").json()
    assert (row["approved"], row["approved_by"] == given["approved_by"]) == (True, True)
    assert cli("audit", "list", "-o", "json").json()[0]["action"] == "pool.approve"
    assert cli("hosts", "list", "-o", "json").json()[0]["pending"] == []

    assert cli("pools", "revoke", "eu", "gpu.keyed", "-o", "id").out.strip() == digest
    assert cli("pools", "revoke", "eu", "gpu.keyed", check=False).code == 3
    assert [row["approved"] for row in cli("pools", "approvals", "-o", "json").json()] == [False]
    assert cli("audit", "list", "-o", "json").json()[0]["action"] == "pool.revoke"


@on_either
def test_check_and_doctor_name_what_waits_for_an_approval(own_cli: CommandLine, stock: Stock) -> None:
    for command in ("doctor", "check"):
        done = own_cli(command, check=False)
        assert "hosts of pool eu declare secrets, scopes for gpu.keyed" in done.out + done.err
        assert "`pools approve eu gpu.keyed 1-" in done.err


def test_a_host_controls_no_terminal(own_cli: CommandLine, stock: Stock) -> None:
    """Its texts are data: the command line prints no control character of them."""
    evil = "\x1b]0;owned\x07\x1b[2J"
    host_of(stock, "us", replace(KEYED, name=f"gpu.{evil}", distribution=evil, scopes=(evil,)))

    for command in (("pools", "approvals"), ("handlers", "list"), ("hosts", "list"), ("doctor",)):
        done = own_cli(*command, check=False)
        assert "\x1b" not in done.out + done.err, command


@on_either
def test_handlers_say_who_offers_them_and_are_forgotten(own_cli: CommandLine, stock: Stock) -> None:
    cli = own_cli
    stock.within(catalogue.put, [replace(RENDER, distribution="old-jobs")], at=stock.now())
    worker = stock.worker(handlers=["gpu.render"])

    rows = [row for row in cli("handlers", "list", "-o", "json").json() if row["name"].startswith("gpu")]
    assert [(row["name"], row["source"], row["pool"]) for row in rows] == [
        ("gpu.keyed", "host", "eu"),
        ("gpu.render", "worker", None),
        ("gpu.render", "host", "eu"),
    ]
    shown = cli("handlers", "show", "gpu.render")
    assert "old-jobs" in shown.out
    assert "also: gpu-jobs 1.0 on hosts of pool eu" in shown.err
    refused = cli("handlers", "forget", "gpu.render", check=False)
    assert (refused.code, "workers offer gpu.render" in refused.err) == (5, True)
    with stock.database.transaction() as connection:
        connection.exec_driver_sql(f"UPDATE workers SET ended_at = renewed_at WHERE id = '{worker}'")
    forgotten = cli("handlers", "forget", "gpu.render", "-o", "json").json()
    assert forgotten == {"name": "gpu.render", "distributions": ["old-jobs"]}
    assert cli("handlers", "forget", "gpu.render", check=False).code == 3
    assert cli("audit", "list", "-o", "json").json()[0]["action"] == "handler.forget"
    assert "gpu-jobs" in cli("handlers", "show", "gpu.render").out
