"""Definitions and runs from the command line: applied, previewed, run by hand, paged, cancelled, retried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.cli import CommandLine, Completed
from tests.fakes.plugins import make_plugin
from tests.fakes.site import definition

RUN_COLUMNS = {
    *("id", "org", "definition", "handler", "revision", "scheduled_for", "origin", "retry_of", "retried_as"),
    *("state", "reason", "detail", "available_at", "attempt", "fencing_token", "result_fencing_token"),
    *("worker", "started_at", "finished_at", "progress", "result", "error"),
}
SHOW_COLUMNS = RUN_COLUMNS | {"attempts", "checkpoint", "claims", "spec"}


@pytest.fixture(scope="module", autouse=True)
def _orgs(cli: CommandLine) -> None:
    cli("orgs", "add", "org_acme")
    cli("orgs", "add", "org_other")


def apply(cli: CommandLine, text: str, *options: str, check: bool = True) -> Completed:
    return cli("apply", "-", *options, stdin=text, check=check)


def applied(cli: CommandLine, name: str, **keys: Any) -> None:
    apply(cli, definition("org_acme", name, "acme.note", keys.pop("schedule", "@yearly"), **keys))


def run_of(cli: CommandLine, name: str, *options: str) -> dict[str, Any]:
    row: dict[str, Any] = cli("definitions", "run", "org_acme", name, *options, "-o", "json").json()
    return row


def test_apply_says_what_it_changes_and_the_same_file_again_nothing(cli: CommandLine):
    text = definition("org_acme", "changes", "acme.note", "@yearly")

    would = apply(cli, text, "--dry-run", "-o", "json").json()
    assert cli("definitions", "show", "org_acme", "changes", check=False).code == 3
    did = apply(cli, text, "-o", "json").json()
    again = apply(cli, text)

    assert would == did
    assert [(row["kind"], row["action"], row["org"], row["name"]) for row in did] == [
        ("definition", "add", "org_acme", "changes")
    ]
    assert again.out == ""
    assert again.err == "nothing changes\n"
    changed = apply(cli, definition("org_acme", "changes", "acme.note", "@monthly"))
    assert "schedule @yearly -> @monthly" in changed.out


def test_the_same_file_as_json_means_the_same(cli: CommandLine):
    entry = {"org": "org_acme", "name": "as-json", "handler": "acme.note", "schedule": "@yearly"}
    apply(cli, definition(entry["org"], entry["name"], entry["handler"], entry["schedule"]))

    again = cli("apply", "-", "-o", "json", stdin=json.dumps({"definition": [entry]}))

    assert again.json() == []


def test_prune_closes_what_the_file_no_longer_has(cli: CommandLine):
    keep = definition("org_other", "keep", "acme.note")
    apply(cli, keep + definition("org_other", "drop", "acme.note"))

    apply(cli, keep, "--prune")

    listed = cli("definitions", "list", "--org", "org_other", "-o", "json").json()
    closed = cli("definitions", "list", "--org", "org_other", "--state", "closed", "-o", "json").json()
    assert [row["name"] for row in listed] == ["keep"]
    assert [row["name"] for row in closed] == ["drop"]
    assert cli("definitions", "list", "--definition", "drop", "-o", "json").json() == []
    assert cli("definitions", "list", "--definition", "keep", "-o", "id").out.split() == [listed[0]["id"]]
    refused = cli("definitions", "run", "org_other", "drop", check=False)
    assert refused.code == 5


def test_an_unknown_handler_is_refused_unless_it_is_allowed(cli: CommandLine):
    unknown = definition("org_acme", "unknown", "acme.not-here")

    refused = apply(cli, unknown, "-o", "json", check=False)
    assert refused.code == 78
    assert json.loads(refused.err)["error"]["code"] == "unknown_handler"

    apply(cli, unknown, "--allow-unknown-handlers")
    assert cli("definitions", "show", "org_acme", "unknown", "-o", "json").json()["state"] == "active"


def test_a_definition_is_previewed_from_its_own_schedule_and_zone(cli: CommandLine):
    applied(cli, "nightly", schedule="0 3 * * *", timezone="Europe/Berlin")

    rows = cli(
        *("definitions", "next", "org_acme", "nightly", "-n", "3", "--from", "2030-07-01", "-o", "json")
    ).json()

    assert [row["scheduled_for"] for row in rows] == [f"2030-07-0{day}T01:00:00.000000Z" for day in (1, 2, 3)]
    assert rows[0]["local"] == "2030-07-01T03:00:00+02:00"
    cli("definitions", "pause", "org_acme", "nightly", "--note", "holidays")
    [paused] = cli("definitions", "next", "org_acme", "nightly", "-n", "1", "-o", "json").json()
    assert "paused" in paused["note"]
    shown = cli("definitions", "show", "org_acme", "nightly", "-o", "json").json()
    assert (shown["state"], shown["pause_note"], shown["next_scheduled_for"]) == ("paused", "holidays", None)
    resumed = cli("definitions", "resume", "org_acme", "nightly", "-o", "json").json()
    assert (resumed["state"], resumed["pause_note"]) == ("active", None)


def test_a_run_by_hand_is_printed_with_the_documented_columns(cli: CommandLine):
    applied(cli, "by-hand", params={"journal": "a"})

    run = run_of(cli, "by-hand", "--request-key", "K", "--param", "journal=b")

    assert set(run) >= RUN_COLUMNS
    assert (run["org"], run["definition"], run["handler"]) == ("org_acme", "by-hand", "acme.note")
    assert (run["origin"], run["state"], run["reason"]) == ("manual", "waiting", "due")
    assert run_of(cli, "by-hand", "--request-key", "K")["id"] == run["id"]
    shown = cli("runs", "show", run["id"], "-o", "json").json()
    assert set(shown) >= SHOW_COLUMNS
    assert shown["params"] == {"journal": "b"}
    assert shown["spec"]["params"] == {"journal": "a"}
    second = cli("definitions", "run", "org_acme", "by-hand", "-o", "json", check=False)
    assert second.code == 5
    assert run["id"] in json.loads(second.err)["error"]["message"]


def test_cancel_returns_at_once_and_an_ended_run_is_retried_as_a_new_one(cli: CommandLine):
    applied(cli, "ends")
    run = run_of(cli, "ends")

    early = cli("runs", "retry", run["id"], check=False)
    cancelled = cli("runs", "cancel", run["id"], "-o", "json").json()
    again = cli("runs", "cancel", run["id"], check=False)
    retried = cli("runs", "retry", run["id"], "-o", "json").json()

    assert early.code == 5
    assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "requested")
    assert again.code == 5
    assert (retried["origin"], retried["retry_of"], retried["state"]) == ("retry", run["id"], "waiting")
    assert retried["scheduled_for"] == run["scheduled_for"]
    assert cli("runs", "show", run["id"], "-o", "json").json()["state"] == "cancelled"


def test_handlers_are_listed_with_the_documented_columns(cli: CommandLine):
    rows = {row["name"]: row for row in cli("handlers", "list", "-o", "json").json()}

    assert set(rows["acme.note"]) >= {"name", "distribution", "version", "isolation", "scopes", "error"}
    assert rows["acme.inline"]["isolation"] == "inline"
    assert rows["http.request"]["distribution"] == "orgworker"
    shown = cli("handlers", "show", "http.request", "-o", "json").json()
    assert shown["params_schema"]["properties"]["url"]


def test_rules_that_only_the_run_checks_are_named_on_stderr(cli: CommandLine, plugins: Path):
    source = (
        "from pydantic import BaseModel, ConfigDict, Field\nfrom worker import job\n"
        "class Params(BaseModel):\n    model_config = ConfigDict(regex_engine='python-re')\n"
        "    mail: str = Field(pattern='^(?!root@)')\n"
        "@job('acme.open', params=Params)\ndef f(ctx): ...\n"
    )
    make_plugin(
        plugins, dist="acme-open", modules={"acme_open": source}, entry_points={"acme.open": "acme_open:f"}
    )

    shown = cli("handlers", "show", "acme.open", "-o", "json")

    assert shown.json()["params_schema"]["properties"]["mail"]["pattern"] == "^(?!root@)"
    assert shown.err.startswith(
        "params: /properties/mail/pattern is checked only by the run's own process: '^(?!root@)': look-around"
    )


def test_skips_are_an_empty_array_where_there_are_none(cli: CommandLine):
    assert cli("skips", "list", "--org", "org_acme", "-o", "json").json() == []


def test_a_state_is_shown_set_and_cleared(cli: CommandLine):
    applied(cli, "remembers")
    state = ("definitions", "state")
    assert cli(*state, "show", "org_acme", "remembers", "-o", "json").json() == {}

    text = cli(*state, "set", "org_acme", "remembers", "--data", '{"cursor": 5}').out
    assert "cursor" in text
    assert cli(*state, "show", "org_acme", "remembers", "-o", "json").json() == {"cursor": 5}
    assert cli(*state, "show", "org_acme", "remembers", "-o", "id").out == "remembers\n"
    assert cli(*state, "clear", "org_acme", "remembers", "-o", "json").json() == {}
    actions = [row["action"] for row in cli("audit", "list", "-o", "json").json()]
    assert actions[:2] == ["definition.clear_state", "definition.set_state"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("[1]", "the state is not a JSON object"),
        ("{", "--data is not JSON"),
        ('{"n": NaN}', "NaN is not JSON"),
    ],
)
def test_what_is_no_state_is_a_usage_error(cli: CommandLine, data: str, problem: str):
    applied(cli, "forgets")

    said = cli("definitions", "state", "set", "org_acme", "forgets", "--data", data, check=False)

    assert said.code == 2
    assert problem in said.err
