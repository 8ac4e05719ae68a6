"""State by hand and the handlers that may have it; base URLs, as `apply` and an edit check them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.site import definition
from worker.errors import Conflict, DefinitionError, NotFound, UsageError
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.given import STATE_LIMIT
from worker.operations.definitions import clear_state, edit_definition, set_state
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import catalogue
from worker.store.lists import read as lists

ORG = """
[[org]]
code = "org_acme"
issuer = "main"
"""
NIGHTLY = definition("org_acme", "nightly", "acme.state", "@daily")
TEMPLATE = NIGHTLY.replace('definition]]\norg = "org_acme"', 'template]]\norgs = "all"')


@pytest.fixture(autouse=True)
def _handler(database):
    entry = HandlerEntry("acme.state", "acme-jobs", "1.0", "acme_jobs:state", state=True)
    with database.transaction() as connection:
        catalogue.put(connection, [entry], at=database.now(connection))


def shown(database) -> Any:
    with database.autocommit() as connection:
        return lists.state(connection, "org_acme", "nightly")


def test_a_state_is_set_replaced_and_cleared_with_audit_rows_that_have_no_values(apply, database, rows):
    apply(ORG + NIGHTLY)
    assert (shown(database)["data"], shown(database)["version"]) == ({}, 0)

    set_state(database, "org_acme", "nightly", {"token": "s3cret", "a": 1}, actor="ada")
    row = set_state(database, "org_acme", "nightly", {"cursor": 5}, actor="ada")
    assert (row["data"], row["version"], row["updated_by"], row["run"]) == ({"cursor": 5}, 2, "ada", None)
    assert row == shown(database)

    assert clear_state(database, "org_acme", "nightly", actor="ada")["data"] == {}
    clear_state(database, "org_acme", "nightly", actor="ada")
    told = [(row["action"], row["detail"]) for row in rows.audit if row["action"].endswith("_state")]
    assert told == [
        ("definition.set_state", {"keys": ["a", "token"], "bytes": 24}),
        ("definition.set_state", {"keys": ["cursor"], "bytes": 12}),
        ("definition.clear_state", {"keys": ["cursor"]}),
    ]


def test_it_is_left_alone_while_a_run_is_running(apply, database, rows):
    apply(ORG + NIGHTLY)
    run = run_now(database, "org_acme", "nightly", actor="ada")
    set_state(database, "org_acme", "nightly", {"n": 1}, actor="ada")  # it waits: it will load this
    rows.set_running(run["id"])

    for change in (
        lambda: set_state(database, "org_acme", "nightly", {}, actor="ada"),
        lambda: clear_state(database, "org_acme", "nightly", actor="ada"),
    ):
        with pytest.raises(Conflict, match=f"run {run['id']} of definition org_acme/nightly is running"):
            change()

    assert shown(database)["data"] == {"n": 1}
    rows.set_ended(run["id"])
    clear_state(database, "org_acme", "nightly", actor="ada")


@pytest.mark.parametrize("data", [{"text": "x" * STATE_LIMIT}, [1], {"n": float("inf")}])
def test_what_is_no_state_is_refused(apply, database, data):
    apply(ORG + NIGHTLY)

    with pytest.raises(UsageError, match="the state is"):
        set_state(database, "org_acme", "nightly", data, actor="ada")


def test_a_state_is_of_a_definition_that_there_is(apply, database):
    apply(ORG)

    with pytest.raises(NotFound):
        set_state(database, "org_acme", "nightly", {}, actor="ada")
    with pytest.raises(NotFound):
        shown(database)


def test_a_state_survives_a_revision_and_goes_with_the_org(apply, database, rows):
    apply(ORG + NIGHTLY)
    set_state(database, "org_acme", "nightly", {"n": 1}, actor="ada")
    edit_definition(database, "org_acme", "nightly", {"priority": 5}, actor="ada")
    assert shown(database)["data"] == {"n": 1}

    set_org_state(database, "org_acme", "removed", actor="ada")

    assert rows.definition_states == []
    (entry,) = [row for row in rows.audit if row["action"] == "org.remove"]
    assert entry["detail"]["states_cleared"] == 1


@pytest.mark.parametrize(
    "file",
    [
        NIGHTLY,
        TEMPLATE,
        NIGHTLY.replace("acme.state", "acme.plain")
        + 'variants = [{ flag = "v2", handler = "acme.state" }]\n',
    ],
)
def test_runs_at_the_same_time_cannot_have_a_state(apply, rows, file):
    with pytest.raises(DefinitionError, match="acme.state declares state") as refused:
        apply(ORG + file + 'overlap = "allow"')

    assert refused.value.field == "overlap"
    assert refused.value.fix == "choose skip, queue_one or replace"
    assert rows.orgs == []
    apply(ORG + file + 'overlap = "queue_one"')


BASE = 'api_base_url = "https://api.acme.com/v1"\n'
ORIGINS = {"main": ["https://api.acme.com"], "other": ["https://api.other.com"]}


@pytest.mark.parametrize("file", [NIGHTLY, TEMPLATE.replace('"all"', '{ issuer = "main" }')])
def test_a_base_url_is_of_an_origin_that_gets_the_token(apply, file):
    apply(ORG + file + BASE, api_origins=ORIGINS)
    apply(ORG + file + BASE + 'api_origins = ["https://api.acme.com:443"]', api_origins=ORIGINS)
    for origins, own in (({"main": []}, ""), (ORIGINS, 'api_origins = ["https://api.acme.com:444"]')):
        with pytest.raises(
            DefinitionError, match="api_base_url: its origin is not in api_origins"
        ) as refused:
            apply(ORG + file + BASE + own, api_origins=origins)
        assert refused.value.field == "api_base_url"


def test_a_template_for_orgs_of_several_issuers_needs_origins_of_its_own(apply):
    with pytest.raises(DefinitionError, match="not in api_origins"):
        apply(ORG + TEMPLATE + BASE, issuers=["main", "other"], api_origins=ORIGINS)

    own = 'api_origins = ["https://api.acme.com"]'
    apply(ORG + TEMPLATE + BASE + own, issuers=["main", "other"], api_origins=ORIGINS)


def test_an_edit_checks_the_base_url_too(apply, database):
    apply(ORG + NIGHTLY)
    changes = {"api_base_url": "https://api.acme.com"}

    with pytest.raises(DefinitionError, match="not in api_origins"):
        edit_definition(database, "org_acme", "nightly", changes, actor="ada", api_origins={"main": []})

    row = edit_definition(database, "org_acme", "nightly", changes, actor="ada", api_origins=ORIGINS)
    assert row["spec"]["api_base_url"] == "https://api.acme.com"
