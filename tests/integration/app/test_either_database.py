"""Every verb on SQLite and on PostgreSQL, one after the other as an operator would go."""

from __future__ import annotations

import json

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.site import definition

SECRET = "Zq7-canary-secret-48151623"


@on_either
def test_the_whole_command_line_works_on_either_database(own_cli: CommandLine):
    cli = own_cli
    printed: list[str] = []

    def given(*arguments: str, stdin: str = "") -> object:
        done = cli(*arguments, "-o", "json", stdin=stdin)
        printed.append(done.out + done.err)
        return done.json()

    entry = {"code": "org_b", "name": "B", "issuer": "main", "client_id": "b", "client_secret": SECRET}
    assert given("db", "check")
    assert given("orgs", "add", "org_a", "--tag", "pro")
    assert given("orgs", "import", "-", stdin=json.dumps(entry))
    assert given(
        "credentials", "add", "org_b", "--no-verify", "--client-id", "b", "--secret-file", "-", stdin=SECRET
    )
    assert len(cli("credentials", "list", "-o", "id").out.split()) == 2
    assert given("credentials", "retire", "org_b", "1")
    assert [row["code"] for row in given("orgs", "list")] == ["org_b", "org_a"]
    text = definition("org_b", "tick", "acme.note", "0 0 1 1 *")
    assert given("apply", "-", stdin=text)
    assert given("apply", "-", stdin=text) == []
    assert [row["name"] for row in given("definitions", "list", "--since", "1h")] == ["tick"]
    assert given("definitions", "show", "org_b", "tick")["spec"]["handler"] == "acme.note"
    assert len(given("definitions", "next", "org_b", "tick", "-n", "2")) == 2
    run = given("definitions", "run", "org_b", "tick")
    assert [row["id"] for row in given("runs", "list", "--state", "waiting", "--since", "1h")] == [run["id"]]
    assert given("runs", "logs", run["id"]) == []
    assert given("runs", "cancel", run["id"])["state"] == "cancelled"
    retried = given("runs", "retry", run["id"])
    assert given("runs", "show", retried["id"])["retry_of"] == run["id"]
    assert given("definitions", "pause", "org_b", "tick")["state"] == "paused"
    assert given("definitions", "resume", "org_b", "tick")["state"] == "active"
    assert given("orgs", "suspend", "org_b")["state"] == "suspended"
    assert given("runs", "show", retried["id"])["reason"] == "suspended"
    assert given("orgs", "resume", "org_b")["state"] == "active"
    assert given("orgs", "remove", "org_b")["state"] == "removed"
    assert given("skips", "list") == []
    assert "acme.note" in [row["name"] for row in given("handlers", "list")]
    assert SECRET not in "".join(printed)
