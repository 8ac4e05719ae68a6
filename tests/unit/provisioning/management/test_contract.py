"""Names of applications, rules of tags, secrets without repr, scopes of the management application."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.kinde.document import document
from worker.features.provisioning.management.contract import ApplicationName, OrgApplication, ProviderOrg
from worker.features.provisioning.management.kinde import SCOPES
from worker.model.provider import (
    mapped_tags,
    need_properties,
    parse_rule,
    parse_rules,
)
from worker.secret import Secret


@given(st.from_regex(r"[!-~]([ -~]{0,50}[!-~])?", fullmatch=True))
def test_a_name_carries_installation_key_and_org(org: str):
    name = ApplicationName("3f9a", "0193abcd-01", org)

    assert ApplicationName.parse(str(name)) == name
    assert str(name) == f"orgworker 3f9a 0193abcd-01 {org}"


@pytest.mark.parametrize(
    "text",
    ["", "orgworker", "Acme", "orgworker 3f9a 0193abcd", "orgworker 3F9A 0193abcd org_a",
     "xorgworker 3f9a 0193abcd org_a", "orgworker 3f9a 0193abcd org_a\n", "orgworker  3f9a 0193abcd org_a"],
)  # fmt: skip
def test_a_name_that_orgworker_did_not_give_is_none(text: str):
    assert ApplicationName.parse(text) is None


@pytest.mark.parametrize(
    "parts", [("", "0193", "org_a"), ("3f9a", "x y", "org_a"), ("3f9a", "0193", ""), ("3f9a", "0193", "a\nb")]
)
def test_parts_that_would_be_read_differently_make_no_name(parts: tuple[str, str, str]):
    with pytest.raises(ValueError, match="not a name"):
        ApplicationName(*parts)


def test_an_application_shows_no_secret():
    application = OrgApplication("org_a", "id", "client", Secret("canary-secret"), "name")

    assert "canary" not in f"{application!r}{application}{[application]}"


ACME = ProviderOrg("org_acme", "Acme", external_id="c-17", handle="acme", is_default=True)


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ("external_id", True),
        ("external_id=c-17", True),
        ("external_id=c-1", False),
        ("handle=acme", True),
        ("is_default", True),
        ("is_default=true", True),
        ("is_default=false", False),
        ("properties.plan=pro", True),
        ("properties.plan=Pro", False),
        ("properties.plan", True),
        ("properties.beta", True),
        ("properties.beta=true", True),
        ("properties.off", False),
        ("properties.off=false", True),
        ("properties.empty", False),
        ("properties.unknown", False),
        ("properties.formula=a=b", True),
    ],
)
def test_a_rule_matches_a_value_or_any_value(rule: str, matches: bool):
    properties = {"plan": "pro", "beta": True, "off": False, "empty": "", "formula": "a=b"}

    assert parse_rule("tag", rule).matches(ACME, properties) is matches


def test_only_tags_of_the_mapping_are_touched():
    rules = parse_rules({"pro": "properties.plan=pro", "known": "external_id"})
    before = frozenset({"pro", "by-hand"})

    assert mapped_tags(ACME, {"plan": "pro"}, rules, before) == {"pro", "known", "by-hand"}
    assert mapped_tags(ACME, {}, rules, before) == {"known", "by-hand"}
    assert mapped_tags(ACME, {}, (), before) == before


def test_only_rules_on_properties_need_them():
    assert need_properties(parse_rules({"pro": "properties.plan"}))
    assert not need_properties(parse_rules({"known": "external_id"}))


@pytest.mark.parametrize("rule", ["", "plan", "properties.", "external_id=", "properties.a b", "name=Acme"])
def test_a_rule_of_another_form_says_how_to_write_it(rule: str):
    with pytest.raises(ValueError, match="tag 'pro': write FIELD or FIELD=VALUE"):
        parse_rule("pro", rule)


def test_the_scopes_are_those_that_kinde_documents():
    """Each route's description names the scope that it needs."""
    described = {
        scope
        for item in document().content["paths"].values()
        for operation in item.values()
        if isinstance(operation, dict)
        for scope in SCOPES
        if f"<code>{scope}</code>" in operation.get("description", "")
    }

    assert described == set(SCOPES)
