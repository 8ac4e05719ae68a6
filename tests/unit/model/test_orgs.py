"""Org states and their moves; and selectors: which orgs a template means."""

from __future__ import annotations

from typing import get_args

import pytest

from worker.errors import DefinitionError
from worker.model.orgs import OrgState, Selector, may_move, parse_selector, selector_in_words
from worker.store.tables import ORG_STATES


def test_the_table_has_every_state():
    assert set(get_args(OrgState)) == set(ORG_STATES)


def test_removal_is_final():
    assert not any(may_move("removed", state) for state in ("active", "paused", "suspended"))
    assert may_move("removed", "removed")
    for state in ("active", "paused", "suspended"):
        assert all(may_move(state, to) for to in ORG_STATES)


@pytest.mark.parametrize(
    ("value", "matching"),
    [
        ("all", {"acme", "beta", "gamma"}),
        ({"tags": ["pro"]}, {"acme", "beta"}),
        ({"tags": ["pro", "eu"]}, {"acme"}),
        ({"issuer": "main"}, {"acme", "gamma"}),
        ({"issuer": "main", "tags": ["pro"]}, {"acme"}),
    ],
)
def test_a_selector_means_orgs_with_every_tag_and_that_issuer(value, matching):
    orgs = {"acme": (["pro", "eu"], "main"), "beta": (["pro"], "other"), "gamma": ([], "main")}
    selector = parse_selector(value)

    assert {
        code for code, (tags, issuer) in orgs.items() if selector.matches(tags=tags, issuer=issuer)
    } == matching
    assert parse_selector(selector.as_json()) == selector


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("some", "orgs"),
        ({}, "orgs"),
        ([], "orgs"),
        ({"tag": "pro"}, "orgs.tag"),
        ({"tags": "pro"}, "orgs.tags"),
        ({"tags": []}, "orgs.tags"),
        ({"tags": [1]}, "orgs.tags"),
        ({"issuer": ""}, "orgs.issuer"),
    ],
)
def test_what_selects_no_orgs_is_refused(value, field):
    with pytest.raises(DefinitionError) as refused:
        parse_selector(value, entry="template t")

    assert (refused.value.entry, refused.value.field) == ("template t", field)


def test_everything_is_selected_by_default():
    assert Selector().matches(tags=(), issuer="any")
    assert Selector().as_json() == "all"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("all", "all orgs"),
        ({"tags": ["pro"]}, "orgs with the tag pro"),
        ({"tags": ["c", "a", "b"]}, "orgs with the tags a, b and c"),
        ({"issuer": "main"}, "orgs of the issuer main"),
        ({"tags": ["pro"], "issuer": "main"}, "orgs with the tag pro of the issuer main"),
        ({"region": "eu"}, '{"region": "eu"}'),
        (None, "null"),
    ],
)
def test_a_selector_in_words(value, words):
    assert selector_in_words(value) == words
