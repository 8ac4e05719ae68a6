"""A file for `apply`: TOML and JSON say the same, and what is wrong is named."""

from __future__ import annotations

import json
import tomllib

import pytest

from worker.errors import DefinitionError, InvalidTrigger
from worker.model.definitions.fields import MAX_ERRORS
from worker.model.definitions.file import format_of, from_template_spec, parse_file, parse_template
from worker.model.orgs import OrgEntry, Selector

TOML = """
[[org]]
code = "org_acme"
name = "Acme"
issuer = "main"
max_concurrent_runs = 4
tags = ["pro"]

[[org]]
code = "org_beta"
issuer = "main"
timezone = "Europe/Berlin"

[[definition]]
org = "org_acme"
name = "nightly-digest"
handler = "acme.digest"
schedule = "0 3 * * *"
starts_at = 2027-01-01T00:00:00Z
params = { collection = "faq" }

[[template]]
name = "usage-export"
orgs = { tags = ["pro"] }
handler = "usage.export"
schedule = "@hourly"
enabled = false
"""
VALUES = {
    "name": "usage-export",
    "orgs": {"tags": ["pro"], "issuer": "main"},
    "handler": "usage.export",
    "schedule": "@hourly",
    "enabled": False,
}


def test_a_file_has_orgs_definitions_and_templates():
    file = parse_file(TOML)

    assert file.orgs == (
        OrgEntry("org_acme", "Acme", "main", max_concurrent_runs=4, tags=frozenset({"pro"})),
        OrgEntry("org_beta", "org_beta", "main", timezone="Europe/Berlin"),
    )
    (definition,) = file.definitions
    assert definition.params == {"collection": "faq"}
    (template,) = file.templates
    assert (template.name, template.selector) == ("usage-export", Selector(tags=frozenset({"pro"})))
    assert template.spec == {"handler": "usage.export", "schedule": "@hourly", "enabled": False}


def test_json_says_the_same_as_toml():
    values = tomllib.loads(TOML)

    assert parse_file(json.dumps(values, default=lambda at: at.isoformat()), "json") == parse_file(
        TOML.encode()
    )


def test_the_name_of_a_file_tells_its_format():
    assert [format_of(name) for name in ("a.json", "a.JSON", "a.toml", "-", "a")] == [
        "json",
        "json",
        *["toml"] * 3,
    ]


def test_an_empty_file_changes_nothing():
    assert parse_file("") == parse_file("{}", "json")


@pytest.mark.parametrize(
    ("text", "entry", "field"),
    [
        ("[[orgs]]\ncode = 'a'", "", "orgs"),
        ("[org]\ncode = 'a'", "", "org"),
        ("[[org]]\nname = 'a'\nissuer = 'main'", "org number 1", "code"),
        ("[[org]]\ncode = 'a'", "org a", "issuer"),
        ("[[org]]\ncode = 'a'\nissuer = 'main'\nweight = 0", "org a", "weight"),
        ("[[org]]\ncode = 'a'\nissuer = 'main'\ntimezone = 'Nowhere'", "org a", "timezone"),
        ("[[org]]\ncode = 'a'\nissuer = 'main'\nclient_secret = 'x'", "org a", "client_secret"),
        ("[[org]]\ncode='a'\nissuer='main'\n[[org]]\ncode='a'\nissuer='main'", "org a", "code"),
        ("[[definition]]\nname = 'n'", "definition number 1", "org"),
        ("[[definition]]\norg='a'\nname='n'\nhandler='h'\nschedule='@daily'\n" * 2, "definition a/n", "name"),
        ("[[template]]\nname='n'\nhandler='h'\nschedule='@daily'", "template n", "orgs"),
        ("[[template]]\nname='n'\norgs='some'\nhandler='h'\nschedule='@daily'", "template n", "orgs"),
        ("[[template]]\nname='n'\norg='a'\norgs='all'\nhandler='h'\nschedule='@daily'", "template n", "org"),
        ("[[template]]\nname='n'\norgs='all'\nhandler='h'\nschedule='@dayly'", "template n", "schedule"),
    ],
)
def test_what_is_wrong_is_named_by_entry_and_field(text, entry, field):
    with pytest.raises(DefinitionError) as refused:
        parse_file(text)

    assert (refused.value.entry, refused.value.field) == (entry, field)


def test_a_bad_schedule_in_a_file_is_an_invalid_trigger():
    with pytest.raises(InvalidTrigger):
        parse_file("[[definition]]\norg='a'\nname='n'\nhandler='h'\nschedule='whenever'")


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("[[org", "toml"),
        ("a = 1\na = 2", "toml"),
        (b"\xff\xfe", "toml"),
        ("{", "json"),
        ("[]", "json"),
        ('{"org": [], "org": []}', "json"),
    ],
)
def test_what_is_neither_toml_nor_json_is_refused(content, format):
    with pytest.raises(DefinitionError, match="the file is not valid"):
        parse_file(content, format)


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("a = " + "[" * 100_000, "toml"),
        ('{"a": ' + "[" * 100_000, "json"),
        ('{"a": ' + '{"a":' * 100_000, "json"),
    ],
)
def test_what_nests_too_deeply_to_be_read_is_refused(content, format):
    with pytest.raises(DefinitionError, match="the file nests too deeply to be read"):
        parse_file(content, format)


def test_a_refusal_does_not_repeat_a_secret_that_stands_beside_the_mistake():
    with pytest.raises(DefinitionError) as refused:
        parse_file("[[org]]\ncode = 'a'\nissuer = 'main'\nclient_secret = 'hush-hush'")

    assert "hush-hush" not in str(refused.value) + refused.value.fix


SEVERAL = """
[[org]]
code = "a"
weight = 0
colour = "red"

[[definition]]
org = "a"
name = "one"
handler = "acme.one"
schedule = "61 * * * *"
timeout = "soon"
overlap = "maybe"

[[definition]]
org = "a"
name = "two"
handler = "acme.two"
schedule = "@daily"

[[definition]]
name = "three"

[[calendar]]
name = "c"
ics = "absent.ics"

[[budget]]
meter = "runs"
"""


def test_all_errors_of_a_file_are_reported_at_once():
    with pytest.raises(DefinitionError) as refused:
        parse_file(SEVERAL)

    found = [(each.entry, each.field) for each in (refused.value, *refused.value.others)]
    assert found[:-2] == [
        ("org a", "colour"),
        ("org a", "issuer"),
        ("org a", "weight"),
        ("definition a/one", "timeout"),
        ("definition a/one", "overlap"),
        ("definition a/one", "schedule"),
        ("definition number 3", "org"),
        ("definition number 3", "handler"),
        ("definition number 3", "schedule"),
    ]
    assert [entry for entry, _ in found[-2:]] == ["budget number 1 (runs)", "calendar c"]


def test_a_file_with_thousands_of_errors_reports_the_first_few():
    wrong = "".join(
        f"[[definition]]\norg='a'\nname='n{n}'\nhandler='h'\nschedule='no'\n" for n in range(2000)
    )
    with pytest.raises(DefinitionError) as refused:
        parse_file(wrong)

    assert len(refused.value.others) == MAX_ERRORS - 1


def test_a_stored_template_reads_back():
    template = parse_template(VALUES, entry="template usage-export")
    selector, spec = json.loads(json.dumps([template.selector.as_json(), template.spec]))

    assert from_template_spec("usage-export", selector, spec) == template
