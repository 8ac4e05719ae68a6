"""The ceiling of a handler in a pool: what goes beyond it, and what a run's definition makes harmless."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Ceiling, Grant, allowed, clamped, digest, excess, may_run
from worker.model.definitions import MAX_ATTEMPTS, TIMEOUT

PLAIN = HandlerEntry("gpu.render", "gpu", "1", "gpu:render")
# A declaration that goes beyond the defaults in one key each.
BEYOND: dict[str, HandlerEntry] = {
    "secrets": replace(PLAIN, secrets=("openai",)),
    "scopes": replace(PLAIN, scopes=("admin:all",)),
    "timeout": replace(PLAIN, timeout="36500d"),
    "max_attempts": replace(PLAIN, max_attempts=2**31 - 1),
    "egress": replace(PLAIN, egress=("api", "https://api.openai.com")),
    "audiences": replace(PLAIN, audiences=("mcp",)),
}


def test_without_an_approval_the_defaults_are_the_ceiling():
    assert excess(Ceiling.of(PLAIN), allowed()) == frozenset()
    smaller = replace(PLAIN, timeout="1m", max_attempts=1, max_concurrent=1)
    assert excess(Ceiling.of(smaller), allowed()) == frozenset()


@pytest.mark.parametrize("key", BEYOND)
def test_what_a_host_asks_for_beyond_them_is_named_and_not_granted(key: str):
    asked = BEYOND[key]

    grant = Grant.of("eu", asked, None, None)

    assert grant.beyond == {key}
    assert grant.entry.secrets == grant.entry.scopes == grant.entry.audiences == ()
    assert grant.entry.egress == (("api",) if key == "egress" else None)
    granted = Ceiling.of(grant.entry)
    assert (granted.timeout, granted.max_attempts) == (TIMEOUT, MAX_ATTEMPTS)
    # The control: an approval of exactly that grants it.
    approved = Grant.of("eu", asked, None, Ceiling.of(asked))
    assert (approved.beyond, approved.entry) == (frozenset(), asked)


@pytest.mark.parametrize("key", BEYOND)
def test_an_approval_of_less_does_not_cover_it(key: str):
    more = {
        "secrets": replace(PLAIN, secrets=("openai", "stripe")),
        "scopes": replace(PLAIN, scopes=("admin:all", "read:kb")),
        "timeout": replace(PLAIN, timeout="36500d"),
        "max_attempts": replace(PLAIN, max_attempts=9),
        "egress": replace(PLAIN, egress=("https://api.openai.com", "public")),
        "audiences": replace(PLAIN, audiences=("mcp", "kb")),
    }[key]
    less = {
        "secrets": replace(PLAIN, secrets=("openai",)),
        "scopes": replace(PLAIN, scopes=("admin:all",)),
        "timeout": replace(PLAIN, timeout="2h"),
        "max_attempts": replace(PLAIN, max_attempts=8),
        "egress": replace(PLAIN, egress=("https://api.openai.com",)),
        "audiences": replace(PLAIN, audiences=("mcp",)),
    }[key]

    grant = Grant.of("eu", more, None, Ceiling.of(less))

    assert grant.beyond == {key}
    assert grant.entry == clamped(less, Ceiling.of(less))
    assert Grant.of("eu", less, None, Ceiling.of(more)).beyond == frozenset()


def test_concurrency_is_bounded_by_what_workers_or_an_approval_have():
    unlimited, two, five = (replace(PLAIN, max_concurrent=most) for most in (None, 2, 5))

    assert Grant.of("eu", unlimited, None, None).beyond == frozenset()
    assert Grant.of("eu", unlimited, two, None).beyond == {"max_concurrent"}
    assert Grant.of("eu", five, two, None).entry.max_concurrent == 2
    assert Grant.of("eu", five, two, Ceiling.of(five)).beyond == frozenset()
    assert Grant.of("eu", two, None, Ceiling.of(five)).entry.max_concurrent == 2


def test_a_handler_of_workers_is_as_they_declare_it():
    theirs = replace(PLAIN, version="2", scopes=("read:kb",), secrets=("openai",), timeout="5h")

    for mine in (PLAIN, replace(PLAIN, scopes=("read:kb",)), replace(theirs, version="666")):
        assert Grant.of("eu", mine, theirs, None) == Grant(theirs)
    more = Grant.of("eu", replace(theirs, scopes=("read:kb", "admin")), theirs, None)
    assert (more.beyond, more.entry.scopes) == ({"scopes"}, ("read:kb",))


def test_the_digest_is_of_pool_handler_and_content():
    of = Ceiling.of(BEYOND["secrets"])
    known = digest("eu", "gpu.render", of)

    assert known == digest("eu", "gpu.render", Ceiling(secrets=frozenset(["openai"])))
    assert known.startswith("1-")
    assert len(known) == 42
    others = {
        digest("us", "gpu.render", of),
        digest("eu", "gpu.other", of),
        *(digest("eu", "gpu.render", Ceiling.of(entry)) for key, entry in BEYOND.items() if key != "secrets"),
        digest("eu", "gpu.render", replace(of, max_concurrent=1)),
    }
    assert known not in others
    assert len(others) == 8


def test_order_and_repetition_of_names_change_no_digest():
    one = Ceiling.of(replace(PLAIN, scopes=("a", "b", "b"), timeout="60m"))
    two = Ceiling.of(replace(PLAIN, scopes=("b", "a")))

    assert digest("eu", "h", one) == digest("eu", "h", two)


def test_a_declaration_without_egress_has_the_digest_that_earlier_releases_print():
    assert digest("eu", "gpu.render", Ceiling.of(BEYOND["secrets"])) == (
        "1-5a5a5b6abd101cd34272e01c370cd1efad862e7c"
    )
    # To reach nothing is a declaration.
    listed = [replace(PLAIN, egress=egress) for egress in (None, (), ("api",))]
    assert len({digest("eu", "h", Ceiling.of(entry)) for entry in listed}) == 3


def test_a_host_that_declares_no_egress_gets_what_workers_list_or_what_is_approved():
    theirs, more = replace(PLAIN, egress=("api", "https://a.example")), ("https://b.example",)
    approved = Ceiling.of(replace(PLAIN, egress=more))

    assert Grant.of("eu", PLAIN, None, None) == Grant(PLAIN)
    assert Grant.of("eu", PLAIN, theirs, None) == Grant(theirs)
    assert Grant.of("eu", PLAIN, None, approved) == Grant(replace(PLAIN, egress=more))
    # Also if workers have the handler and list nothing themselves.
    assert Grant.of("eu", PLAIN, PLAIN, approved).entry.egress == more
    # And if it asks for what is not approved.
    assert Grant.of("eu", BEYOND["secrets"], None, approved).entry.egress == more
    # An approval of what declared nothing, or of an earlier release, lists nothing.
    assert Grant.of("eu", PLAIN, None, Ceiling.of(PLAIN)).entry.egress is None


def test_a_host_may_list_less_than_workers_do():
    theirs = replace(PLAIN, secrets=("openai",), egress=("api", "https://*.example.com"))

    granted = Grant.of("eu", replace(PLAIN, egress=("https://a.example.com",)), theirs, None)

    assert granted == Grant(replace(theirs, egress=("https://a.example.com",)))
    wider = Grant.of("eu", replace(PLAIN, egress=("public",)), theirs, None)
    assert (wider.beyond, wider.entry.egress) == ({"egress"}, ())


@pytest.mark.parametrize("egress", [("open",), ("public",), ("https://a.example",), ("api", "open")])
def test_a_list_beyond_the_api_needs_an_approval_where_workers_list_nothing(egress: tuple[str, ...]):
    """Under `network = "require"`, what lists nothing reaches only the API: a host cannot say otherwise."""
    declared = replace(PLAIN, egress=egress)

    assert Grant.of("eu", declared, None, None).beyond == {"egress"}
    assert Grant.of("eu", declared, PLAIN, None).beyond == {"egress"}
    assert Grant.of("eu", declared, replace(PLAIN, egress=("open",)), None).beyond == frozenset()


def test_an_approval_of_open_covers_every_list():
    approved = Ceiling.of(replace(PLAIN, egress=("open",)))

    assert excess(Ceiling.of(replace(PLAIN, egress=("https://a.example", "public"))), approved) == frozenset()


def test_a_definition_does_not_stand_in_for_an_approval_of_egress():
    own = {"egress": ["https://api.openai.com"], "audiences": ["mcp"]}

    for key in ("egress", "audiences"):
        assert not Grant.of("eu", BEYOND[key], None, None).may_run(own)


@pytest.mark.parametrize("ceiling", [Ceiling(), *map(Ceiling.of, BEYOND.values()), Ceiling(max_concurrent=0)])
def test_a_ceiling_is_stored_and_read_back(ceiling: Ceiling):
    assert Ceiling.from_json(ceiling.as_json()) == ceiling


def test_a_field_that_a_stored_ceiling_lacks_is_not_approved():
    stored = {"version": 1, "secrets": ["openai"]}

    approved = Ceiling.from_json(stored)

    assert approved == Ceiling(secrets=frozenset(["openai"]))
    assert Grant.of("eu", BEYOND["scopes"], None, approved).beyond == {"scopes"}
    assert Grant.of("eu", BEYOND["secrets"], None, approved).beyond == frozenset()


@pytest.mark.parametrize(
    ("beyond", "own", "may"),
    [
        ((), {}, True),
        (("scopes",), {}, False),
        (("scopes",), {"scopes": None}, False),
        (("scopes",), {"scopes": []}, True),
        (("scopes",), {"scopes": frozenset({"a"}), "timeout": None}, True),
        (("timeout", "scopes"), {"scopes": ["a"]}, False),
        (("timeout", "scopes"), {"scopes": ["a"], "timeout": timedelta(hours=9)}, True),
        (("max_attempts",), {"max_attempts": 1}, True),
        (("secrets",), {"scopes": [], "timeout": "1h", "max_attempts": 1}, False),
        (("max_concurrent",), {"max_concurrent": 1}, False),
    ],
)
def test_a_definition_that_sets_all_of_it_needs_no_approval(
    beyond: tuple[str, ...], own: dict[str, Any], may: bool
):
    assert may_run(beyond, own, scopes=("admin:all",)) is may


@pytest.mark.parametrize(
    ("beyond", "own", "may"),
    [
        (("scopes",), {"scopes": ["a"]}, False),
        (("scopes",), {"scopes": ["a", "b"]}, True),
        (("scopes",), {}, False),
        # It takes its limits from the definition's own handler.
        (("timeout", "max_attempts"), {}, True),
        (("secrets",), {"scopes": ["a", "b"]}, False),
    ],
)
def test_the_scopes_of_a_variant_must_be_the_definitions(
    beyond: tuple[str, ...], own: dict[str, Any], may: bool
):
    assert may_run(beyond, own, scopes=("a", "b"), is_variant=True) is may
