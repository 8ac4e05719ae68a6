"""`templates backfill`: one range for every org of a template."""

from __future__ import annotations

import pytest

from tests.conftest import on_either
from tests.fakes.cli import CommandLine

TEMPLATE = '[[template]]\nname = "{name}"\norgs = "all"\nhandler = "acme.note"\nschedule = "{schedule}"\n'
RANGE = ("--from", "2026-01-01", "--until", "2026-01-04")


@pytest.fixture
def site(own_cli: CommandLine) -> CommandLine:
    """Three orgs with two templates, of which one never fires in the range; one org is paused."""
    for code in ("org_a", "org_b", "org_c"):
        own_cli("orgs", "add", code)
    text = TEMPLATE.format(name="daily", schedule="@daily") + TEMPLATE.format(
        name="june", schedule="0 0 1 6 *"
    )
    own_cli("apply", "-", stdin=text)
    own_cli("orgs", "pause", "org_c")
    return own_cli


def backfills(site: CommandLine) -> list[tuple[str, str, int]]:
    rows = site("definitions", "backfills", "-o", "json").json()
    return sorted((row["org"], row["state"], row["instants"]) for row in rows)


def test_every_org_of_the_template_gets_the_range_once_and_what_is_left_is_named(site: CommandLine):
    planned = site("templates", "backfill", "daily", *RANGE, "--dry-run", "-o", "json", check=False)
    assert backfills(site) == []

    done = site("templates", "backfill", "daily", *RANGE, "-o", "json", check=False)

    for each, made in ((planned, 0), (done, 1)):
        assert each.code == 5
        rows = {row["org"]: row for row in each.json()}
        assert [(row["instants"], row["made"]) for row in rows.values()] == [(3, made), (3, made), (0, 0)]
        assert rows["org_a"]["left"] is None
        assert "org org_c is paused" in rows["org_c"]["left"]
    assert "6 scheduled times of 2 orgs run again" in done.err
    assert "1 of 3 orgs were left out: org_c: " in done.err
    assert backfills(site) == [("org_a", "running", 3), ("org_b", "running", 3)]

    site("orgs", "resume", "org_c")
    again = site("templates", "backfill", "daily", *RANGE)
    assert len(again.out.splitlines()) == 4
    assert [org for org, *_ in backfills(site)] == ["org_a", "org_b", "org_c"]


def test_a_range_is_cancelled_for_all_orgs(site: CommandLine):
    site("templates", "backfill", "daily", *RANGE, check=False)

    done = site("templates", "backfill", "daily", *RANGE, "--cancel", "-o", "json")

    assert [row["org"] for row in done.json()] == ["org_a", "org_b"]
    assert {state for _, state, _ in backfills(site)} == {"cancelled"}
    assert site("templates", "backfill", "daily", *RANGE, "--cancel", "-o", "json").json() == []


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("absent", *RANGE), 3, "there is no template absent"),
        (("daily", "--from", "2026-01-04", "--until", "2026-01-01"), 2, "the range is empty"),
        (("daily", "--from", "2026-01-01", "--until", "2999-01-01"), 2, "ends in the future"),
        (("daily", *RANGE, "--limit", "1001"), 2, "limit 1001"),
        (("daily", *RANGE, "--dry-run", "--cancel"), 2, "exclude each other"),
    ],
)
def test_a_wrong_call_changes_nothing(cli: CommandLine, arguments: tuple[str, ...], code: int, error: str):
    cli("apply", "-", stdin=TEMPLATE.format(name="daily", schedule="@daily"))

    done = cli("templates", "backfill", *arguments, check=False)

    assert (done.code, done.out) == (code, "")
    assert error in done.err


@on_either
def test_a_schedule_without_a_time_in_the_range_is_not_a_fault(site: CommandLine):
    done = site("templates", "backfill", "june", *RANGE, "-o", "json", check=False)

    assert [(row["instants"], row["left"]) for row in done.json()][:2] == [(0, None), (0, None)]


def test_one_definition_is_planned_before_it_runs_again(cli: CommandLine):
    cli("orgs", "add", "org_x")
    cli("apply", "-", stdin=TEMPLATE.format(name="daily", schedule="@daily"))

    planned = cli("definitions", "backfill", "org_x", "daily", *RANGE, "--dry-run", "-o", "json").json()

    assert (planned["instants"], planned["made"], planned["id"]) == (3, 0, None)
    assert (planned["first"], planned["last"]) == (
        "2026-01-01T00:00:00.000000Z",
        "2026-01-03T00:00:00.000000Z",
    )
    assert cli("definitions", "backfills", "-o", "json").json() == []
