"""The search language: what a text asks for, and what each mistake is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import UsageError
from worker.model import search
from worker.model.search import Query, parsed, pieces_of, words_of

# A Thursday.
NOW = datetime(2026, 11, 26, 9, 30, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


def at(*parts: int, zone=UTC) -> datetime:
    return datetime(*parts, tzinfo=zone).astimezone(UTC)


def test_the_example_of_the_console():
    text = 'org:acme state:failed,refused since:yesterday handler:kb.digest cause:"CRM answers"'

    assert parsed(text, now=NOW) == Query(
        org="acme",
        states=frozenset({"failed", "refused"}),
        since=at(2026, 11, 25),
        handler="kb.digest",
        cause="CRM answers",
    )


def test_bare_words_and_quoted_ones_are_words():
    assert parsed('acme  "west coast" 0192aaaa', now=NOW).words == ("acme", "west", "coast", "0192aaaa")
    assert parsed('"org:acme"', now=NOW).words == ("org:acme",)
    assert parsed("01a22a45-2bd0…c8fb 01A22A45..c8fb", now=NOW).words == (
        "01a22a45-2bd0…c8fb",
        "01A22A45..c8fb",
    )
    assert parsed("  ", now=NOW) == Query()


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("today", at(2026, 11, 26, zone=BERLIN)),
        ("yesterday", at(2026, 11, 25, zone=BERLIN)),
        ("monday", at(2026, 11, 23, zone=BERLIN)),
        ("Thursday", at(2026, 11, 26, zone=BERLIN)),
        ("friday", at(2026, 11, 20, zone=BERLIN)),
        ("2026-11-26", at(2026, 11, 26, zone=BERLIN)),
        ("2026-11-26T08:00", at(2026, 11, 26, 8, zone=BERLIN)),
        ("2026-11-26T08:00:00Z", at(2026, 11, 26, 8)),
        ("2h", NOW - timedelta(hours=2)),
    ],
)
def test_since_is_in_the_zone_of_who_asks(text, since):
    assert parsed(f"since:{text} until:{text}", now=NOW, zone=BERLIN) == Query(since=since, until=since)


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("hanlder:kb.digest", "no key hanlder:", "did you mean handler? "),
        ("state:faild", "'faild' is not a state", "did you mean failed? "),
        ("state:failed,", "'' is not a state", "one of "),
        ("reason:timedout", "'timedout' is not a reason", "did you mean timed_out? "),
        ("origin:cron", "'cron' is not an origin", "one of schedule, "),
        ("since:someday", "since: 'someday' is not a time", "yesterday"),
        ("state:failed state:refused", "state: twice", "once"),
        ("org:", "org: has no value", "code"),
        ('org:""', "org: has no value", "code"),
        ('cause:"CRM', "quote in the wrong place", 'cause:"CRM answers"'),
        ("a\0b", "not printable", "remove"),
        ("a" * 501, "more than 500", "less"),
        ("a b c d e f g h i", "more than 8 words", "fewer"),
    ],
)
def test_a_mistake_is_named_with_what_helps(text, message, fix):
    with pytest.raises(UsageError) as caught:
        parsed(text, now=NOW)

    assert message in caught.value.message
    assert fix in caught.value.fix


@given(st.text(max_size=60))
def test_any_text_is_a_query_or_a_usage_error(text):
    try:
        found = parsed(text, now=NOW)
    except UsageError:
        return
    assert isinstance(found, Query)


def test_words_are_compared_without_case_and_accents():
    assert words_of("org_Acme", "Müller & Söhne-West GmbH") == {
        *("org_acme", "org", "acme", "muller", "&", "sohne-west", "sohne", "west", "gmbh"),
    }
    assert search.folded("MÜLLER") == "muller"
    assert all(len(word) <= search.MAX_WORD for word in words_of("x" * 200))


def test_the_pieces_of_an_error_are_its_letters_and_digits():
    assert pieces_of("HTTP_503: Ärger mit „crm-sync“!") == ["http", "503", "arger", "mit", "crm", "sync"]
    assert pieces_of(" — ") == []
    assert [len(piece) for piece in pieces_of("x" * 200)] == [search.MAX_WORD]


TEXT = 'acme state:failed,refused since:1h cause:"CRM answers" "west coast"'


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("state", "failed", 'acme state:failed since:1h cause:"CRM answers" "west coast"'),
        ("state", "", 'acme since:1h cause:"CRM answers" "west coast"'),
        ("cause", "disk is full", 'acme state:failed,refused since:1h cause:"disk is full" "west coast"'),
        ("org", "org_acme", f"{TEXT} org:org_acme"),
        ("pool", "", TEXT),
    ],
)
def test_a_key_is_replaced_in_its_place_added_or_removed(key, value, text):
    assert search.with_term(TEXT, key, value) == text


def test_a_term_is_removed_and_the_rest_stays_as_it_is_written():
    left = [search.without(TEXT, term) for term in search.terms(TEXT)]

    assert left == [
        'state:failed,refused since:1h cause:"CRM answers" "west coast"',
        'acme since:1h cause:"CRM answers" "west coast"',
        'acme state:failed,refused cause:"CRM answers" "west coast"',
        'acme state:failed,refused since:1h "west coast"',
        'acme state:failed,refused since:1h cause:"CRM answers"',
    ]
    assert search.with_term('Org:x "org:y" org', "org", "z") == 'org:z "org:y" org'


PRINTABLE = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=30)


@given(PRINTABLE, st.sampled_from(["org", "handler", "definition", "cause", "pool", "worker"]))
def test_a_value_that_is_set_is_the_value_that_is_read(value, key):
    """Quotes become blanks, since the grammar has none within a value; nothing is left of some."""
    plain = value.replace('"', " ").strip()

    text = search.with_term(TEXT, key, value)

    read = parsed(text, now=NOW)
    assert (getattr(read, key), read.words) == (plain or None, ("acme", "west", "coast"))
    assert key == "cause" or read.cause == "CRM answers"
    assert search.with_term(text, key, "") == search.with_term(TEXT, key, "")


def test_a_revision_is_a_number_and_an_org_has_no_key_for_workers():
    assert parsed("definition:x revision:7 worker:build-7", now=NOW) == Query(
        definition="x", revision=7, worker="build-7"
    )
    for text, keys in (("revision:new", search.KEYS), ("worker:build-7", search.KEYS_OF_ORGS)):
        with pytest.raises(UsageError):
            parsed(text, now=NOW, keys=keys)
