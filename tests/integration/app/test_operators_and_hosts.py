"""`operators` and `hosts`: who has a token, which is printed once, as they are added, listed and removed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.cli import CommandLine


@pytest.mark.parametrize(
    ("noun", "options", "others", "token", "row"),
    [
        pytest.param(
            "operator",
            ["--role", "operator"],
            [],
            "orgworker_op_",
            {"role": "operator", "source": "database"},
            marks=pytest.mark.feature("console"),
        ),
        pytest.param(
            "host",
            ["--pool", "eu-gpu"],
            ["--pool", "us"],
            "orgworker_host_",
            {"pool": "eu-gpu", "state": "absent", "worker": None},
            marks=pytest.mark.feature("hosts"),
        ),
    ],
)
def test_one_is_added_listed_and_removed(
    own_cli: CommandLine, noun: str, options: list[str], others: list[str], token: str, row: dict[str, Any]
):
    added = own_cli(f"{noun}s", "add", "ada", *options, "-o", "json").json()
    again = own_cli(f"{noun}s", "add", "ada", *others, check=False)
    listed = own_cli(f"{noun}s", "list", "-o", "json")
    removed = own_cli(f"{noun}s", "remove", "ada", "-o", "json").json()
    missing = own_cli(f"{noun}s", "remove", "ada", check=False)
    audited = own_cli("audit", "list", "-o", "json").json()

    assert (added["name"], added[options[0][2:]]) == ("ada", options[1])
    assert added["token"].startswith(token)
    assert (again.code, f"{noun}s remove ada" in again.err) == (5, True)
    assert added["token"] not in listed.out
    [found] = listed.json()
    assert found["name"] == "ada" and row.items() <= found.items()
    assert removed["name"] == "ada"
    assert missing.code == 3
    assert [change["action"] for change in audited[:2]] == [f"{noun}.remove", f"{noun}.add"]
    assert added["token"] not in str(audited)
    assert "ada" not in own_cli(f"{noun}s", "list", "-o", "json").out


@pytest.mark.feature("console")
def test_people_see_the_token_of_an_operator_and_that_it_is_shown_once(cli: CommandLine):
    added = cli("operators", "add", "ben")

    assert "orgworker_op_" in added.out
    assert "cannot be shown again" in added.err
    assert cli("operators", "add", "bo:b", check=False).code == 2
    assert cli("operators", "add", "bob", "--role", "root", check=False).code == 2
    table = cli("operators", "list").out
    assert table.split("\n")[0].split() == ["name", "role", "source", "created_at", "created_by"]


@pytest.mark.feature("console")
def test_the_token_of_an_operators_mcp_client_is_shown_once(cli: CommandLine):
    cli("operators", "add", "cat")

    made = cli("operators", "mcp-token", "cat")
    again = cli("operators", "mcp-token", "cat", "-o", "json").json()
    removed = cli("operators", "mcp-token", "cat", "--remove", "-o", "json").json()

    assert "orgworker_mcp_" in made.out and "cannot be shown again" in made.err
    assert again["token"].startswith("orgworker_mcp_") and again["token"] not in made.out
    assert removed == {"name": "cat", "role": "viewer", "token": None}
    assert "orgworker_mcp_" not in cli("operators", "list").out + cli("audit", "list", "-o", "json").out
    assert cli("operators", "mcp-token", "nobody", check=False).code == 3


@pytest.mark.feature("hosts")
def test_people_see_the_token_of_a_host_and_that_it_is_shown_once(cli: CommandLine):
    added = cli("hosts", "add", "gpu1", "--pool", "eu-gpu")

    assert "orgworker_host_" in added.out
    assert "cannot be shown again" in added.err
    for name, pool in (("bo b", "eu"), ("-b", "eu"), ("ben", "Über"), ("ben", "")):
        assert cli("hosts", "add", "--pool", pool, "--", name, check=False).code == 2
    table = cli("hosts", "list").out
    assert table.split("\n")[0].split()[:4] == ["name", "pool", "state", "machine"]
