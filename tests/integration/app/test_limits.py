"""`limits`: as an operator types it."""

from __future__ import annotations

import json

import pytest

from tests.fakes.cli import CommandLine

pytestmark = pytest.mark.feature("egress")

FILE = """
[[limit]]
origin = "https://api.openai.com"
per = "org"
rate = "40/s"
"""


def test_a_limit_is_applied_listed_shown_and_removed(cli: CommandLine):
    applied = cli("apply", "-", "-o", "json", stdin=FILE)
    again = cli("apply", "-", stdin=FILE)

    assert json.loads(applied.out)[0]["name"] == "https://api.openai.com per org"
    assert "nothing changes" in again.out + again.err
    [row] = json.loads(cli("limits", "list", "-o", "json").out)
    assert (row["origin"], row["per"], row["rate"], row["burst"]) == (
        "https://api.openai.com",
        "org",
        "40/s",
        40,
    )
    shown = json.loads(cli("limits", "show", "https://api.openai.com/", "org", "-o", "json").out)
    assert (shown["max_wait"], shown["orgs"], shown["used"], shown["pauses"]) == ("10s", 0, [], [])
    assert "https://api.openai.com" in cli("limits", "show", "https://api.openai.com", "org").out

    cli("limits", "remove", "https://api.openai.com", "org")

    assert cli("limits", "list", "-o", "json").out.strip() == "[]"
    actions = [row["action"] for row in json.loads(cli("audit", "list", "-o", "json").out)]
    assert actions[:2] == ["limit.remove", "limit.add"]
