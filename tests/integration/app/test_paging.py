"""Every list is cut by --limit and goes on with --after, and none loses or repeats a row on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.site import definition

ORGS = ("org_a", "org_b", "org_c")


@pytest.fixture(scope="module")
def filled(cli: CommandLine) -> CommandLine:
    """Three rows and more of what can be listed, but of skips and backfills."""
    for org in ORGS:
        cli("orgs", "add", org)
        for generation in range(3):
            secret = f"secret-{org}-{generation}"
            cli(
                "credentials",
                "add",
                org,
                "--no-verify",
                "--client-id",
                org,
                "--secret-file",
                "-",
                stdin=secret,
            )
    names = [f"job-{n}" for n in range(3)]
    hourly = [definition("org_a", name, "acme.note", "@hourly", overlap="allow") for name in names]
    cli("apply", "-", stdin="".join(hourly))
    head = '[[template]]\nname = "{}"\norgs = {{ tags = ["none"] }}'
    template = head + '\nhandler = "acme.note"\nschedule = "@daily"\n'
    cli("apply", "-", stdin="".join(template.format(name) for name in names))
    for name in names:
        cli("definitions", "run", "org_a", name)
        cli(*("definitions", "backfill", "org_a", name), *("--from", "2026-01-01", "--until", "2026-01-02"))
    return cli


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("orgs list", "id"),
        ("credentials list", "id"),
        ("credentials list org_b", "id"),
        ("credentials list --org org_b --state active", "id"),
        ("definitions list --org org_a", "id"),
        ("definitions backfills", "id"),
        ("templates list", "id"),
        ("runs list --definition job-1", "id"),
        ("audit list --org org_a", "id"),
        ("handlers list", "name"),
    ],
)
def test_pages_of_one_are_the_whole_list(filled: CommandLine, command: str, key: str):
    whole = rows(filled, command)
    assert whole

    paged: list[Any] = []
    while page := rows(filled, command, "--limit", "1", *(["--after", paged[-1]] if paged else [])):
        assert len(page) == 1
        paged.append(page[0][key])

    assert paged == [row[key] for row in whole]
    assert filled(*command.split(), "-o", "id").out.split() == paged


@pytest.mark.parametrize(
    "command",
    [
        *(
            f"{noun} list"
            for noun in ("orgs", "credentials", "definitions", "templates", "runs", "skips", "audit")
        )
    ],
)
def test_since_leaves_out_what_is_older(filled: CommandLine, command: str):
    assert rows(filled, command, "--since", "2099-01-01") == []
    assert rows(filled, command, "--since", "1h") == rows(filled, command)


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "many"])
@pytest.mark.parametrize(
    "command",
    [
        *(f"{noun} list" for noun in ("orgs", "credentials", "definitions", "templates", "runs")),
        *("skips list", "audit list", "handlers list", "definitions backfills"),
    ],
)
def test_a_limit_lies_between_1_and_1000(filled: CommandLine, command: str, limit: str):
    refused = filled(*command.split(), "--limit", limit, "-o", "json", check=False)

    assert (refused.code, refused.out) == (2, "")
    assert json.loads(refused.err)["error"]["code"] == "usage"
    assert filled(*command.split(), "--limit", "1000").code == 0


def test_orgs_are_narrowed_to_one(filled: CommandLine):
    assert [row["code"] for row in rows(filled, "orgs list --org org_b")] == ["org_b"]


def test_a_page_of_handlers_never_ends_within_a_name(filled: CommandLine, monkeypatch: pytest.MonkeyPatch):
    """Two distributions may offer one name; --after goes on with the next name."""
    offered = [{"name": name, "distribution": f"d{n}"} for n, name in enumerate(("a", "b", "b", "c"))]
    keys = ("source", "pool", "version", "isolation", "scopes", "error")
    entries = [entry | dict.fromkeys(keys) for entry in offered]
    monkeypatch.setattr("worker.store.lists.handlers.listed", lambda *_, **__: entries)

    first = rows(filled, "handlers list", "--limit", "2")
    second = rows(filled, "handlers list", "--limit", "2", "--after", "a")

    assert [row["name"] for row in first] == ["a"]
    assert [row["name"] for row in second] == ["b", "b"]
    assert [row["name"] for row in rows(filled, "handlers list", "--after", "b")] == ["c"]


def rows(cli: CommandLine, command: str, *more: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cli(*command.split(), *more, "-o", "json").json()
    return found
