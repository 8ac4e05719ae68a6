"""`operators`: a token that is printed once, and the entries of worker.toml beside the rows."""

from __future__ import annotations

from tests.fakes.cli import CommandLine


def test_an_operator_is_added_listed_and_removed(own_cli: CommandLine):
    added = own_cli("operators", "add", "ada", "--role", "operator", "-o", "json").json()
    again = own_cli("operators", "add", "ada", check=False)
    listed = own_cli("operators", "list", "-o", "json")
    removed = own_cli("operators", "remove", "ada", "-o", "json").json()
    missing = own_cli("operators", "remove", "ada", check=False)
    audited = own_cli("audit", "list", "-o", "json").json()

    assert (added["name"], added["role"]) == ("ada", "operator")
    assert added["token"].startswith("orgworker_op_")
    assert (again.code, "operators remove ada" in again.err) == (5, True)
    assert added["token"] not in listed.out
    [row] = listed.json()
    assert (row["name"], row["role"], row["source"]) == ("ada", "operator", "database")
    assert removed["name"] == "ada"
    assert missing.code == 3
    assert [row["action"] for row in audited[:2]] == ["operator.remove", "operator.add"]
    assert added["token"] not in str(audited)


def test_people_see_the_token_and_that_it_is_shown_once(cli: CommandLine):
    added = cli("operators", "add", "ben")

    assert "orgworker_op_" in added.out
    assert "cannot be shown again" in added.err
    assert cli("operators", "add", "bo:b", check=False).code == 2
    assert cli("operators", "add", "bob", "--role", "root", check=False).code == 2
    table = cli("operators", "list").out
    assert table.split("\n")[0].split() == ["name", "role", "source", "created_at", "created_by"]
