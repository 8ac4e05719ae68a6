"""A wrong name, command or option gets the closest right one; the exit code stays."""

from __future__ import annotations

import pytest

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from worker.errors import did_you_mean

TEMPLATE = '[[template]]\nname = "export"\norgs = "all"\nhandler = "acme.note"\nschedule = "@yearly"\n'


@pytest.fixture
def site(own_cli: CommandLine) -> CommandLine:
    for code in ("org_acme", "org_globex", "org_initech"):
        own_cli("orgs", "add", code)
    own_cli("orgs", "add", "org_0815", "--name", "Hooli Holdings")
    own_cli("apply", "-", stdin=TEMPLATE)
    return own_cli


@on_either
def test_a_wrong_name_gets_the_closest_right_one(site: CommandLine):
    for line, code, question in (
        ("orgs show org_acmee", 3, "did you mean org_acme? "),
        ("orgs show globex", 3, "did you mean org_globex? "),
        ("orgs show nothing-like-it", 3, None),
        ("orgs show Hooli", 3, "did you mean org_0815 (Hooli Holdings)? "),
        ("runs list --org org_intech", 3, "did you mean org_initech? "),
        ("definitions show org_acme exprot", 3, "did you mean export? "),
        ("definitions pause org_acem export", 3, "did you mean org_acme? "),
        ("templates show exports", 3, "did you mean export? "),
        ("templates close exports", 3, "did you mean export? "),
        ("handlers show acme.notes", 3, "did you mean acme.note"),
        ("try acme.ntoe", 3, "did you mean acme.note"),
        ("runs list --orgs x", 2, "Did you mean --org?"),
        ("runs lsit", 2, "Did you mean 'list'?"),
        ("rnus list", 2, "Did you mean 'runs'?"),
    ):
        done = site(*line.split(), check=False)
        assert done.code == code, line
        assert ("did you mean" in done.err.lower()) == (question is not None), (line, done.err)
        assert question is None or question in done.err, (line, done.err)


def test_a_word_that_all_names_share_is_close_to_none():
    many = [f"org_customer_{number}" for number in range(9)]
    assert did_you_mean("org", many) == ""
    assert did_you_mean("acme", ["org_acme", "org_acme_eu"]) == "did you mean org_acme or org_acme_eu?"
    assert did_you_mean("x", []) == ""
