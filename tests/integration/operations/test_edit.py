"""Edit: some keys of one definition, settled first, and refused where somebody else was quicker."""

from __future__ import annotations

import pytest

from tests.fakes.closing import close_definition
from tests.fakes.site import definition, org_entry
from worker.errors import Conflict, DefinitionError, InvalidTrigger, NotFound
from worker.operations.definitions import edit_definition, pause_definition
from worker.operations.runs import run_now

FILE = org_entry("org_acme", tags=["pro"]) + definition(
    "org_acme", "digest", "acme.note", "every 10m", params={"text": "hello"}, spread="off", timeout="2h"
)


@pytest.fixture
def edit(apply, database):
    apply(FILE)

    def edit_keys(changes, **options):
        return edit_definition(database, "org_acme", "digest", changes, actor="tester", **options)

    return edit_keys


def test_the_keys_named_change_and_the_others_stay(edit, rows):
    row = edit({"schedule": "every 1h", "timeout": None, "params": {"text": "bye"}})

    assert row["revision"] == 2
    assert row["spec"] == {
        "handler": "acme.note",
        "params": {"text": "bye"},
        "schedule": "every 1h",
        "spread": "off",
    }
    (entry,) = [entry for entry in rows.audit if entry["action"] == "definition.change"]
    assert entry["detail"]["timeout"] == {"before": "2h", "after": None}


def test_an_unencrypted_origin_is_refused_unless_the_operator_allows_it(edit, rows):
    with pytest.raises(DefinitionError, match="api_origins: http://api.acme.com would carry") as refused:
        edit({"api_origins": ["http://api.acme.com"]})
    assert "[execution] insecure_origins" in refused.value.fix

    row = edit({"api_origins": ["http://api.acme.com"]}, insecure_origins=["http://api.acme.com"])

    assert row["spec"]["api_origins"] == ["http://api.acme.com"]


def test_whoever_read_an_older_revision_is_refused(edit, rows):
    edit({"priority": 1}, revision=1)

    with pytest.raises(Conflict, match="is now at revision 2, not 1"):
        edit({"priority": 2}, revision=1)

    assert edit({"priority": 2}, revision=2)["revision"] == 3


def test_the_same_values_change_nothing(edit, rows):
    before = rows.everything()

    edit({"timeout": "120m", "enabled": True}, revision=1)

    assert rows.everything() == before


def test_enabled_makes_no_revision_and_a_pause_stays(edit, database, rows):
    pause_definition(database, "org_acme", "digest", actor="tester", note="broken")

    row = edit({"enabled": False})

    assert (row["revision"], row["enabled"], row["pause_note"]) == (1, False, "broken")


def test_a_running_run_keeps_its_revision(edit, database, rows):
    run = run_now(database, "org_acme", "digest", actor="tester")
    rows.set_running(run["id"])

    edit({"params": {"text": "bye"}})

    assert rows.live_runs[0]["revision"] == 1


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"schedule": "0 99 * * *"}, InvalidTrigger, "schedule"),
        ({"tiemout": "2h"}, DefinitionError, "tiemout"),
        ({"params": {}}, DefinitionError, "params.text"),
        ({"handler": "acme.gone"}, DefinitionError, "handler"),
        ({"isolation": "inline"}, DefinitionError, "isolation"),
    ],
)
def test_what_apply_refuses_is_refused_with_its_key(edit, rows, changes, error, field):
    before = rows.everything()

    with pytest.raises(error) as refused:
        edit(changes)

    assert refused.value.field == field
    assert rows.everything() == before


def test_what_is_closed_or_of_a_template_cannot_be_edited(edit, apply, database):
    apply('[[template]]\nname = "export"\norgs = "all"\nhandler = "acme.plain"\nschedule = "@hourly"\n')
    with pytest.raises(Conflict, match="made by a template"):
        edit_definition(database, "org_acme", "export", {"priority": 1}, actor="tester")

    close_definition(database, "org_acme", "digest", actor="tester")
    with pytest.raises(Conflict, match="is closed"):
        edit({"priority": 1})
    with pytest.raises(NotFound):
        edit_definition(database, "org_acme", "other", {"priority": 1}, actor="tester")
