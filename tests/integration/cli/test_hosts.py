"""`hosts`: a token that is printed once, for a machine that runs handlers without the database."""

from __future__ import annotations

from tests.fakes.cli import CommandLine


def test_a_host_is_added_listed_and_removed(own_cli: CommandLine):
    added = own_cli("hosts", "add", "gpu1", "--pool", "eu-gpu", "-o", "json").json()
    again = own_cli("hosts", "add", "gpu1", "--pool", "us", check=False)
    listed = own_cli("hosts", "list", "-o", "json")
    removed = own_cli("hosts", "remove", "gpu1", "-o", "json").json()
    missing = own_cli("hosts", "remove", "gpu1", check=False)
    audited = own_cli("audit", "list", "-o", "json").json()

    assert (added["name"], added["pool"]) == ("gpu1", "eu-gpu")
    assert added["token"].startswith("orgworker_host_")
    assert (again.code, "hosts remove gpu1" in again.err) == (5, True)
    assert added["token"] not in listed.out
    [row] = listed.json()
    assert (row["name"], row["pool"], row["state"], row["worker"]) == ("gpu1", "eu-gpu", "absent", None)
    assert removed["name"] == "gpu1"
    assert missing.code == 3
    assert [row["action"] for row in audited[:2]] == ["host.remove", "host.add"]
    assert added["token"] not in str(audited)
    assert own_cli("hosts", "list", "-o", "json").json() == []


def test_people_see_the_token_and_that_it_is_shown_once(cli: CommandLine):
    added = cli("hosts", "add", "gpu1", "--pool", "eu-gpu")

    assert "orgworker_host_" in added.out
    assert "cannot be shown again" in added.err
    for name, pool in (("bo b", "eu"), ("-b", "eu"), ("ben", "Über"), ("ben", "")):
        assert cli("hosts", "add", "--pool", pool, "--", name, check=False).code == 2
    table = cli("hosts", "list").out
    assert table.split("\n")[0].split()[:4] == ["name", "pool", "state", "machine"]
