"""Orgs and credentials from the command line: added, imported, stopped; no secret comes out again."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from tests.fakes.cli import CommandLine, Completed

SECRET = "Zq7-canary-secret-48151623"


def line(code: str, **more: object) -> str:
    client = {"client_id": f"m2m-{code}", "client_secret": SECRET}
    return json.dumps({"code": code, "name": code, "issuer": "main", **client, **more}) + "\n"


def test_an_org_added_is_shown_and_listed_with_the_documented_keys(cli: CommandLine):
    given = ("--name", "Eins", "--tag", "pro", "--timezone", "Europe/Berlin")
    added = cli("orgs", "add", "org_one", *given, "-o", "json").json()

    shown = cli("orgs", "show", "org_one", "-o", "json").json()
    assert shown == added
    assert (shown["code"], shown["name"], shown["issuer"]) == ("org_one", "Eins", "main")
    assert (shown["tags"], shown["timezone"], shown["max_concurrent_runs"]) == (["pro"], "Europe/Berlin", 10)
    assert shown["created_at"].endswith("Z")
    assert datetime.fromisoformat(shown["created_at"])
    rows = cli("orgs", "list", "-o", "json").json()
    assert shown["id"] in [row["id"] for row in rows]
    assert "org_one" in cli("orgs", "list").out


def test_an_import_is_all_or_nothing_and_says_nothing_of_the_secret(cli: CommandLine):
    bad = cli("orgs", "import", "-", stdin=line("org_in1") + line("org_in2", colour="red"), check=False)
    assert bad.code == 2
    assert "line 2" in bad.err and "colour" in bad.err
    assert SECRET not in bad.out + bad.err
    assert cli("orgs", "show", "org_in1", check=False).code == 3

    good = line("org_in1", tags=["pro"]) + "\n" + line("org_in2")
    for added in (2, 0):
        done = cli("orgs", "import", "-", "-o", "json", stdin=good).json()
        assert done == {"orgs_added": added, "orgs_changed": 0, "credentials_added": added}


def test_a_name_in_an_import_may_have_a_separator_of_lines(cli: CommandLine):
    text = line("org_separated").replace('"name": "org_separated"', '"name": "A\u2028B"')

    cli("orgs", "import", "-", stdin=text)

    assert cli("orgs", "show", "org_separated", "-o", "json").json()["name"] == "A\u2028B"


def test_a_generation_that_no_column_holds_is_refused(cli: CommandLine):
    cli("orgs", "import", "-", stdin=line("org_large"))

    assert cli("credentials", "retire", "org_large", "9" * 20, check=False).code == 2


def test_credentials_are_generations_and_their_secret_never_comes_out(cli: CommandLine, tmp_path: Path):
    cli("orgs", "import", "-", stdin=line("org_cred"))
    secret_file = tmp_path / "secret"
    secret_file.write_text(SECRET + "-new\n")

    given = ("--no-verify", "--client-id", "m2m-new", "--secret-file", str(secret_file))
    cli("credentials", "add", "org_cred", *given)
    listed = cli("credentials", "list", "org_cred", "-o", "json")
    retired = cli("credentials", "retire", "org_cred", "1", "-o", "json")
    again = cli("credentials", "retire", "org_cred", "1", check=False)
    absent = cli("credentials", "retire", "org_cred", "7", check=False)
    shown = cli("orgs", "show", "org_cred", "-o", "json")

    rows = listed.json()
    assert [(row["generation"], row["client_id"], row["state"]) for row in rows] == [
        (2, "m2m-new", "active"),
        (1, "m2m-org_cred", "active"),
    ]
    assert retired.json()["state"] == "retired"
    assert (again.code, absent.code) == (5, 3)
    assert SECRET not in "".join(each.out + each.err for each in (listed, retired, again, shown))
    assert SECRET.encode() not in cli.settings.with_name("worker.db").read_bytes()


def test_the_states_of_an_org_and_who_moved_it(cli: CommandLine):
    cli("orgs", "import", "-", stdin=line("org_state"))

    def move(verb: str) -> dict[str, object]:
        row: dict[str, object] = cli("orgs", verb, "org_state", "--note", "why", "-o", "json").json()
        return row

    assert move("pause")["state"] == "paused"
    assert move("suspend")["state"] == "suspended"
    resumed = move("resume")
    assert (resumed["state"], resumed["state_note"]) == ("active", "why")
    assert resumed["state_by"]
    assert move("remove")["state"] == "removed"
    assert cli("orgs", "resume", "org_state", check=False).code == 5
    assert cli("credentials", "list", "org_state", "--state", "active", "-o", "json").json() == []


def on_a_terminal(cli: CommandLine, answer: str, *arguments: str) -> Completed:
    """The command with a terminal as its standard input, where `answer` is typed."""
    terminal, given = pty.openpty()
    try:
        os.write(terminal, f"{answer}\n".encode())
        command = [sys.executable, "-m", "worker", "--config", str(cli.settings), *arguments]
        done = subprocess.run(command, stdin=given, capture_output=True, text=True, timeout=60)
    finally:
        os.close(terminal)
        os.close(given)
    return Completed(done.returncode, done.stdout, done.stderr)


def test_on_a_terminal_the_removal_of_an_org_is_asked_about(cli: CommandLine):
    cli("orgs", "add", "org_asked")

    refused = on_a_terminal(cli, "n", "orgs", "remove", "org_asked")
    assert (refused.code, refused.out) == (1, "")
    assert "destroy its secrets? [y/N]" in refused.err
    assert "nothing was changed" in refused.err
    assert cli("orgs", "show", "org_asked", "-o", "json").json()["state"] == "active"

    assert on_a_terminal(cli, "y", "orgs", "remove", "org_asked", "-o", "json").json()["state"] == "removed"


def test_it_is_not_asked_about_where_the_answer_is_given_or_nobody_is_there(cli: CommandLine):
    for org in ("org_said", "org_script"):
        cli("orgs", "add", org)

    said = on_a_terminal(cli, "", "orgs", "remove", "org_said", "--yes", "-o", "json")

    assert said.json()["state"] == "removed"
    assert cli("orgs", "remove", "org_script", "-o", "json").json()["state"] == "removed"
